"""An explanation of a text as one self-contained page: tokens by sites, needs, cards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd_lens.storage import write_text
from vpd_lens.viz.graph_page import rounded
from vpd_lens.viz.html import render_data

if TYPE_CHECKING:
    from vpd_lens.analysis.explain import Explanation

MAX_CARDS = 400  # a few megabytes of page
STYLES = ("graph.css", "panel.css", "explain.css")
SCRIPTS = ("text", "card", "explain")


def to_html(explanation: Explanation, path: str | Path, title: str | None = None) -> Path:
    """Write a page that needs no network; see `Explanation.to_html`.

    It has the cards of the subcomponents of the largest effects, at most 400 of them.
    """
    write_text(Path(path), render(payload(explanation), title or "What a text needs"))
    return Path(path)


render = partial(render_data, "assets/explain.html.j2", STYLES, SCRIPTS)


def payload(explanation: Explanation, n_cards: int = MAX_CARDS) -> dict[str, Any]:
    """What the page shows; needs are `[site, index, importance, activation, effect]`.

    It has the cards of the `n_cards` largest effects.
    """
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
    shown = sorted(largest, key=lambda name: -largest[name])[:n_cards]
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
