"""The plots of sweeps and reproductions, each an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpd_lens.plots.reports import steps_axis
from vpd_lens.plots.style import PALETTE, as_svg, canvas, muted


def line_panels(
    label: str, x_label: str, x: Sequence[float], panels: Mapping[str, Sequence[float]]
) -> str:
    """One line per panel over a common logarithmic axis; vertical axes begin at 0.

    Args:
        label: What the plot shows, for screen readers.
        x_label: Name of the axis.
        x: Its places.
        panels: Values by title.
    """
    with canvas(label, (10.2, 3.2)) as figure:
        for axes, (title, values) in zip(
            _row_of_axes(figure, len(panels)), panels.items(), strict=True
        ):
            axes.plot(x, values, "o-", color=PALETTE[0], markersize=4.5)
            axes.set(xlabel=x_label, title=title)
            steps_axis(axes, x)
            axes.set_ylim(0, 1.12 * (max(values) or 1))

    return as_svg(figure)


def bar_panels(label: str, panels: Mapping[str, Mapping[str, float]]) -> str:
    """Bars with their values, one panel per quantity.

    Args:
        label: What the plot shows, for screen readers.
        panels: `{quantity: {bar: value}}`, the same bars in each.
    """
    with canvas(label, (10.2, 2.8)) as figure:
        for axes, (title, bars) in zip(
            _row_of_axes(figure, len(panels)), panels.items(), strict=True
        ):
            places = np.arange(len(bars))
            colours = [PALETTE[index % len(PALETTE)] for index in range(len(bars))]
            drawn = axes.bar(places, list(bars.values()), 0.6, color=colours)
            axes.bar_label(drawn, fmt="{:.3g}", fontsize=7.5, color=muted(), padding=2)
            axes.set_xticks(places, list(bars), fontsize=7.5)
            axes.tick_params(axis="x", length=0)
            axes.set_title(title)
            axes.margins(y=0.14)

    return as_svg(figure)


def _row_of_axes(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])
