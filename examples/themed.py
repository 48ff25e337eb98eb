"""Figures for pages that are read on light and on dark: one file for each."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from vpd_lens.plots import as_svg
from vpd_lens.plots.style import THEMES
from vpd_lens.storage import write_text


def save(folder: Path, name: str, figure: Figure) -> None:
    """One figure as two files, in the colours of light and of dark pages."""
    for theme in THEMES:
        write_text(folder / f"{name}_{theme}.svg", as_svg(figure, theme))
