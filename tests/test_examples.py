"""The example scripts, cut down: a real Llama that others trained, and the quickstart."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny, shared_folder

import quickstart_target
import vpd_lens
from recorded import RunRecord
from vpd_lens.example import example_harvest, example_report
from vpd_lens.models import load_model
from vpd_lens.training import VPDConfig

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stories260k_loads():
    """A grouped-query, gated, rotary model's own loss is as documented."""
    pytest.importorskip("transformer_lens.HookedTransformer", reason="needs HookedTransformer")
    folder = shared_folder("stories260K")
    stories = script("stories260k")
    model = stories.load_stories(folder)
    _, held_out = stories.load_tokens(folder)
    with torch.no_grad():
        loss = float(model(held_out[:32], return_type="loss"))
    assert loss == pytest.approx(1.281, abs=0.03)
    assert "once" in stories.text(held_out[0], folder).lower()


def test_stories260k_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The script's own main with two small steps, twice: the second run finds a record."""
    pytest.importorskip("transformer_lens.HookedTransformer", reason="needs HookedTransformer")
    folder = shared_folder("stories260K")
    stories = script("stories260k")
    model = stories.load_stories(folder)
    tokens = stories.load_tokens(folder)[1][:2, :32]
    small = {"seq_len": 32, "batch_size": 2, "log_every": 1, "faithfulness.warmup_steps": 10}
    run = stories.run(folder, 2, 0)
    run = replace(
        run,
        target=replace(run.target, held_out=tokens),
        config=run.config.replaced(small),
        evaluation={"pgd_steps": [], "batch_size": 2},
    )
    monkeypatch.setattr(stories, "run", lambda *_: run)
    monkeypatch.setattr(stories.story, "__defaults__", (20,))
    monkeypatch.setattr(vpd_lens.EvalReport, "to_html", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["stories260k.py", str(folder), "--output", str(tmp_path)])
    stories.main()
    path = tmp_path / "records" / "small,steps=2,seed=0.json"
    record = RunRecord.read(path)
    assert len(record.report.delta) == 35 + 1  # and their total
    loss = model(tokens, return_type="loss").item()
    assert record.report.modes["target"]["ce"] == pytest.approx(loss, rel=1e-5)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "there was a little girl named Lily" in printed
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(stories, "story", lambda *_: "")
    stories.main()
    assert path.stat().st_mtime_ns == written


