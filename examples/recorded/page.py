"""Sections as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from recorded.figures import legend
from recorded.record import RunRecord
from recorded.section import Section, shown
from vpd_lens.storage import write_text
from vpd_lens.viz.html import render_template


def write_page(
    path: Path,
    title: str,
    about: str,
    sections: Sequence[Section],
    records: Sequence[RunRecord],
    warning: str = "",
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: Its heading.
        about: A sentence below the heading.
        sections: What to show, in order.
        records: The runs behind them; the page ends with where and how they were made.
        warning: Shown above everything, if there is something to warn of.
    """
    page = render_template(
        "recorded",
        "page.html.j2",
        title=title,
        about=about,
        warning=warning,
        sections=sections,
        legend=legend(records[0].report) if records else "",
        origins=_origins(records),
        svg=Markup,
        shown=shown,
    )
    write_text(path, page)


def _origins(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    return [
        {
            "name": record.name,
            "steps": f"{record.config.steps:,}",
            "seed": str(record.seed),
            "minutes": f"{record.training_seconds / 60:,.1f}",
            "date": record.date,
            "machine": record.machine.gpu or f"{record.machine.cpu} ({record.machine.n_cpus})",
            "versions": ", ".join(f"{name} {v}" for name, v in record.versions.items()),
        }
        for record in records
    ]
