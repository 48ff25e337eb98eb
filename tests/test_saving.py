"""Saved decompositions: exact round trip, and refusal of what is damaged, foreign or newer."""

import json

import pytest
import torch
from conftest import tiny_bridge

from vpd_lens import CausalImportanceConfig, load
from vpd_lens.decomposition.attach import attach
from vpd_lens.errors import ArtefactError, AttachError

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
    assert json.loads((folder / "metrics.json").read_text()) == {"kl": 0.5}
    assert "vpd_lens.load" in (folder / "README.md").read_text()


def test_every_importance_function_is_restored(tmp_path, tokens):
    for index, change in enumerate(
        (
            {"kind": "transformer"},
            {"kind": "mlp"},
            {"kind": "shared_mlp"},
            {"kind": "mlp", "hidden": 0},
            {"kind": "shared_mlp", "hidden": 0},
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
@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_damaged_tensors_are_noticed(saved, name, damage):
    _, folder = saved
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[-3] ^= 1
        file.write_bytes(bytes(content) if damage == "tampered" else bytes(content[:-9]))
    model = tiny_bridge()
    with pytest.raises(ArtefactError, match=name):
        load(folder, model)
    assert "vpd" not in model.__dict__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer than this library"),
        ({"format_version": "x"}, "no format_version"),
        ({"shiny": True}, "unknown fields .*shiny"),
        ({"n_subcomponents": [6] * 12}, "do not fit"),
    ],
)
def test_changed_configurations_are_noticed(saved, change, message):
    _, folder = saved
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = tiny_bridge()
    with pytest.raises(ArtefactError, match=message):
        load(folder, model)
    assert "vpd" not in model.__dict__


def test_unreadable_json_and_missing_folders(saved, tmp_path):
    _, folder = saved
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"config\.json: missing or damaged"):
        load(folder, tiny_bridge())
    with pytest.raises(ArtefactError, match="no such directory"):
        load(tmp_path / "nowhere", tiny_bridge())


def test_saving_replaces_atomically(saved, monkeypatch):
    model, folder = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("vpd_lens.decomposition.saving._model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        model.vpd.save(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    monkeypatch.undo()
    model.vpd.save(folder, {"kl": 0.25})
    assert json.loads((folder / "metrics.json").read_text()) == {"kl": 0.25}
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]


def test_a_crash_between_the_two_renames_loses_nothing(saved):
    _, folder = saved
    folder.rename(folder.with_name(".saved.old"))
    assert load(folder, tiny_bridge()).vpd.trained_steps == 5
