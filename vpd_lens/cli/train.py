"""`vpd-lens init` and `train`: from a run file to a trained decomposition."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

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
    preset: Annotated[str, Option(help="paper, small or spd.")] = "small", debug: Debug = False
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
        Path | None, Option(help="Directory of the results, instead of the file's.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the checkpoint.")] = False,
    device: Device = None,
    wandb: Annotated[
        str | None, Option(metavar="PROJECT", help="Log to this wandb project too.")
    ] = None,
    wandb_mode: Annotated[
        str | None, Option(help="online or offline; default: wandb's own setting.")
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
        if wandb is None and wandb_mode is not None:
            raise ConfigError("--wandb-mode needs --wandb PROJECT.")
        to_wandb = {"project": wandb} | ({"mode": wandb_mode} if wandb_mode else {})

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
            wandb=to_wandb if wandb else None,
            prepend_bos=run.prepend_bos,
        )
        if not is_first():
            return
        folder = result.folder
        say(f"Decomposition: {folder / 'decomposition'}", quiet)
        if run.evaluation is not None:
            report = evaluate(model, progress=not quiet, **run.evaluation_plan())
            show(report.tables(), quiet)
            write_report(report, folder / "report.json", folder / "report.html", run.output)
            say(f"Report: {folder / 'report.html'}", quiet)
        words = (folder, run.model.source, run.data, folder / "harvest")
        name, source, data, harvest = (shlex.quote(str(word)) for word in words)
        say(
            f"Next: vpd-lens harvest {name} --model {source} --data {data} --output {harvest}\n"
            f'      vpd-lens graph "a prompt" --decomposition {name} --model {source}',
            quiet,
        )
