"""Nodes and links of the graph JSON that circuit-tracer and Neuronpedia both read.

| here | `feature_type` | why |
|---|---|---|
| subcomponent | `cross layer transcoder` | has a panel of examples in both viewers |
| error, delta | `mlp reconstruction error` | counted as error in both viewers' scores |
| bias, position | `bias` | keeps its label, is no error, has no examples |
| embedding | `embedding` | |
| output | `logit` | |
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vpd_lens.analysis.attribution.graph_numbering import EMBEDDED, Axis, Numbering, numbering
from vpd_lens.analysis.attribution.nodes import KINDS
from vpd_lens.analysis.attribution.pairs_record import AttentionPair
from vpd_lens.analysis.attribution.qk_tracing import trace_pairs
from vpd_lens.analysis.targets import Output
from vpd_lens.errors import InputError

if TYPE_CHECKING:
    from vpd_lens.analysis.attribution.graph import AttributionGraph

FEATURE_TYPES = {
    "subcomponent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "delta": "mlp reconstruction error",
    "bias": "bias",
    "position": "bias",
    "embedding": "embedding",
    "output": "logit",
}


def graph_json(
    graph: AttributionGraph, axis: Axis, pairs: Sequence[AttentionPair] | None
) -> dict[str, Any]:
    """Everything of the graph JSON but its metadata.

    Args:
        graph: The graph.
        axis: What a layer is.
        pairs: What subcomponents contribute to attention scores.

    Raises:
        InputError: If the graph has values that JSON has no numbers for, or no outputs.
    """
    _require_finite(graph, pairs or ())
    numbers = numbering(graph.nodes.places, axis)
    nodes = _nodes(graph, numbers)
    ids = [node["node_id"] for node in nodes]
    edges = graph.edges
    columns = (edges.source.tolist(), edges.target.tolist(), edges.weight.tolist())
    data = {
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": next(n["node_id"] for n in nodes if n["is_target_logit"]),
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(*columns, strict=True)
        ],
    }
    if pairs is not None:
        known = dict(zip(graph.nodes.names(), nodes, strict=True))
        data["qk_only_nodes"] = trace_pairs(known, pairs, lambda name: _absent(name, numbers))
    return data


def feature_indices(graph: AttributionGraph, numbers: Numbering) -> dict[int, tuple[str, int]]:
    """The site and subcomponent of every feature number in a graph.

    Args:
        graph: The graph.
        numbers: How its features are numbered.
    """
    nodes = graph.nodes.where(graph.nodes.of_kind("subcomponent"))
    named = {
        (nodes.places[place], index)
        for place, index in zip(nodes.place.tolist(), nodes.index.tolist(), strict=True)
    }
    return {numbers.feature(site, index): (site, index) for site, index in sorted(named)}


def checked_slug(slug: str, name: str = "slug") -> str:
    """A name that both viewers accept in addresses and files.

    Raises:
        InputError: If it has other characters, or is that of another file of the viewers.
    """
    if not re.fullmatch(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*", slug):
        raise InputError(
            f"{name}={slug!r}; expected letters, digits, '_', '-' and '.' only, the first of them "
            "no '.', as the viewers have it in addresses and file names."
        )
    if slug == "graph-metadata" or slug.endswith(".vpd"):
        raise InputError(f"{name}={slug!r} is the name of another file; choose another.")
    return slug


def checked_threshold(threshold: float | None) -> float | None:
    """A share of influence at which the viewers' slider begins.

    Raises:
        InputError: If it is not in (0, 1].
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(
            f"node_threshold={threshold}; expected a share, above 0 and at most 1, or None for a "
            "viewer without slider."
        )
    return threshold


def _require_finite(graph: AttributionGraph, pairs: Sequence[AttentionPair]) -> None:
    columns = {
        "activations": graph.nodes.activation,
        "edges": graph.edges.weight,
        "attention pairs": torch.tensor([pair.weight for pair in pairs]),
    }
    for name, column in columns.items():
        count = int((~column.isfinite()).sum())
        if count:
            raise InputError(
                f"{count} {name} of this graph are not finite, and JSON has no such numbers. Look "
                "for NaN or infinity in the model's weights."
            )
    if not graph.outputs:
        raise InputError("this graph has no outputs; the viewers need at least one.")


def _nodes(graph: AttributionGraph, numbers: Numbering) -> list[dict[str, Any]]:
    nodes, orders = graph.nodes, itertools.count()
    columns = (nodes.kind, nodes.place, nodes.position, nodes.index, nodes.activation)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    result = []
    for kind_id, place_id, position, index, activation in rows:
        kind, place = KINDS[kind_id], nodes.places[place_id]
        if kind == "output":
            order = next(orders)
            node = _output_node(graph.outputs[order], order, numbers)
        elif kind == "embedding":
            text = f'Emb: "{graph.strings[position]}"'
            node = _node(kind, EMBEDDED, index, position, text) | {"feature": position}
        else:
            node = _place_node(numbers, kind, place, index, position)
        if kind == "subcomponent":
            node["clerp"] += " (-)" if activation < 0 else " (+)"
        result.append(node | {"activation": activation})
    for node, influence in zip(result, graph.influence().cumulative.tolist(), strict=True):
        node["influence"] = influence
    return result


def _output_node(output: Output, order: int, numbers: Numbering) -> dict[str, Any]:
    # Differences and directions have no token; two of them still need two numbers.
    number = output.token_id if output.token_id >= 0 else -1 - order
    # The viewers read the probability out of the label.
    clerp = f'Output "{output.name}" (p={output.probability:.3f})'
    node = _node("output", str(numbers.n_layers + 1), number, output.position, clerp)
    return node | {"token_prob": output.probability, "is_target_logit": order == 0}


def _place_node(
    numbers: Numbering, kind: str, place: str, index: int, position: int
) -> dict[str, Any]:
    """A node of a matrix, norm or activation function, labelled with its name."""
    number = numbers.number(kind, place, index)
    if kind != "subcomponent":
        return _node(kind, numbers.layer_of(place), number, position, f"{place} {kind}")
    node = _node(kind, numbers.layer_of(place), number, position, f"{place}:{index}")
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


def _absent(name: str, numbers: Numbering) -> dict[str, Any]:
    """The record of a node that attention pairs name but that is not in the graph.

    Raises:
        InputError: If it is no name of a node at one of the graph's matrices.
    """
    match = re.fullmatch(r"(.+?)(?::(\d+)|\.(error|delta|bias))@(\d+)", name)
    if match is None or match[1] not in numbers.layer:
        raise InputError(
            f"pairs name a node {name!r}, which is not in this graph and not of one of its "
            "matrices; expected names like 'blocks.1.attn.q:31@5'."
        )
    kind = match[3] or "subcomponent"
    return _place_node(numbers, kind, match[1], int(match[2] or -1), int(match[4]))
