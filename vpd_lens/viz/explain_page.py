"""An explanation of a text as one self-contained page: tokens by sites, needs, cards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.utils import htmlsafe_json_dumps

from vpd_lens.storage import write_text
from vpd_lens.viz.graph_page import rounded
from vpd_lens.viz.html import asset, render_template

if TYPE_CHECKING:
    from vpd_lens.analysis.explain import Explanation

MAX_CARDS = 400  # a few megabytes of page
STYLES = ("graph.css", "panel.css", "explain.css")
SCRIPTS = ("text", "card", "explain")


def to_html(explanation: Explanation, path: str | Path, title: str | None = None) -> Path:
    """Write a page that needs no network; see `Explanation.to_html`.

    It has the cards of the subcomponents of the largest effects, at most 400 of them.
    """
    page = render_template(
        "vpd_lens.viz",
        "assets/explain.html.j2",
        title=title or "What a text needs",
        data=htmlsafe_json_dumps(payload(explanation), separators=(",", ":"), allow_nan=False),
        styles=[asset(f"assets/{name}") for name in STYLES],
        scripts=[asset(f"assets/{name}.js") for name in SCRIPTS],
    )
    write_text(Path(path), page)
    return Path(path)


def payload(explanation: Explanation) -> dict[str, Any]:
    """What the page shows; needs are `[site, index, importance, activation, effect]`."""
    names = explanation.layout.names
    numbers = {name: number for number, name in enumerate(names)}
    needs, largest = [], {}
    for position in range(len(explanation.strings)):
        row = []
        for need in explanation.needs(position, k=None):
            site, _, index = need.name.rpartition(":")
            row.append([numbers[site], int(index), need.importance, need.activation, need.effect])
            largest[need.name] = max(largest.get(need.name, 0.0), abs(need.effect))
        needs.append(row)
    shown = sorted(largest, key=lambda name: -largest[name])[:MAX_CARDS]
    token, position = explanation.target
    data = {
        "tokens": explanation.strings,
        "sites": list(names),
        "needs": needs,
        "predictions": explanation.predictions,
        "target": {"token": token, "position": position, "probability": explanation.probability},
        "threshold": explanation.threshold,
        "final_scale": explanation.cards.directions.final_scale,
        "cards": {name: explanation.cards.for_page(name) for name in shown},
        "labels": explanation.cards.labels.texts(),
        "n_subcomponents": len(largest),
    }
    return rounded(data, 3)
