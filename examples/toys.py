"""Decompose a toy model whose mechanisms are known, and compare with the truth.

    python examples/toys.py tms-5-2 --method vpd --seeds 5
    python examples/toys.py --help

Every seed trains its own target and decomposes it. The output directory receives `records/`,
`runs/` and one page per toy and method. Repeating the command goes on where it was interrupted;
finished seeds are read from their records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as rich_print
from rich.box import SIMPLE_HEAD
from rich.table import Table

from recorded import Run, RunRecord, Target, perform
from toy_runs.measure import measure
from toy_runs.page import render
from toy_runs.presets import METHODS, method_of, preset
from vpd_lens.cli.options import Debug, Quiet, readable_errors
from vpd_lens.storage import write_text
from vpd_lens.toys import TOYS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def toy_run(name: str, method: str, seed: int) -> Run:
    """One seed of one toy under one method.

    Args:
        name: One of `vpd_lens.toys.TOYS`.
        method: One of `METHODS`.
        seed: Seed of target and decomposition.

    Raises:
        ConfigError: If there is no such toy or method.
    """
    config = preset(name, method).replaced({"seed": seed})
    toy = TOYS[name]
    target = Target(
        {"toy": name, "seed": seed},
        load=lambda: toy.train_target(seed),
        data=replace(toy.data, nonzero=True),
        example=torch.eye(toy.data.n_features),
        measure=lambda model: measure(toy, model.vpd),
    )
    return Run(f"{name},{method},seed={seed}", target, config, {})


def run_seeds(name: str, method: str, n_seeds: int, output: Path) -> Iterator[RunRecord]:
    """The records of seeds `0 .. n_seeds - 1`, each as soon as it is there."""
    for seed in range(n_seeds):
        yield perform(toy_run(name, method, seed), output, progress=False, say=lambda _: None)


def table(records: list[RunRecord]) -> Table:
    """The figures of some seeds as a rich table: one row per seed and site.

    Columns: represented features of all, subcomponents alive of those expected, MMCS of vectors
    and of whole matrices, L2 ratio, CI errors at tolerances 0.1 and 0.2, seconds of the
    decomposition.

    Args:
        records: At least one record, all of one toy and method.
    """
    toy, method = records[0].target["toy"], method_of(records[0].config)
    out = Table(
        title=f"{toy}, {method}: {METHODS[method]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # or it would not fit into 80 columns
    )
    figures = ("alive", "MMCS", "mat.", "L2", "err .1", "err .2")
    for heading in ("seed", "feat.", "site", *figures, "s"):
        out.add_column(heading, justify="left" if heading == "site" else "right", no_wrap=True)
    for record in records:
        head = [str(record.seed), f"{len(record.report.represented)}/{TOYS[toy].data.n_features}"]
        sites = record.report.sites
        for index, (name, site) in enumerate(sites.items()):
            out.add_row(
                *(head if index == 0 else ["", ""]),
                name,
                f"{site.alive}/{site.expected}",
                "" if site.mmcs is None else f"{site.mmcs:.4f}",
                "" if site.matrix_mmcs is None else f"{site.matrix_mmcs:.4f}",
                "" if site.l2_ratio is None else f"{site.l2_ratio:.3f}",
                str(site.error_01),
                str(site.error_02),
                f"{record.training_seconds:.0f}" if index == 0 else "",
                end_section=index == len(sites) - 1,
            )
    return out


@app.command(help=__doc__.partition("\n")[0])
def main(
    name: Annotated[str, typer.Argument(help="tms-5-2, tms-40-10, ...-id or resid-mlp-1|2|3.")],
    method: Annotated[str, typer.Option(help="vpd or spd.")] = "vpd",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 5,
    output: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/toys"),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    with readable_errors(debug):
        records, page = [], output / f"{name},{method}.html"
        for record in run_seeds(name, method, seeds, output):
            records.append(record)
            write_text(page, render(records))
            if not quiet:
                typer.echo(f"seed {record.seed}: {record.training_seconds:.0f} s")
        if not quiet:
            rich_print(table(records))
            typer.echo(f"Page: {page}")


if __name__ == "__main__":
    app()
