"""The plots of an audit, each a function from a report to an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from vpd_lens.evaluation.audit import Audit, Estimate
from vpd_lens.evaluation.plots import FULL, HALF, MAIN, line, svg
from vpd_lens.evaluation.report import EvalReport
from vpd_lens.viz.svg import PALETTE, legend_above

_SETS = {"donors": MAIN, "same text": PALETTE[1], "frequency": PALETTE[6], "random": PALETTE[3]}


def _audit_of(report: EvalReport) -> Audit:
    assert report.audit is not None
    return report.audit


def _curve(axes: Axes, row: Mapping[str, Estimate], colour: str, label: str) -> None:
    """A line through estimates, two standard errors around it."""
    x = [float(key) for key in row]
    mean = [estimate.mean for estimate in row.values()]
    spread = [0.0 if e.error != e.error else 2 * e.error for e in row.values()]
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, mean, "o-", color=colour, markersize=3, label=label)


@svg("aggregation", "Divergence when what k other tokens need is switched on", HALF)
def aggregation_plot(figure: Figure, report: EvalReport, unit: str) -> None:
    """Divergence by number of donors: one line per kind of set."""
    axes = figure.subplots()
    for kind, row in _audit_of(report).aggregation.items():
        _curve(axes, row, _SETS[kind], kind)
    ticks = [int(k) for k in _audit_of(report).aggregation["donors"]]
    axes.set(xscale="log", xlabel="donors k", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    line(axes, report.modes["ci"]["kl"], "importances alone")
    legend_above(axes)


@svg("levels", "Divergence by level between importances and 1", HALF)
def levels_plot(figure: Figure, report: EvalReport, unit: str) -> None:
    """Divergence by level, with what is in use alone, and without what is never needed."""
    axes, audit = figure.subplots(), _audit_of(report)
    _curve(axes, audit.levels, MAIN, "in use only")
    colours = (PALETTE[4], PALETTE[3], PALETTE[6])
    for (threshold, row), colour in zip(audit.unused.items(), colours, strict=True):
        _curve(axes, row, colour, f"all but ≤ {threshold}")
    axes.set(xlabel="level s", ylabel=unit)
    axes.set_ylim(bottom=0)
    legend_above(axes)


@svg("layers", "Divergence by number of masked layers", FULL)
def layers_plot(figure: Figure, report: EvalReport, unit: str) -> None:
    """Divergence by number of masked layers; a cross where all read the target's stream."""
    axes, audit = figure.subplots(), _audit_of(report)
    for mode, colour in (("ci", MAIN), ("stochastic", PALETTE[4])):
        row = audit.subsets[mode]
        _curve(axes, row, colour, mode)
        if mode in audit.parallel:
            y = audit.parallel[mode].mean
            axes.plot([len(row)], [y], "x", color=colour, markersize=6, label=f"{mode}, parallel")
    axes.set(xlabel="masked layers", ylabel=unit)
    axes.xaxis.set_major_locator(FixedLocator([int(k) for k in audit.subsets["ci"]]))
    axes.set_ylim(bottom=0)
    legend_above(axes)
