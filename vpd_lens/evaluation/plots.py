"""The plots of an evaluation page, each a function from reports to an inline SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.evaluation.report import EvalReport
from vpd_lens.viz.svg import GRID, INK, MUTED, PALETTE, draw, legend_above

MAIN, BESIDE = "#3f87d6", "#d98a2b"  # blue for a report, orange for the one beside it
FULL, HALF = (10.2, 2.7), (5.0, 2.8)
_POINTS, _MAX_PANELS, _MAX_LABELS, _FEW_SITES = 5000, 8, 16, 26
_KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.gate", "mlp.out")
_COLOURS: dict[str, str] = dict(zip(_KINDS, PALETTE, strict=True))
Named = Sequence[tuple[str, EvalReport]]


def svg(name: str, label: str, size: tuple[float, float]) -> Callable[..., Callable[..., Any]]:
    """Make what fills a figure a function that returns the figure's SVG; see `draw`.

    Or what `to` makes of it, which takes what `draw` does.
    """

    def decorate(plot: Callable[..., None]) -> Callable[..., Any]:
        @wraps(plot)
        def drawn(*reports: Any, to: Callable[..., Any] = draw) -> Any:
            return to(name, label, size, lambda figure: plot(figure, *reports))

        return drawn

    return decorate


@svg("pgd", "Divergence against the number of adversarial steps", HALF)
def pgd_plot(figure: Figure, reports: Named, unit: str) -> None:
    """Divergence against the adversary's steps: mean over attacks as a line, up to the maximum."""
    axes = figure.subplots()
    for (name, report), colour in zip(reports, (MAIN, BESIDE), strict=False):
        if report.pgd:
            steps = [max(int(step), 0.5) for step in report.pgd]  # the axis is logarithmic
            mean, largest = ([v[of] for v in report.pgd.values()] for of in ("mean", "max"))
            axes.fill_between(steps, mean, largest, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, mean, "o-", color=colour, markersize=3.5, label=name)
            axes.plot(steps, largest, ":", color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="steps of the adversary", ylabel=unit)
    ticks = {int(step) for _, report in reports for step in report.pgd} - {0}
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    main = reports[0][1]
    for mode, label in (("stochastic", "random masks"), ("zero", "everything ablated")):
        line(axes, main.modes[mode]["kl"], label)
    if main.worst < main.modes["zero"]["kl"]:
        line(axes, main.worst, "knowing nothing of the input")
    legend_above(axes)


def line(axes: Axes, y: float, label: str) -> None:
    """A dashed horizontal line with its label."""
    axes.axhline(y, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(label, (1, y), (-2, 2), **place, ha="right", fontsize=7.5, color=MUTED)


@svg("histogram", "Histogram of causal importances", HALF)
def histogram_plot(figure: Figure, reports: Named) -> None:
    """Counts of importances, logarithmic."""
    axes = figure.subplots()
    (name, report), *others = reports
    counts = np.maximum(report.ci_histogram, 0.5)
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=MAIN, label=name)
    for other_name, other in others:
        scale = sum(report.ci_histogram) / max(sum(other.ci_histogram), 1)
        scaled = np.maximum(np.array(other.ci_histogram) * scale, 0.5)
        grid = np.linspace(0, 1, len(scaled) + 1)
        axes.stairs(scaled, grid, color=BESIDE, linewidth=1.4, label=other_name)
    axes.set(yscale="log", xlabel="causal importance", ylabel="count", xlim=(-0.01, 1.01))
    axes.set_ylim(bottom=0.7)
    if others:
        legend_above(axes)


@svg("l0", "L0 of every site", FULL)
def l0_plot(figure: Figure, reports: Named) -> None:
    """Active subcomponents per position at every site, at the first threshold."""
    axes = figure.subplots()
    names = list(reports[0][1].n_subcomponents)
    l0 = [next(iter(report.l0.values())) for _, report in reports]
    values = [l0[0][name] for name in names]
    others = [values.get(name, np.nan) for values in l0[1:2] for name in names]
    _site_bars(axes, names, values, "active per position", others)
    _label_bars(axes, names, values, [f"{v:.{0 if max(values) >= 10 else 1}f}" for v in values])


