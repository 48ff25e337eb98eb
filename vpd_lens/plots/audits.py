"""Figures of audits: of one report in detail, or of several, each in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from vpd_lens.errors import InputError
from vpd_lens.evaluation.audit import Audit, Estimate
from vpd_lens.evaluation.report import EvalReport
from vpd_lens.plots.reports import Reports, adversary, coloured, named, steps_axis, unit
from vpd_lens.plots.style import FULL, HALF, MAIN, PALETTE, canvas, legend_above, line, panel

# Estimates by what is on the axis, and the curves of a figure by their labels, with colours.
Row = Mapping[str, Estimate]
Curves = dict[str, tuple[Row, str]]
_SETS = {"donors": MAIN, "same text": PALETTE[1], "frequency": PALETTE[6], "random": PALETTE[3]}
_UNUSED = PALETTE[4], PALETTE[3], PALETTE[6]
_MODES = {"ci": MAIN, "stochastic": PALETTE[4]}


def donors(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Divergence when what k other tokens need is switched on, too; bands: two standard errors.

    Of one report also its controls, one line per kind of set.

    Raises:
        InputError: If a report has no audit.
    """
    runs = named(reports)
    curves = _curves(
        runs,
        lambda audit: audit.aggregation["donors"],
        lambda audit: {kind: (row, _SETS[kind]) for kind, row in audit.aggregation.items()},
    )
    label = "Divergence when what k other tokens need is switched on"
    with panel(label, HALF, ax) as (figure, axes):
        _draw(axes, curves, "donors k", unit(runs))
        steps_axis(axes, _places(curves))
        if len(runs) == 1:
            line(axes, next(iter(runs.values())).modes["ci"]["kl"], "importances alone")
            axes.set_ylim(top=1.1 * axes.get_ylim()[1])  # room for its label
    return figure


def levels(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Divergence by the level between importances and 1, of what is in use alone.

    Of one report also of all but what is never needed.

    Raises:
        InputError: If a report has no audit.
    """

    def detail(audit: Audit) -> Curves:
        unused = zip(audit.unused.items(), _UNUSED, strict=True)
        others = {f"all but ≤ {limit}": (row, colour) for (limit, row), colour in unused}
        return {"in use only": (audit.levels, MAIN), **others}

    runs = named(reports)
    curves = _curves(runs, lambda audit: audit.levels, detail)
    with panel("Divergence by level between importances and 1", HALF, ax) as (figure, axes):
        _draw(axes, curves, "level s", unit(runs))
    return figure


def layers(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Divergence by number of layers masked with importances.

    Of one report also under random masks, with a cross where all layers read the target's stream.

    Raises:
        InputError: If a report has no audit.
    """
    runs = named(reports)
    curves = _curves(
        runs,
        lambda audit: audit.subsets["ci"],
        lambda audit: {mode: (audit.subsets[mode], colour) for mode, colour in _MODES.items()},
    )
    with panel("Divergence by number of masked layers", FULL, ax) as (figure, axes):
        _draw(axes, curves, "masked layers", unit(runs))
        axes.xaxis.set_major_locator(FixedLocator(_places(curves)))
        if len(runs) == 1:
            for mode, estimate in _audit(*runs.values()).parallel.items():
                row, colour = curves[mode]
                style = {"color": colour, "markersize": 6, "label": f"{mode}, parallel"}
                axes.plot([len(row)], [estimate.mean], "x", **style)
            legend_above(axes)
    return figure


def resistance(reports: Reports) -> Figure:
    """Left `adversary`, right `donors`: what a run holds against, by search and by company.

    Raises:
        InputError: If a report has no audit.
    """
    with canvas(
        "Divergence under attack, and when other tokens' needs are on", (9.0, 2.9)
    ) as figure:
        left, right = figure.subplots(1, 2)
        adversary(reports, ax=left)
        donors(reports, ax=right)
    return figure


def _audit(report: EvalReport) -> Audit:
    if report.audit is None:
        raise InputError("a report has no audit. Make it with evaluate(model, data, audit=True).")
    return report.audit


def _curves(
    runs: Mapping[str, EvalReport],
    of_each: Callable[[Audit], Row],
    alone: Callable[[Audit], Curves],
) -> Curves:
    """One curve of each of several reports, or what there is to see of one alone."""
    if len(runs) == 1:
        return alone(_audit(*runs.values()))
    return {name: (of_each(_audit(report)), colour) for name, report, colour in coloured(runs)}


def _draw(axes: Axes, curves: Curves, xlabel: str, ylabel: str) -> None:
    """Lines through estimates, two standard errors around each."""
    for label, (row, colour) in curves.items():
        x = [float(key) for key in row]
        mean = [estimate.mean for estimate in row.values()]
        spread = [0.0 if e.error != e.error else 2 * e.error for e in row.values()]
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, "o-", color=colour, markersize=3, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    legend_above(axes)


def _places(curves: Curves) -> list[float]:
    """Where on the axis there are estimates."""
    return sorted({float(key) for row, _ in curves.values() for key in row})
