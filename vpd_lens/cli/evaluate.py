"""`vpd-lens eval` and `info`: how good a saved decomposition is, and what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpd_lens.cli.options import (
    BatchSize,
    Debug,
    Decomposed,
    Device,
    Model,
    ModelClassName,
    ProcessingName,
    Quiet,
    SeqLen,
    load_decomposed,
    readable_errors,
    require_folder,
    show,
    write_report,
)
from vpd_lens.errors import ConfigError


def eval_command(
    decomposition: Decomposed,
    model: Model,
    data: Annotated[str, typer.Option(help="Held-out data: path, or hf:NAME.")],
    n_batches: Annotated[int, typer.Option(min=1, help="Batches.")] = 8,
    batch_size: BatchSize = 16,
    seq_len: SeqLen = None,
    pgd_steps: Annotated[
        str, typer.Option(help="Steps of the adversary, separated by commas; `none` skips it.")
    ] = "20,40,80,160,320",
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures as JSON.")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="JSON of another report, shown next to this one.")
    ] = None,
    beside_name: Annotated[str, typer.Option(help="What to call it.")] = "beside",
    model_class: ModelClassName = "auto",
    processing: ProcessingName = "default",
    seed: Annotated[int, typer.Option(help="Seed of masks and adversary.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a saved decomposition and print the tables."""
    with readable_errors(debug):
        steps = _step_counts(pgd_steps)
        require_folder(decomposition)

        from vpd_lens.evaluation import EvalReport, evaluate

        other = EvalReport.from_json(beside) if beside else None
        report = evaluate(
            load_decomposed(decomposition, model, model_class, device, processing),
            data,
            n_batches=n_batches,
            batch_size=batch_size,
            seq_len=seq_len,
            pgd_steps=steps,
            seed=seed,
            progress=not quiet,
        )
        show(report.tables(other, beside_name), quiet)
        write_report(report, json, html, str(decomposition), other, beside_name)


def info_command(decomposition: Decomposed, debug: Debug = False) -> None:
    """Say what a saved decomposition is, without loading its model."""
    with readable_errors(debug):
        require_folder(decomposition)

        from vpd_lens.description import describe

        show(describe(decomposition), quiet=False)


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
