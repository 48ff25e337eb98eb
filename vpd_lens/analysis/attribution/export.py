"""An attribution graph as a `networkx.DiGraph`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpd_lens.analysis.attribution.nodes import KINDS

if TYPE_CHECKING:
    import networkx

    from vpd_lens.analysis.attribution.graph import AttributionGraph


def to_networkx(graph: AttributionGraph) -> networkx.DiGraph:
    """The graph with nodes named as in `graph.nodes.names()`.

    Args:
        graph: The graph.

    Returns:
        Nodes have `kind`, `site`, `position`, `token` (the prompt's, as text), `index`,
        `activation`, `importance` and `influence`; edges have `weight`.
    """
    import networkx

    nodes, names = graph.nodes, graph.nodes.names()
    result = networkx.DiGraph()
    columns = (nodes.kind, nodes.place, nodes.position, nodes.index)
    values = (nodes.activation, nodes.importance, graph.influence().nodes)
    rows = zip(names, *(column.tolist() for column in (*columns, *values)), strict=True)
    for name, kind, place, position, index, activation, importance, influence in rows:
        result.add_node(
            name,
            kind=KINDS[kind],
            site=nodes.places[place],
            position=position,
            token=graph.strings[position],
            index=index,
            activation=activation,
            importance=importance,
            influence=influence,
        )
    edges = graph.edges
    for source, target, weight in zip(
        edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True
    ):
        result.add_edge(names[source], names[target], weight=weight)
    return result
