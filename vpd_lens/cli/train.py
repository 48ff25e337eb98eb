"""`vpd-lens init` and `train`: from a run file to a trained decomposition."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_lens.cli.options import (
    Debug,
    Device,
    Overrides,
    Quiet,
    RunFilePath,
    quoted,
    readable_errors,
    say,
    show,
    write_report,
)
from vpd_lens.errors import ConfigError


def init_command(
    preset: Annotated[str, typer.Option(help="paper, small or spd.")] = "small",
    debug: Debug = False,
) -> None:
    """Print a run file in which every field is explained.

    Write it with `vpd-lens init > run.yaml`, change what differs, and give it to train.
    """
    with readable_errors(debug):
        from vpd_lens.config import template

        typer.echo(template(preset), nl=False)


def train_command(
    run_file: RunFilePath,
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

    `vpd-lens init > run.yaml` writes a run file with every field explained.

    The output directory receives metrics.jsonl, config.yaml, checkpoint/ and
    decomposition/, and with an evaluation report.json and report.html.
    """
    with readable_errors(debug):
        from vpd_lens.config import read_run_file

        changes = list(overrides or [])
        changes += [f"output={quoted(output)}"] if output else []
        changes += [f"training.device={quoted(device)}"] if device else []
        run = read_run_file(run_file, changes)
        to_wandb = _wandb_arguments(wandb, wandb_mode)

        from vpd_lens.evaluation import evaluate
        from vpd_lens.models import load_model
        from vpd_lens.training import train
        from vpd_lens.training.distributed import claim_gpu, is_first

        claim_gpu(run.training.device)
        model = load_model(**run.model.model_dump(), device=run.training.device)
        result = train(
            model,
            run.data,
            run.training,
            output=run.output,
            resume=resume,
            progress=not quiet,
            wandb=to_wandb,
            prepend_bos=run.prepend_bos,
        )
        if not is_first():
            return
        say(f"Decomposition: {result.folder / 'decomposition'}", quiet)
        if run.evaluation is not None:
            report = evaluate(model, progress=not quiet, **run.evaluation_plan())
            show(report.tables(), quiet)
            page = result.folder / "report.html"
            write_report(report, result.folder / "report.json", page, run.output)
            say(f"Report: {page}", quiet)
        source, data = shlex.quote(run.model.source), shlex.quote(run.data)
        folder = shlex.quote(str(result.folder))
        say(
            f"Next: vpd-lens harvest {folder} --model {source} --data {data} --output "
            f"{shlex.quote(str(result.folder / 'harvest'))}\n"
            f'      vpd-lens graph "a prompt" --decomposition {folder} --model {source}',
            quiet,
        )


def _wandb_arguments(project: str | None, mode: str | None) -> dict[str, Any] | None:
    if project is None:
        if mode is not None:
            raise ConfigError("--wandb-mode needs --wandb PROJECT.")
        return None
    return {"project": project} | ({"mode": mode} if mode else {})
