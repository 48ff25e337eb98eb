"""`vpd-lens init`, `plan` and `train`: from a run file to a trained decomposition."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from vpd_lens.cli import options
from vpd_lens.cli.options import quoted, readable_errors, say
from vpd_lens.errors import ConfigError


def init_command(
    preset: Annotated[str, Option(help="paper, recent, small, spd or targeted.")] = "small",
    debug: options.Debug = False,
) -> None:
    """Print a run file in which every field is explained.

    Write it with `vpd-lens init > run.yaml`, change what differs, and give it to train.
    """
    with readable_errors(debug):
        from vpd_lens.config import template

        typer.echo(template(preset), nl=False)


def plan_command(
    model: Annotated[
        str | None, Option(metavar="SOURCE", help="The target: a directory, or a name.")
    ] = None,
    run: Annotated[
        Path | None, Option(metavar="RUN.YAML", help="Plan this run file instead.")
    ] = None,
    preset: Annotated[str, Option(help="A preset, as in init; not with --run.")] = "paper",
    overrides: options.Overrides = None,
    processes: Annotated[int, Option(min=1, help="Processes (GPUs) that share the batch.")] = 1,
    measure: Annotated[
        int | None,
        Option(
            min=1,
            metavar="SEQUENCES",
            help="Time real steps of so many sequences here, and scale that by the FLOP.",
        ),
    ] = None,
    device: Annotated[
        str, Option(help="cuda: bf16 as on a GPU; cpu: fp32. Also where --measure runs.")
    ] = "cuda",
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    json: Annotated[Path | None, Option(help="Write all figures as JSON.")] = None,
    debug: options.Debug = False,
) -> None:
    """Count the FLOP and the memory of a training step by running it without values.

    Only the configuration of a Hugging Face model is read. No device is needed but for --measure.
    """
    with readable_errors(debug):
        from vpd_lens.config import read_run_file

        if (model is None) == (run is None):
            raise ConfigError("give either --model or --run.")
        start = []
        if model is not None:
            start = ["data=none", "output=none", f"training.preset={quoted(preset)}"]
            start += [f"model.source={quoted(model)}", f"model.model_class={model_class}"]
            start += [f"model.processing={processing}"]
        found = read_run_file(run, [*start, *(overrides or [])])
        config = found.training
        rows, rest = divmod(config.batch_size, processes)
        if rest:
            raise ConfigError(f"batch_size={config.batch_size} is not a multiple of {processes}.")
        from vpd_lens.decomposition.attach import attach
        from vpd_lens.decomposition.ranks import site_sizes, sites_table
        from vpd_lens.models import load_model
        from vpd_lens.storage import write_json
        from vpd_lens.training.plan import measured_step, plan_step

        target = load_model(**found.model.loading, weights=False)
        context = int(target.cfg.n_ctx)  # type: ignore[union-attr, arg-type]
        pos = min(config.seq_len or context, context)
        gpu = device != "cpu"
        cost = plan_step(target, config, rows, pos, autocast=gpu)
        figures: dict[str, Any] = {**asdict(cost), "batch": rows, "pos": pos}
        each = " in each process" * (processes > 1)
        typer.echo(f"A step of {rows} x {pos} tokens{each}, {config.steps} times\n{cost}")
        vpd = target.__dict__["vpd"]
        if measure is not None:
            real = load_model(**found.model.loading, device=device)
            attach(real, config.sites, config.n_subcomponents, config.importance)
            config = config.replaced({"batch_size": measure, "micro_batches": 1, "device": device})
            vpd = real.__dict__["vpd"]
            seconds = measured_step(vpd, config, measure, pos)
            target = load_model(**found.model.loading, weights=False)
            part = plan_step(target, config, measure, pos, autocast=gpu)
            scaled = seconds * cost.total_flop / part.total_flop
            figures |= {"measured_batch": measure, "measured_seconds": seconds, "seconds": scaled}
            typer.echo(
                f"Time on {device}: {seconds:.3g} s for {measure} sequences, so {scaled:.3g} s a "
                f"step, {scaled * config.steps / 3600:.3g} hours for the run"
            )
        say(sites_table(vpd), quiet=False)
        if json is not None:
            figures["sites"] = site_sizes(vpd)
            write_json(json, figures)


def train_command(
    run_file: options.RunFilePath,
    overrides: options.Overrides = None,
    output: Annotated[
        Path | None, Option(help="Directory of the results, instead of the file's.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the checkpoint.")] = False,
    device: options.Device = None,
    wandb: Annotated[
        str | None, Option(metavar="PROJECT", help="Log to this wandb project too.")
    ] = None,
    wandb_mode: Annotated[
        str | None, Option(help="online or offline; default: wandb's own setting.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
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
        from vpd_lens.decomposing import decompose
        from vpd_lens.evaluation import evaluate
        from vpd_lens.models import load_model
        from vpd_lens.training import train
        from vpd_lens.training.distributed import claim_gpu, is_first

        claim_gpu(run.training.device)
        model = load_model(**run.model.loading, device=run.training.device)
        if run.model.base is not None:
            decompose(model, config=run.training, base=load_model(**run.model.loading_base))
        result = train(
            model,
            run.data,
            run.training,
            output=run.output,
            resume=resume,
            progress=not quiet,
            wandb=to_wandb if wandb else None,
            prepend_bos=run.prepend_bos,
            elsewhere=run.elsewhere,
        )
        if not is_first():
            return
        folder = result.folder
        say(f"Decomposition: {folder / 'decomposition'}", quiet)
        if run.evaluation is not None:
            report = evaluate(model, progress=not quiet, **run.evaluation_plan())
            say(report.tables(), quiet)
            report.to_json(folder / "report.json")
            page = report.to_html(folder / "report.html", f"VPD evaluation of {run.output}")
            say(f"Report: {page}", quiet)
        words = (folder, run.data, folder / "harvest")
        name, data, harvest = (shlex.quote(str(word)) for word in words)
        say(
            f"Next: vpd-lens harvest {name} --data {data} --output {harvest}\n"
            f'      vpd-lens graph "a prompt" --decomposition {name}',
            quiet,
        )
