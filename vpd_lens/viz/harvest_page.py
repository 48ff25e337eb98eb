"""A harvest as a folder of self-contained HTML pages: an index, and one page per site.

A page holds its data as JSON and draws the cards that are looked at, so that pages with hundreds
of subcomponents open at once. Tokens are arbitrary text: they reach the document as text nodes
only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.storage import write_text
from vpd_lens.viz.html import asset, render_template

_BINS = 48


def write(
    harvest: Harvest, folder: str | Path, title: str = "Harvest", cards: Cards | None = None
) -> Path:
    """Write `index.html`, whose path is returned, and a page for every site.

    `page_name(site)#c17` is the address of subcomponent 17. The folder is made if need be; other
    files in it are left alone. The title is the index' heading. With `vpd_lens.Cards(model)`,
    pages also say what the weights read and write, and lead to the subcomponents around each.
    """
    folder, names = Path(folder), harvest.layout.names
    for number, site in enumerate(names):
        page = _render(
            "harvest_site.html.j2",
            title=f"{site} - {title}",
            heading=title,
            site=site,
            before=_link(names[number - 1]) if number else None,
            after=_link(names[number + 1]) if number + 1 < len(names) else None,
            data=htmlsafe_json_dumps(_payload(harvest, site, cards), separators=(",", ":")),
            script=asset("harvest.js"),
        )
        write_text(folder / page_name(site), page)
    index = folder / "index.html"
    write_text(index, _index(harvest, title))
    return index


def page_name(site: str) -> str:
    """File name of a site's page."""
    return quote(site, safe="") + ".html"


def _link(site: str) -> dict[str, Any]:
    # Quoted once more, because a file name may hold a percent sign.
    return {"name": site, "href": quote(page_name(site))}


def _render(template: str, **values: Any) -> str:
    return render_template("vpd_lens.viz", template, harvest_style=asset("harvest.css"), **values)


def _index(harvest: Harvest, title: str) -> str:
    lowest, fired, rows = _lowest_decade(harvest), [], []
    for site, size in zip(harvest.layout.names, harvest.layout.sizes, strict=True):
        densities = sorted(row.density for row in harvest.table(site) if row.density)
        fired += densities
        row = {
            "fired": len(densities),
            "count": size,
            "l0": sum(densities),
            "median": densities[len(densities) // 2] if densities else None,
            "bars": _histogram(densities, lowest),
        }
        rows.append(_link(site) | row)
    totals = {"alive": len(fired), "l0": sum(fired), "decades": -lowest}
    return _render("harvest_index.html.j2", title=title, harvest=harvest, sites=rows, **totals)


def _lowest_decade(harvest: Harvest) -> int:
    """Left end of the density axis: the decade of one firing in all positions."""
    return min(-1, math.floor(-math.log10(max(harvest.n_positions, 1))))


def _histogram(densities: list[float], lowest: int) -> list[tuple[float, float]]:
    """Left edge and height, both in [0, 1], of the filled bins of a logarithmic density axis."""
    shares = np.clip(1 - np.log10(densities) / lowest, 0, 1)
    counts = np.histogram(shares, _BINS, (0, 1))[0].tolist()
    return [(n / _BINS, math.sqrt(count / max(counts))) for n, count in enumerate(counts) if count]


def _payload(harvest: Harvest, site: str, known: Cards | None) -> dict[str, Any]:
    """What `harvest.js` draws; keys are short because there are many of them."""
    numbers: dict[str, int] = {}  # every text is stored once
    table = harvest.table(site)

    def number(token: int) -> int:
        return numbers.setdefault(harvest.strings[token], len(numbers))

    def examples(index: int, kind: str) -> list[list[Any]]:
        """`[focus, tokens, importances in percent, activations]` of every example."""
        return [
            [
                example.focus,
                [number(token) for token in example.tokens],
                [round(100 * g) for g in example.importance],
                [float(f"{a:.3g}") for a in example.activation],
            ]
            for example in harvest.examples(site, index, kind)
        ]

    def tokens(index: int, side: str, k: int = 10, by: str = "information") -> list[list[Any]]:
        """`[token, recall, precision, PMI]` of the largest tokens."""
        return [
            [number(t.token), *(float(f"{x:.4g}") for x in (t.recall, t.precision, t.pmi))]
            for t in harvest.tokens(site, index, side, k, by)
        ]

    cards = [
        {
            "i": row.index,
            "density": row.density,
            "importance": row.mean_importance,
            "size": row.mean_activation,
            "activation": row.firing_activation,
            "top": examples(row.index, "top"),
            "random": examples(row.index, "random"),
            "commonest": tokens(row.index, "input", 1, "recall")[0][:2],
            "input": tokens(row.index, "input"),
            "output": tokens(row.index, "output"),
            "weights": known.weights(f"{site}:{row.index}") if known else [],
        }
        for row in table
        if row.density
    ]
    return {
        "site": site,
        "count": len(table),
        "positions": harvest.n_positions,
        "threshold": harvest.settings.threshold,
        "lowest": _lowest_decade(harvest),
        "cards": cards,
        "labels": (known.labels if known else harvest.labels).texts(),
        "pages": {name: quote(page_name(name)) for name in harvest.layout.names},
        "tokens": list(numbers),
    }
