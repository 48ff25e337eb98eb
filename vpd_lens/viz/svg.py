"""Matplotlib figures as inline SVG that takes its colours from the page around it, or as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins, replaced by the page's own colours, which differ between light and dark themes.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
_CSS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}

PALETTE = ("#4c86d9", "#2fa39a", "#67a33f", "#c99a1e", "#d9703f", "#c2568f", "#8b6fd0")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
    "axes.titlesize": 8.5,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def draw(name: str, label: str, size: tuple[float, float], plot: Callable[[Figure], object]) -> str:
    """Draw one figure, without touching the user's settings of matplotlib.

    Args:
        name: Unique on the page.
        label: What it shows, for screen readers.
        size: Width and height in inches; only their ratio and the size of text follow from it.
        plot: Fills the figure.

    Returns:
        An `<svg>` element without width, height, external references or namespaces.
    """
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index(">", view.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", body)
    # Two decimals in coordinates; text between tags keeps its digits.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for stand_in, colour in _CSS.items():
        body = body.replace(stand_in, colour)
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{label}">{body.strip()}'


def write_png(
    folder: Path, name: str, label: str, size: tuple[float, float], plot: Callable[[Figure], object]
) -> tuple[str, str]:
    """Draw one figure on white as `<name>.png` in a folder; its file name, and its label."""
    grey = dict.fromkeys(("grid.color", "axes.edgecolor", "xtick.color"), "#d5d5d5")
    with rc_context({**_STYLE, **grey}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    return f"{name}.png", label


def legend_above(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """A legend in one line above the axes, of every labelled artist or of `handles`."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": 12}
    spaces = {"columnspacing": 1.4, "handlelength": 1.2, "handletextpad": 0.5}
    axes.legend(handles=handles, borderpad=0.2, borderaxespad=0.3, **place, **spaces)
