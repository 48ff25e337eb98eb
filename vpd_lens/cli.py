"""`vpd-lens train | plan | eval | graph | harvest | sweep | reproduce | toy | info`.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpd_lens import __version__
from vpd_lens.commands.experiments import reproduce_command, sweep_command, toy_command
from vpd_lens.commands.graph import graph_command
from vpd_lens.commands.harvest import harvest_command
from vpd_lens.commands.options import (
    Debug,
    Device,
    Overrides,
    Quiet,
    decomposition_folder,
    quoted,
    readable_errors,
    say,
)
from vpd_lens.commands.plan import plan_command
from vpd_lens.errors import ConfigError

if TYPE_CHECKING:
    from vpd_lens.evaluation import EvalReport

app = typer.Typer(
    name="vpd-lens",
    help="Decompose the parameters of a TransformerLens model (VPD).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `vpd-lens`."""
    app()


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"vpd-lens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command("train")
def train_command(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the results, instead of the file's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    device: Device = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log to this wandb project too.")
    ] = None,
    wandb_mode: Annotated[
        str | None, typer.Option(help="online or offline; default: wandb's own setting.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a decomposition as a run file says.

    The run file is YAML:

        model: {source: DIRECTORY_OR_NAME, model_class: auto, processing: default}

        data: PATH_OR_NAME

        output: DIRECTORY

        training: {preset: small, steps: 2000, optimiser: {lr: 1e-3}}

        evaluation: {data: HELD_OUT_DATA, n_batches: 8}   # optional

    The output directory receives metrics.jsonl, config.yaml, checkpoint/ and
    decomposition/, and with an evaluation report.json and report.html.
    """
    with readable_errors(debug):
        from vpd_lens.config import read_run_file
        from vpd_lens.models import load_model
        from vpd_lens.training import train
        from vpd_lens.training.distributed import claim_gpu, is_first

        changes = list(overrides or [])
        changes += [f"output={quoted(output)}"] if output else []
        changes += [f"training.device={quoted(device)}"] if device else []
        run = read_run_file(run_file, changes)
        claim_gpu(run.training.device)
        model = load_model(**run.model.model_dump(), device=run.training.device)
        result = train(
            model,
            run.data,
            run.training,
            output=run.output,
            resume=resume,
            progress=not quiet,
            wandb=_wandb_arguments(wandb, wandb_mode),
            prepend_bos=run.prepend_bos,
        )
        if not is_first():
            return
        say(f"Decomposition: {result.folder / 'decomposition'}", quiet)
        if run.evaluation is not None:
            report = _evaluate(model, run.evaluation_plan(), quiet)
            _write(report, result.folder / "report.json", result.folder / "report.html", run.output)
            say(f"Report: {result.folder / 'report.html'}", quiet)


@app.command("init")
def init_command(
    preset: Annotated[str, typer.Argument(help="paper, small or spd.")] = "small",
    debug: Debug = False,
) -> None:
    """Print a run file in which every field is explained: vpd-lens init > run.yaml."""
    with readable_errors(debug):
        from vpd_lens.config import template

        typer.echo(template(preset), nl=False)


@app.command("eval")
def eval_command(
    decomposition: Annotated[Path, typer.Argument(help="A saved decomposition, or a run.")],
    model: Annotated[str, typer.Option(metavar="SOURCE", help="Its base model.")],
    data: Annotated[str, typer.Option(help="Held-out data: path, or hf:NAME.")],
    n_batches: Annotated[int, typer.Option(min=1, help="Batches.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sequence; default: the model's context.")
    ] = None,
    pgd_steps: Annotated[
        str, typer.Option(help="Steps of the adversary, separated by commas; `none` skips it.")
    ] = "20,40,80,160,320",
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures as JSON.")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="JSON of another report, shown next to this one.")
    ] = None,
    beside_name: Annotated[str, typer.Option(help="What to call it.")] = "beside",
    model_class: Annotated[str, typer.Option(help="auto, hooked_transformer or bridge.")] = "auto",
    processing: Annotated[str, typer.Option(help="default, none or full.")] = "default",
    seed: Annotated[int, typer.Option(help="Seed of masks and adversary.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a saved decomposition and print the tables."""
    with readable_errors(debug):
        steps = _step_counts(pgd_steps)
        folder = decomposition_folder(decomposition)

        from vpd_lens.decomposition.saving import load
        from vpd_lens.evaluation import EvalReport
        from vpd_lens.models import load_model

        other = EvalReport.from_json(beside) if beside else None
        loaded = load(folder, load_model(model, model_class, device or "auto", processing))  # type: ignore[arg-type]
        plan: dict[str, Any] = {
            "data": data,
            "n_batches": n_batches,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "pgd_steps": steps,
            "seed": seed,
        }
        report = _evaluate(loaded, plan, quiet, other, beside_name)
        _write(report, json, html, str(decomposition), other, beside_name)


@app.command("info")
def info_command(
    decomposition: Annotated[Path, typer.Argument(help="A saved decomposition, or a run.")],
    debug: Debug = False,
) -> None:
    """Say what a saved decomposition is, without loading its model."""
    with readable_errors(debug):
        folder = decomposition_folder(decomposition)

        from rich import print as rich_print

        from vpd_lens.description import describe

        rich_print(describe(folder))


app.command("plan")(plan_command)
app.command("sweep")(sweep_command)
app.command("reproduce")(reproduce_command)
app.command("toy")(toy_command)
app.command("harvest")(harvest_command)
app.command("graph")(graph_command)


# --------------------------------------------------------------------------- helpers


def _evaluate(
    model: Any,
    plan: dict[str, Any],
    quiet: bool,
    beside: EvalReport | None = None,
    beside_name: str = "beside",
) -> EvalReport:
    from rich import print as rich_print

    from vpd_lens.evaluation import evaluate

    report = evaluate(model, progress=not quiet, **plan)
    if not quiet:
        rich_print(report.tables(beside, beside_name))
    return report


def _write(
    report: EvalReport,
    json: Path | None,
    html: Path | None,
    name: str,
    beside: EvalReport | None = None,
    beside_name: str = "beside",
) -> None:
    for path in (json, html):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json is not None:
        report.to_json(json)
    if html is not None:
        report.to_html(html, f"VPD evaluation of {name}", beside, beside_name)


def _step_counts(text: str) -> tuple[int, ...]:
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = (-1,)
    if min(steps) < 0:
        raise ConfigError(f"--pgd-steps {text!r}: expected numbers separated by commas, or none.")
    return steps


def _wandb_arguments(project: str | None, mode: str | None) -> dict[str, Any] | None:
    if project is None:
        if mode is not None:
            raise ConfigError("--wandb-mode needs --wandb PROJECT.")
        return None
    return {"project": project} | ({"mode": mode} if mode else {})
