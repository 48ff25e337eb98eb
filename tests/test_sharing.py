"""Decompositions that others open: where the base model comes from, the hub, the card."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import rich
import safetensors.torch
import torch
import yaml
from compat.builders import boot, has_hooked_transformer, hooked, native, save_architecture, tokens
from hub_server import WRITER, Hub
from rich.console import Console
from typer.testing import CliRunner

import vpd_lens
from vpd_lens import storage
from vpd_lens.cli import app
from vpd_lens.decomposition.attach import attach
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import ArtefactError, ConfigError, HubError, InputError
from vpd_lens.interop import hub as sharing
from vpd_lens.model_card import REPORT
from vpd_lens.models import FLAGS, load_model

pytestmark = pytest.mark.compat

IMPORTANCE = vpd_lens.CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)
REPOSITORY = "somebody/vpd-tiny"

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)


def decomposed(model):
    return attach(model, n_subcomponents=5, importance=IMPORTANCE, seed=3)


def origin(folder):
    return storage.read(folder, DecompositionRecord).record.origin


def assert_same(one, other):
    """Equal to the bit, also under masks, and about what a text becomes."""
    assert type(one) is type(other)
    assert torch.equal(one.to_tokens("w5 w6"), other.to_tokens("w5 w6"))
    for mode in ("target", "ci", "stochastic"):
        with torch.no_grad(), one.vpd.masked(mode, seed=0), other.vpd.masked(mode, seed=0):
            assert torch.equal(one(tokens()), other(tokens())), mode


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_architecture("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Small enough to serve, and of a name that HookedTransformer knows."""
    folder = save_architecture("gpt2", tmp_path_factory.mktemp("gpt2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub, on which everyone is logged in with the right to write."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield server
    server.shutdown()
    server.server_close()


# ------------------------------------------------------- the base model by its record


@pytest.mark.parametrize("processing", ["none", "full", "some", "half"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_base_model_is_loaded_again_as_it_was(architecture, processing, request, tmp_path):
    folder = request.getfixturevalue(architecture)
    some = {"fold_ln": True, "center_unembed": True}
    how = some if processing == "some" else "none" if processing == "half" else processing
    dtype = torch.bfloat16 if processing == "half" else torch.float32
    model = decomposed(load_model(folder, processing=how, dtype=dtype))
    model.cfg.default_prepend_bos = False
    again = vpd_lens.load(model.vpd.save(tmp_path / "saved"))
    assert_same(model, again)
    assert again.compatibility_mode == model.compatibility_mode
    assert next(again.parameters()).dtype == dtype
    assert again.cfg.model_name == model.cfg.model_name
    assert again.cfg.default_prepend_bos is False


def test_what_was_done_to_the_weights_is_seen_in_them(gpt2, tmp_path):
    for index, name in enumerate(FLAGS):
        model = decomposed(load_model(gpt2, processing={name: True}))
        done = origin(model.vpd.save(tmp_path / str(index))).processing
        assert done == {flag: flag == name for flag in FLAGS}
    assert origin(decomposed(load_model(gpt2)).vpd.save(tmp_path / "raw")).processing == {}
    renamed = boot(gpt2, "unprocessed")
    again = vpd_lens.load(decomposed(renamed).vpd.save(tmp_path / "renamed"))
    assert again.compatibility_mode


def test_a_model_beside_its_decomposition_moves_with_it(llama, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(llama, home / "model")
    decomposed(load_model(home / "model")).vpd.save(home / "saved")
    assert origin(home / "saved").source == "../model"
    home.rename(tmp_path / "moved")
    assert vpd_lens.load(tmp_path / "moved" / "saved").vpd.layout.total > 0
    decomposed(load_model(llama)).vpd.save(home / "saved")
    assert origin(home / "saved").source == str(llama)


def test_a_source_given_is_loaded_as_the_record_says(gpt2, tmp_path):
    model = decomposed(load_model(gpt2, processing="full"))
    model.cfg.default_prepend_bos = False
    folder = model.vpd.save(tmp_path / "saved")
    elsewhere = shutil.copytree(gpt2, tmp_path / "elsewhere")
    assert_same(model, vpd_lens.load(folder, elsewhere))
    own = vpd_lens.load(folder, load_model(elsewhere, processing="full"))
    assert own.cfg.default_prepend_bos  # a model that is handed in keeps its settings


def test_models_made_in_python_are_asked_for(tmp_path):
    makers = [native, hooked] if has_hooked_transformer() else [native]
    for index, make in enumerate(makers):
        folder = decomposed(make("ln")).vpd.save(tmp_path / str(index))
        assert origin(folder) is None
        with pytest.raises(ArtefactError, match=r"does not say .* made in Python.* --model"):
            vpd_lens.load(folder)
        assert vpd_lens.load(folder, make("ln")).vpd.trained_steps == 0


def test_a_base_model_that_changed_or_went_is_refused(llama, gpt2, tmp_path):
    place = shutil.copytree(llama, tmp_path / "place")
    folder = decomposed(load_model(place)).vpd.save(tmp_path / "deep" / "saved")
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1  # which is no site
    other.save_pretrained(place)
    with pytest.raises(ArtefactError, match="no longer those that were decomposed"):
        vpd_lens.load(folder)
    shutil.rmtree(place)
    with pytest.raises(ArtefactError, match=r"was in .*place, which is not here.*model=\.\.\."):
        vpd_lens.load(folder)
    with pytest.raises(vpd_lens.errors.VPDError, match=r"blocks\.0\.mlp\.gate"):
        vpd_lens.load(folder, gpt2)  # a model of another shape
    with pytest.raises(ConfigError, match="device='nonsense'"):
        vpd_lens.load(folder, llama, device="nonsense")


def test_a_record_without_an_origin_still_loads(llama, tmp_path):
    """As all that were written before it was recorded."""
    model = decomposed(load_model(llama, processing="full"))
    model.cfg.default_prepend_bos = False
    folder = model.vpd.save(tmp_path / "saved")
    file = folder / "record.json"
    content = json.loads(file.read_text())
    del content["record"]["origin"], content["sha256"]
    storage.write_json(file, {**content, "sha256": storage._digest(content)})
    with pytest.raises(ArtefactError, match="does not say"):
        vpd_lens.load(folder)
    assert_same(model, vpd_lens.load(folder, llama))


# ------------------------------------------------------------------------- the hub


def test_pushed_and_opened_it_is_the_same(hub, llama, tmp_path):
    model = decomposed(load_model(llama, processing="full"))
    address = model.vpd.push_to_hub(REPOSITORY, include_model=True, private=True, licence="mit")
    assert re.fullmatch(rf"{hub.address}/{REPOSITORY}/commit/\w{{40}}", address)
    assert hub.private[REPOSITORY]
    again = vpd_lens.load(REPOSITORY)
    assert_same(model, again)
    card = hub.files(REPOSITORY)["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])
    assert data["library_name"] == "vpd_lens"
    assert data["license"] == "mit"
    assert f'vpd_lens.load("{REPOSITORY}")' in card
    assert not any(str(llama).encode() in file for file in hub.files(REPOSITORY).values())


@pytest.mark.parametrize("kind", ["bridge", pytest.param("hooked_transformer", marks=needs_hooked)])
def test_a_base_model_on_the_hub_is_found_there(kind, hub, gpt2, tmp_path):
    name = "gpt2"
    first = hub.add_folder(name, gpt2)
    model = decomposed(load_model(name, kind))
    folder = model.vpd.save(tmp_path / "saved")
    assert (origin(folder).source, origin(folder).revision) == (name, first)
    hub.commit(name, "main", hub.files(name) | {"config.json": b"{}"})  # somebody else's
    sharing.push(folder, REPOSITORY)
    again = vpd_lens.load(REPOSITORY)
    assert_same(model, again)
    assert origin(again.vpd.save(tmp_path / "again")) == origin(folder)
    card = hub.files(REPOSITORY)["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == name
    assert f"at commit `{first}`" in card


@pytest.mark.parametrize("kind", ["bridge", pytest.param("hooked_transformer", marks=needs_hooked)])
def test_both_models_of_a_difference_are_found_there(kind, hub, gpt2, tmp_path):
    name = "gpt2"
    first, files = hub.add_folder(name, gpt2), hub.files(name)
    weights = safetensors.torch.load(files["model.safetensors"])
    weights["transformer.h.0.mlp.c_fc.weight"] *= 1.5
    tuned_file = safetensors.torch.save(weights, metadata={"format": "pt"})
    second = hub.commit(name, "main", files | {"model.safetensors": tuned_file})
    base, tuned = (load_model(name, kind, revision=commit) for commit in (first, second))
    vpd_lens.decompose(tuned, base=base, n_subcomponents=3, importance=IMPORTANCE)
    folder = tuned.vpd.save(tmp_path / "saved")
    record = storage.read(folder, DecompositionRecord).record
    assert (record.origin.revision, record.other_origin.revision) == (second, first)
    sharing.push(folder, REPOSITORY)
    again = vpd_lens.load(REPOSITORY)
    assert again.vpd.layout.names == ("blocks.0.mlp.in",)
    assert_same(tuned, again)
    assert torch.equal(again.vpd.sites[0].origin, tuned.vpd.sites[0].origin)
    assert f"another model's, loaded from `{name}`" in hub.files(REPOSITORY)["README.md"].decode()


def test_only_what_is_needed_is_downloaded(hub, llama, tmp_path):
    model = decomposed(load_model(llama))
    model.vpd.push_to_hub(REPOSITORY, include_model=True)
    hub.asked.clear()
    vpd_lens.load(REPOSITORY, llama)
    assert not any("model/" in path and "resolve" in path for path in hub.asked)
    vpd_lens.load(REPOSITORY)
    assert any(f"resolve/{hub.branches[REPOSITORY]['main']}/model/" in path for path in hub.asked)
    hub.shutdown()
    hub.server_close()
    assert_same(model, vpd_lens.load(REPOSITORY))  # from the cache


def test_branches_and_later_versions(hub, llama):
    model = decomposed(load_model(llama))
    model.vpd.push_to_hub(REPOSITORY)
    first = hub.branches[REPOSITORY]["main"]
    model.vpd.trained_steps = 7
    model.vpd.push_to_hub(REPOSITORY, revision="longer")
    assert vpd_lens.load(REPOSITORY, llama).vpd.trained_steps == 0
    assert vpd_lens.load(REPOSITORY, llama, revision="longer").vpd.trained_steps == 7
    model.vpd.push_to_hub(REPOSITORY)
    assert vpd_lens.load(REPOSITORY, llama).vpd.trained_steps == 7
    assert vpd_lens.load(REPOSITORY, llama, revision=first).vpd.trained_steps == 0
    with pytest.raises(HubError, match="no such revision"):
        vpd_lens.load(REPOSITORY, llama, revision="shorter")


@pytest.fixture(scope="module")
def evaluated(llama):
    model = decomposed(load_model(llama))
    report = vpd_lens.evaluate(
        model, tokens(8), n_batches=1, batch_size=4, pgd_steps=(2,), audit=True, progress=False
    )
    harvest = vpd_lens.harvest(model, tokens(8), n_batches=2, batch_size=4, progress=False)
    return model, report, harvest


def test_report_and_harvest_come_along(evaluated, hub, tmp_path):
    model, report, harvest = evaluated
    model.vpd.push_to_hub(REPOSITORY, report=report, harvest=harvest)
    card = hub.files(REPOSITORY)["README.md"].decode()
    assert report.verdict() in card
    pictures = re.findall(r"!\[[^\]]+\]\(([\w-]+\.png)\)", card)
    assert {"pgd.png", "l0.png", "aggregation.png"} <= set(pictures)
    for name in pictures:
        assert hub.files(REPOSITORY)[name].startswith(b"\x89PNG")
    for table in (part for part in report.tables().renderables if not isinstance(part, str)):
        assert f"### {table.title}" in card
    header = next(line for line in card.splitlines() if "hidden error" in line)
    assert r"| \|delta\|/\|W\| |" in header  # one column
    kl, ce, recovered = report.modes["stochastic"].values()
    assert f"\n| stochastic | {kl:.4f} | {ce:.3f} | {recovered:.1%} |\n" in card
    folder = sharing.find(REPOSITORY, also=(sharing.HARVEST,))
    again = vpd_lens.Harvest.load(folder / sharing.HARVEST, model.vpd)
    assert again.n_positions == harvest.n_positions
    assert vpd_lens.EvalReport.from_json(folder / REPORT) == report
    model.vpd.push_to_hub(REPOSITORY)  # without them: nothing of them is left
    left = hub.files(REPOSITORY)
    assert not any(name.endswith(".png") or name.startswith("harvest/") for name in left)
    assert REPORT not in left


def test_a_card_needs_no_network(evaluated, llama, tmp_path):
    model, report, _ = evaluated
    folder = model.vpd.save(tmp_path / "saved", report=report)
    card = (folder / "README.md").read_text()
    assert report.verdict() in card
    assert all((folder / name).is_file() for name in re.findall(r"\]\(([\w-]+\.png)\)", card))
    assert vpd_lens.EvalReport.from_json(folder / REPORT) == report
    assert_same(model, vpd_lens.load(folder))
    other = attach(load_model(llama), "mlp", n_subcomponents=4, importance=IMPORTANCE)
    with pytest.raises(InputError, match="Evaluate this one"):
        other.vpd.save(folder, report=report)
    assert (folder / "README.md").read_text() == card


def test_what_is_of_another_decomposition_is_not_pushed(evaluated, hub, llama):
    _, report, harvest = evaluated
    other = attach(load_model(llama), "mlp", n_subcomponents=4, importance=IMPORTANCE)
    with pytest.raises(InputError, match=r"report: it is of \d+ sites"):
        other.vpd.push_to_hub(REPOSITORY, report=report)
    with pytest.raises(ArtefactError, match="of another decomposition"):
        other.vpd.push_to_hub(REPOSITORY, harvest=harvest)
    with pytest.raises(InputError, match="include_model: the base model was not loaded"):
        decomposed(native("ln")).vpd.push_to_hub(REPOSITORY, include_model=True)
    assert not hub.asked


def test_a_local_base_model_is_not_named_on_the_hub(hub, llama):
    decomposed(load_model(llama)).vpd.push_to_hub(REPOSITORY)
    assert "has to be at hand" in hub.files(REPOSITORY)["README.md"].decode()
    with pytest.raises(ArtefactError, match="does not say where its base model came from"):
        vpd_lens.load(REPOSITORY)


def test_a_local_other_model_is_not_named_on_the_hub(hub, llama):
    base, tuned = load_model(llama), load_model(llama)
    with torch.no_grad():
        tuned.original_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    vpd_lens.decompose(tuned, base=base, n_subcomponents=3, importance=IMPORTANCE)
    tuned.vpd.push_to_hub(REPOSITORY)
    assert not any(str(llama).encode() in file for file in hub.files(REPOSITORY).values())
    assert "base_model, base=other_model" in hub.files(REPOSITORY)["README.md"].decode()
    vpd_lens.remove(tuned)
    with pytest.raises(ArtefactError, match=r"difference is taken came from.* --base"):
        vpd_lens.load(REPOSITORY, tuned)
    assert vpd_lens.load(REPOSITORY, tuned, base=llama).vpd.layout.names == ("blocks.0.mlp.in",)


# ------------------------------------------------------------------------ refusals


def test_without_permission_nothing_is_published(hub, llama, monkeypatch):
    model = decomposed(load_model(llama))
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HubError, match=r"nothing was published.*no permission.*hf auth login"):
        model.vpd.push_to_hub(REPOSITORY)
    assert REPOSITORY not in hub.branches
    hub.create(REPOSITORY)
    before = dict(hub.branches[REPOSITORY])
    with pytest.raises(HubError, match=r"nothing was published.*no permission"):
        model.vpd.push_to_hub(REPOSITORY)
    assert hub.branches[REPOSITORY] == before
    with pytest.raises(HubError, match="cannot be the name of a repository"):
        model.vpd.push_to_hub("a/b--c")
    for name in ("noslash", "a/b/c", "../up", "a b/c"):
        with pytest.raises(HubError, match="expected 'user/name'"):
            model.vpd.push_to_hub(name)


def test_repositories_that_cannot_be_opened(hub, llama, tmp_path, monkeypatch):
    with pytest.raises(HubError, match=r"no such directory here\. On the hub: there is no 'a/b'"):
        vpd_lens.load("a/b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(
        ArtefactError, match=r"in runs; did you mean runs/first\?.* revision=\"main"
    ):
        vpd_lens.load("runs/frist")
    assert not any("frist" in path for path in hub.asked)
    hub.add_folder("someone/foreign", llama)
    with pytest.raises(ArtefactError, match=r"no record\.json in this repository"):
        vpd_lens.load("someone/foreign")
    assert not any("safetensors" in path for path in hub.asked)
    decomposed(load_model(llama)).vpd.push_to_hub(REPOSITORY, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HubError, match="private and you are not logged in"):
        vpd_lens.load(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    files = hub.files(REPOSITORY)
    name = "subcomponents.safetensors"
    hub.commit(REPOSITORY, "main", files | {name: files[name][:-1] + b"?"})
    with pytest.raises(ArtefactError, match="does not match its checksum"):
        vpd_lens.load(REPOSITORY, llama)
    hub.commit(REPOSITORY, "main", {n: data for n, data in files.items() if n != name})
    with pytest.raises(ArtefactError, match="missing"):
        vpd_lens.load(REPOSITORY, llama)


def test_without_a_network(hub, llama, monkeypatch):
    from huggingface_hub import constants

    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for attempt in (
        lambda: vpd_lens.load("a/b"),
        lambda: decomposed(load_model(llama)).vpd.push_to_hub(REPOSITORY),
        lambda: sharing.published(),
    ):
        with pytest.raises(HubError, match=r"cannot be reached .* Check the network"):
            attempt()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            attempt()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ArtefactError, match="no such directory"):
        vpd_lens.load("nowhere")


# ------------------------------------------------------------------------ commands


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_commands(evaluated, hub, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rich, "_console", Console(width=300))
    model, report, harvest = evaluated
    run = tmp_path / "runs" / "first"
    model.vpd.save(run / "decomposition")
    report.to_json(run / "report.json")
    decomposed(native("ln")).vpd.save(tmp_path / "runs" / "by-hand")
    (tmp_path / "runs" / "by-hand" / "record.json").write_text('{"kind": "decomposition"}')
    said = call("list", tmp_path / "runs").output
    verdict = report.verdict().split(". ")[0]
    assert re.search(rf"first/decomposition.*llama.*TransformerBridge.*{verdict}", said)
    assert re.search(r"by-hand.*damaged", said)
    options = ("--harvest", harvest.save(tmp_path / "harvest"), "--include-model")
    assert f'vpd_lens.load("{REPOSITORY}")' in call("push", run, REPOSITORY, *options).output
    hub.add_folder("somebody/else", llama)
    said = call("list", "--author", "somebody").output
    assert re.search(rf"{REPOSITORY}.*{verdict}", said)
    assert "somebody/else" not in said
    assert REPOSITORY not in call("list", "--hub", "nothing like it").output
    assert "trained" in call("info", REPOSITORY).output
    np.save(tmp_path / "tokens.npy", tokens(8).numpy())
    few = ("--n-batches", 1, "--batch-size", 2, "--seq-len", 6, "--pgd-steps", "none")
    said = call("eval", REPOSITORY, "--data", tmp_path / "tokens.npy", *few).output
    assert "Masking modes" in said
    said = call("eval", run, "--data", "x", "--processing", "full", code=2).stderr
    assert "Give --model too" in said
    assert "no such directory" in call("list", tmp_path / "nowhere", code=2).stderr
    assert "no such directory" in call("push", tmp_path / "nowhere", REPOSITORY, code=2).stderr
