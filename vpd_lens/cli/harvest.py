"""`vpd-lens harvest`: what every subcomponent responds to, stored and shown."""

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
    say,
)


def harvest_command(
    decomposition: Decomposed,
    model: Model,
    data: Annotated[str, typer.Option(help="Text or tokens: path, or hf:NAME.")],
    output: Annotated[Path, typer.Option(help="Directory of the results.")],
    n_batches: Annotated[int, typer.Option(min=1, help="Batches in all.")] = 500,
    batch_size: BatchSize = 16,
    seq_len: SeqLen = None,
    sites: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of the sites; default: all.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Importance above which a subcomponent fires.")
    ] = 0.1,
    n_top: Annotated[int, typer.Option(min=1, help="Top examples of each.")] = 10,
    n_random: Annotated[int, typer.Option(min=1, help="Random examples of each.")] = 20,
    context: Annotated[int, typer.Option(min=0, help="Tokens on either side.")] = 20,
    memory_limit: Annotated[float, typer.Option(help="Largest size of the tables, in GiB.")] = 4.0,
    model_class: ModelClassName = "auto",
    processing: ProcessingName = "default",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random examples.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what is in the output directory.")
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Gather what every subcomponent responds to, and show it.

    The output directory receives harvest/ (the data) and dashboard/ (HTML pages; open
    index.html). The state is written about once a minute; after an interruption repeat the
    command with --resume.
    """
    with readable_errors(debug):
        loaded = load_decomposed(decomposition, model, model_class, device, processing)

        from vpd_lens.analysis.harvest import harvest
        from vpd_lens.viz.harvest_page import write

        result = harvest(
            loaded,
            data,
            n_batches=n_batches,
            batch_size=batch_size,
            seq_len=seq_len,
            sites=None if sites is None else [part.strip() for part in sites.split(",")],
            threshold=threshold,
            n_top=n_top,
            n_random=n_random,
            context=context,
            seed=seed,
            output=output / "harvest",
            resume=resume,
            memory_limit=memory_limit,
            progress=not quiet,
        )
        say(repr(result), quiet)
        index = write(result, output / "dashboard", f"Harvest of {decomposition}")
        say(f"Dashboard: {index}", quiet)
