"""Recorded runs, sweeps over a run file, and the paper's claims in small."""

import csv
import importlib.metadata
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import save_tiny, tiny_bridge, without_drawing
from typer.testing import CliRunner

import reproduce as reproduce_script
import sweep as sweep_script
import vpd_lens
from recorded import Run, RunRecord, Target, load_decomposed, perform
from recorded import run as run_module
from recorded.grid import grid_points, overrides, parse_grid, point_name
from reproduce import reproduce
from sweep import sweep
from vpd_lens.cli import app
from vpd_lens.config import read_run_file
from vpd_lens.errors import ArtefactError, ConfigError, NonFiniteLossError, TrainingInterrupted
from vpd_lens.training import VPDConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::vpd_lens.training.log.TrainingWarning"  # runs of a few steps look failed
    ),
]
TRAINING = {
    "preset": "small",
    "n_subcomponents": 4,
    "importance": {"d_model": 8, "n_blocks": 1, "n_heads": 2, "d_ffn": 8},
    "steps": 3,
    "batch_size": 4,
    "seq_len": 8,
    "log_every": 1,
    "checkpoint_every": 1,
    "faithfulness": {"warmup_steps": 2},
}
EVALUATION = {"n_batches": 1, "batch_size": 4, "pgd_steps": [2], "pgd_restarts": 1}
GRID = ["minimality.coefficient=1e-4,1e-2", "seed=0,1"]
QUIET = {"progress": False, "say": lambda _: None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a saved model and tokens."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder / "model", n_layers=1)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 29, 2000, np.uint16))
    return folder


def write_run(base, folder, **changes):
    run = {
        "model": {"source": str(base / "model")},
        "data": str(base / "tokens.npy"),
        "output": str(folder / "out"),
        "training": TRAINING,
        "evaluation": {"data": str(base / "tokens.npy"), **EVALUATION},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value}))
    return path


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished 2x2 sweep through the command line; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_run(base, folder)
    flags = [part for axis in GRID for part in ("--grid", axis)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_drawing_reports(monkeypatch)
        result = CliRunner().invoke(sweep_script.app, [str(path), *flags])
    assert result.exit_code == 0, (result.output, result.exception)
    return path, folder / "out", result


@pytest.fixture(autouse=True)
def _no_report_pages(monkeypatch):
    """Making them takes longer than all else; `finished` has them."""
    without_report_pages(monkeypatch)


def without_report_pages(monkeypatch):
    monkeypatch.setattr(vpd_lens.EvalReport, "to_html", lambda *_, **__: None)


def without_drawing_reports(monkeypatch):
    """Reports have their pages, without what is drawn; pages of experiments are whole."""
    to_html = vpd_lens.EvalReport.to_html

    def undrawn(*arguments):
        with pytest.MonkeyPatch.context() as within:
            without_drawing(within)
            return to_html(*arguments)

    monkeypatch.setattr(vpd_lens.EvalReport, "to_html", undrawn)


@pytest.fixture
def copied(finished, base, tmp_path):
    """The run file and the runs of `finished`, free to change."""
    shutil.copytree(finished[1], tmp_path / "out")
    return write_run(base, tmp_path), tmp_path / "out"


class Trained:
    """Counts what `perform` trains: the steps each call begins at."""

    def __init__(self, monkeypatch):
        self.resumed = []
        train = run_module.train

        def counted(*arguments, resume, **options):
            self.resumed.append(resume)
            return train(*arguments, resume=resume, **options)

        monkeypatch.setattr(run_module, "train", counted)


# ------------------------------------------------------------------------------ records


@pytest.fixture(scope="module")
def record(finished):
    _, out, _ = finished
    return RunRecord.read(out / "records" / "minimality.coefficient=0.0001,seed=1.json")


def test_a_record_says_everything(record, base):
    assert record.name == "minimality.coefficient=0.0001,seed=1"
    assert record.config.seed == record.seed == 1
    assert record.config.minimality.coefficient == 1e-4
    assert record.config.steps == record.report.trained_steps == 3
    assert record.target["model"]["source"] == str(base / "model")
    assert record.evaluation["pgd_steps"] == [2]
    assert re.fullmatch("[0-9a-f]{64}", record.weights)
    assert set(record.versions) == {"vpd_lens", "torch", "transformer_lens", "python"}
    assert record.versions["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.date)
    assert record.machine.cpu
    assert record.machine.n_cpus >= 1
    assert record.training_seconds > 0
    assert record.command


def test_a_record_survives_its_file(record, tmp_path):
    record.write(tmp_path / "new" / "record.json")
    assert RunRecord.read(tmp_path / "new" / "record.json") == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]
    with_infinity = record.model_copy(update={"training_seconds": float("inf")})
    with_infinity.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == with_infinity


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "[]", "an object"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format_version"),
        (lambda text: text.replace('"steps": 3', '"steps": 0'), "steps"),
        (lambda text: text.replace('"machine"', '"maschine"'), "machine"),
    ],
)
def test_a_damaged_record_is_refused(record, tmp_path, damage, words):
    path = tmp_path / "record.json"
    record.write(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtefactError, match=words) as error:
        RunRecord.read(path)
    assert str(path) in str(error.value)
    assert "delete it" in str(error.value)


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="No such file"):
        RunRecord.read(tmp_path / "none.json")


