"""How much of the outputs each node and edge accounts for, directly and through others.

Edges into a node are taken in absolute value and divided by their sum; the influence of a node is
what reaches the outputs from it along all paths. The definitions, thresholds and scores are those
of circuit tracing with transcoders (Ameisen et al. 2025), so that numbers can be compared; errors
and deltas count as error nodes. `total_effects` is signed, and in the outputs' own units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix
from torch import Tensor

from vpd_lens.analysis.circuits.tables import Edges, Nodes
from vpd_lens.errors import InputError

ERRORS = ("error", "delta")


@dataclass(frozen=True)
class Influence:
    """Influences on the outputs, weighted by their probabilities.

    Attributes:
        nodes: Of each node, through all paths; of an output, its weight.
        edges: Of each edge: the share of its target's influence that comes along it.
        cumulative: For each node, the share of all influence that lies in nodes at least as
            influential: small for the most important ones. 0 for outputs.
    """

    nodes: Float[Tensor, " n_nodes"]
    edges: Float[Tensor, " n_edges"]
    cumulative: Float[Tensor, " n_nodes"]


Weights = Float[Tensor, " n_outputs"] | None


def influence(nodes: Nodes, edges: Edges, weights: Weights = None) -> Influence:
    """Influence of every node and edge."""
    total = _reaching(nodes, edges, weights)
    shares = _shares(edges, len(nodes))
    onward = torch.from_numpy(total)[edges.target.long()]
    others = total.copy()
    others[nodes.of_kind("output").numpy()] = 0
    order = np.argsort(-others, kind="stable")
    sums = np.cumsum(others[order])
    cumulative = np.empty_like(others)
    cumulative[order] = sums / max(float(sums[-1]) if len(sums) else 0.0, 1e-30)
    cumulative[nodes.of_kind("output").numpy()] = 0
    return Influence(
        torch.from_numpy(total).float(),
        (torch.from_numpy(shares) * onward).float(),
        torch.from_numpy(cumulative).float(),
    )


def kept_by_influence(
    nodes: Nodes,
    edges: Edges,
    node_threshold: float,
    edge_threshold: float,
    weights: Weights = None,
) -> tuple[Bool[Tensor, " n_nodes"], Bool[Tensor, " n_edges"]]:
    """The nodes that hold a share of all influence, and then the edges that do.

    Embeddings and outputs are always kept; a node without an edge towards an output is not, nor
    a subcomponent that nothing reaches.

    Raises:
        InputError: If a threshold is not in (0, 1].
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise InputError(f"{name}={value}; expected a share, above 0 and at most 1.")
    ends = nodes.of_kind("embedding", "output")
    first = influence(nodes, edges, weights).nodes
    keep = _holding(first, node_threshold, ~nodes.of_kind("output")) | ends
    among = keep[edges.source.long()] & keep[edges.target.long()]
    left = Edges(edges.source[among], edges.target[among], edges.weight[among])
    scores = torch.zeros(len(edges.weight))
    scores[among] = influence(nodes, left, weights).edges
    kept_edges = _holding(scores, edge_threshold, among) & among
    needs_input = nodes.of_kind("subcomponent")
    while True:
        source, target = edges.source[kept_edges].long(), edges.target[kept_edges].long()
        leads = torch.zeros(len(nodes), dtype=torch.bool).index_fill_(0, source, True)
        reached = torch.zeros(len(nodes), dtype=torch.bool).index_fill_(0, target, True)
        still = keep & (ends | (leads & (reached | ~needs_input)))
        if bool((still == keep).all()):
            return keep, kept_edges
        keep = still
        kept_edges &= keep[edges.source.long()] & keep[edges.target.long()]


def scores(nodes: Nodes, edges: Edges, weights: Weights = None) -> tuple[float, float]:
    """Replacement and completeness score, both in [0, 1].

    Returns:
        Replacement: share of the influence at the graph's beginnings (embeddings, biases, errors,
            deltas) that is not errors' or deltas'. Completeness: of every node the share of its
            input that does not come from errors or deltas (1 without inputs), weighted by the
            nodes' influence.
    """
    total = _reaching(nodes, edges, weights)
    error = nodes.of_kind(*ERRORS).numpy()
    begin = nodes.of_kind("embedding", "position", "bias").numpy()
    ends = total[error].sum() + total[begin].sum()
    replacement = float(total[begin].sum() / ends) if ends > 0 else 1.0
    from_error = np.zeros(len(nodes))
    shares = _shares(edges, len(nodes))
    np.add.at(from_error, edges.target.numpy(), shares * error[edges.source.numpy()])
    return replacement, float((total * (1 - from_error)).sum() / total.sum())


def total_effects(nodes: Nodes, edges: Edges, output: int) -> Float[Tensor, " n_nodes"]:
    """The part of an output that each subcomponent accounts for, along all paths, to first order.

    Edges are local: `w / (a_s g_s)` is the derivative of the target's activation by the source's.
    The total derivative of an output by a node is the sum over all paths of products of these, and
    the node's activation times it is the output's change when the node is ablated.

    Returns:
        `a_s d(output)/d(a_s)` for subcomponents, NaN for other nodes. Effects of nodes on one path
        overlap, so they do not add up to the output.
    """
    inner, activation = nodes.of_kind("subcomponent"), nodes.activation.double()
    kept = inner[edges.source.long()]
    local = Edges(edges.source[kept], edges.target[kept], edges.weight[kept].double())
    slopes = local.weight / (activation * nodes.importance)[local.source.long()]
    start = np.zeros(len(nodes))
    start[output] = 1
    effects = torch.from_numpy(_along_paths(start, slopes.numpy(), local, nodes)) * activation
    return torch.where(inner, effects, torch.nan).float()


def _shares(edges: Edges, n_nodes: int) -> np.ndarray:
    """Each edge's share of the absolute weight into its target."""
    weight, target = edges.weight.abs().double().numpy(), edges.target.numpy()
    incoming = np.bincount(target, weight, minlength=n_nodes)
    return weight / np.maximum(incoming, 1e-30)[target]


def _reaching(nodes: Nodes, edges: Edges, weights: Weights) -> np.ndarray:
    """Influence of every node: the outputs' weights, and what flows back along all paths."""
    is_output = nodes.of_kind("output").numpy()
    weight = np.zeros(len(nodes))
    weight[is_output] = nodes.importance.numpy()[is_output] if weights is None else weights.numpy()
    weight = weight / max(float(weight.sum()), 1e-30)
    return weight + _along_paths(weight, _shares(edges, len(nodes)), edges, nodes)


def _along_paths(start: np.ndarray, values: np.ndarray, edges: Edges, nodes: Nodes) -> np.ndarray:
    """`w A + w A^2 + ...`, with `w` the start at some nodes and `A[target, source]` the values."""
    ends = edges.target.numpy(), edges.source.numpy()
    matrix = csr_matrix((values, ends), shape=(len(nodes), len(nodes)))
    total, wave = np.zeros(len(nodes)), start
    for _ in range(len(nodes.places) + 1):  # a path visits each place at most once
        wave = wave @ matrix
        if not wave.any():
            break
        total += wave
    return total


def _holding(
    values: Float[Tensor, " n"], share: float, among: Bool[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """The largest of some values that together hold a share of their sum."""
    held = torch.where(among, values.double(), 0)
    order = held.argsort(descending=True, stable=True)
    before = held[order].cumsum(0) - held[order]
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[order] = before < share * held.sum()
    return keep & among & (held > 0)
