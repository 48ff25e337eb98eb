"""An attribution graph as one interactive, self-contained HTML page."""

from __future__ import annotations

import hashlib
import html
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from vpd_lens.analysis.circuits.tables import KINDS
from vpd_lens.storage import write_text
from vpd_lens.viz.html import render_data

if TYPE_CHECKING:
    from vpd_lens.analysis.attention import HeadLoadings
    from vpd_lens.analysis.cards import Cards
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.clustering import Clusters
    from vpd_lens.analysis.harvest import Harvest

# More than a browser filters between two frames, and a few megabytes of page.
MAX_EDGES = 60_000
INLINE_EDGES = 10_000  # a notebook keeps every output in its file
STYLES = ("graph.css", "panel.css")
# In this order: they share one scope, and each may use the ones before it.
SCRIPTS = (
    *("text", "data", "state", "groups", "filters", "layout", "edges", "board", "card", "panel"),
    *("controls", "search", "keyboard", "main"),
)


def to_html(
    graph: AttributionGraph,
    path: str | Path,
    harvest: Harvest | None = None,
    title: str | None = None,
    cards: Cards | None = None,
    loadings: HeadLoadings | None = None,
    clusters: Clusters | None = None,
) -> Path:
    """Write a page that needs no network, to explore a graph by hand.

    Args:
        graph: The graph; of more than 60,000 edges the strongest are shown.
        path: The HTML file.
        harvest: Where subcomponents' cards come from.
        title: Heading of the page.
        cards: What is known of subcomponents (`vpd_lens.Cards`), which says more than a harvest.
        loadings: What each head carries of the edges from v to o (`head_loadings`).
        clusters: Nodes of one position and cluster are shown as a group, until a reader changes
            the groups.

    Raises:
        ArtefactError: If the harvest, the cards or the clusters are of another decomposition.
    """
    data = payload(graph, harvest, cards, loadings, clusters)
    write_text(Path(path), render(data, title or "Attribution graph"))
    return Path(path)


def inline(graph: AttributionGraph) -> str:
    """The page as part of a notebook's output, for which a large graph is too much."""
    if graph.n_edges > INLINE_EDGES:
        return (
            f"<p>To explore its {graph.n_edges:,} edges: <code>graph.to_html(path)</code>. Of at "
            f"most {INLINE_EDGES:,} the page is shown here: <code>graph.pruned(0.3)</code>.</p>"
        )
    page = html.escape(render(payload(graph), "Attribution graph"))
    style = "width:100%;height:640px;border:0;color-scheme:light dark"
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" style="{style}" srcdoc="{page}"></iframe>'
    )


render = partial(render_data, "assets/graph.html.j2", STYLES, SCRIPTS)


def payload(
    graph: AttributionGraph,
    harvest: Harvest | None = None,
    cards: Cards | None = None,
    loadings: HeadLoadings | None = None,
    clusters: Clusters | None = None,
) -> dict[str, Any]:
    """What the page shows, as JSON-able columns of nodes and, the strongest first, of edges."""
    influence, nodes = graph.influence(), graph.nodes
    used = nodes.place.unique()
    strongest = graph.edges.weight.abs().argsort(descending=True, stable=True)[:MAX_EDGES]
    edges, plain = graph.edges.where(strongest), ("position", "index", "activation", "importance")
    # The same for the same nodes, so that groups outlive a new page of the same graph.
    text = "\0".join([*graph.strings, *nodes.names()]).encode("utf-8", "surrogatepass")
    data = {
        "hash": hashlib.sha256(text).hexdigest()[:16],
        "tokens": list(graph.strings),
        "rows": [_row(nodes.places[place]) for place in used.tolist()],
        "kinds": list(KINDS),
        "nodes": {
            "name": nodes.names(),
            "kind": nodes.kind.tolist(),
            "row": torch.searchsorted(used, nodes.place).tolist(),
            **{name: getattr(nodes, name).tolist() for name in plain},
            "influence": influence.nodes.tolist(),
            "cumulative": influence.cumulative.tolist(),
        },
        "outputs": _outputs(graph),
        "edges": {name: getattr(edges, name).tolist() for name in edges.columns()},
        "heads": {} if loadings is None else _heads(graph, loadings, strongest),
        "n_edges": graph.n_edges,
        "scores": {
            "completeness": graph.completeness(),
            "replacement": influence.replacement,
            "completeness_score": influence.completeness,
        },
        "cards": _cards(graph, harvest, cards),
        "labels": _labels(graph, cards or harvest),
        "groups": [] if clusters is None else _groups(graph, clusters),
    }
    settings = {name: graph.settings.get(name) for name in ("frozen", "delta", "threshold")}
    return rounded(data) | {"settings": settings}


def _row(place: str) -> dict[str, str]:
    """`blocks.0.mlp.in` is the row `mlp in` of block 0; places outside blocks have none."""
    match = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?(.+)", place)
    block, label = match.groups() if match else ("", place)
    return {"place": place, "block": block, "label": re.sub(r"[._]", " ", label)}


def _outputs(graph: AttributionGraph) -> list[dict[str, Any]]:
    numbers = graph.nodes.of_kind("output").nonzero()[:, 0].tolist()
    # A difference or a direction has no probability.
    odds = [output.probability if output.token_id >= 0 else None for output in graph.outputs]
    rows = zip(numbers, graph.outputs, odds, strict=True)
    return [{"node": node, "text": output.name, "probability": p} for node, output, p in rows]


def _heads(
    graph: AttributionGraph, loadings: HeadLoadings, shown: Int[Tensor, " m"]
) -> dict[int, list[float]]:
    """What each head carries, by the numbers of the edges on the page."""
    loadings.check(graph)
    number = torch.full((graph.n_edges,), -1)
    number[shown] = torch.arange(len(shown))
    rows = zip(number[loadings.edge].tolist(), loadings.weights.tolist(), strict=True)
    return {edge: weights for edge, weights in rows if edge >= 0}


def _labels(graph: AttributionGraph, known: Harvest | Cards | None) -> dict[str, str]:
    """What subcomponents are called now, or else were when the graph was saved."""
    return (known is not None and known.labels.texts()) or graph.labels.texts()


def _groups(graph: AttributionGraph, clusters: Clusters) -> list[dict[str, Any]]:
    """Groups as the page writes them to a file."""
    return [{"name": name, "members": m} for name, m in clusters.groups_in(graph).items()]


def _cards(
    graph: AttributionGraph, harvest: Harvest | None, cards: Cards | None
) -> dict[str, dict[str, Any]]:
    """Cards by subcomponent, each once although it is a node at several positions."""
    known = cards or harvest
    if known is None:
        return {}
    known.check(graph.settings.get("decomposition", ""))
    own = graph.nodes.where(graph.nodes.of_kind("subcomponent"))
    found = torch.stack([own.place, own.index], 1).unique(dim=0).tolist()
    names = [(own.places[place], index) for place, index in found]
    shown = {f"{site}:{index}": _card(harvest, cards, site, index) for site, index in names}
    return {name: card for name, card in shown.items() if card is not None}


def _card(harvest: Harvest | None, cards: Cards | None, site: str, index: int) -> Any:
    if cards is not None:
        return rounded(cards.for_page(f"{site}:{index}"), 3)
    assert harvest is not None
    card = harvest.card(site, index)
    return card and card | {"examples": rounded(card["examples"], 3)}


def rounded(value: Any, digits: int = 4) -> Any:
    """Data of a page with few digits in all floats, which are `None` where they are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    return value
