"""How figures look: the colours of a theme in files, those of the page around them as SVG.

A figure is shown by a notebook without pyplot, and follows its light or dark theme.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vpd_lens.errors import InputError


class Theme(NamedTuple):
    """Colours of text and of what is beside it, of lines behind data, and of the background."""

    ink: str
    muted: str
    grid: str
    paper: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", "#ffffff"),
    "dark": Theme("#e6edf3", "#9198a1", "#3d444d", "#0d1117"),
}
# What a page has in their place. It defines the two variables; a notebook's output does, too.
_CSS = ("currentColor", "var(--muted)", "var(--grid)")
_AS_IN_PAGES = (
    "--muted:color-mix(in srgb,currentColor 68%,transparent);"
    "--grid:color-mix(in srgb,currentColor 22%,transparent);font-family:system-ui,sans-serif"
)

MAIN, BESIDE = "#3f87d6", "#d98a2b"  # blue for a report, orange for the one beside it
PALETTE = ("#4c86d9", "#2fa39a", "#67a33f", "#c99a1e", "#d9703f", "#c2568f", "#8b6fd0")
RUNS = (MAIN, BESIDE, *PALETTE[1:4], *PALETTE[5:])
FULL, HALF = (10.2, 2.7), (5.0, 2.8)

# Zero is transparent, and so of the background's own colour, light or dark.
_CLEAR = [*to_rgba(MAIN)[:3], 0.0], [*to_rgba(BESIDE)[:3], 0.0]
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0, MAIN), (0.5, _CLEAR[0]), (0.5, _CLEAR[1]), (1, BESIDE)]
)
_POSITIVE = LinearSegmentedColormap.from_list("positive", [_CLEAR[0], MAIN])

_theme: ContextVar[Theme] = ContextVar("theme", default=THEMES["light"])


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Colours of the figures made inside a `with` block: `"light"` or `"dark"`.

    Notebooks and pages have their own; this is for files.

    Raises:
        InputError: If there is no such theme.

    Examples:
        >>> from vpd_lens import plots
        >>> from vpd_lens.example import example_report
        >>> with plots.theme("dark"):
        ...     figure = plots.alive(example_report())
        >>> figure.get_facecolor()[:3] < (0.1, 0.1, 0.1)
        True
    """
    if name not in THEMES:
        raise InputError(f"theme={name!r}; expected one of {', '.join(THEMES)}.")
    token = _theme.set(THEMES[name])
    try:
        yield
    finally:
        _theme.reset(token)


class Plot(Figure):
    """A figure that notebooks show in their own colours, and files in those of its theme."""

    style: dict[str, Any]

    def draw(self, renderer: Any) -> None:
        """As any figure, in the style it was made in: ticks are made when they are first drawn."""
        with rc_context(self.style):
            super().draw(renderer)

    def _repr_html_(self) -> str:
        width = round(96 * self.get_figwidth())
        return f'<div style="max-width:{width}px;{_AS_IN_PAGES}">{as_svg(self)}</div>'


@contextmanager
def canvas(label: str, size: tuple[float, float]) -> Iterator[Plot]:
    """A new figure in the theme's style, without touching the user's settings of matplotlib.

    `label` says what it shows, for screen readers; `size` is in inches.
    """
    style = _style(_theme.get())
    with rc_context(style):
        figure = Plot(figsize=size, layout="constrained")
        figure.style = style
        figure.set_label(label)
        yield figure


@contextmanager
def panel(
    label: str, size: tuple[float, float], ax: Axes | None = None
) -> Iterator[tuple[Figure, Axes]]:
    """The axes of a new figure, or `ax`, in the style that the user has made it in."""
    if ax is not None:
        figure = ax.figure
        assert isinstance(figure, Figure)
        yield figure, ax
        return
    with canvas(label, size) as figure:
        yield figure, figure.subplots()


def ink() -> str:
    """The colour of text, and of marks that are to be seen first."""
    return rcParams["text.color"]


def muted() -> str:
    """The colour of what is beside the data."""
    return rcParams["axes.labelcolor"]


def grid() -> str:
    """The colour of what is behind the data."""
    return rcParams["grid.color"]


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "font.size": 8.5,
        "figure.facecolor": theme.paper,
        "axes.facecolor": "none",
        "text.color": theme.ink,
        "axes.titlesize": 8.5,
        "axes.titlecolor": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "xtick.major.size": 2.5,
        "xtick.minor.size": 0,
        "ytick.color": theme.grid,
        "ytick.labelcolor": theme.muted,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }


def as_svg(figure: Figure, theme: str | None = None) -> str:
    """A figure as an `<svg>` element without width, height, or external references.

    Its colours are those of the page around it, `currentColor`, `var(--muted)` and `var(--grid)`;
    or with a `theme` that theme's, for a file of its own.
    """
    buffer = io.StringIO()
    # Ids differ between the figures of a page, and stay the same when one is drawn again.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": str(figure.get_label())}):
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
    for own in THEMES.values():
        for colour, shown in zip(own, THEMES[theme] if theme else _CSS, strict=False):
            body = body.replace(colour, shown)
    alone = 'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" '
    label = html.escape(str(figure.get_label()))
    start = f'<svg {alone if theme else ""}viewBox="{view[1]}" role="img" aria-label="{label}">'
    return start + body.strip()


def heat(axes: Axes, values: np.ndarray, signed: bool, limit: float | None = None) -> AxesImage:
    """A matrix in colours, up to `limit` or its largest entry."""
    limit = float(np.nanmax(np.abs(values))) if limit is None else limit
    limits = {"vmin": -limit if signed else 0.0, "vmax": max(limit, 1e-12)}
    cmap = _SIGNED if signed else _POSITIVE
    image = axes.imshow(values, cmap=cmap, aspect="auto", interpolation="nearest", **limits)
    axes.grid(False)
    return image


def legend_above(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """A legend in one line above the axes, of every labelled artist or of `handles`."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": 12}
    spaces = {"columnspacing": 1.4, "handlelength": 1.2, "handletextpad": 0.5}
    if any(handle.get_label() for handle in handles):
        axes.legend(handles=handles, borderpad=0.2, borderaxespad=0.3, **place, **spaces)


def plain(text: str) -> str:
    """A token as a label: white space visible, and dollars no formulas."""
    text = text.replace(" ", "·") if text.isspace() else text
    return text.replace("\n", "⏎").replace("$", r"\$")


def line(axes: Axes, y: float, label: str) -> None:
    """A dashed horizontal line with its label."""
    axes.axhline(y, color=muted(), linewidth=0.9, linestyle=(0, (4, 3)))
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(label, (1, y), (-2, 2), **place, ha="right", fontsize=7.5, color=muted())
