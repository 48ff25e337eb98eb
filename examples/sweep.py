"""Train, evaluate and record every combination of some values.

    python examples/sweep.py run.yaml --grid 'minimality.coefficient=1e-4,1e-3' --grid 'seed=0,1,2'
    python examples/sweep.py --help

The run file is that of `vpd-lens train` and needs an evaluation section. Beside the runs (see
`recorded.run`) the output directory receives `rows.csv`, all figures, and `report.html`, the table
and the Pareto plot. Repeat the command to go on after an interruption.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import print as rich_print

from recorded.figures import figures
from recorded.grid import (
    Axes,
    GridPoint,
    grid_points,
    label,
    overrides,
    parse_grid,
    point_name,
)
from recorded.page import write_page
from recorded.record import RunRecord
from recorded.run import Run, perform
from recorded.section import Figure, Section
from vpd_lens import plots
from vpd_lens.cli.options import Debug, Device, Overrides, Quiet, quoted, readable_errors, say
from vpd_lens.config import read_run_file
from vpd_lens.errors import ConfigError, NonFiniteLossError
from vpd_lens.evaluation import EvalReport
from vpd_lens.storage import write_text


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        folder: The directory of runs.
        section: Table and plot.
        rows: All figures of all runs, as in `rows.csv`.
        diverged: Grid points whose loss became NaN or infinite, with the message; they have no
            record and are tried again when the sweep is repeated.
    """

    folder: Path
    section: Section
    rows: list[dict[str, Any]]
    diverged: dict[str, str]


def sweep(
    run_file: Path,
    grid: Sequence[str],
    output: Path | None = None,
    changes: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Train, evaluate and record every point of a grid.

    All points are validated before the first is trained. Repeating an interrupted sweep goes on
    where it stopped; see `perform`.

    Args:
        run_file: The run file of `vpd-lens train`, with an `evaluation` section.
        grid: `PATH=V1,V2,...` each; see `parse_grid`.
        output: The directory of runs; by default the run file's `output`.
        changes: Overrides of the run file for all points, `PATH=VALUE` each.
        progress: Show progress bars.
        say: Receives one line per run.

    Raises:
        ConfigError: If the grid or some point of it is not valid; nothing is trained then.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    axes = parse_grid(grid)
    points = {point_name(point): point for point in grid_points(axes)}
    runs = {}
    folder = output or Path(read_run_file(run_file, changes).output)
    for name, point in points.items():
        file = read_run_file(run_file, [*changes, *overrides(point)])
        runs[name] = Run.of_run_file(name, file)
    if len(runs) < len(grid_points(axes)):
        raise ConfigError("values of the grid differ only in characters that names lack.")
    records: dict[str, RunRecord] = {}
    diverged: dict[str, str] = {}
    for index, (name, run) in enumerate(runs.items(), start=1):
        say(f"Run {index} of {len(runs)}")
        try:
            records[name] = perform(run, folder, progress, say)
        except NonFiniteLossError as error:
            diverged[name] = str(error)
            say(f"{name}: {error}")
    rows = [{**points[name], **_all_figures(record)} for name, record in records.items()]
    section = _section(axes, points, records, diverged)
    write_text(folder / "rows.csv", _csv(rows))
    write_page(
        folder / "report.html",
        f"Sweep of {', '.join(axes)}",
        f"{len(records)} runs of {run_file.name}.",
        [section],
        list(records.values()),
    )
    return SweepResult(folder, section, rows, diverged)


def _section(
    axes: Axes,
    points: dict[str, GridPoint],
    records: dict[str, RunRecord],
    diverged: dict[str, str],
) -> Section:
    rows = [
        {**{path: label(value) for path, value in points[name].items()}, **figures(record)}
        for name, record in records.items()
    ]
    failed = f" Diverged and left out: {'; '.join(diverged)}." if diverged else ""
    return Section(
        name="sweep",
        title="All runs",
        question="What does each setting cost in reconstruction, and what does it buy in sparsity?",
        rows=rows,
        reading=f"Runs for different numbers of steps cannot be compared: L0 falls late.{failed}",
        figures=[_figure(axes, points, records)] if records else [],
        records=list(records),
    )


def _figure(axes: Axes, points: dict[str, GridPoint], records: dict[str, RunRecord]) -> Figure:
    """The Pareto plot: points labelled by the first path, lines by all others."""
    first, *others = axes
    lines: dict[str, dict[str, EvalReport]] = {}
    for name, record in records.items():
        line = ", ".join(f"{path}={label(points[name][path])}" for path in others)
        lines.setdefault(line, {})[label(points[name][first])] = record.report
    series = f", one line per {' and '.join(others)}" if others else ""
    return Figure(
        "Sparsity against reconstruction",
        plots.as_svg(plots.pareto(*lines.values(), names=list(lines))),
        f"Points are labelled with {first}{series}. Lower left is better: fewer active "
        "subcomponents, and an output that changes less when the others are ablated by an "
        "adversary (left) or at random (right).",
    )


def _all_figures(record: RunRecord) -> dict[str, Any]:
    summary = record.report.summary()
    summary["C"] = summary.pop("n_subcomponents")  # which a grid may have as a setting
    return {
        "name": record.name,
        **summary,
        "training_seconds": record.training_seconds,
        "date": record.date,
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.partition("\n")[0])
def main(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file.")],
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
    with readable_errors(debug):
        changes = [*(overrides or []), *([f"training.device={quoted(device)}"] if device else [])]
        result = sweep(
            run_file,
            grid,
            output,
            changes,
            progress=not quiet,
            say=lambda text: say(text, quiet),
        )
        if not quiet:
            rich_print(result.section.table())
        say(f"Report: {result.folder / 'report.html'}", quiet)


if __name__ == "__main__":
    app()