# ------------------------------------------------------------------------------- grids


def test_a_grid_is_a_product_of_yaml_values():
    grid = parse_grid(["optimiser.lr=1e-3,3e-3", "n_subcomponents={attn: 2, mlp: 3},8", "sites=a"])
    assert grid["optimiser.lr"] == [1e-3, 3e-3]
    assert grid["n_subcomponents"] == [{"attn": 2, "mlp": 3}, 8]
    points = grid_points(grid)
    assert len(points) == 4
    assert points[1] == {"optimiser.lr": 1e-3, "n_subcomponents": 8, "sites": "a"}
    assert point_name(points[1]) == "optimiser.lr=0.001,n_subcomponents=8,sites=a"
    assert re.fullmatch(r"[\w.,=+-]+", point_name(points[0]))


def test_a_point_is_what_set_would_make_of_it(base, tmp_path):
    path = write_run(base, tmp_path)
    for point in grid_points(parse_grid(["optimiser.lr=1e-5,2", "sites=[mlp],attn,'1e5'"])):
        config = read_run_file(path, overrides(point)).training
        assert config.optimiser.lr == point["optimiser.lr"]
        sites = point["sites"]
        assert config.sites == (sites if isinstance(sites, str) else tuple(sites))


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([], "at least one --grid"),
        (["seed"], "PATH=V1,V2"),
        (["seed="], "PATH=V1,V2"),
        (["=1,2"], "PATH=V1,V2"),
        (["seed=[1"], "not YAML"),
        (["seed=1,1"], "given twice"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["output=a,b"], "use --output"),
        (["sead=1"], "sead: there is no such field"),
        (["steps=3,0"], "steps"),
        (["sites=a/b,a|b"], "names"),
    ],
)
def test_bad_grids_train_nothing(base, tmp_path, grid, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        sweep(write_run(base, tmp_path), grid, **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_an_evaluation_and_whole_models(base, tmp_path):
    with pytest.raises(ConfigError, match="no evaluation section"):
        sweep(write_run(base, tmp_path, evaluation=None), GRID, **QUIET)
    model = {"source": str(base / "model"), "base": str(base / "model")}
    with pytest.raises(ConfigError, match="experiments are of whole models"):
        sweep(write_run(base, tmp_path, model=model), GRID, **QUIET)


# ------------------------------------------------------------------------------- sweeps


def test_what_a_sweep_leaves(finished):
    _, out, result = finished
    names = [f"minimality.coefficient={c},seed={s}" for c in ("0.0001", "0.01") for s in (0, 1)]
    assert {path.name for path in out.iterdir()} == {"records", "report.html", "rows.csv", "runs"}
    assert sorted(path.stem for path in (out / "records").iterdir()) == names
    assert sorted(path.name for path in (out / "runs").iterdir()) == names
    for name in names:
        assert f"VPD evaluation of {name}" in (out / "runs" / name / "report.html").read_text()
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [row["name"] for row in rows] == names
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    for row in rows:
        report = RunRecord.read(out / "records" / f"{row['name']}.json").report
        assert float(row["l0"]) == report.summary()["l0"]
        assert float(row["kl_pgd_2"]) == report.pgd["2"]["mean"]
    assert "Run 4 of 4" in result.stdout
    assert "PGD-2" in result.stdout


def test_the_page_of_a_sweep(finished):
    page = (finished[1] / "report.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "seed=1" in page  # a series
    for label in (">0.0001<", ">0.01<", "PGD-2 KL", "stochastic KL"):
        assert label in page


def test_a_sweep_gives_what_train_gives(finished, base, tmp_path):
    path = write_run(base, tmp_path)
    flags = ["--set", "seed=1", "--set", "minimality.coefficient=1e-2", "--quiet"]
    result = CliRunner().invoke(app, ["train", str(path), *flags])
    assert result.exit_code == 0, result.output
    alone = vpd_lens.EvalReport.from_json(tmp_path / "out" / "report.json")
    record = RunRecord.read(finished[1] / "records" / "minimality.coefficient=0.01,seed=1.json")
    assert record.report == alone


def test_finished_runs_are_not_repeated(copied, monkeypatch):
    path, out = copied
    trained = Trained(monkeypatch)
    before = (out / "rows.csv").read_text()
    sweep(path, GRID, **QUIET)
    assert trained.resumed == []
    assert (out / "rows.csv").read_text() == before


def test_a_lost_record_is_measured_again_without_training(copied, monkeypatch):
    path, out = copied
    lost = out / "records" / "minimality.coefficient=0.01,seed=0.json"
    before = RunRecord.read(lost)
    lost.unlink()
    trained = Trained(monkeypatch)
    sweep(path, GRID, **QUIET)
    assert trained.resumed == [True]
    assert RunRecord.read(lost).report == before.report
    assert RunRecord.read(lost).training_seconds == before.training_seconds


def test_a_changed_configuration_is_trained_anew(copied, monkeypatch):
    path, out = copied
    trained = Trained(monkeypatch)
    half = [GRID[0], "seed=0"]
    result = sweep(path, half, changes=["steps=2"], **QUIET)
    assert trained.resumed == [False] * 2
    assert {record["training_seconds"] > 0 for record in result.rows} == {True}
    steps = [RunRecord.read(file).config.steps for file in (out / "records").iterdir()]
    assert sorted(steps) == [2, 2, 3, 3]
    previous = [folder for folder in (out / "runs").iterdir() if folder.suffix == ".previous"]
    assert len(previous) == 2
    assert (previous[0] / "decomposition").is_dir()


def test_a_changed_evaluation_is_only_measured_anew(copied, monkeypatch):
    path, out = copied
    trained = Trained(monkeypatch)
    sweep(path, [GRID[0], "seed=0"], changes=["evaluation.pgd_steps=[1]"], **QUIET)
    assert trained.resumed == [True] * 2
    assert not list((out / "runs").glob("*.previous"))


def test_a_damaged_record_stops_a_sweep(copied):
    path, out = copied
    (out / "records" / "minimality.coefficient=0.01,seed=0.json").write_text("{")
    result = CliRunner().invoke(sweep_script.app, [str(path), "--grid", GRID[0], "--grid", GRID[1]])
    assert result.exit_code == 2
    assert "seed=0.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupted_sweep_goes_on(base, tmp_path, monkeypatch):
    """Stopped within the second run, after a checkpoint: the result is the uninterrupted one."""
    path = write_run(base, tmp_path)
    train, calls = run_module.train, []

    def stopping(*arguments, **options):
        calls.append(options["resume"])
        if len(calls) == 2:
            stop_after(monkeypatch, steps=2)
        return train(*arguments, **options)

    monkeypatch.setattr(run_module, "train", stopping)
    with pytest.raises(TrainingInterrupted, match="Repeat the command"):
        sweep(path, ["seed=0,1"], **QUIET)
    monkeypatch.undo()
    without_report_pages(monkeypatch)  # which that has undone, too
    assert [file.name for file in (tmp_path / "out" / "records").iterdir()] == ["seed=0.json"]
    trained = Trained(monkeypatch)
    sweep(path, ["seed=0,1"], **QUIET)
    assert trained.resumed == [True]
    whole = sweep(path, ["seed=1"], tmp_path / "whole", **QUIET)
    resumed = RunRecord.read(tmp_path / "out" / "records" / "seed=1.json")
    assert RunRecord.read(whole.folder / "records" / "seed=1.json").report == resumed.report


def stop_after(monkeypatch, steps):
    """Stop the training that begins next after so many steps, as Ctrl-C does."""
    import signal

    from vpd_lens.training.step import Stepper

    step = Stepper.step

    def counted(self, batch, index, *rest):
        if index == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, index, *rest)

    monkeypatch.setattr(Stepper, "step", counted)


def test_a_run_without_a_checkpoint_begins_again(base, tmp_path, monkeypatch):
    path = write_run(base, tmp_path)
    begun = tmp_path / "out" / "runs" / "seed=0"
    begun.mkdir(parents=True)
    (begun / "metrics.jsonl").write_text('{"step": 1, "seconds_per_step": 100.0}\n')
    trained = Trained(monkeypatch)
    result = sweep(path, ["seed=0"], **QUIET)
    assert trained.resumed == [False]
    assert result.rows[0]["training_seconds"] < 100


def test_a_diverging_run_does_not_stop_the_others(base, tmp_path, monkeypatch):
    path = write_run(base, tmp_path)
    train = run_module.train

    def diverging(model, data, config, **options):
        if config.seed == 0:
            raise NonFiniteLossError("the loss is NaN")
        return train(model, data, config, **options)

    monkeypatch.setattr(run_module, "train", diverging)
    result = sweep(path, ["seed=0,1"], **QUIET)
    assert result.diverged == {"seed=0": "the loss is NaN"}
    assert [row["name"] for row in result.rows] == ["seed=1"]
    assert "Diverged and left out: seed=0" in (result.folder / "report.html").read_text()


def test_a_grid_of_anything(base, tmp_path):
    """Settings that share a name with a figure, and evaluations that differ."""
    grid = ["n_subcomponents=3", "evaluation.pgd_steps=[1],[]"]
    result = sweep(write_run(base, tmp_path), grid, **QUIET)
    assert [row["n_subcomponents"] for row in result.rows] == [3, 3]
    assert [row["C"] for row in result.rows] == [21, 21]
    assert [row.get("kl_pgd_1") is None for row in result.rows] == [False, True]
    rows = list(csv.DictReader((result.folder / "rows.csv").open()))
    assert rows[1]["kl_pgd_1"] == ""
    assert "PGD-1 KL" in (result.folder / "report.html").read_text()


def test_a_sweep_in_which_everything_diverges(base, tmp_path, monkeypatch):
    def diverging(*_, **__):
        raise NonFiniteLossError("the loss is NaN")

    monkeypatch.setattr(run_module, "train", diverging)
    result = sweep(write_run(base, tmp_path), ["seed=0,1"], **QUIET)
    assert len(result.diverged) == 2
    assert result.rows == []
    assert "Diverged" in (result.folder / "report.html").read_text()


def test_sweep_from_the_command_line(finished, base, tmp_path):
    path = write_run(base, tmp_path)
    target = tmp_path / "elsewhere"
    arguments = [path, "--grid", "steps=1,2", "--set", "seed=5", "--output", target, "-q"]
    result = CliRunner().invoke(sweep_script.app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.output) == (0, "")
    assert RunRecord.read(target / "records" / "steps=2.json").seed == 5
    result = CliRunner().invoke(sweep_script.app, [str(path), "--grid", "colour=red"])
    assert result.exit_code == 2
    assert "colour: there is no such field" in result.stderr


# ------------------------------------------------------------------------------- one run


def test_a_run_on_data_in_memory(tmp_path, tokens):
    config = VPDConfig.from_mapping(TRAINING)
    target = Target({"name": "tiny"}, tiny_bridge, tokens, held_out=tokens[:8])
    plan = {"batch_size": 4, "n_batches": 2, "pgd_steps": ()}
    lines = []
    one = Run("one", target, config, plan)
    record = perform(one, tmp_path, progress=False, say=lines.append)
    assert record.report.batch_shape == [4, 8]
    assert perform(one, tmp_path, progress=False, say=lines.append) == record
    assert lines == ["one: training", "one: already recorded"]
    model = load_decomposed(one, tmp_path)
    again = vpd_lens.evaluate(model, tokens[:8], progress=False, **plan)
    assert again == record.report
    other = Target({"name": "another"}, lambda: tiny_bridge(seed=1), tokens, tokens[:8])
    changed = perform(Run("one", other, config, plan), tmp_path, **QUIET)
    assert changed.weights != record.weights
    assert (tmp_path / "runs" / "one.previous" / "decomposition").is_dir()


# ----------------------------------------------------------------------------- reproduce


def test_unknown_claims_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\['magic'\] are not known; choose from adversary"):
        reproduce(tmp_path, ["seeds", "magic"])
    result = CliRunner().invoke(reproduce_script.app, ["--claims", "magic"])
    assert result.exit_code == 2
    assert "magic" in result.stderr


@pytest.fixture(scope="module")
def first_claim(tmp_path_factory):
    """The folder of a claim with a few steps of everything, its command, and what that printed."""
    folder = tmp_path_factory.mktemp("claims")
    arguments = ["--claims", "adversary", "--output", str(folder), "--quick"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_report_pages(monkeypatch)
        result = CliRunner().invoke(reproduce_script.app, arguments)
    return folder, arguments, result


def test_one_claim_from_the_command_line(first_claim, monkeypatch):
    """The second call trains nothing."""
    folder, arguments, result = first_claim
    assert result.exit_code == 0, (result.output, result.exception)
    assert "without it" in result.stdout
    page = (folder / "report.html").read_text()
    assert "No figure on this page means anything" in page
    assert page.count("<svg") == 1
    stored = (folder / "claims" / "adversary.json").read_text()
    assert json.loads(stored)["records"] == [
        "vpd",
        "vpd-without-adversary",
        "vpd-without-adversary,gentler",
    ]
    monkeypatch.setattr(run_module, "train", None)
    again = CliRunner().invoke(reproduce_script.app, arguments)
    assert "vpd: already recorded" in again.stdout
    assert (folder / "claims" / "adversary.json").read_text() == stored


def test_every_claim_from_its_runs_to_the_page(first_claim, tmp_path, monkeypatch):
    """The page of all of them; that of one is in `first_claim`."""
    names = ["adversary", "pareto", "splitting", "seeds", "controls", "generations"]
    write = reproduce_script.write_page

    def last(path, title, about, sections, *rest):
        if len(sections) == len(names):
            write(path, title, about, sections, *rest)

    monkeypatch.setattr(reproduce_script, "write_page", last)
    monkeypatch.setattr("claims.generations.N_NEW", 3)
    shutil.copytree(first_claim[0], tmp_path, dirs_exist_ok=True)
    sections = reproduce(tmp_path, quick=True, **QUIET)
    assert [section.name for section in sections] == names
    by_name = {section.name: section for section in sections}
    assert [row["training"] for row in by_name["adversary"].rows] == [
        "with the adversary",
        "without it",
        "without it, coefficient 0.00015",
    ]
    assert [row["method"] for row in by_name["pareto"].rows] == ["VPD"] * 5 + ["SPD"] * 3
    assert [row["C"] for row in by_name["splitting"].rows] == [56, 112, 224, 448]
    shares = [row["multiple matches"] for row in by_name["splitting"].rows]
    assert shares[:2] == [None, None]
    assert all(0 <= share <= 1 for share in shares[2:])
    starts = [row["start"] for row in by_name["seeds"].rows]
    assert starts == ["aligned"] * 15 + ["random"] * 15
    assert [row["masks"] for row in by_name["generations"].rows[:2]] == ["(the prompt)", "target"]
    records = {path.stem: RunRecord.read(path) for path in (tmp_path / "records").iterdir()}
    assert len(records) == 20
    random_starts = [name for name in records if records[name].config.initialisation == "random"]
    assert sorted(random_starts) == [
        "vpd,start=random",
        "vpd,start=random,seed=1",
        "vpd,start=random,seed=2",
    ]
    assert records["vpd,random-weights"].weights != records["vpd"].weights
    assert records["vpd,random-weights"].config == records["vpd"].config
    assert records["spd,coefficient=0.005"].config.adversary.coefficient == 0
    for name in names:
        stored = json.loads((tmp_path / "claims" / f"{name}.json").read_text())
        assert stored["rows"] == [dict(row) for row in by_name[name].rows]
        assert set(stored["records"]) <= set(records)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r"(src|href)=\"(?!#)", page)
