"""`vpd-lens sweep`, `reproduce` and `toy`: many runs, recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
)


def sweep_command(
    run_file: RunFilePath,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="PATH=V1,V2,...",
            help="Values of one setting; may be repeated. PATH is that of --set.",
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the runs, instead of the file's output.")
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train, evaluate and record every combination of some values.

    The run file is that of `vpd-lens train` and needs an evaluation section. The output
    directory receives runs/, records/, rows.csv and report.html. Repeat the command to go on
    after an interruption.
    """
    with readable_errors(debug):
        from vpd_lens.config import read_run_file

        changes = [*(overrides or []), *([f"training.device={quoted(device)}"] if device else [])]
        read_run_file(run_file, changes)  # what is wrong with it, before torch is imported

        from vpd_lens.experiments import sweep

        result = sweep(
            run_file,
            grid,
            output,
            changes,
            progress=not quiet,
            say=lambda text: say(text, quiet),
        )
        show(result.section.table(), quiet)
        say(f"Report: {result.folder / 'report.html'}", quiet)


def reproduce_command(
    claims: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Which claims: adversary, pareto, splitting, seeds, controls, generations; "
            "default: all.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/reproduce"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="VPD training steps of every run; default: 2000.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that it works; the figures mean nothing.")
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Test the paper's claims on a small language model, trained on the spot, offline.

    The output directory receives runs/, records/, claims/ and report.html. Repeat the command to
    go on after an interruption.
    """
    with readable_errors(debug):
        from vpd_lens.experiments import reproduce
        from vpd_lens.experiments.claims import CLAIMS

        chosen = list(CLAIMS) if claims is None else [part.strip() for part in claims.split(",")]
        reproduce(
            output,
            chosen,
            steps,
            quick,
            device or "auto",
            progress=not quiet,
            say=lambda text: say(text, quiet),
            show=lambda section: show(section.table(), quiet),
        )
        say(f"Report: {output / 'report.html'}", quiet)


def toy_command(
    name: Annotated[str, typer.Argument(help="tms-5-2, tms-40-10, ...-id or resid-mlp-1|2|3.")],
    method: Annotated[str, typer.Option(help="vpd or spd.")] = "vpd",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the results; default: runs/toy-NAME-METHOD.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decompose a toy model whose mechanisms are known, and compare.

    Repeating the command goes on where it was interrupted: finished seeds are read from the
    output directory, which receives seed-N.json, seed-N/ and page.html.
    """
    with readable_errors(debug):
        from vpd_lens.files import write_text_atomically
        from vpd_lens.toys import run_seeds, table
        from vpd_lens.toys.page import render

        folder = output or Path("runs") / f"toy-{name}-{method}"
        records = []
        for record in run_seeds(name, method, seeds, folder):
            records.append(record)
            write_text_atomically(folder / "page.html", render(records))
            say(f"seed {record.seed}: {record.seconds:.0f} s", quiet)
        show(table(records), quiet)
        say(f"Page: {folder / 'page.html'}", quiet)
