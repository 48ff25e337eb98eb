"""The runs of a toy as one self-contained HTML page: importances and vectors, found and true."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy_runs.measure import SiteFigures
from toy_runs.presets import METHODS, method_of
from vpd_lens.plots.style import as_svg, canvas, muted
from vpd_lens.viz.html import render_template

TRUE, FOUND = "#d98a2b", "#3f87d6"


def render(records: list[RunRecord]) -> str:
    """One page for the seeds of one toy under one method.

    Args:
        records: At least one record.

    Returns:
        HTML that needs no network.
    """
    first = records[0]
    return render_template(
        "toy_runs",
        "page.html.j2",
        title=f"{first.target['toy']} decomposed by {method_of(first.config)}",
        method=METHODS[method_of(first.config)].capitalize(),
        records=records,
        svg=_svg,
    )


def _svg(name: str, site: SiteFigures) -> Markup:
    with canvas(f"{name}: importances and vectors", (9.0, 3.2)) as figure:
        _fill(figure, site)
    return Markup(as_svg(figure))


def _fill(figure: Figure, site: SiteFigures) -> None:
    true, found = np.array(site.true), np.array(site.found)
    flat = true.ndim == 2 and true.shape[1] == 2
    left, *right = figure.subplots(1, 2 if flat or not true.size else 3)
    left.imshow(
        np.array(site.importance), vmin=0, vmax=1, cmap="Blues", aspect="auto", rasterized=True
    )
    left.axvline(site.expected - 0.5, color=muted(), linewidth=0.8)
    left.set(title="causal importance", xlabel="subcomponent", ylabel="feature")
    left.grid(False)
    if not true.size:
        right[0].set_axis_off()
    elif flat:
        _arrows(right[0], true, found)
    else:
        limit = float(np.abs(true).max())
        for axes, vectors, title in zip(right, (true, found), ("true", "found"), strict=True):
            if vectors.size:
                axes.imshow(vectors, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
            axes.set(title=title, xlabel="hidden dimension")
            axes.grid(False)


def _arrows(axes: Axes, true: np.ndarray, found: np.ndarray) -> None:
    for vectors, colour, width in ((true, TRUE, 5.0), (found, FOUND, 1.4)):
        for x, y in vectors:
            axes.plot([0, x], [0, y], color=colour, linewidth=width, solid_capstyle="round")
    axes.set(title="true and found", aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
