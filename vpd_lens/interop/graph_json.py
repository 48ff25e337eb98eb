"""Nodes and links of the graph JSON that circuit-tracer and Neuronpedia both read.

The viewers know layers, each with numbered features. A layer is a matrix here (`axis="site"`) or a
block (`axis="block"`); the matrices of one block then share its feature numbers in turn, so that
layer, feature and position stay unique.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from vpd_lens.errors import InputError

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.tables import AttentionPair
    from vpd_lens.analysis.clustering import Clusters

Axis = Literal["site", "block"]

FEATURE_TYPES = {
    "subcomponent": "cross layer transcoder",  # has a panel of examples in both viewers
    "error": "mlp reconstruction error",  # counted as error in both viewers' scores
    "delta": "mlp reconstruction error",
    "bias": "bias",  # keeps its label, is no error, has no examples
    "position": "bias",
    "embedding": "embedding",
    "output": "logit",
}
# Nodes that are no features have numbers below 0, distinct within a layer: the viewers merge
# nodes of the same layer, number and position, and may drop them as too common.
_UNNUMBERED = ("error", "delta", "bias", "position")
_MATRIX = re.compile(r".+\.attn\.[qkvo]|.+\.mlp\.(in|gate|out)|unembed")
# Of pairs behind attention scores; the viewer lists all of them, for every node anew.
_TOP = 20


@dataclass(frozen=True)
class Numbering:
    """Numbers of layers and features."""

    layer: dict[str, int]  # of each place between the embedding and the outputs
    rank: dict[str, int]  # which of its layer's places it is, the matrices first
    width: dict[int, int]  # how many matrices each layer has

    def number(self, kind: str, place: str, index: int) -> int:
        """Number of a node of a matrix, norm or activation, unique in its layer and position."""
        rank = self.rank.get(place, 0)
        if kind == "subcomponent":
            return index * self.width[self.layer[place]] + rank
        return -1 - (rank * len(_UNNUMBERED) + _UNNUMBERED.index(kind))

    def feature(self, place: str, index: int) -> int:
        """Number of a subcomponent among those of all layers: the Cantor pairing of two."""
        x, y = self.layer[place], self.number("subcomponent", place, index)
        return (x + y) * (x + y + 1) // 2 + y


def numbering(places: Sequence[str], axis: Axis) -> Numbering:
    """How the places of a graph are numbered, which depends on the model and the axis only."""
    if axis not in ("site", "block"):
        raise InputError(f"axis={axis!r}; expected 'site' or 'block'.")
    inner = [place for place in places if place not in ("embed", "output")]
    matrices = [place for place in inner if _MATRIX.fullmatch(place)]
    layer: dict[str, int] = {}
    count = block = 0
    for place in inner:
        # Norms and activation functions belong to the matrix that reads them, and places outside
        # of blocks, such as the last norm, to the block before them.
        match = re.match(r"blocks\.(\d+)\.", place)
        block = int(match[1]) if match else block
        layer[place] = block if axis == "block" else min(count, max(len(matrices) - 1, 0))
        count += place in matrices
    ranks: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
    ordered = sorted(inner, key=lambda place: place not in matrices)
    rank = {place: next(ranks[layer[place]]) for place in ordered}
    return Numbering(layer, rank, Counter(layer[place] for place in matrices))


def metadata(
    graph: AttributionGraph, slug: str, scan: str, node_threshold: float | None
) -> dict[str, Any]:
    """What both viewers want to know of a graph beside its nodes and links."""
    if node_threshold is not None and not 0 < node_threshold <= 1:
        raise InputError(
            f"node_threshold={node_threshold}; expected a share, above 0 and at most 1, or None."
        )
    return {
        "slug": checked_slug(slug),
        "scan": scan,
        "prompt_tokens": list(graph.strings),
        "prompt": "".join(graph.strings),
        "node_threshold": node_threshold,
        "schema_version": 1,
    }


def checked_slug(slug: str, name: str = "slug") -> str:
    """A name that both viewers accept in addresses and files; others are refused."""
    if not re.fullmatch(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*", slug):
        raise InputError(
            f"{name}={slug!r}; expected letters, digits, '_', '-' and '.', the first no '.'."
        )
    if slug == "graph-metadata" or slug.endswith(".vpd"):
        raise InputError(f"{name}={slug!r} is the name of another file; choose another.")
    return slug


def graph_json(
    graph: AttributionGraph,
    axis: Axis,
    pairs: Sequence[AttentionPair] | None,
    clusters: Clusters | None = None,
) -> dict[str, Any]:
    """Everything of the graph JSON but its metadata, if it has outputs and finite values only."""
    _require_finite(graph, pairs or ())
    numbers = numbering(graph.nodes.places, axis)
    nodes = _nodes(graph, numbers)
    ids = [node["node_id"] for node in nodes]
    links = (getattr(graph.edges, name).tolist() for name in graph.edges.columns())
    first = next(node["node_id"] for node in nodes if node["is_target_logit"])
    groups = {} if clusters is None else clusters.groups_in(graph)
    id_of = dict(zip(graph.nodes.names(), ids, strict=True))
    supernodes = [[name, *(id_of[member] for member in m)] for name, m in groups.items()]
    pinned = [node for _, *members in supernodes for node in members]  # else they are not shown
    view = {"pinnedIds": pinned, "supernodes": supernodes, "linkType": "both", "clickedId": first}
    view["sg_pos"] = ""
    data: dict[str, Any] = {"qParams": view, "nodes": nodes}
    data["links"] = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(*links, strict=True)
    ]
    if pairs is not None:
        known = dict(zip(graph.nodes.names(), nodes, strict=True))
        data["qk_only_nodes"] = _trace_pairs(known, pairs, numbers)
    return data


def _require_finite(graph: AttributionGraph, pairs: Sequence[AttentionPair]) -> None:
    columns = {"activations": graph.nodes.activation, "edges": graph.edges.weight}
    columns["attention pairs"] = torch.tensor([pair.weight for pair in pairs])
    for name, column in columns.items():
        if count := int((~column.isfinite()).sum()):
            raise InputError(
                f"{count} {name} of this graph are not finite, and JSON has no such numbers. Look "
                "for NaN or infinity in the model's weights."
            )
    if not graph.outputs:
        raise InputError("this graph has no outputs; the viewers need at least one.")


def _nodes(graph: AttributionGraph, numbers: Numbering) -> list[dict[str, Any]]:
    lists, outputs, result = graph.nodes.lists(), enumerate(graph.outputs), []
    last = str(max(numbers.layer.values(), default=-1) + 2)
    columns = [lists[name] for name in ("kind", "site", "index", "position", "activation")]
    rows = zip(*columns, graph.influence().cumulative.tolist(), strict=True)
    for kind, place, index, position, activation, influence in rows:
        if kind == "output":
            order, output = next(outputs)
            # Differences and directions have no token; two of them still need two numbers.
            number = output.token_id if output.token_id >= 0 else -1 - order
            # The viewers read the probability out of the label.
            label = f'Output "{output.name}" (p={output.probability:.3f})'
            node = _node(kind, last, number, output.position, label)
            node |= {"token_prob": output.probability, "is_target_logit": order == 0}
        elif kind == "embedding":
            node = _node(kind, "E", index, position, f'Emb: "{graph.strings[position]}"')
            node["feature"] = position
        else:
            node = _place_node(numbers, kind, place, index, position)
        if kind == "subcomponent":
            node["clerp"] += " (-)" if activation < 0 else " (+)"
            if text := graph.labels.text(f"{place}:{index}"):
                node["clerp"] = f"{text} [{node['clerp']}]"
        result.append(node | {"activation": activation, "influence": influence})
    return result


def _place_node(
    numbers: Numbering, kind: str, place: str, index: int, position: int
) -> dict[str, Any]:
    """A node of a matrix, norm or activation function, labelled with its name."""
    number, layer = numbers.number(kind, place, index), str(numbers.layer.get(place, "E"))
    if kind != "subcomponent":
        return _node(kind, layer, number, position, f"{place} {kind}")
    node = _node(kind, layer, number, position, f"{place}:{index}")
    return node | {"feature": numbers.feature(place, index)}


def _node(kind: str, layer: str, number: int, position: int, clerp: str) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{number}_{position}",
        "feature": number,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": FEATURE_TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{number}-{position}",
        "clerp": clerp,
    }


def _trace_pairs(
    nodes: dict[str, dict[str, Any]], pairs: Sequence[AttentionPair], numbers: Numbering
) -> dict[str, dict[str, Any]]:
    """Give attention's nodes, as `qk_tracing_results`, the pairs behind their scores.

    A subcomponent of an o matrix depends on the scores of its position as query. Of layers whose o
    matrix has no nodes, those of the v matrix get the pairs of their position as key. Heads are
    summed, as a node may belong to several. Records of nodes that only pairs refer to are returned
    by id.
    """
    site_of = {name: name.rpartition(":")[0] for name in nodes}
    groups: dict[tuple[str, int], list[AttentionPair]] = defaultdict(list)
    sites = set(site_of.values())
    for pair in pairs:
        o, v = (f"blocks.{pair.layer}.attn.{letter}" for letter in "ov")
        groups[(o, pair.query_position) if o in sites else (v, pair.key_position)].append(pair)
    unknown = (end for p in pairs for end in (p.query, p.key) if end not in nodes)
    absent = {end: _absent(end, numbers) for end in unknown}
    ids = {name: node["node_id"] for name, node in (nodes | absent).items()}
    results = {key: _contributors(group, ids) for key, group in groups.items()}
    for name, node in nodes.items():
        if (key := (site_of[name], node["ctx_idx"])) in results:
            node["qk_tracing_results"] = results[key]
    return {node["node_id"]: node for node in absent.values()}


def _contributors(pairs: Sequence[AttentionPair], ids: dict[str, str]) -> dict[str, list[Any]]:
    def largest(*ends: str) -> list[list[Any]]:
        total: Counter[tuple[str, ...]] = Counter()
        for pair in pairs:
            total[tuple(ids[getattr(pair, end)] for end in ends)] += pair.weight  # type: ignore
        found = sorted(total.items(), key=lambda item: -abs(item[1]))[:_TOP]
        return [[*names, weight] for names, weight in found]

    return {
        "pair_wise_contributors": largest("query", "key"),
        "top_q_marginal_contributors": largest("query"),
        "top_k_marginal_contributors": largest("key"),
    }


def _absent(name: str, numbers: Numbering) -> dict[str, Any]:
    """The record of a node that attention pairs name but that is not in the graph."""
    match = re.fullmatch(r"(.+?)(?::(\d+)|\.(error|delta|bias))@(\d+)", name)
    if match is None or match[1] not in numbers.layer:
        raise InputError(
            f"pairs name a node {name!r}, which is not in this graph and not of one of its "
            "matrices; expected names like 'blocks.1.attn.q:31@5'."
        )
    kind = match[3] or "subcomponent"
    return _place_node(numbers, kind, match[1], int(match[2] or -1), int(match[4]))