def test_target_s_is_what_others_trained():
    """Its logits are those that came with its weights."""
    pytest.importorskip("transformer_lens.HookedTransformer", reason="needs HookedTransformer")
    folder = shared_folder("targets")
    target, _ = script("recipes").target_s(folder, folder)
    tokens = torch.from_numpy(np.load(folder / "S" / "ref_tokens.npy").astype("int64"))
    expected = torch.from_numpy(np.load(folder / "S" / "ref_logits.npy"))
    with torch.no_grad():
        logits = target.load()(tokens.view(-1, tokens.shape[-1]))
    torch.testing.assert_close(logits.view_as(expected), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_a_recipe_from_the_command_line(tmp_path, monkeypatch):
    """With two small steps; what `--set` says is in the record."""
    pytest.importorskip("transformer_lens.HookedTransformer", reason="needs HookedTransformer")
    recipes = script("recipes")
    folder = shared_folder("targets")
    monkeypatch.setattr(vpd_lens.EvalReport, "to_html", lambda *_: None)
    small = ["n_subcomponents=8", "importance.d_model=16", "batch_size=2", "adversary.merge=0.5"]
    small += ["faithfulness.warmup_steps=2"]
    arguments = ["s", "--data", str(folder), "--output", str(tmp_path), "--name", "tiny"]
    arguments += ["--steps", "2", "--rows", "2", "--attack", "1", "2"]
    sets = [part for pair in small for part in ("--set", pair)]
    monkeypatch.setattr("sys.argv", ["recipes.py", *arguments, *sets])
    recipes.main()
    record = RunRecord.read(tmp_path / "records" / "s,tiny,steps=2,seed=0.json")
    assert record.config.adversary.merge == 0.5
    assert record.config.minimality.coefficient == 1.1e-3  # the target's own
    assert list(record.report.pgd) == ["1", "2"]
    assert record.report.n_positions == 2 * 64


def test_quickstart_in_small(tmp_path, monkeypatch, capsys):
    """The script's own main, with a few steps of everything, twice: the second run resumes."""
    quickstart = script("quickstart")
    monkeypatch.setattr(quickstart, "N_NEW", 2)
    monkeypatch.setattr(quickstart, "N_CHARACTERS", 60_000)
    small = VPDConfig.small
    tiny = {"seq_len": 16, "importance": TINY["importance"], "faithfulness": {"warmup_steps": 2}}
    monkeypatch.setattr(VPDConfig, "small", lambda **given: small(**given | tiny))
    evaluate = vpd_lens.evaluate
    monkeypatch.setattr(
        vpd_lens, "evaluate", lambda model, rows, **_: evaluate(model, rows[:2], pgd_steps=())
    )
    attribute, pruning, graphs = vpd_lens.attribute, vpd_lens.PruneConfig, []
    short = {"attack_steps": (1, 2), "draws": 1}
    monkeypatch.setattr(vpd_lens, "PruneConfig", lambda **given: pruning(**given | short))

    def once(*arguments, **given):
        graphs.extend([] if graphs else [attribute(*arguments, **given)])
        return graphs[0]

    monkeypatch.setattr(vpd_lens, "attribute", once)
    arguments = ["quickstart.py", "--output", str(tmp_path), "--steps", "2", "--prune-steps", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    (tmp_path / "live").mkdir()  # as left by a run that was killed before its first checkpoint
    (tmp_path / "live" / "metrics.jsonl").write_text("")
    quickstart.main()
    for page in ("report.html", "explained.html", "circuit.html", "harvest/index.html"):
        assert (tmp_path / page).stat().st_size > 10_000
    assert (tmp_path / "live" / "decomposition" / "record.json").exists()
    # Again, for the training.
    for shown in ("continuations", "write"):
        monkeypatch.setattr(quickstart, shown, lambda *_: None)
    monkeypatch.setattr(vpd_lens.EvalReport, "to_html", lambda *_: None)
    quickstart.main()
    printed = capsys.readouterr().out
    assert printed.count("What to try next") == 2


def test_train_example_in_small(tmp_path, monkeypatch):
    """The script's own main with few steps: what it packs is what `load_example` reads."""
    train_example = script("train_example")
    configuration = train_example.configuration
    few = {"faithfulness.warmup_steps": 0, "log_every": 1, "batch_size": 2}
    monkeypatch.setattr(
        train_example, "configuration", lambda *given: configuration(*given).replaced(few)
    )
    monkeypatch.setattr(train_example, "N_CHARACTERS", 300_000)
    monkeypatch.setattr(quickstart_target, "N_HELD_OUT", 20_000)
    evaluate, harvest = vpd_lens.evaluate, vpd_lens.harvest
    monkeypatch.setattr(
        vpd_lens,
        "evaluate",
        lambda model, rows, **_: evaluate(model, rows[:2], pgd_steps=(), progress=False),
    )
    monkeypatch.setattr(
        vpd_lens,
        "harvest",
        lambda model, tokens, **given: harvest(model, tokens, **given | {"n_batches": 1}),
    )
    arguments = ["train_example.py", "--output", str(tmp_path), "--target-steps", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--steps", "1", "--note", "In small."])
    train_example.main()
    packed = (tmp_path / "example").rename(tmp_path / "packed")
    assert "In small." in (packed / "README.md").read_text()
    for file in (packed / "decomposition").glob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes()
    assert vpd_lens.load(packed / "decomposition").vpd.trained_steps == 1
    model = vpd_lens.load_example(packed)
    assert model.vpd.trained_steps == 1
    trained = vpd_lens.load(tmp_path / "vpd", load_model(tmp_path / "target")).vpd
    for ours, theirs in zip(model.vpd.subcomponents.v, trained.subcomponents.v, strict=True):
        assert torch.equal(ours, theirs.half().float())
    example_harvest(model.vpd, packed)
    assert example_report(packed).n_positions == 2 * 128


TINY = {
    "importance": {"d_model": 16, "n_blocks": 1, "n_heads": 2},
    "faithfulness": {"warmup_steps": 2},
    "batch_size": 4,
    "log_every": 1,
}


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_modular_addition_in_small(tmp_path, monkeypatch, capsys):
    """The script's own main, with a few steps of everything."""
    example = script("modular_addition")
    counts = {"attn": 64, "mlp": 256}
    monkeypatch.setattr(
        example,
        "configuration",
        lambda steps, seed, initialisation="aligned": VPDConfig.small(
            steps=steps, seed=seed, initialisation=initialisation, n_subcomponents=counts, **TINY
        ),
    )
    arguments = ["--output", str(tmp_path), "--modulus", "7", "--target-steps", "5", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["modular_addition.py", *arguments])
    example.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["sites"]) >= {"blocks.0.mlp.in", "blocks.0.mlp.out"}
    for name, neurons in figures["neurons"].items():
        assert neurons["live"] == 256
        assert 0 < neurons["mean_share"] < 1, name
    assert VPDConfig(**figures["config"]) == example.configuration(1, 0)
    assert figures["versions"]["torch"] == torch.__version__
    # By frequency, before and after training, and the four controls.
    assert len(figures["left"]) == 2 * 3 * len(figures["keys"]) + 4
    assert (tmp_path / "ablation.svg").exists()
    assert "key frequencies" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_one_behaviour_in_small(tmp_path, monkeypatch, capsys):
    """Of the toy, and of a model in a folder with two files of tokens."""
    example = script("targeted")
    save_tiny(tmp_path / "model")
    random = np.random.default_rng(0)
    for name in ("inside", "outside"):
        np.save(tmp_path / f"{name}.npy", random.integers(4, 29, (16, 8)))
    monkeypatch.setattr(example.TwoTasks, "train_target", lambda task: task.transformer())
    other = ["--model", str(tmp_path / "model")]
    other += ["--data", str(tmp_path / "inside.npy"), "--elsewhere", str(tmp_path / "outside.npy")]
    for name, arguments in (("toy", ["--each"]), ("other", other)):
        always = ["--output", str(tmp_path / name), "--steps", "2", "--set", "batch_size=8"]
        always += ["--set", "n_subcomponents=4", "--set", "importance.hidden=[8]"]
        monkeypatch.setattr("sys.argv", ["targeted.py", *always, *arguments])
        example.main()
        figures = json.loads((tmp_path / name / "figures.json").read_text())
        config = VPDConfig(**figures["config"])
        assert config.elsewhere.coefficient > 0
        assert (config.steps, config.n_subcomponents) == (2, 4)
        assert figures["inside"].keys() == figures["outside"].keys()
        assert ("accuracy" in figures) == (name == "toy")
    assert "important subcomponents" in capsys.readouterr().out


def test_windows_of_a_behaviour_lead_up_to_it(monkeypatch):
    example = script("targeted")
    text = example.standard_library_text(60_000)
    monkeypatch.setattr(example, "standard_library_text", lambda n: text)
    model = vpd_lens.remove(vpd_lens.load_example())
    brackets = example.BEHAVIOURS["brackets"]
    shows, others = example.windows(model, brackets, 60, 60)
    assert shows.shape[1] == others.shape[1] == example.LENGTH
    assert len(torch.unique(shows, dim=0)) == len(shows) > 10 < len(others)
    wanted = [i for i in range(1024) if model.to_string([i]).startswith(brackets)]
    for rows, close in ((shows[:10], True), (others[:10], False)):
        p = model(rows).softmax(-1)[..., wanted].sum(-1)
        assert ((p[:, -1] > 0.5) == close).all()
        assert close or (p < 0.5).all()


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_a_fine_tune_in_small(tmp_path, monkeypatch):
    example = script("fine_tune")
    text = example.standard_library_text(60_000)
    assert example.in_other_words("itself, self.x") == "itself, me.x"
    monkeypatch.setattr(example, "standard_library_text", lambda n: text)
    arguments = ["--output", str(tmp_path), "--tune-steps", "2", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["fine_tune.py", *arguments])
    example.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert VPDConfig(**figures["config"]) == example.configuration(2, 0)
    assert all(name.startswith("blocks.3.") for name in figures["n_subcomponents"])
    on, off = figures["says"]["everything on"], figures["says"]["everything ablated"]
    assert on.keys() == {"me", "self"}
    assert on["me"] > off["me"]
    assert figures["inside"]["everything on"] == pytest.approx(0, abs=1e-5)


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_induction_in_small(tmp_path, monkeypatch):
    example = script("induction")
    monkeypatch.setattr(
        example,
        "configuration",
        lambda steps, seed: VPDConfig.small(steps=steps, seed=seed, n_subcomponents=8, **TINY),
    )
    arguments = ["--output", str(tmp_path), "--target-steps", "3", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["induction.py", *arguments])
    example.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    first = figures["target"]
    # Ablating queries of one head of layer 0 cannot change what the other attends to.
    for row, values in figures.items():
        if row.startswith("blocks.0.attn.q, head 0"):
            assert values["previous 1"] == pytest.approx(first["previous 1"], abs=2e-3)
    assert any("others" in row for row in figures)


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_gpu_run_on_a_cpu(tmp_path, monkeypatch, undrawn):
    """The script for a GPU, with its small model: it has to be right before there is one."""
    arguments = ["--output", str(tmp_path), "--tiny", "--device", "cpu", "--target-steps", "5"]
    monkeypatch.setattr("sys.argv", ["gpu_run.py", *arguments, "--steps", "3"])
    script("gpu_run").main()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["device"] == "cpu"
    assert run["target"]["steps"] == 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert [int(steps) for steps in report["pgd"]] == [5, 10]


def test_gpu_benchmark_on_a_cpu(tmp_path, monkeypatch):
    """Its comparison of devices is exact where both are the same, and its count is right."""
    path = EXAMPLES.parent / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--device", "cpu", "--tiny", "--batch", "4", "--seq-len", "64", "--steps", "1"]
    arguments += ["--warmup", "0", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    module.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["difference_from_cpu"]["fp32"] == {"loss": 0.0, "worst_gradient": 0.0}
    assert 0 < result["difference_from_cpu"]["bf16"]["loss"] < 0.01
    assert 3e-3 < result["tflop_per_step"] < 5e-3
    assert set(result["phases_ms"]) >= {"target", "importance", "adversary", "backward"}


def test_a_part_of_a_language_model_in_small(tmp_path, monkeypatch):
    """With the example's model in its place; a second run trains no more."""
    smollm2 = script("smollm2")

    def model(_):
        found = vpd_lens.load_example()
        vpd_lens.remove(found)
        return found

    configuration = smollm2.configuration

    def short(*given):
        config = configuration(*given)
        return config.replaced({"faithfulness.warmup_steps": 5, "importance.d_model": 12})

    monkeypatch.setattr(smollm2, "get_model", model)
    monkeypatch.setattr(smollm2, "configuration", short)
    text = "def close(self):\n    return self.open(path)\n" * 600
    monkeypatch.setattr(smollm2, "standard_library_text", lambda _: text)
    arguments = ["smollm2.py", "--output", str(tmp_path), "--steps", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--sites", r"blocks\.3\.attn"])
    for _ in range(2):
        smollm2.main()
        assert (tmp_path / "explained.html").exists()
    report = vpd_lens.EvalReport.from_json(tmp_path / "report.json")
    assert set(report.n_subcomponents) == {f"blocks.3.attn.{x}" for x in "qkvo"}
    assert len((tmp_path / "vpd" / "metrics.jsonl").read_text().splitlines()) == 1
