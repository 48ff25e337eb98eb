"""Figures of evaluation reports, of one or of several on the same axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, groupby, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from vpd_lens.errors import InputError
from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.evaluation.report import UNITS, EvalReport, headline_attack
from vpd_lens.plots.style import (
    FULL,
    HALF,
    MAIN,
    PALETTE,
    RUNS,
    canvas,
    grid,
    ink,
    legend_above,
    line,
    muted,
    panel,
)

_POINTS, _MAX_PANELS, _MAX_LABELS, _FEW_SITES = 5000, 8, 16, 26
_KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.gate", "mlp.out")
_COLOURS: dict[str, str] = dict(zip(_KINDS, PALETTE, strict=True))
_MARKS = ("-", ":", "--", "-.")
Reports = EvalReport | Mapping[str, EvalReport]


def named(reports: Reports) -> dict[str, EvalReport]:
    """Reports by name; one alone has none."""
    found = {"": reports} if isinstance(reports, EvalReport) else dict(reports)
    if not found:
        raise InputError("reports is empty; expected an EvalReport, or several by name.")
    return found


def coloured(reports: Mapping[str, EvalReport]) -> Iterator[tuple[str, EvalReport, str]]:
    """Every report with its name and its colour."""
    for (name, report), colour in zip(reports.items(), cycle(RUNS), strict=False):
        yield name, report, colour


def unit(reports: Mapping[str, EvalReport]) -> str:
    """What the divergences of the reports are called."""
    return UNITS[next(iter(reports.values())).divergence]


def steps_axis(axes: Axes, ticks: Sequence[float | int]) -> None:
    """A logarithmic axis with just these ticks."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written in full."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def adversary(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Divergence against the adversary's steps: the mean over attacks, up to the worst as a band.

    Dashed lines are the first report's.
    """
    runs = named(reports)
    with panel("Divergence against the steps of an adversary", HALF, ax) as (figure, axes):
        for name, report, colour in coloured(runs):
            if report.pgd:
                steps = [max(int(step), 0.5) for step in report.pgd]  # the axis is logarithmic
                mean, largest = ([v[of] for v in report.pgd.values()] for of in ("mean", "max"))
                axes.fill_between(steps, mean, largest, color=colour, alpha=0.18, linewidth=0)
                axes.plot(steps, mean, "o-", color=colour, markersize=3.5, label=name)
                axes.plot(steps, largest, ":", color=colour, linewidth=1)
        axes.set(yscale="log", xlabel="steps of the adversary", ylabel=unit(runs))
        steps_axis(axes, list({int(step) for r in runs.values() for step in r.pgd} - {0}))
        plain_log(axes.yaxis)
        main = next(iter(runs.values()))
        line(axes, main.modes["stochastic"]["kl"], "random masks")
        blind = main.worst < main.modes["zero"]["kl"]
        line(axes, main.worst, "knowing nothing of the input" if blind else "everything ablated")
        legend_above(axes)
    return figure


def importance_histogram(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Counts of importances, logarithmic; those of further reports scaled to the first's."""
    (name, report), *others = named(reports).items()
    counts = np.maximum(report.ci_histogram, 0.5)
    edges = np.linspace(0, 1, len(counts) + 1)
    with panel("Histogram of causal importances", HALF, ax) as (figure, axes):
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=MAIN, label=name)
        for (other_name, other), colour in zip(others, cycle(RUNS[1:]), strict=False):
            scale = sum(report.ci_histogram) / max(sum(other.ci_histogram), 1)
            scaled = np.maximum(np.array(other.ci_histogram) * scale, 0.5)
            own_edges = np.linspace(0, 1, len(scaled) + 1)
            axes.stairs(scaled, own_edges, color=colour, linewidth=1.4, label=other_name)
        axes.set(yscale="log", xlabel="causal importance", ylabel="count", xlim=(-0.01, 1.01))
        axes.set_ylim(bottom=0.7)
        legend_above(axes)
    return figure


