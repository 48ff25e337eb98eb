"""An attribution graph as a `networkx.DiGraph`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

    from vpd_lens.analysis.attention import HeadLoadings
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.clustering import Clusters


def to_networkx(
    graph: AttributionGraph,
    loadings: HeadLoadings | None = None,
    clusters: Clusters | None = None,
) -> networkx.DiGraph:
    """The graph with nodes named as in `graph.nodes.names()`.

    Nodes have `kind`, `site`, `position`, `token` (the prompt's, as text), `index`, `activation`,
    `importance`, `influence` and, those that are labelled, `label`; edges have `weight` and, with
    `loadings`, those from v to o `heads`, what each head carries. With `clusters`, nodes of one
    position and cluster are one, of kind `cluster`, with its `members`; its edges are sums of
    theirs, without those inside it, and the `influence` is theirs together.
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
    return result if clusters is None else _grouped(result, clusters.groups_in(graph))


def _grouped(whole: networkx.DiGraph, groups: dict[str, list[str]]) -> networkx.DiGraph:
    """The graph with one node for each group."""
    import networkx

    owner = {member: name for name, members in groups.items() for member in members}
    result = networkx.DiGraph()
    result.add_nodes_from((name, own) for name, own in whole.nodes.items() if name not in owner)
    for name, members in groups.items():
        own = {key: whole.nodes[members[0]][key] for key in ("position", "token")}
        influence = sum(whole.nodes[member]["influence"] for member in members)
        result.add_node(name, kind="cluster", members=members, influence=influence, **own)
    for source, target, own in whole.edges(data=True):
        ends = owner.get(source, source), owner.get(target, target)
        if result.has_edge(*ends):
            result.edges[ends]["weight"] += own["weight"]
        elif ends[0] != ends[1]:
            kept = own if ends == (source, target) else {"weight": own["weight"]}
            result.add_edge(*ends, **kept)
    return result
