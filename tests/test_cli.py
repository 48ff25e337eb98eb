"""The command line: in this process where possible, as a real process where it matters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from compat.builders import VOCABULARY, save_architecture
from conftest import save_tiny
from processes import signalled, start
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import vpd_lens
from vpd_lens import EvalReport
from vpd_lens.cli import app, main
from vpd_lens.config import read_run_file
from vpd_lens.errors import ConfigError
from vpd_lens.models import load_model

pytestmark = pytest.mark.slow

TRAINING = {
    "preset": "small",
    "n_subcomponents": 6,
    "importance": {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 16},
    "steps": 6,
    "batch_size": 4,
    "seq_len": 8,
    "log_every": 2,
    "faithfulness": {"warmup_steps": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model that has a tokenizer, token data and text data."""
    folder = tmp_path_factory.mktemp("base")
    save_architecture("llama", folder).rename(folder / "model")
    random = np.random.default_rng(0)
    np.save(folder / "tokens.npy", random.integers(4, VOCABULARY, 5000).astype(np.uint16))
    (folder / "text").mkdir()
    for index in range(3):
        words = (f"w{i}" for i in random.integers(4, VOCABULARY, 300))
        (folder / "text" / f"{index}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def write_run(base, tmp_path):
    """Write a run file, with changes at the top level and in `training`."""

    def write(training=None, **changes):
        run = {
            "model": {"source": str(base / "model")},
            "data": str(base / "tokens.npy"),
            "output": str(tmp_path / "out"),
            "training": {**TRAINING, **(training or {})},
            **changes,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in run.items() if v is not None}))
        return path

    return write


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def assert_said(result, *words):
    assert result.stderr.startswith("vpd-lens: ")
    assert "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run with an evaluation, through the program."""
    folder = tmp_path_factory.mktemp("finished")
    run = {
        "model": {"source": str(base / "model")},
        "data": str(base / "text"),
        "output": str(folder / "out"),
        "training": TRAINING,
        "evaluation": {
            "data": str(base / "text"),
            "n_batches": 1,
            "batch_size": 4,
            "pgd_steps": [2],
            "pgd_restarts": 1,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    result = call("train", folder / "run.yaml")
    return folder / "out", result


# ----------------------------------------------------------------------------- train


def test_training_on_text_with_an_evaluation(finished):
    folder, result = finished
    assert steps_of(folder) == [2, 4, 6]
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint",
        "config.yaml",
        "decomposition",
        "metrics.jsonl",
        "report.html",
        "report.json",
    }
    report = EvalReport.from_json(folder / "report.json")
    assert report.trained_steps == 6
    assert report.batch_shape == [4, 8]  # as long as in training
    assert list(report.pgd) == ["2"]
    assert "blocks.1.mlp.out" in (folder / "report.html").read_text()
    assert "Masking modes" in result.stdout
    assert f"Next: vpd-lens harvest {folder}" in result.stdout


def test_clusters_are_printed_and_stored(finished, base, tmp_path):
    from vpd_lens.analysis.clustering import Clusters

    folder, _ = finished
    data = ["--data", str(base / "text"), "--n-batches", "2", "--batch-size", "4"]
    where = ["--seq-len", "8", "--output", str(tmp_path / "clusters")]
    result = call("cluster", folder, *data, *where, "--best", "--until-one")
    assert "of more than one" in result.stdout
    found = Clusters.load(tmp_path / "clusters")
    assert found.at(1).labels.max() == 0
    assert found.sampler == "Best()"
    result = call("cluster", folder, *data, *where, "--threshold", "1", code=2)
    assert_said(result, "threshold=1.0; expected an importance between 0 and 1")


def test_one_behaviour_has_a_second_source(write_run, base, tmp_path):
    targeted = {"preset": "targeted", "importance": {"hidden": [8]}}
    path = write_run(targeted, elsewhere=str(base / "text"))
    call("train", path)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert {"elsewhere", "l0_elsewhere"} <= json.loads(lines[-1]).keys()
    result = call("train", write_run(targeted, output=str(tmp_path / "other")), code=2)
    assert_said(result, "elsewhere is None")


def test_a_difference_from_another_model(write_run, base, tmp_path):
    tuned, original = tmp_path / "tuned", tmp_path / "original"
    for folder in (tuned, original):
        shutil.copytree(base / "model", folder)
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    source = {"source": str(tuned), "base": str(original)}
    call("train", write_run({"importance": {"d_model": 16, "n_heads": 2}}, model=source))
    saved = tmp_path / "out/decomposition"
    model = vpd_lens.load(saved)
    assert model.vpd.layout.names == ("blocks.1.mlp.in",)
    rows = torch.arange(4, 12)[None]
    with torch.no_grad(), model.vpd.masked("zero"):
        torch.testing.assert_close(model(rows), load_model(original)(rows), atol=1e-5, rtol=1e-4)
    assert "Difference from" in call("info", saved).stdout
    measure = ["eval", saved, "--data", base / "tokens.npy", "--seq-len", 8, "--n-batches", 1]
    measure += ["--pgd-steps", "none", "--json", tmp_path / "report.json"]
    call(*measure)
    first = (tmp_path / "report.json").read_text()
    moved = original.rename(tmp_path / "moved")
    assert_said(call(*measure, code=2), str(original), "which is not here", "--base")
    call(*measure, "--base", moved)
    assert (tmp_path / "report.json").read_text() == first
    assert_said(call(*measure, "--base", tuned, code=2), "base has the same weights")


def test_overrides(write_run, base, tmp_path):
    path = write_run(output="not/here", data="nor/here")
    changes = ["steps=2", "optimiser.lr=1e-3", "training.seed=7", "minimality={p_end: 0.5}"]
    changes += [f"data={base / 'tokens.npy'}", "sites=mlp"]
    flags = [part for change in changes for part in ("--set", change)]
    result = call("train", path, *flags, "--output", tmp_path / "a: #b", "--quiet")
    assert result.output == ""
    config = yaml.safe_load((tmp_path / "a: #b" / "config.yaml").read_text())
    assert config["steps"] == 2
    assert config["seed"] == 7
    assert config["optimiser"]["lr"] == 1e-3
    assert config["optimiser"]["clip_importance"] == 1.0  # the preset's, not replaced
    assert config["minimality"]["p_end"] == 0.5
    assert config["sites"] == "mlp"
    sites = json.loads((tmp_path / "a: #b" / "decomposition" / "record.json").read_text())[
        "record"
    ]["sites"]
    assert sites == [f"blocks.{i}.mlp.{kind}" for i in (0, 1) for kind in ("gate", "in", "out")]


def test_numbers_with_exponents_are_numbers(write_run):
    path = write_run()
    path.write_text(path.read_text().replace("steps: 6", "steps: 1e1\n  optimiser: {lr: 2E-4}"))
    run = read_run_file(path, ["faithfulness.coefficient=1e6", "n_subcomponents={attn: 3, mlp: 4}"])
    assert run.training.steps == 10
    assert run.training.optimiser.lr == 2e-4
    assert run.training.faithfulness.coefficient == 1e6
    assert run.training.faithfulness.warmup_steps == 3
    assert run.training.n_subcomponents == {"attn": 3, "mlp": 4}
    assert read_run_file(path, ["model.processing=none"]).model.processing == "none"
    assert read_run_file(path, ["prepend_bos=false"]).prepend_bos is False
    with pytest.raises(ConfigError, match=r"model\.source\.x"):
        read_run_file(path, ["model.source.x=1"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "optimiser.lrr=1"], ["optimiser.lrr", "no such field"]),
        (["--set", "modle=1"], ["modle", "no such field"]),
        (["--set", "model.sauce=1"], ["model.sauce", "no such field"]),
        (["--set", "steps"], ["PATH=VALUE"]),
        (["--set", "steps=[1"], ["not YAML", "line 1, column 3:\n      [1\n"]),
        (["--set", "steps=0"], ["steps", "greater than or equal to 1", "got 0"]),
        (["--set", "preset=big"], ["preset", "paper, recent, small, spd"]),
        (["--set", "model.model_class=gpt"], ["model.model_class", "hooked_transformer"]),
        (["--set", "model.source=./nowhere"], ["nowhere", "no such directory"]),
        (["--set", "data=/nowhere.npy"], ["/nowhere.npy"]),
        (["--device", "quantum"], ["device='quantum'"]),
        (["--wandb-mode", "offline"], ["--wandb PROJECT"]),
        (["--resume"], ["checkpoint"]),
    ],
)
def test_bad_input_is_said(write_run, flags, words):
    assert_said(call("train", write_run(), *flags, code=2), *words)