def l0(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Active subcomponents per position at every site, at the first threshold.

    Bars are the first report's, marks across them the others'.
    """
    runs = named(reports)
    names = list(next(iter(runs.values())).n_subcomponents)
    values = {name: next(iter(report.l0.values())) for name, report in runs.items()}
    with panel("L0 of every site", FULL, ax) as (figure, axes):
        heights = _site_bars(axes, names, values, "active per position")
        digits = 0 if max(heights) >= 10 else 1
        _label_bars(axes, names, heights, [f"{v:.{digits}f}" for v in heights], list(values)[1:])
    return figure


def alive(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Subcomponents that are ever used at every site, against how many it has.

    Bars are the first report's, marks across them the others'.
    """
    runs = named(reports)
    totals = next(iter(runs.values())).n_subcomponents
    names, values = list(totals), {name: report.alive for name, report in runs.items()}
    with panel("Alive subcomponents of every site", FULL, ax) as (figure, axes):
        places, heights = _site_positions(names), list(totals.values())
        axes.bar(places, heights, 0.8, color=grid(), edgecolor=muted(), linewidth=0.5)
        counts = [f"{n:.0f}" for n in _site_bars(axes, names, values, "subcomponents")]
        _label_bars(axes, names, heights, counts, list(values)[1:])
    return figure


def mean_importance(report: EvalReport) -> Figure:
    """Mean importance of every subcomponent, sorted: one panel per kind, one line per layer."""
    names = list(report.mean_ci)
    kinds = list(_kind_colours(names))
    if len(kinds) > _MAX_PANELS:
        kinds = [""]
    points = max(24, min(250, _POINTS // len(names)))
    with canvas("Sorted mean causal importance per site", (10.2, 4.2)) as figure:
        panels = figure.subplots(2, len(kinds), sharey="row", squeeze=False)
        for column, kind in enumerate(kinds):
            mine = [name for name in names if kind in ("", _layer_and_kind(name)[1])]
            for index, name in enumerate(mine):
                ranks, values = _thinned(report.mean_ci[name], points)
                alpha = 1.0 if len(mine) == 1 else 1 - 0.65 * index / (len(mine) - 1)
                layer, own_kind = _layer_and_kind(name)
                style = {"color": _kind_colours(names)[own_kind], "alpha": alpha, "linewidth": 1.4}
                for axes in panels[:, column]:
                    axes.plot(ranks, values, **style, label=layer or name)
            linear, logarithmic = panels[:, column]
            linear.set(title=kind or "all sites", ylim=(0, 1))
            logarithmic.set(yscale="log", ylim=(ALIVE / 10, 1.5))
            logarithmic.axhline(ALIVE, color=muted(), linewidth=0.9, linestyle=(0, (4, 3)))
            logarithmic.yaxis.set_minor_locator(NullLocator())
            if 1 < len(mine) <= 6:
                small = {"title_fontsize": 7, "fontsize": 7, "handlelength": 1.1}
                linear.legend(title="layer", **small, loc="upper right")
        panels[0, 0].set_ylabel("mean CI")
        panels[1, 0].set_ylabel("mean CI, log")
        figure.supxlabel("subcomponents of the site, sorted", fontsize=8.5, color=muted())
    return figure


def delta(reports: Reports, *, ax: Axes | None = None) -> Figure:
    """Relative size of every site's delta; bars the first report's, marks the others'."""
    runs = named(reports)
    names = list(next(iter(runs.values())).n_subcomponents)
    sizes = {
        name: {site: _at_least(report.delta[site]["relative"], 1e-9) for site in names}
        for name, report in runs.items()
    }
    with panel("Relative size of the delta of every site", HALF, ax) as (figure, axes):
        values = _site_bars(axes, names, sizes, "size of delta / size of W")
        axes.set(yscale="log", ylim=(min(values) / 2, max(1.0, *values)))
        legend_above(axes, _marks(list(sizes)[1:]))
    return figure


def hidden_error(report: EvalReport, *, ax: Axes | None = None) -> Figure:
    """Relative error of every site's output under CI masks (bars) and random masks (marks)."""
    errors = {"importances as masks": report.hidden_error["ci"]}
    errors["random masks"] = report.hidden_error["stochastic"]
    with panel("Relative error of every site's output", HALF, ax) as (figure, axes):
        _site_bars(axes, list(report.n_subcomponents), errors, "error / mean square")
        bars = Patch(color=muted(), label="importances as masks")
        legend_above(axes, [bars, *_marks(["random masks"])])
    return figure


def pareto(*series: Mapping[str, EvalReport], names: Sequence[str] = ()) -> Figure:
    """Sparsity against reconstruction: L0 and one divergence per panel, logarithmic axes.

    Args:
        series: Reports by label, which stands beside the point; each series is one line.
        names: Of the series, for the legend.
    """
    under: dict[str, list[list[tuple[float, float, str]]]] = {}
    for number, reports in enumerate(series):
        for label, report in named(reports).items():
            for title, value in _losses(report).items():
                lines = under.setdefault(title, [[] for _ in series])
                used = next(iter(report.l0.values()))["total"]
                if used > 0 and value > 0:  # where logarithmic axes can show it
                    lines[number].append((used, value, label))
    with canvas("Divergence against L0", (10.2, 3.8)) as figure:
        panels = figure.subplots(1, len(under), squeeze=False)[0]
        for axes, (title, lines) in zip(panels, under.items(), strict=True):
            for index, points in enumerate(map(sorted, lines)):
                label = names[index] if names else ""
                x, y = [point[0] for point in points], [point[1] for point in points]
                colour = PALETTE[index % len(PALETTE)]
                axes.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.2, label=label)
                for *place, text in points:
                    style = {"textcoords": "offset points", "fontsize": 7.5, "color": muted()}
                    axes.annotate(text, place, (5, 4), **style, zorder=3)
            axes.set(xscale="log", yscale="log", xlabel="L0, active per position", ylabel=title)
            axes.grid(axis="both")
            axes.margins(0.14)
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
        legend_above(panels[0])
    return figure


def _losses(report: EvalReport) -> dict[str, float]:
    """Under the adversary, if there was one, and under random masks."""
    measure, steps = UNITS[report.divergence], headline_attack(report)
    robust = {f"PGD-{steps} {measure}": report.pgd[steps]["mean"]} if steps else {}
    return robust | {f"stochastic {measure}": report.modes["stochastic"]["kl"]}


def _at_least(value: float, floor: float) -> float:
    return value if value > floor else floor  # NaN of a zero matrix, too


def _thinned(values: Sequence[float], points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of a sorted curve, its ends included; zeros become the axis' floor."""
    ranks = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int))
    return ranks + 1, np.maximum(np.array(values)[ranks], ALIVE / 10)


def _layer_and_kind(name: str) -> tuple[str, str]:
    """`"0", "attn.q"` of `blocks.0.attn.q`; no layer and the whole name for a site in no block."""
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _kind_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every kind, legible on light and dark; the same for a kind on every page."""
    kinds = dict.fromkeys(_layer_and_kind(name)[1] for name in names)
    return {kind: _COLOURS.get(kind, PALETTE[i % len(PALETTE)]) for i, kind in enumerate(kinds)}


def _site_positions(names: Sequence[str]) -> np.ndarray:
    """One place per site, with a gap between layers, `[n_sites]`."""
    layers = [_layer_and_kind(name)[0] for name in names]
    new = [layer != before for before, layer in pairwise([layers[0], *layers])]
    return np.arange(len(names)) + 0.9 * np.cumsum(new)


def _site_bars(
    axes: Axes, names: list[str], values: Mapping[str, Mapping[str, float]], ylabel: str
) -> list[float]:
    """One bar per site, labelled by layer, of the first of `values`, and a mark of each other.

    The heights of the bars come back.
    """
    positions, colours = _site_positions(names), _kind_colours(names)
    parts = [_layer_and_kind(name) for name in names]
    heights, *others = ([of.get(name, np.nan) for name in names] for of in values.values())
    axes.bar(positions, heights, 0.8, color=[colours[kind] for _, kind in parts])
    for marks, style in zip(others, cycle(_MARKS), strict=False):
        ends = positions - 0.4, positions + 0.4
        axes.hlines(marks, *ends, color=ink(), linewidth=1.6, linestyle=style)
    axes.set_xlim(positions[0] - 0.8, positions[-1] + 0.8)
    places, labels = [], []
    for layer, group in groupby(zip(positions, parts, strict=True), lambda pair: pair[1][0]):
        members = [(position, kind) for position, (_, kind) in group]
        if layer:
            members = [(np.mean([position for position, _ in members]), f"layer {layer}")]
        places += [float(position) for position, _ in members]
        labels += [label for _, label in members]
    every = -(-len(places) // _MAX_LABELS)
    axes.set_xticks(places[::every], labels[::every])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(ylabel)
    return heights


def _marks(names: Sequence[str]) -> list[Line2D]:
    """What a legend says of the marks across bars."""
    pairs = zip(names, cycle(_MARKS), strict=False)
    return [Line2D([], [], color=ink(), linestyle=style, label=name) for name, style in pairs]


def _label_bars(
    axes: Axes,
    names: list[str],
    heights: Sequence[float | int],
    labels: Sequence[str],
    others: Sequence[str],
) -> None:
    """Write labels over bars, unless there are too many, and a legend of sites and of marks."""
    kinds = [Patch(color=c, label=kind) for kind, c in _kind_colours(names).items()]
    legend_above(axes, [*kinds, *_marks(others)])
    if len(names) > _FEW_SITES:
        return
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5, "color": muted()}
    for x, height, label in zip(_site_positions(names), heights, labels, strict=True):
        axes.annotate(label, (x, height), (0, 2), **style)
    axes.margins(y=0.12)
