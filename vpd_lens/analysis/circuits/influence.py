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

Weights = Float[Tensor, " n_outputs"]


@dataclass(frozen=True)
class Influence:
    """Influences on the outputs, weighted by their probabilities.

    Attributes:
        nodes: Of each node, through all paths; of an output, its weight.
        edges: Of each edge: the share of its target's influence that comes along it.
        cumulative: For each node, the share of all influence that lies in nodes at least as
            influential: small for the most important ones. 0 for outputs.
        replacement: Share of the influence at the graph's beginnings (embeddings, biases, errors,
            deltas) that is not errors' or deltas'.
        completeness: Of every node the share of its input that does not come from errors or
            deltas (1 without inputs), weighted by the nodes' influence.
    """

    nodes: Float[Tensor, " n_nodes"]
    edges: Float[Tensor, " n_edges"]
    cumulative: Float[Tensor, " n_nodes"]
    replacement: float
    completeness: float


def influence(nodes: Nodes, edges: Edges, weights: Weights) -> Influence:
    """Influence of every node and edge; `weights` are the outputs'."""
    weight = torch.zeros(len(nodes), dtype=torch.float64)
    weight[nodes.of_kind("output")] = weights.double()
    weight /= weight.sum().clamp(min=1e-30)
    # Each edge's share of the absolute weight into its target.
    shares = edges.weight.abs().double()
    shares /= edges.target.bincount(shares, minlength=len(nodes)).clamp(min=1e-30)[edges.target]
    total = weight + _along_paths(weight, shares, edges, nodes)
    others = total.masked_fill(nodes.of_kind("output"), 0)
    ordered, order = others.sort(descending=True, stable=True)
    sums, cumulative = ordered.cumsum(0), torch.empty_like(others)
    cumulative[order] = sums / sums[-1:].clamp(min=1e-30)
    cumulative[nodes.of_kind("output")] = 0
    error, begin = nodes.of_kind("error", "delta"), nodes.of_kind("embedding", "position", "bias")
    ends = float(total[error | begin].sum())
    from_error = torch.zeros_like(total)
    from_error.index_add_(0, edges.target, shares * error[edges.source])
    return Influence(
        total.float(),
        (shares * total[edges.target]).float(),
        cumulative.float(),
        replacement=float(total[begin].sum()) / ends if ends > 0 else 1.0,
        completeness=float((total * (1 - from_error)).sum() / total.sum()),
    )


def kept_by_influence(
    nodes: Nodes, edges: Edges, node_threshold: float, edge_threshold: float, weights: Weights
) -> tuple[Bool[Tensor, " n_nodes"], Bool[Tensor, " n_edges"]]:
    """The nodes that hold a share of all influence, and then the edges that do.

    Embeddings and outputs are always kept; a node without an edge towards an output is not, nor
    a subcomponent that nothing reaches. An `InputError` if a threshold is not in (0, 1].
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise InputError(f"{name}={value}; expected a share, above 0 and at most 1.")
    ends = nodes.of_kind("embedding", "output")
    first = influence(nodes, edges, weights).nodes
    keep = _holding(first, node_threshold, ~nodes.of_kind("output")) | ends
    among = keep[edges.source] & keep[edges.target]
    scores = torch.zeros(len(among))
    scores[among] = influence(nodes, edges.where(among), weights).edges
    kept_edges = _holding(scores, edge_threshold, among)
    needs_input = nodes.of_kind("subcomponent")
    while True:
        leads, reached = torch.zeros_like(keep), torch.zeros_like(keep)
        leads[edges.source[kept_edges]] = reached[edges.target[kept_edges]] = True
        still = keep & (ends | (leads & (reached | ~needs_input)))
        if torch.equal(still, keep):
            return keep, kept_edges
        keep = still
        kept_edges &= keep[edges.source] & keep[edges.target]


def total_effects(nodes: Nodes, edges: Edges, output: int) -> Float[Tensor, " n_nodes"]:
    """Of each subcomponent `a_s d(output)/d(a_s)`, along all paths; NaN for other nodes.

    An edge's `w / (a_s g_s)` is the derivative of its target's activation by its source's, and that
    of an output is the sum over all paths of products of these. Effects on one path overlap.
    """
    inner, activation = nodes.of_kind("subcomponent"), nodes.activation.double()
    local = edges.where(inner[edges.source])
    slopes = local.weight.double() / (activation * nodes.importance)[local.source]
    start = torch.zeros_like(activation)
    start[output] = 1
    effects = _along_paths(start, slopes, local, nodes) * activation
    return torch.where(inner, effects, torch.nan).float()


def _along_paths(
    start: Float[Tensor, " n_nodes"], values: Float[Tensor, " n_edges"], edges: Edges, nodes: Nodes
) -> Float[Tensor, " n_nodes"]:
    """`w A + w A^2 + ...`, with `w` the start at some nodes and `A[target, source]` the values."""
    ends = edges.target.numpy(), edges.source.numpy()
    matrix = csr_matrix((values.numpy(), ends), shape=(len(nodes), len(nodes)))
    wave, total = start.numpy(), np.zeros(len(nodes))
    for _ in nodes.places:  # a path visits each place at most once
        wave = wave @ matrix
        if not wave.any():
            break
        total += wave
    return torch.from_numpy(total)


def _holding(
    values: Float[Tensor, " n"], share: float, among: Bool[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """The largest of some values that together hold a share of their sum."""
    held = torch.where(among, values.double(), 0)
    ordered, order = held.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    keep = torch.zeros_like(among)
    keep[order] = before < share * held.sum()
    return keep & among & (held > 0)
