"""The plots of sweeps and reproductions, each an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from vpd_lens.viz.svg import MUTED, PALETTE, draw, legend_above

_FULL = (10.2, 3.2)


@dataclass(frozen=True)
class Point:
    """One run in a Pareto plot.

    Attributes:
        series: Runs of one series are joined by a line and share a colour.
        label: Written beside the point.
        l0: Active subcomponents per position.
        losses: The divergences, one per panel, by axis label.
    """

    series: str
    label: str
    l0: float
    losses: Mapping[str, float]


def pareto_plot(name: str, points: Sequence[Point]) -> str:
    """Sparsity against reconstruction: L0 and one divergence per panel, logarithmic axes.

    Args:
        name: Unique on the page.
        points: The runs; those with a value that is not positive are left out of a panel.
    """
    series = list(dict.fromkeys(point.series for point in points))
    panels = list(dict.fromkeys(panel for point in points for panel in point.losses))

    def plot(figure: Figure) -> None:
        for axes, panel in zip(_row_of_axes(figure, len(panels)), panels, strict=True):
            for index, one in enumerate(series):
                mine = [p for p in points if p.series == one and _has_place(p, panel)]
                mine.sort(key=lambda point: point.l0)
                colour = PALETTE[index % len(PALETTE)]
                x, y = [p.l0 for p in mine], [p.losses[panel] for p in mine]
                axes.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.2, label=one)
                for point in mine:
                    _annotate(axes, point.label, (point.l0, point.losses[panel]))
            axes.set(xscale="log", yscale="log", xlabel="L0, active per position", ylabel=panel)
            axes.grid(axis="both")
            axes.margins(0.14)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_locator(NullLocator())
        if series != [""]:
            legend_above(figure.axes[0])

    return draw(name, "Divergence against L0", (10.2, 3.8), plot)


def line_panels(
    name: str, label: str, x_label: str, x: Sequence[float], panels: Mapping[str, Sequence[float]]
) -> str:
    """One line per panel over a common logarithmic axis; vertical axes begin at 0.

    Args:
        name: Unique on the page.
        label: What the plot shows, for screen readers.
        x_label: Name of the axis.
        x: Its places.
        panels: Values by title.
    """

    def plot(figure: Figure) -> None:
        for axes, (title, values) in zip(
            _row_of_axes(figure, len(panels)), panels.items(), strict=True
        ):
            axes.plot(x, values, "o-", color=PALETTE[0], markersize=4.5)
            axes.set(xscale="log", xlabel=x_label, title=title)
            axes.set_ylim(0, 1.12 * (max(values) or 1))
            axes.xaxis.set_major_locator(FixedLocator(list(x)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return draw(name, label, _FULL, plot)


def bar_panels(name: str, label: str, panels: Mapping[str, Mapping[str, float]]) -> str:
    """Bars with their values, one panel per quantity.

    Args:
        name: Unique on the page.
        label: What the plot shows, for screen readers.
        panels: `{quantity: {bar: value}}`, the same bars in each.
    """

    def plot(figure: Figure) -> None:
        for axes, (title, bars) in zip(
            _row_of_axes(figure, len(panels)), panels.items(), strict=True
        ):
            places = np.arange(len(bars))
            colours = [PALETTE[index % len(PALETTE)] for index in range(len(bars))]
            drawn = axes.bar(places, list(bars.values()), 0.6, color=colours)
            axes.bar_label(drawn, fmt="{:.3g}", fontsize=7.5, color=MUTED, padding=2)
            axes.set_xticks(places, list(bars), fontsize=7.5)
            axes.tick_params(axis="x", length=0)
            axes.set_title(title)
            axes.margins(y=0.14)

    return draw(name, label, (10.2, 2.8), plot)


def _row_of_axes(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _has_place(point: Point, panel: str) -> bool:
    """Whether logarithmic axes can show it."""
    return point.l0 > 0 and point.losses.get(panel, 0) > 0


def _annotate(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(
        text, place, (5, 4), textcoords="offset points", fontsize=7.5, color=MUTED, zorder=3
    )
