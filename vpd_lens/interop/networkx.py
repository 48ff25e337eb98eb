"""An attribution graph as a `networkx.DiGraph`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

    from vpd_lens.analysis.attention import HeadLoadings
    from vpd_lens.analysis.circuits.graph import AttributionGraph


def to_networkx(graph: AttributionGraph, loadings: HeadLoadings | None = None) -> networkx.DiGraph:
    """The graph with nodes named as in `graph.nodes.names()`.

    Nodes have `kind`, `site`, `position`, `token` (the prompt's, as text), `index`, `activation`,
    `importance`, `influence` and, those that are labelled, `label`; edges have `weight` and, with
    `loadings`, those from v to o `heads`, what each head carries.
    """
    import networkx

    columns, edges = graph.nodes.lists(), graph.edges
    names = columns.pop("name")
    columns["token"] = [graph.strings[position] for position in columns["position"]]
    columns["influence"] = graph.influence().nodes.tolist()
    result = networkx.DiGraph()
    for name, *values in zip(names, *columns.values(), strict=True):
        result.add_node(name, **dict(zip(columns, values, strict=True)))
    called = {name: text for name in names if (text := graph.labels.text(name))}
    networkx.set_node_attributes(result, called, "label")
    ends = [[names[node] for node in side.tolist()] for side in (edges.source, edges.target)]
    result.add_weighted_edges_from(zip(*ends, edges.weight.tolist(), strict=True))
    if loadings is not None:
        loadings.check(graph)
        for edge, heads in zip(loadings.edge.tolist(), loadings.weights.tolist(), strict=True):
            result.edges[ends[0][edge], ends[1][edge]]["heads"] = heads
    return result
