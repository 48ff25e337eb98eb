"""Runs that are resumed, repeated, continued or broken off: what is checked, and what is left."""

import dataclasses
import os
import shutil

import pytest
import torch
from conftest import tiny_bridge
from safetensors.torch import load_file
from test_saving import V01, v01_model
from test_training import checkpoint_of, config, fresh_stepper, state

import vpd_lens
from vpd_lens import VPDConfig, decompose, storage
from vpd_lens.decomposition.attach import attach
from vpd_lens.errors import (
    ArtefactError,
    AttachError,
    ConfigError,
    DataError,
    NonFiniteLossError,
    ProcessError,
)
from vpd_lens.training import sharding, train, trainer
from vpd_lens.training.checkpoint import Checkpoint, CheckpointRecord, save_checkpoint
from vpd_lens.training.distributed import ALONE
from vpd_lens.training.step import Stepper, warm_up_faithfulness

PROGRESS = {"step": 3, "trained_before": 0, "data": {}, "extra": {}}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 29, (64, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """A run of 8 steps whose last checkpoint is of step 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    model = tiny_bridge()
    original = storage.write

    def write(path, record, *rest):
        return original(path, record, *rest) if getattr(record, "step", 0) < 8 else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpd_lens.training.checkpoint.storage.write", write)
        train(model, tokens, config(checkpoint_every=2), output=folder, progress=False)
    model.vpd.save(folder / "decomposition")
    return folder, model


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def resume(folder, tokens, model=None, **changes):
    model = model or tiny_bridge()
    options = {"output": folder, "resume": True, "progress": False}
    train(model, tokens, config(checkpoint_every=2, **changes), **options)
    return model


def rewritten(folder, change):
    """The checkpoint with other tensors or another record, and with checksums that fit."""
    artefact = storage.read(folder / "checkpoint", CheckpointRecord)
    tensors = {name: tensor.clone() for name, tensor in artefact.tensors("state").items()}
    record = change(tensors) or artefact.record
    storage.write(folder / "checkpoint", record, {"state": tensors})


def test_a_run_is_resumed_bit_identically(run, finished, tokens):
    assert checkpoint_of(run).step == 6
    assert all(map(torch.equal, state(resume(run, tokens).vpd), state(finished[1].vpd)))


def test_generators_of_another_kind_of_device_begin_anew(run, finished, tokens):
    """B5: a CUDA generator's state has 16 bytes, a CPU one's thousands."""
    rewritten(run, lambda tensors: tensors.update(generator=torch.zeros(16, dtype=torch.uint8)))
    stepper = fresh_stepper({"checkpoint_every": 2})
    found = Checkpoint.open(run / "checkpoint", stepper)
    found.restore(stepper)
    expected = ALONE.generator(0, stepper.device, 6).get_state()
    assert torch.equal(stepper.generator.get_state(), expected)
    for name, tensor in stepper.vpd.importance.state_dict().items():
        assert torch.equal(tensor, found.tensors[f"importance/{name}"])
    model = resume(run, tokens)
    assert model.vpd.trained_steps == 8
    for one, other in zip(state(model.vpd), state(finished[1].vpd), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)


def without(name):
    return lambda tensors: tensors.__delitem__(name)


def reshaped(name):
    return lambda tensors: tensors.update({name: torch.zeros(3)})


@pytest.mark.parametrize(
    "change",
    [
        without("subcomponents/blocks.0.attn.q.V"),
        without("generator"),
        without("sources/components"),
        without("sources/delta"),
        without("optimiser/0/0/step"),
        without("adversary/0/exp_avg"),
        reshaped("subcomponents/blocks.1.mlp.out.U"),
        reshaped("optimiser/0/3/exp_avg"),
        reshaped("adversary/1/exp_avg_sq"),
        reshaped("sources/delta"),
        reshaped("importance/unknown"),
        lambda tensors: tensors.update(window=torch.zeros(1, 5)),
    ],
)
def test_nothing_is_changed_unless_every_tensor_fits(run, change):
    """B5, the second half: everything is checked before anything is overwritten."""
    rewritten(run, change)
    stepper = fresh_stepper({"checkpoint_every": 2})
    before = state(stepper.vpd)
    with pytest.raises(ArtefactError, match="do not fit its record"):
        Checkpoint.open(run / "checkpoint", stepper)
    assert all(map(torch.equal, before, state(stepper.vpd)))
    assert not stepper.optimisers[0].state


def test_a_position_in_other_data_changes_nothing(run, tokens):
    model = attach(tiny_bridge(), n_subcomponents=12, importance=config().importance)
    before = state(model.vpd)
    with pytest.raises((DataError, ArtefactError)):
        resume(run, tokens[:32], model)
    assert all(map(torch.equal, before, state(model.vpd)))


def test_a_damaged_checkpoint_is_explained(run, tokens):
    """B12: not a KeyError."""
    file = run / "checkpoint" / storage.RECORD
    file.write_text(file.read_text().replace('"sha256"', '"sha255"'))
    with pytest.raises(ArtefactError, match=r"record\.json"):
        resume(run, tokens)


def test_a_checkpoint_of_version_0_1_is_resumed(tmp_path):
    for missing in ("sha256", "config", "step", "data"):
        folder = shutil.copytree(V01 / "run" / "checkpoint", tmp_path / missing)
        content = storage.read_json(folder / "checkpoint.json")
        del content[missing]
        storage.write_json(folder / "checkpoint.json", content)
        with pytest.raises(ArtefactError, match=missing):
            storage.read(folder, CheckpointRecord)
    record = storage.read(V01 / "run", CheckpointRecord).record
    assert (record.step, record.trained_before) == (4, 0)
    model = attach(v01_model(), n_subcomponents=5, importance=record.config.importance)
    stepper = Stepper(model.vpd, record.config)
    Checkpoint.open(V01 / "run" / "checkpoint", stepper).restore(stepper)
    saved = load_file(V01 / "run" / "checkpoint" / "state.safetensors")
    assert torch.equal(model.vpd.v("blocks.0.attn.q"), saved["subcomponents/blocks.0.attn.q.V"])
    assert torch.equal(stepper.generator.get_state(), saved["generator"])
    batch = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))
    losses, _ = stepper.step(batch, 4)
    assert torch.isfinite(losses["total"])


def test_saving_makes_no_second_copy(tmp_path, monkeypatch):
    """B18: what is on the CPU is written from where it is."""
    stepper = fresh_stepper()
    written = {}
    monkeypatch.setattr(storage, "save_file", lambda tensors, path: written.update(tensors))
    save_checkpoint(tmp_path / "checkpoint", stepper, **PROGRESS)
    for name, parameter in stepper.vpd.importance.named_parameters():
        assert written[f"importance/{name}"].data_ptr() == parameter.data_ptr()


def test_a_full_disk_keeps_the_previous_checkpoint(run, monkeypatch):
    before = {f.name: f.read_bytes() for f in (run / "checkpoint").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        save_checkpoint(run / "checkpoint", fresh_stepper(), **PROGRESS)
    assert before == {f.name: f.read_bytes() for f in (run / "checkpoint").iterdir()}
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_trained_steps_add_up(run, tokens, tmp_path, monkeypatch):
    """B13: 8 steps and 2 more are 10, also where the second run is resumed."""
    model = resume(run, tokens)
    assert model.vpd.trained_steps == 8
    warmed = []
    monkeypatch.setattr(trainer, "warm_up_faithfulness", lambda stepper: warmed.append(1))
    monkeypatch.setattr(trainer, "align", lambda *_: warmed.append(1))
    before = state(model.vpd)
    short = config(steps=2, optimiser={"lr": 1e-9, "importance_lr": 1e-9}, log_every=1)
    short = short.replaced({"initialisation": "aligned", "checkpoint_every": 1})
    train(model, tokens, short, output=tmp_path / "b", progress=False)
    assert not warmed  # neither aligned nor warmed up again
    for one, other in zip(before, state(model.vpd), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert model.vpd.trained_steps == 10
    assert checkpoint_of(tmp_path / "b").trained_before == 8
    assert vpd_lens.load(tmp_path / "b", tiny_bridge()).vpd.trained_steps == 10
    again = tiny_bridge()
    train(again, tokens, short, output=tmp_path / "b", resume=True, progress=False)
    assert again.vpd.trained_steps == 10


def killed(folder, tokens):
    """A run that dies in its second step: no checkpoint, nothing tidied up."""
    batches = iter(tokens.split(4))

    def data():
        yield next(batches)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_bridge(), data(), config(log_every=1), output=folder, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_checkpoint_starts_over(tokens, tmp_path, resume, capsys):
    folder = tmp_path / "run"
    killed(folder, tokens)
    model = tiny_bridge()
    train(model, tokens, config(log_every=1), output=folder, resume=resume)
    assert "holds a run without a checkpoint; it starts over" in " ".join(
        capsys.readouterr().out.split()
    )
    straight = tiny_bridge()
    train(straight, tokens, config(log_every=1), output=tmp_path / "straight", progress=False)
    assert all(map(torch.equal, state(model.vpd), state(straight.vpd)))
    assert (folder / "metrics.jsonl").read_text().count("\n") == 8


def test_what_cannot_be_started_or_resumed_is_said(run, tokens, tmp_path):
    options = {"progress": False, "config": config()}
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny_bridge(), tokens, output=run, **options)
    shutil.rmtree(run / "checkpoint")
    for again in (False, True):
        with pytest.raises(ConfigError, match="the result of a run whose checkpoint is gone"):
            train(tiny_bridge(), tokens, output=run, resume=again, **options)
    with pytest.raises(ConfigError, match=r"resume=True, but output=.*nowhere' holds no run"):
        train(tiny_bridge(), tokens, output=tmp_path / "nowhere", resume=True, **options)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("preset", [VPDConfig, *map(VPDConfig.__dict__.get, ("paper", "small"))])
def test_every_preset_checkpoints_by_the_clock(preset):
    make = preset.__get__(None, VPDConfig) if isinstance(preset, classmethod) else preset
    assert make().checkpoint_every == 0
    assert trainer.CHECKPOINT_SECONDS == 300


def test_the_clock_says_when_also_for_one_process(tokens, tmp_path, monkeypatch):
    seconds = iter(range(0, 10_000, 101))  # every reading of the clock is 101 s later
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(seconds)))
    saved = []

    def save(path, stepper, *, step, **rest):
        saved.append(step)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    train(tiny_bridge(), tokens, config(), output=tmp_path / "run", progress=False)
    # A save takes 101 s, a twentieth of 2020: the next one is due only after so long.
    assert saved == [3, 8]


class Broken:
    """Data that fails before it gives anything."""

    def __iter__(self):
        raise OSError("the network is gone")
        yield


@pytest.mark.parametrize("data", ["/no/such/corpus.npy", Broken(), torch.zeros(2, 8).long()])
def test_a_failed_decompose_leaves_the_model_as_it_was(tokens, tmp_path, data):
    """In a notebook the corrected cell is simply run again."""
    model = tiny_bridge()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    forward = model.forward
    with pytest.raises(Exception, match=r"corpus|network|2|rows"):
        decompose(model, data, config(), output=tmp_path / "a", progress=False)
    assert "vpd" not in model.__dict__
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.forward == forward
    with pytest.raises(DataError):
        train(model, "/no/such/corpus.npy", config(), output=tmp_path / "b", progress=False)
    assert "vpd" not in model.__dict__  # `train` attaches, too
    decompose(model, tokens, config(steps=1), output=tmp_path / "a", progress=False)
    with pytest.raises(AttachError, match="decomposed already"):
        decompose(model, tokens, config(), output=tmp_path / "c", progress=False)
    assert model.vpd.trained_steps == 1


def test_what_has_been_trained_stays_after_a_failure(tokens, tmp_path):
    model = tiny_bridge()

    def data():
        yield from tokens[:12].split(4)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decompose(model, data(), config(), output=tmp_path / "a", progress=False)
    assert model.vpd.trained_steps == 3
    mine = attach(tiny_bridge(), n_subcomponents=12)  # not attached by the call that fails
    with pytest.raises(DataError):
        train(mine, "/no/such/corpus.npy", config(), output=tmp_path / "b", progress=False)
    assert mine.vpd.trained_steps == 0


def test_an_unusable_output_is_an_error_of_the_library(tokens, tmp_path):
    model = tiny_bridge()
    with pytest.raises(ArtefactError, match="cannot be written"):
        decompose(model, tokens, config(), output=tmp_path / ("x" * 300), progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"):
        decompose(model, tokens, config(), output=tmp_path / "file" / "run", progress=False)
    assert "vpd" not in model.__dict__


@dataclasses.dataclass(frozen=True)
class Two(type(ALONE)):
    """Two processes of which only this one is there, to see what an error leaves."""

    together: bool = True

    def all_here(self, seconds=10.0):
        return self.together


@pytest.mark.parametrize("error", [NonFiniteLossError, ProcessError, KeyboardInterrupt])
@pytest.mark.parametrize("together", [True, False])
def test_a_sharded_importance_function_is_put_back_after_an_error(monkeypatch, error, together):
    """B26; unless the others are gone, with whom the shards would have to be gathered."""
    monkeypatch.setattr(sharding, "_shard", lambda *_: None)
    vpd = attach(tiny_bridge(), n_subcomponents=4).vpd
    expected, module, processes = state(vpd), vpd.importance, Two(world=2, together=together)
    with pytest.raises(error), sharding.sharded_importance(vpd, processes, True):
        raise error("x")
    restored = together and error is not ProcessError
    assert (vpd.importance is not module) == restored
    assert all(map(torch.equal, expected, state(vpd)))


def test_the_process_group_is_closed_after_an_error(tokens, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(type(ALONE), "close", lambda self: closed.append(1))
    with pytest.raises(DataError):
        train(tiny_bridge(), "/no/such/corpus.npy", config(), output=tmp_path / "a", progress=False)
    assert closed == [1]


def test_warm_up_is_there_to_be_asked_for():
    stepper = fresh_stepper()
    assert warm_up_faithfulness(stepper) > 0


def test_a_full_disk_ends_a_run_with_an_error_of_the_library(tokens, small_disk):
    model, folder = tiny_bridge(), small_disk / "run"
    with pytest.raises(ArtefactError, match="checkpoint: cannot be written"):
        train(model, tokens, config(steps=2), output=folder, progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert model.vpd.trained_steps == 2
    os.system(f"mount -o remount,ro {small_disk}")
    with pytest.raises(ArtefactError, match=r"Read-only"):
        train(tiny_bridge(), tokens, config(steps=2), output=small_disk / "new", progress=False)
