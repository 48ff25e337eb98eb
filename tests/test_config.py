"""Configurations: presets, files, overrides, and what is said about mistakes."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import vpd_lens
import vpd_lens.errors
from vpd_lens.config import (
    CausalImportanceConfig,
    Config,
    OptimiserConfig,
    VPDConfig,
    read_run_file,
    template,
)
from vpd_lens.errors import ConfigError


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(template("small"))
    return path


def test_configurations_are_imported_without_torch_and_fast():
    program = (
        "import sys, time; start = time.process_time(); import vpd_lens; vpd_lens.VPDConfig; "
        "from vpd_lens.config import read_run_file; seconds = time.process_time() - start; "
        "assert not {'torch', 'transformer_lens'} & set(sys.modules); assert seconds < 1.5, seconds"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_completed_and_nothing_else():
    assert sorted(dir(vpd_lens)) == sorted([*vpd_lens.__all__, "__version__"])


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    """Importing `package.name` puts the module in the place of a function that is called so.

    `vpd_lens.plots` is a module.
    """
    found = [m.name for m in pkgutil.walk_packages(vpd_lens.__path__, "vpd_lens.")]
    modules = [importlib.import_module(name) for name in found if not name.endswith("__main__")]
    for module in [vpd_lens, *modules]:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            hidden = isinstance(value, ModuleType) and value is not vpd_lens.plots
            assert not hidden, f"{module.__name__}.{name}"


# ------------------------------------------------------------------------- templates


@pytest.mark.parametrize("preset", ["paper", "small", "spd", "targeted"])
def test_a_template_is_its_preset_commented_and_uncommented(preset, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(template(preset))
    expected = getattr(VPDConfig, preset)()
    assert read_run_file(path).training == expected
    assert read_run_file(path).evaluation is None
    lines = [
        line if line.lstrip().startswith("# ") else line.replace("#", "", 1)
        for line in template(preset).splitlines()
    ]
    path.write_text("\n".join(lines))
    assert read_run_file(path).training == expected
    assert read_run_file(path).evaluation.n_batches == 8


def test_every_field_has_help():
    lacking = [
        f
        for kind in Config.__subclasses__()
        for f in kind.model_fields.values()
        if not f.description
    ]
    assert lacking == []
    assert VPDConfig.model_fields["seq_len"].description.startswith("Tokens per sequence")


# ------------------------------------------------------------------ files, overrides


def test_fields_of_a_section_that_are_not_named_stay_the_preset_s():
    merged = VPDConfig.small().merged({"optimiser": {"lr": 1}, "n_subcomponents": {"attn": 3}})
    assert merged == VPDConfig.small().replaced({"optimiser.lr": 1, "n_subcomponents": {"attn": 3}})
    assert merged.merged({"n_subcomponents": {"mlp": 2}}).n_subcomponents == {"mlp": 2}


def test_a_config_of_version_0_1_loads():
    saved = VPDConfig.spd(importance=CausalImportanceConfig(kind="mlp")).model_dump(mode="json")
    assert VPDConfig(**saved).model_dump(mode="json") == saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainig.steps=3", "trainig: there is no such field; did you mean training"),
        ("stpes=3", "stpes: there is no such field; did you mean steps"),
        ("optimizer.lr=1", "optimizer: there is no such field; did you mean optimiser"),
        ("training.optimizer.lr=1", "training.optimizer: .*did you mean optimiser"),
        ("initialization=aligned", "did you mean initialisation"),
        ("lr=1", "did you mean adversary.lr or optimiser.lr"),
        ("minimality.coeficient=1", "training.minimality.coeficient: .*did you mean coefficient"),
        ("preset=smal", "training.preset: .*small, spd, targeted; did you mean small"),
        ("model.source.x=1", "model.source.x: source is 'gpt2', which has no fields"),
    ],
)
def test_what_was_meant_is_guessed(run_file, change, message):
    with pytest.raises(ConfigError, match=message):
        read_run_file(run_file, [change])


def test_all_that_is_wrong_is_said_at_once(run_file):
    run_file.write_text("data: 3\ntraining: {steps: 0}\nevaluation: {n_batches: 0}")
    with pytest.raises(ConfigError) as caught:
        read_run_file(run_file)
    for words in (
        f"{run_file} is not valid",
        "model: missing",
        "data: Input should be a valid string (got 3)",
        "training.steps: Input should be greater than or equal to 1 (got 0)",
        "evaluation.data: missing",
        "evaluation.n_batches: Input should be greater than or equal to 1 (got 0)",
    ):
        assert words in str(caught.value)


def test_a_section_on_its_own_explains_itself():
    with pytest.raises(ConfigError, match=r"OptimiserConfig is not valid:\n  lr: .*got -1"):
        OptimiserConfig(lr=-1)


def test_yaml_errors_keep_their_lines(run_file):
    run_file.write_text("a: [\nb: 3")
    with pytest.raises(ConfigError) as caught:
        read_run_file(run_file)
    assert f'\n    in "{run_file}", line 1, column 4:\n      a: [\n         ^\n' in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="there is no such file"):
        read_run_file(run_file.with_name("none.yaml"))


# ---------------------------------------------------------------- names of arguments


def test_what_decompose_does_not_take_is_answered_with_what_it_does():
    from conftest import tiny_bridge

    model = tiny_bridge()
    for arguments, message in (
        ({"n_components": 4}, "no argument 'n_components'; did you mean n_subcomponents?"),
        ({"data": VPDConfig.small()}, "data is a VPDConfig; pass config="),
        ({"sites": ["blocks.0.attn.W_Q"]}, "W_Q is attn.q here"),
        ({"sites": ["blocks.0.mlp.inn"]}, "did you mean blocks.0.mlp.in?"),
    ):
        with pytest.raises(vpd_lens.errors.VPDError) as caught:
            vpd_lens.decompose(model, **arguments)
        assert message in str(caught.value)
        assert "vpd" not in model.__dict__


# ---------------------------------------------------------------- the width of terminals


def test_the_bar_and_the_losses_fit_80_columns(tmp_path, monkeypatch):
    import io

    from rich.console import Console

    from vpd_lens.training import log as logging

    metrics = {"stochastic": 2.22, "adversarial": 5.83, "l0": 48.6, "faithfulness": 0.0149}
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(logging, "Console", lambda **_: screen)
    with logging.MetricsLog(tmp_path, 400_000) as log:
        log.advance(123_456)
        log.write(123_456, {**metrics, "seconds_per_step": 0.1})
    shown = screen.file.getvalue()
    for words in ("123456/400000", "0:00:00", "stochastic 2.22", "faithfulness 0.0149"):
        assert words in shown
    assert "…" not in shown


def test_lines_in_a_pipe_are_not_broken(tmp_path, capsys):
    from vpd_lens.training.log import MetricsLog

    metrics = {"stochastic": 2.22, "adversarial": 5.83, "l0": 48.6, "faithfulness": 0.0149}
    with MetricsLog(tmp_path, 400_000) as log:
        log.write(123_456, {**metrics, "seconds_per_step": 0.1})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 123456/400000")
    assert line.endswith("min left")
