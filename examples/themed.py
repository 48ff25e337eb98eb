"""Figures for pages that are read on light and on dark: one file for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from vpd_lens.storage import write_text
from vpd_lens.viz.svg import draw

COLOURS = {
    "light": {"currentColor": "#1f2328", "var(--muted)": "#59636e", "var(--grid)": "#d1d9e0"},
    "dark": {"currentColor": "#e6edf3", "var(--muted)": "#9198a1", "var(--grid)": "#3d444d"},
}


def save(
    folder: Path, name: str, size: tuple[float, float], plot: Callable[[Figure], None]
) -> None:
    """One figure as two files, in the colours of light and of dark pages."""
    for theme, colours in COLOURS.items():
        text = draw(name, name, size, plot)
        for stand_in, colour in colours.items():
            text = text.replace(stand_in, colour)
        write_text(
            folder / f"{name}_{theme}.svg",
            text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '
                         'font-family="system-ui, sans-serif" ', 1),
        )  # fmt: skip