def test_bad_run_files(write_run, tmp_path):
    assert_said(call("train", tmp_path / "none.yaml", code=2), "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    assert_said(call("train", tmp_path / "bad.yaml", code=2), "bad.yaml", "YAML")
    (tmp_path / "list.yaml").write_text("- 1")
    assert_said(call("train", tmp_path / "list.yaml", code=2), "mapping", "list")
    assert_said(call("train", write_run(data=None), code=2), "data: missing")
    assert_said(call("train", write_run(colour="red"), code=2), "colour", "no such field")
    result = call("train", write_run(evaluation={"n_batches": 0}), code=2)
    assert_said(result, "evaluation.data: missing", "evaluation.n_batches")


def test_an_output_is_not_overwritten(finished, write_run):
    folder, _ = finished
    result = call("train", write_run(), "--output", folder, code=2)
    assert_said(result, "already holds a run", "--resume")
    assert "resume=True" not in result.stderr
    assert isinstance(
        CliRunner().invoke(app, ["train", "nowhere.yaml", "--debug"]).exception, ConfigError
    )


def program(*arguments):
    sys.argv = ["vpd-lens", *map(str, arguments)]
    main()


@pytest.mark.xdist_group("processes")
def test_interrupted_and_resumed(write_run, tmp_path):
    path = write_run({"steps": 12, "batch_size": 64, "seq_len": 32, "log_every": 1})
    out = tmp_path / "out"
    process = start(program, "train", path, folder=tmp_path)
    status, printed = signalled(
        signal.SIGTERM,
        process,
        tmp_path,
        once=lambda: (out / "metrics.jsonl").exists() and steps_of(out),
    )
    assert status == 130, printed
    assert "stopped by SIGTERM" in printed
    assert "--resume" in printed
    assert "Traceback" not in printed
    done = record(out / "checkpoint")["step"]
    assert 1 <= done < 12
    assert not (out / "decomposition").exists()
    assert_said(call("info", out, code=2), "--resume")
    assert_said(call("train", path, "--resume", "--set", "seed=1", code=2), "seed")
    call("train", path, "--resume", "--quiet")
    assert steps_of(out) == list(range(1, 13))
    assert (
        json.loads((out / "decomposition" / "record.json").read_text())["record"]["trained_steps"]
        == 12
    )


def test_wandb_offline(write_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    call("train", write_run(), "--wandb", "vpd", "--wandb-mode", "offline", "--quiet")
    files = list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
    state = record(tmp_path / "out" / "checkpoint")
    assert state["extra"]["wandb_id"] in files[0].name


# ---------------------------------------------------------------------- eval and info


def test_eval(finished, base, tmp_path, undrawn):
    folder, _ = finished
    arguments = ["eval", folder, "--data", base / "tokens.npy"]
    arguments += ["--n-batches", 1, "--batch-size", 2, "--seq-len", 8, "--pgd-steps", "1,2"]
    new = tmp_path / "new"
    result = call(*arguments, "--json", new / "r.json", "--html", new / "r.html")
    assert "stochastic_subset" in result.stdout
    assert "blocks.0.attn.q" in result.stdout
    report = EvalReport.from_json(new / "r.json")
    assert list(report.pgd) == ["1", "2"]
    assert report.batch_shape == [2, 8]
    arguments[arguments.index("1,2")] = "none"
    beside = ["--beside", folder / "report.json", "--beside-name", "on text"]
    result = call(*arguments, *beside, "--html", new / "r.html", "--seed", 1)
    assert "on text" in result.stdout
    assert "on text" in (new / "r.html").read_text()


def test_eval_of_the_wrong_things(finished, base, tmp_path):
    folder, _ = finished
    data = ["--data", base / "tokens.npy"]
    model = ["--model", base / "model"]
    assert_said(call("eval", tmp_path / "none", *model, *data, code=2), "none")
    assert_said(call("eval", folder, *model, *data, "--pgd-steps", "a", code=2), "--pgd-steps")
    assert_said(call("eval", folder, *data, "--model-class", "bridge", code=2), "Give --model too")
    other = save_tiny(tmp_path / "other")
    result = call("eval", folder, "--model", other, *data, code=2)
    assert_said(result, "differ")


def test_graph(finished, base, tmp_path):
    from vpd_lens import AttributionGraph

    where = ["--decomposition", finished[0]]
    saved, page = tmp_path / "saved", tmp_path / "graph.html"
    result = call(
        *("graph", "w5 w9 w7", "--target", "w8", "--target", "w9", *where, "--frozen"),
        *("--save", saved, "--html", page),
    )
    assert "w8" in result.stdout
    graph = AttributionGraph.load(saved)
    assert graph.strings[-3:] == ("w5", "w9", "w7")
    assert [output.name for output in graph.outputs] == ["w8", "w9"]
    assert graph.completeness() == pytest.approx(1, abs=1e-4)
    assert "w9" in page.read_text()


def test_graph_of_the_wrong_things(finished, base, tmp_path):
    where = ["--decomposition", finished[0], "--model", base / "model"]
    result = call("graph", "", *where, code=2)
    assert_said(result, "prompt is empty")
    result = call("graph", "w5", "--target", "w6 w7", *where, code=2)
    assert_said(result, "is 2 tokens")
    result = call("graph", "w5", "--target", "w6", "--prune", "magic", *where, code=2)
    assert_said(result, "magic")


def record(folder):
    return json.loads((folder / "record.json").read_text())["record"]


def test_info_needs_neither_model_nor_transformer_lens(finished):
    folder, _ = finished
    program = (
        "import sys; from vpd_lens.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'transformer_lens' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "info", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("trained for 6 steps", "blocks.1.attn.o", "optimiser.lr", "stochastic"):
        assert word in " ".join(result.stdout.split())


def test_folders_without_a_decomposition_say_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_said(call("info", "none", code=2), "no such directory")
    assert_said(call("info", tmp_path, code=2), "there is no decomposition in it")
    half = call("graph", "a prompt", "--model", "x", code=2)
    assert_said(half, "--model is the base model of a --decomposition")


def test_an_older_version_is_told_to_upgrade(tmp_path):
    (tmp_path / "config.json").write_text('{"format_version": 99}')
    assert_said(call("info", tmp_path, code=2), "Upgrade vpd-lens")


# ------------------------------------------------------------------------- the program


def test_help_and_mistakes_in_a_run_file_do_not_wait_for_torch(tmp_path):
    program = (
        "import sys, time; start = time.process_time(); from vpd_lens.cli import app\n"
        "for words in (['train', '--help'], ['train', 'none.yaml'], ['info', 'none'],\n"
        "              ['graph', 'x', '--decomposition=none', '--model=m'], ['init'],\n"
        "              ['eval', 'none', '--model=m', '--data=d'],\n"
        "              ['harvest', 'none', '--model=m', '--data=d', '--output=o']):\n"
        "    try: app(words, standalone_mode=False)\n"
        "    except BaseException as error: pass\n"
        "seconds = time.process_time() - start\n"
        "assert 'torch' not in sys.modules; assert seconds < 2.5, seconds"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "--set" in re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert "preset: small" in result.stdout
    assert result.stderr.count("vpd-lens: ") == 5


def test_the_installed_command():
    command = Path(sys.executable).with_name("vpd-lens")
    assert os.access(command, os.X_OK)
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("vpd-lens 0.")
