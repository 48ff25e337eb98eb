"""Training curves, of one run or of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.plots.style import RUNS, canvas, muted
from vpd_lens.training.log import RECONSTRUCTION

USUAL = (*RECONSTRUCTION, "faithfulness", "l0")
Runs = str | Path | Mapping[str, str | Path]


def training(runs: Runs, metrics: Sequence[str] | None = None) -> Figure:
    """What a run has logged, one panel per metric and one line per run, over its steps.

    Args:
        runs: The folder of a run or its `metrics.jsonl`, or several by name.
        metrics: Those of `metrics.jsonl` to show; by default the reconstruction losses,
            `faithfulness` and `l0`, as far as they were logged.

    Raises:
        ArtefactError: If a file is missing, or is no log.
        InputError: If no run has logged one of the metrics.
    """
    paths = runs if isinstance(runs, Mapping) else {"": runs}
    logs = {name: _read(Path(path)) for name, path in paths.items()}
    known = sorted({key for log in logs.values() for row in log for key in row} - {"step"})
    shown = [name for name in USUAL if name in known] if metrics is None else list(metrics)
    if not shown or not set(shown) <= set(known):
        raise InputError(f"metrics={metrics!r}; expected some of those logged: {known}.")
    with canvas("Metrics against training steps", (2.6 * len(shown) + 0.4, 2.7)) as figure:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, metric in zip(panels, shown, strict=True):
            for (name, log), colour in zip(logs.items(), cycle(RUNS), strict=False):
                rows = [(row["step"], row[metric]) for row in log if metric in row]
                steps, values = zip(*rows, strict=True) if rows else ((), ())
                axes.plot(steps, values, color=colour, label=name)
            values = [row[metric] for log in logs.values() for row in log if metric in row]
            wide = min(values) > 0 and max(values) > 10 * min(values)
            axes.set(yscale="log" if wide else "linear", title=metric)
        figure.supxlabel("training steps", fontsize=8.5, color=muted())
        if handles := panels[0].get_legend_handles_labels()[0]:
            figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; an interruption may have cut the last one short."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ArtefactError(f"{path}: no log of a run ({error}).") from None
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    if not rows:
        raise ArtefactError(f"{path}: no line of it is a metric; expected a run's metrics.jsonl.")
    return rows