@svg("alive", "Alive subcomponents of every site", FULL)
def alive_plot(figure: Figure, report: EvalReport) -> None:
    """Subcomponents that are ever used, against how many each site has."""
    axes = figure.subplots()
    names, totals = list(report.n_subcomponents), list(report.n_subcomponents.values())
    alive = [report.alive[name] for name in names]
    axes.bar(_site_positions(names), totals, 0.8, color=GRID, edgecolor=MUTED, linewidth=0.5)
    _site_bars(axes, names, alive, "subcomponents")
    _label_bars(axes, names, totals, [f"{n:.0f}" for n in alive])


@svg("mean-ci", "Sorted mean causal importance per site", (10.2, 4.2))
def mean_importance_plot(figure: Figure, report: EvalReport) -> None:
    """Mean importance of every subcomponent, sorted: one panel per kind, one line per layer."""
    names = list(report.mean_ci)
    kinds = list(_kind_colours(names))
    if len(kinds) > _MAX_PANELS:
        kinds = [""]
    points = max(24, min(250, _POINTS // len(names)))
    panels = figure.subplots(2, len(kinds), sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        mine = [name for name in names if kind in ("", _layer_and_kind(name)[1])]
        for index, name in enumerate(mine):
            ranks, values = _thinned(report.mean_ci[name], points)
            alpha = 1.0 if len(mine) == 1 else 1 - 0.65 * index / (len(mine) - 1)
            layer, own_kind = _layer_and_kind(name)
            line = {"color": _kind_colours(names)[own_kind], "alpha": alpha, "linewidth": 1.4}
            for axes in panels[:, column]:
                axes.plot(ranks, values, **line, label=layer or name)
        linear, logarithmic = panels[:, column]
        linear.set(title=kind or "all sites", ylim=(0, 1))
        logarithmic.set(yscale="log", ylim=(ALIVE / 10, 1.5))
        logarithmic.axhline(ALIVE, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        logarithmic.yaxis.set_minor_locator(NullLocator())
        if 1 < len(mine) <= 6:
            small = {"title_fontsize": 7, "fontsize": 7, "handlelength": 1.1}
            linear.legend(title="layer", **small, loc="upper right")
    panels[0, 0].set_ylabel("mean CI")
    panels[1, 0].set_ylabel("mean CI, log")
    figure.supxlabel("subcomponents of the site, sorted", fontsize=8.5, color=MUTED)


@svg("delta", "Relative size of the delta of every site", HALF)
def delta_plot(figure: Figure, report: EvalReport) -> None:
    """Relative size of every site's delta."""
    axes = figure.subplots()
    names = list(report.n_subcomponents)
    sizes = [report.delta[name]["relative"] for name in names]
    values = [size if size > 1e-9 else 1e-9 for size in sizes]  # NaN of a zero matrix, too
    _site_bars(axes, names, values, "size of delta / size of W")
    axes.set(yscale="log", ylim=(min(values) / 2, max(1.0, *values)))


@svg("hidden", "Relative error of every site's output", HALF)
def hidden_plot(figure: Figure, report: EvalReport) -> None:
    """Relative error of every site's output under CI masks (bars) and random masks (marks)."""
    axes = figure.subplots()
    names = list(report.n_subcomponents)
    ci, random = ([report.hidden_error[mode][n] for n in names] for mode in ("ci", "stochastic"))
    _site_bars(axes, names, ci, "error / mean square", random)
    bars = Patch(color=MUTED, label="importances as masks")
    legend_above(axes, [bars, Line2D([], [], color=INK, label="random masks")])


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
    axes: Axes, names: list[str], values: list[float], ylabel: str, marks: Sequence[float] = ()
) -> None:
    """One bar per site, with a mark across it, labelled by layer."""
    positions, colours = _site_positions(names), _kind_colours(names)
    parts = [_layer_and_kind(name) for name in names]
    axes.bar(positions, values, 0.8, color=[colours[kind] for _, kind in parts])
    if marks:
        axes.hlines(marks, positions - 0.4, positions + 0.4, color=INK, linewidth=1.6)
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


def _label_bars(
    axes: Axes, names: list[str], heights: list[float] | list[int], labels: list[str]
) -> None:
    """Write labels over bars, unless there are too many, and a legend of the kinds of sites."""
    legend_above(axes, [Patch(color=c, label=kind) for kind, c in _kind_colours(names).items()])
    if len(names) > _FEW_SITES:
        return
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5, "color": MUTED}
    for x, height, label in zip(_site_positions(names), heights, labels, strict=True):
        axes.annotate(label, (x, height), (0, 2), **style)
    axes.margins(y=0.12)
