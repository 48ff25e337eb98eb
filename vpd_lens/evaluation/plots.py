"""The plots of an evaluation page, each a function from reports to an inline SVG.

A report is drawn in blue, the one beside it in orange.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, ScalarFormatter

from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.viz.svg import GRID, INK, MUTED, PALETTE, draw, legend_above

if TYPE_CHECKING:
    from vpd_lens.evaluation.report import EvalReport

MAIN, BESIDE = "#3f87d6", "#d98a2b"
_FULL, _HALF = (10.2, 2.7), (5.0, 2.8)
_POINTS = 5000
_MAX_PANELS = 8

_KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.gate", "mlp.out")
_KIND_COLOURS: dict[str, str] = dict(zip(_KINDS, PALETTE, strict=True))
_FEW_SITES = 26
_MAX_LABELS = 16

Named = Sequence[tuple[str, "EvalReport"]]


def pgd_plot(reports: Named, unit: str) -> str:
    """Divergence against the adversary's steps: mean over attacks as a line, up to the maximum."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, report), colour in zip(reports, (MAIN, BESIDE), strict=False):
            if not report.pgd:
                continue
            steps = [max(int(step), 0.5) for step in report.pgd]  # the axis is logarithmic
            mean = [value["mean"] for value in report.pgd.values()]
            largest = [value["max"] for value in report.pgd.values()]
            axes.fill_between(steps, mean, largest, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, mean, "o-", color=colour, markersize=3.5, label=name)
            axes.plot(steps, largest, ":", color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="steps of the adversary", ylabel=unit)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator(sorted(_pgd_steps(reports))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        _reference(axes, reports[0][1].modes["stochastic"]["kl"], "random masks")
        _reference(axes, reports[0][1].modes["zero"]["kl"], "everything ablated")
        legend_above(axes)

    return draw("pgd", "Divergence against the number of adversarial steps", _HALF, plot)


def histogram_plot(reports: Named) -> str:
    """Counts of importances, logarithmic."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        (name, report), *others = reports
        edges = np.linspace(0, 1, len(report.ci_histogram) + 1)
        counts = np.maximum(report.ci_histogram, 0.5)
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

    return draw("histogram", "Histogram of causal importances", _HALF, plot)


def l0_plot(reports: Named) -> str:
    """Active subcomponents per position at every site, at the first threshold."""
    report = reports[0][1]
    names = list(report.n_subcomponents)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        values = _at_first_threshold(report, names)
        positions = site_bars(axes, names, values)
        print_values(axes, positions, values, "{:.0f}" if max(values) >= 10 else "{:.1f}")
        if len(reports) > 1:
            others = _at_first_threshold(reports[1][1], names)
            axes.hlines(others, positions - 0.4, positions + 0.4, color=INK, linewidth=1.6)
        axes.set_ylabel("active per position")
        legend_above(axes, kind_handles(names))

    return draw("l0", "L0 of every site", _FULL, plot)


def alive_plot(report: EvalReport) -> str:
    """Subcomponents that are ever used, against how many each site has."""
    names = list(report.n_subcomponents)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        totals = [float(report.n_subcomponents[name]) for name in names]
        alive = [report.alive[name] for name in names]
        positions = site_positions(names)
        axes.bar(positions, totals, 0.8, color=GRID, edgecolor=MUTED, linewidth=0.5)
        site_bars(axes, names, alive)
        print_values(axes, positions, totals, "{:.0f}", alive)
        axes.set_ylabel("subcomponents")
        legend_above(axes, kind_handles(names))

    return draw("alive", "Alive subcomponents of every site", _FULL, plot)


def mean_importance_plot(report: EvalReport) -> str:
    """Mean importance of every subcomponent, sorted: one panel per kind, one line per layer."""
    names = list(report.mean_ci)
    kinds = list(dict.fromkeys(kind_of(name) for name in names))
    if len(kinds) > _MAX_PANELS:
        kinds = [""]
    points = max(24, min(250, _POINTS // len(names)))

    def plot(figure: Figure) -> None:
        panels = figure.subplots(2, len(kinds), sharey="row", squeeze=False)
        for column, kind in enumerate(kinds):
            mine = [name for name in names if kind in ("", kind_of(name))]
            for index, name in enumerate(mine):
                ranks, values = _thinned(report.mean_ci[name], points)
                alpha = 1.0 if len(mine) == 1 else 1 - 0.65 * index / (len(mine) - 1)
                colour = kind_colours(names)[kind_of(name)]
                label = layer_of(name) or name
                for axes in panels[:, column]:
                    axes.plot(ranks, values, color=colour, alpha=alpha, linewidth=1.4, label=label)
            panels[0, column].set(title=kind or "all sites", ylim=(0, 1))
            panels[1, column].set(yscale="log", ylim=(ALIVE / 10, 1.5))
            panels[1, column].axhline(ALIVE, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            panels[1, column].yaxis.set_minor_locator(NullLocator())
            if 1 < len(mine) <= 6:
                panels[0, column].legend(
                    title="layer", title_fontsize=7, fontsize=7, handlelength=1.1, loc="upper right"
                )
        panels[0, 0].set_ylabel("mean CI")
        panels[1, 0].set_ylabel("mean CI, log")
        figure.supxlabel("subcomponents of the site, sorted", fontsize=8.5, color=MUTED)

    return draw("mean-ci", "Sorted mean causal importance per site", (10.2, 4.2), plot)


def delta_plot(report: EvalReport) -> str:
    """Relative size of every site's delta."""
    names = list(report.n_subcomponents)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        sizes = [report.delta[name]["relative"] for name in names]
        values = [size if size > 1e-9 else 1e-9 for size in sizes]  # NaN of a zero matrix, too
        site_bars(axes, names, values)
        axes.set(yscale="log", ylabel="size of delta / size of W")
        axes.set_ylim(min(values) / 2, max(1.0, *values))

    return draw("delta", "Relative size of the delta of every site", _HALF, plot)


def hidden_plot(report: EvalReport) -> str:
    """Relative error of every site's output under CI masks (bars) and random masks (marks)."""
    names = list(report.n_subcomponents)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        positions = site_bars(axes, names, [report.hidden_error["ci"][name] for name in names])
        random = [report.hidden_error["stochastic"][name] for name in names]
        axes.hlines(random, positions - 0.4, positions + 0.4, color=INK, linewidth=1.6)
        axes.set_ylabel("error / mean square")
        bars = Patch(color=MUTED, label="importances as masks")
        legend_above(axes, [bars, Line2D([], [], color=INK, label="random masks")])

    return draw("hidden", "Relative error of every site's output", _HALF, plot)


# --------------------------------------------------------------------------- numbers


def _at_first_threshold(report: EvalReport, names: Sequence[str]) -> list[float]:
    values = next(iter(report.l0.values()))
    return [values.get(name, float("nan")) for name in names]


def _pgd_steps(reports: Named) -> set[int]:
    return {int(step) for _, report in reports for step in report.pgd} - {0}


def _reference(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (1, value),
        (-2, 2),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=MUTED,
    )


def _thinned(values: Sequence[float], points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of a sorted curve, its ends included; zeros become the axis' floor."""
    ranks = np.unique(np.linspace(0, len(values) - 1, min(points, len(values))).round().astype(int))
    return ranks + 1, np.maximum(np.array(values)[ranks], ALIVE / 10)


# ------------------------------------------------------- sites along an axis: grouped by layer


def layer_of(name: str) -> str:
    """`"0"` of `blocks.0.attn.q`; empty for a site in no block."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return match[1] if match else ""


def kind_of(name: str) -> str:
    """`"attn.q"` of `blocks.0.attn.q`; the whole name for a site in no block."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def kind_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every kind, legible on light and dark; the same for a kind on every page."""
    kinds = dict.fromkeys(kind_of(name) for name in names)
    return {
        kind: _KIND_COLOURS.get(kind, PALETTE[index % len(PALETTE)])
        for index, kind in enumerate(kinds)
    }


def site_positions(names: Sequence[str]) -> np.ndarray:
    """One place per site, with a gap between layers, `[n_sites]`."""
    gaps, before = [], layer_of(names[0])
    for name in names:
        gaps.append(0.9 if layer_of(name) != before else 0.0)
        before = layer_of(name)
    return np.arange(len(names)) + np.cumsum(gaps)


def site_bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> np.ndarray:
    """One bar per site; returns their places, `[n_sites]`."""
    positions = site_positions(names)
    colours = kind_colours(names)
    axes.bar(positions, values, 0.8, color=[colours[kind_of(name)] for name in names])
    axes.set_xlim(positions[0] - 0.8, positions[-1] + 0.8)
    _label_layers(axes, names, positions)
    return positions


def _label_layers(axes: Axes, names: Sequence[str], positions: np.ndarray) -> None:
    places, labels = [], []
    for layer, group in groupby(zip(names, positions, strict=True), lambda pair: layer_of(pair[0])):
        members = list(group)
        if layer:
            places.append(float(np.mean([position for _, position in members])))
            labels.append(f"layer {layer}")
        else:
            places += [float(position) for _, position in members]
            labels += [kind_of(name) for name, _ in members]
    every = -(-len(places) // _MAX_LABELS)
    axes.set_xticks(places[::every], labels[::every])
    axes.tick_params(axis="x", length=0)


def print_values(
    axes: Axes,
    positions: np.ndarray,
    heights: Sequence[float],
    form: str,
    values: Sequence[float] | None = None,
) -> None:
    """Write values over bars, unless there are too many.

    Args:
        axes: Where.
        positions: Places of the bars, `[n_sites]`.
        heights: Their heights.
        form: Format string of a value.
        values: What to write; by default the heights.
    """
    if len(positions) > _FEW_SITES:
        return
    for x, height, value in zip(positions, heights, values or heights, strict=True):
        axes.annotate(
            form.format(value),
            (x, height),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=MUTED,
        )
    axes.margins(y=0.12)


def kind_handles(names: Sequence[str]) -> list[Patch]:
    """Legend entries for the kinds of these sites."""
    return [Patch(color=colour, label=kind) for kind, colour in kind_colours(names).items()]
