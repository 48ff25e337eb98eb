"""Training on two processes (gloo, on the CPU); `processes_worker.py` has what each one runs."""

import json
import os
import re
import shutil
from contextlib import suppress

import numpy as np
import processes_worker
import pytest
import torch
import yaml
from conftest import save_tiny, tiny_bridge
from processes import ended, start, two
from processes_worker import KINDS, RUN, TOKENS, Crash, crash, trained
from safetensors.torch import load_file
from test_training import config, state

from vpd_lens import load
from vpd_lens.data import token_batches
from vpd_lens.errors import ConfigError
from vpd_lens.storage import read
from vpd_lens.training.checkpoint import CheckpointRecord
from vpd_lens.training.distributed import ALONE, Processes

SECOND = Processes(rank=1, world=2)
STEPS = list(range(1, RUN["steps"] + 1))


def launched(test):
    """Mark a test of a job: all of them on one worker, where one server starts their processes."""
    return pytest.mark.slow(pytest.mark.xdist_group("processes")(test))


def case(function, folder):
    """Run a function of `processes_worker` in a job of two processes; its status and output."""
    return ended(start(two, function, folder=folder), folder)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@launched
def test_one_step_has_the_losses_and_gradients_of_the_global_batch(tmp_path):
    """Every scope, with micro-batches, sharded and not; the same draws for the same rows."""
    status, printed = case(processes_worker.same_step, tmp_path)
    assert status == 0, printed[-3000:]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of a job that ended with a death, and of the one that went on, with both."""
    folder = tmp_path_factory.mktemp("jobs")
    died = case(processes_worker.resume_then_die, folder)
    assert (folder / "dying").is_dir(), died[1][-3000:]
    shutil.copytree(folder / "dying", folder / "died")
    one_process(folder / "single", stop_at=4)
    went_on = case(processes_worker.go_on, folder)
    return folder, died, went_on


def one_process(folder, stop_at=None):
    """Train on this process alone, up to a step or to the end, from a checkpoint if any."""
    with suppress(Crash):
        return trained(folder, at=stop_at, do=crash, **KINDS["sequence"])


@launched
def test_a_dying_process_ends_the_job_and_its_checkpoint_goes_on(jobs):
    folder, (status, printed), went_on = jobs
    assert status != 0
    assert "Root Cause" in printed
    assert re.search(r"rank\s+: 1 .*\n.*exitcode\s+: -9", printed), printed[-3000:]
    (message,) = re.findall("ProcessError: (process 0 .*)", printed)
    assert "after step 6, is in dying/checkpoint" in message
    assert "--resume" in message
    # Resuming equals the run that nothing interrupted; the job itself compares the bits.
    assert went_on[0] == 0, went_on[1][-3000:]
    assert [line["step"] for line in metrics_of(folder / "dying")] == STEPS


@launched
def test_metrics_are_those_of_the_global_batch_and_every_process_has_them(jobs):
    folder, *_ = jobs
    for kind in KINDS:
        (own, _, metrics), (other, _, others) = (
            torch.load(folder / f"{kind}-whole" / f"process-{rank}.pt") for rank in (0, 1)
        )
        assert metrics == others
        assert metrics_of(folder / f"{kind}-whole")[-1] == {"step": metrics_step(kind), **metrics}
        assert all(map(torch.equal, own, other))
        saved = load(folder / f"{kind}-whole" / "decomposition", tiny_bridge())
        assert all(map(torch.equal, own, state(saved.vpd)))


def metrics_step(kind):
    return KINDS[kind].get("steps", RUN["steps"])


@launched
def test_a_checkpoint_holds_the_sources_of_all_rows(jobs):
    folder, *_ = jobs
    for kind, joined in (("sequence", torch.cat), ("batch", same)):
        tensors = load_file(folder / f"{kind}-whole" / "checkpoint" / "state.safetensors")
        own = [torch.load(folder / f"{kind}-whole" / f"process-{rank}.pt")[1] for rank in (0, 1)]
        for index, name in enumerate(("components", "delta")):
            expected = joined([leaves[index] for leaves in own])
            assert torch.equal(tensors[f"sources/{name}"], expected)
        assert not torch.equal(tensors["generator"], tensors["generator/1"])


def same(tensors):
    first, second = tensors
    assert torch.equal(first, second)
    return first


@launched
def test_another_number_of_processes_goes_on_with_the_same_run(jobs):
    """Two, then one, against two all along; one, then two, against one all along."""
    folder, *_ = jobs
    one_process(folder / "died")
    one_process(folder / "alone")
    pairs = (("died", "sequence-whole", 6), ("single", "alone", 3))
    for changed, unchanged, at in pairs:
        found, expected = metrics_of(folder / changed), metrics_of(folder / unchanged)
        assert [line["step"] for line in found] == STEPS
        assert [without_time(line) for line in found[:at]] == [
            without_time(line) for line in expected[:at]
        ]
        # The same parameters, rows and sources: only the random masks are others.
        for name in ("adversarial", "minimality", "faithfulness", "l0"):
            assert found[at][name] == pytest.approx(expected[at][name], rel=1e-5), name
        assert found[at]["stochastic"] != pytest.approx(expected[at]["stochastic"], rel=1e-5)
        for name in ("minimality", "faithfulness", "l0"):
            assert found[-1][name] == pytest.approx(expected[-1][name], rel=0.1), name


def without_time(line):
    return {name: value for name, value in line.items() if name != "seconds_per_step"}


@launched
def test_a_signal_to_one_process_stops_all_after_the_same_step(jobs):
    folder, *_ = jobs
    first, second = ((folder / "stopped" / f"process-{r}.txt").read_text() for r in (0, 1))
    assert first == second
    assert first.startswith("stopped by SIGTERM after step 4 of 10")
    assert read(folder / "stopped" / "checkpoint", CheckpointRecord).record.step == 4


@launched
def test_without_checkpoint_every_the_clock_says_when(jobs):
    folder, *_ = jobs
    assert read(folder / "clocked" / "checkpoint", CheckpointRecord).record.step == 3


@launched
def test_the_command_line_on_two_processes(tmp_path):
    save_tiny(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    training = config(steps=4, checkpoint_every=2, log_every=2).model_dump(mode="json")
    run = {
        "model": {"source": str(tmp_path / "model")},
        "data": "tokens.npy",
        "output": "out",
        "training": training,
        "evaluation": {"data": "tokens.npy", "n_batches": 1, "batch_size": 4, "pgd_steps": [2]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    status, printed = case(processes_worker.command, tmp_path)
    assert status == 0, printed[-3000:]
    assert printed.count("Decomposition: out/decomposition") == 1
    assert printed.count("step 4/4") == 1
    assert {"report.html", "report.json", "decomposition"} <= set(os.listdir(tmp_path / "out"))


def test_a_batch_that_cannot_be_shared_is_refused():
    assert ALONE.rows(7) == slice(None)
    assert SECOND.rows(8, 2) == slice(4, 8)
    with pytest.raises(ConfigError, match="multiple of 2 processes x 2 micro_batches"):
        SECOND.rows(6, 2)


def test_random_numbers_differ_between_processes_and_the_first_draws_those_of_a_single_one():
    def draws(processes, *arguments):
        generator = processes.generator(*arguments)
        return torch.rand(4, generator=generator)

    cpu = torch.device("cpu")
    plain = torch.rand(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draws(ALONE, 7, cpu), plain)
    assert torch.equal(draws(Processes(rank=0, world=2), 7, cpu), plain)
    others = [draws(SECOND, 7, cpu), draws(SECOND, 8, cpu), draws(SECOND, 7, cpu, 30)]
    others.append(draws(Processes(rank=2, world=3), 7, cpu))
    for index, one in enumerate([*others, plain]):
        assert all(not torch.equal(one, other) for other in [*others, plain][:index])
    assert torch.equal(draws(SECOND, 7, cpu), others[0])


def batches_of(kind):
    if kind == "rows":
        return TOKENS
    if kind == "stream":
        return TOKENS.flatten()
    if kind == "function":
        return lambda generator, n: torch.randint(0, 29, (n, 8), generator=generator)
    if kind == "documents":
        from datasets import Dataset

        return Dataset.from_dict({"tokens": TOKENS.tolist()})
    return [TOKENS[start : start + 8] for start in range(0, 64, 8)]


@pytest.mark.parametrize("kind", ["rows", "stream", "function", "documents", "iterable"])
def test_processes_share_the_rows_of_the_same_batches(kind):
    """Over an epoch border; a position of any number of processes is one of any other."""
    plan = {"model": tiny_bridge(), "batch_size": 8, "seq_len": 8, "seed": 3}
    shares = [Processes(rank=rank, world=4).rows(8) for rank in range(4)]
    alone = token_batches(batches_of(kind), **plan)
    many = [token_batches(batches_of(kind), **plan, rows=rows) for rows in shares]
    for _ in range(11):
        whole = next(alone).tokens
        assert torch.equal(torch.cat([next(own).tokens for own in many]), whole)
    assert all(own.state_dict() == alone.state_dict() for own in many)
    late = token_batches(batches_of(kind), **plan, rows=SECOND.rows(8))
    late.load_state_dict(many[3].state_dict())
    assert torch.equal(next(late).tokens, next(alone).tokens[4:])
