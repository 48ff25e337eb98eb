"""Saved decompositions: exact round trip, and refusal of what is damaged, foreign or newer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_bridge
from safetensors.torch import load_file

from vpd_lens import CausalImportanceConfig, load, storage
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.folding import Columns, fold
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import ArtefactError, AttachError, InputError

IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)


@pytest.fixture
def saved(tmp_path):
    model = tiny_bridge()
    attach(model, n_subcomponents={r"attn": 7, r"mlp": 11}, importance=IMPORTANCE, seed=3)
    model.vpd.trained_steps = 5
    return model, model.vpd.save(tmp_path / "saved", {"kl": 0.5})


def test_round_trip_is_exact(saved, tokens):
    model, folder = saved
    again = load(folder, tiny_bridge())
    assert again.vpd.layout == model.vpd.layout
    assert again.vpd.trained_steps == 5
    for one, two in zip(model.vpd.parameters(), again.vpd.parameters(), strict=True):
        assert torch.equal(one, two)
    for mode in ("ci", "rounded", "stochastic"):
        with model.vpd.masked(mode, seed=0), again.vpd.masked(mode, seed=0):
            assert torch.equal(model(tokens[:3]), again(tokens[:3]))
    assert storage.read(folder, DecompositionRecord).record.metrics == {"kl": 0.5}
    assert "vpd_lens.load" in (folder / "README.md").read_text()


def test_an_older_record_whose_sizes_have_gaps_loads(tmp_path):
    """They were filled from all of the target, whatever matrices were decomposed."""
    whole = CausalImportanceConfig().filled(16, 2)
    model = attach(tiny_bridge(), r"blocks\.1\.mlp", n_subcomponents=4, importance=whole)
    model.vpd.importance_config = CausalImportanceConfig()  # as it was stored
    again = load(model.vpd.save(tmp_path / "old"), tiny_bridge())
    for one, two in zip(model.vpd.parameters(), again.vpd.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_size_is_the_rounded_decomposition(saved, tmp_path, dtype):
    model, whole = saved
    half = model.vpd.save(tmp_path / "half", dtype=dtype)
    name = "subcomponents.safetensors"
    assert (half / name).stat().st_size < 0.6 * (whole / name).stat().st_size
    again = load(half, tiny_bridge())
    for one, two in zip(model.vpd.parameters(), again.vpd.parameters(), strict=True):
        assert two.dtype == torch.float32
        assert torch.equal(one.to(dtype).float(), two)


def test_a_dtype_that_cannot_hold_a_value_is_refused(saved, tmp_path):
    model, _ = saved
    with torch.no_grad():
        model.vpd.subcomponents.u[3][0, 0] = 1e5
    with pytest.raises(InputError, match=r"\.U has values that torch.float16 cannot hold"):
        model.vpd.save(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(InputError, match="expected torch"):
        model.vpd.save(tmp_path / "half", dtype=torch.int8)
    assert not (tmp_path / "half").exists()


def test_every_importance_function_is_restored(tmp_path, tokens):
    for index, change in enumerate(
        (
            {"kind": "transformer"},
            {"kind": "mlp"},
            {"kind": "shared_mlp"},
            {"kind": "mlp", "hidden": 0},
            {"kind": "shared_mlp", "hidden": 0},
            {"kind": "vector_mlp", "hidden": 5},
            {"kind": "global_mlp", "hidden": 5},
            *({"kind": k, "hidden": (6, 5)} for k in ("mlp", "vector_mlp", "shared_mlp")),
        )
    ):
        model = tiny_bridge()
        importance = IMPORTANCE.model_copy(update=change)
        attach(model, n_subcomponents=6, importance=importance)
        folder = model.vpd.save(tmp_path / str(index))
        again = load(folder, tiny_bridge())
        expected = model.vpd.causal_importance(tokens[:2])
        assert torch.equal(again.vpd.causal_importance(tokens[:2]), expected)


def test_a_model_with_other_weights_is_refused_and_left_alone(saved):
    _, folder = saved
    other = tiny_bridge()
    other.blocks[1].mlp.out.original_component.weight.data[0, 0] += 1e-3
    before = set(other.hook_dict)
    with pytest.raises(ArtefactError, match=r"1 of 12 decomposed weights.*blocks\.1\.mlp\.out"):
        load(folder, other)
    assert "vpd" not in other.__dict__
    assert set(other.hook_dict) == before


def test_the_cause_of_a_mismatch_is_named(saved):
    _, folder = saved
    with pytest.raises(ArtefactError, match="dtype: 'float32' then, 'bfloat16' now"):
        load(folder, tiny_bridge().to(torch.bfloat16))


def test_a_model_with_other_sites_is_refused(saved):
    _, folder = saved
    with pytest.raises(AttachError, match=r"blocks\.1\.attn\.q"):
        load(folder, tiny_bridge(n_layers=1))
    model, _ = saved
    with pytest.raises(AttachError, match="decomposed already"):
        load(folder, model)


@pytest.mark.parametrize("name", ["subcomponents.safetensors", "causal_importance.safetensors"])
def test_damaged_tensors_are_noticed(saved, name):
    _, folder = saved
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    model = tiny_bridge()
    with pytest.raises(ArtefactError, match=name):
        load(folder, model)
    assert "vpd" not in model.__dict__


def test_tensors_and_record_must_fit_each_other(saved, tmp_path):
    """What no checksum can notice: a record of its own with the tensors of something else."""
    _, folder = saved
    artefact = storage.read(folder, DecompositionRecord)
    tensors = {n: artefact.tensors(n) for n in ("subcomponents", "causal_importance")}
    model, other = tiny_bridge(), tmp_path / "other"
    sizes = artefact.record.model_copy(update={"n_subcomponents": (6,) * 12})
    storage.write(other, sizes, tensors)
    with pytest.raises(ArtefactError, match=r"k\.U' is \[7, 16\], expected \[6, 16\]"):
        load(other, model)
    sites = artefact.record.model_copy(update={"n_subcomponents": (6,) * 11})
    storage.write(other, sites, tensors)
    with pytest.raises(ArtefactError, match="12 sites, 11 sizes"):
        load(other, model)
    del tensors["causal_importance"][next(iter(tensors["causal_importance"]))]
    storage.write(other, artefact.record, tensors)
    with pytest.raises(ArtefactError, match=r"causal_importance.*is missing"):
        load(other, model)
    del tensors["causal_importance"]
    storage.write(other, artefact.record, tensors)
    with pytest.raises(ArtefactError, match=r"causal_importance.*no checksum"):
        load(other, model)
    assert "vpd" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_or_a_wrong_folder(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ArtefactError, match="no such directory"):
        load(tmp_path / "nowhere", tiny_bridge())
    (tmp_path / "run").mkdir()
    with pytest.raises(ArtefactError, match="there is no decomposition in it"):
        load(tmp_path / "run", tiny_bridge())
    folder.rename(tmp_path / "run" / "decomposition")
    assert load(tmp_path / "run", tiny_bridge()).vpd.trained_steps == 5


def test_the_fingerprint_is_computed_again_only_after_a_change(saved, monkeypatch):
    model, folder = saved
    vpd = model.vpd
    first = fingerprint(vpd)
    assert fingerprint(load(folder, tiny_bridge()).vpd) == first
    calls = []
    hashed = storage.tensor_hash
    monkeypatch.setattr(storage, "tensor_hash", lambda t: calls.append(1) or hashed(t))
    assert fingerprint(vpd) == first
    assert not calls
    with torch.no_grad():
        vpd.u("blocks.0.attn.q")[0, 0] += 1
    second = fingerprint(vpd)
    vpd.v("blocks.0.attn.q").data[0, 0] += 1  # without a new version
    third = fingerprint(vpd)
    optimiser = torch.optim.AdamW(vpd.subcomponents.parameters(), fused=True)
    vpd.subcomponents.v[0].sum().backward()
    optimiser.step()
    assert len({first, second, third, fingerprint(vpd)}) == 4
    fold(vpd, Columns(vpd.layout.sizes, [[0]] * 12, vpd.device))
    assert len({first, second, third, fingerprint(vpd)}) == 4


V01 = Path(__file__).parent / "data" / "v01"


def v01_model():
    """The model that version 0.1 decomposed."""
    shape = {"d_model": 8, "d_head": 4, "d_mlp": 12, "n_ctx": 6, "d_vocab": 13}
    model = tiny_bridge(n_layers=1, **shape)
    model.load_state_dict(load_file(V01 / "model" / "model.safetensors"))
    return model


def test_a_decomposition_of_version_0_1_loads():
    vpd = load(V01 / "run", v01_model()).vpd
    assert vpd.trained_steps == 6
    assert vpd.layout.sizes == (4, 1, 1, 1, 1, 1)
    assert vpd.original_indices("blocks.0.attn.q") == [0, 1, 3, 4]
    tensors = load_file(V01 / "run" / "decomposition" / "subcomponents.safetensors")
    assert torch.equal(vpd.v("blocks.0.mlp.in"), tensors["blocks.0.mlp.in.V"])
    assert torch.equal(vpd.subcomponents.folded[0].u, tensors["blocks.0.attn.q.folded_U"])
    record = storage.read(V01 / "run" / "decomposition", DecompositionRecord).record
    assert record.metrics["l0"] == 8.375
    assert record.base_model.kind == "bridge"


def test_one_of_version_0_1_is_checked_as_well(tmp_path):
    for change, message in (
        ({"sha256": {}}, "no checksum"),  # which once checked nothing
        ({"sha256": None}, "damaged"),
        ({"shiny": True}, "shiny: there is no such field"),
        ({"format_version": 99}, "newer than this library"),
        ({"n_subcomponents": [6] * 6}, "do not count"),
        ({"original_indices": {}, "n_subcomponents": [6] * 6}, "do not fit"),
    ):
        folder = shutil.copytree(V01 / "run" / "decomposition", tmp_path / message)
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(ArtefactError, match=message):
            load(folder, v01_model())
    del record["sha256"], record["format_version"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match="there is no decomposition in it"):
        load(folder, v01_model())  # as any config.json of another program


def test_saving_again_replaces_the_earlier_one(saved):
    model, folder = saved
    model.vpd.save(folder, {"kl": 0.25})
    assert storage.read(folder, DecompositionRecord).record.metrics == {"kl": 0.25}
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]
