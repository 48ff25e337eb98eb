"""Attention in attribution graphs: which heads carry an edge, and what makes them look there.

With the pattern of every head as it is, what `o` reads at a position is a sum over heads of the
values that each takes there, so an edge from v at position `t'` to `o:n` at `t` is, exactly,

    sum_h P[h, t, t'] (y_s[h] . V_n[h])

where `y_s` is what the source writes: `a_c g_c U_c` of a subcomponent, what subcomponents write
beyond their importance, `x Delta`, or the bias. What makes head `h` look from `t` to `t'` are
pairs of q and k subcomponents, whose contributions add up to its score (`prompt`).

Source: VPD, attribution graphs and attention.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.attention.attention import Attention
from vpd_lens.analysis.attention.form import heads_of
from vpd_lens.analysis.attention.prompt import PromptAttention, patterns_of
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.tables import KINDS, AttentionPair, Nodes
from vpd_lens.analysis.circuits.targets import explained_decomposition
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError, VPDError

_TOLERANCE = 1e-2  # of the largest edge; bf16 rounds at 4e-3
_REST = ("error", "delta", "bias")  # what writes besides subcomponents


@dataclass
class HeadLoadings:
    """The share of every head in the edges of a graph from v to o.

    Attributes:
        layer: Of each of these edges.
        edge: Its number in the graph.
        weights: What each head carries; they add up to the edge.
    """

    layer: Int[Tensor, " n"]
    edge: Int[Tensor, " n"]
    weights: Float[Tensor, "n head"]

    def check(self, graph: AttributionGraph) -> None:
        """Refuse another graph than the one that was split; an `InputError`."""
        known = not len(self.edge) or int(self.edge.max()) < graph.n_edges
        if known and len(self.edge):
            edges = graph.edges.weight[self.edge]
            known = bool(((self.weights.sum(1) - edges).abs() <= 2e-2 * edges.abs().max()).all())
        if not known:
            raise InputError(
                "loadings are of another graph: their heads do not add up to the edges of this "
                "one. Split this graph with head_loadings(model, graph)."
            )

    def of(self, edge: int) -> Float[Tensor, " head"]:
        """The heads of one edge of the graph.

        Raises:
            InputError: If it does not go from v to o.
        """
        found = (self.edge == edge).nonzero()[:, 0]
        if not len(found):
            raise InputError(f"edge {edge} does not go from a v to an o matrix.")
        return self.weights[int(found[0])]


@torch.no_grad()
def head_loadings(model: nn.Module, graph: AttributionGraph) -> HeadLoadings:
    """Split every edge from v to o over the heads of its layer.

    Exact: heads add up to the edge, in frozen graphs and in those of gradients alike, because v
    acts on o through no pattern. q and k do, and their edges are not split. Nor are those of an
    error in a graph that was pruned, which no longer knows what that error was made of.

    Raises:
        ArtefactError: If the graph is of another decomposition.
        InputError: If no layer has both v and o decomposed.
        VPDError: If the heads do not add up to the edges: something else lies between v and o.
    """
    vpd = explained_decomposition(model)
    importance = graph.importance(vpd)
    layers = [
        layer
        for layer in range(int(model.cfg.n_layers))  # type: ignore[union-attr]
        if {f"blocks.{layer}.attn.{part}" for part in "vo"} <= set(vpd.layout.names)
    ]
    if not layers:
        raise InputError("head_loadings needs a layer whose v and o matrices are decomposed.")
    tokens = torch.tensor(graph.tokens, device=vpd.device)[None]
    inputs = dict(zip(vpd.layout.names, vpd.inputs(tokens), strict=True))
    patterns = patterns_of(vpd, layers, tokens)
    parts = [
        _of_layer(vpd, graph, layer, patterns[layer][0].float().cpu(), inputs, importance)
        for layer in layers
    ]
    found = HeadLoadings(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    return _checked(graph, found)


def _checked(graph: AttributionGraph, found: HeadLoadings) -> HeadLoadings:
    """Without the edges of errors that no longer add up; others have to."""
    edges, error = graph.edges.weight[found.edge], KINDS.index("error")
    gap, largest = (found.weights.sum(1) - edges).abs(), edges.abs().max() if len(edges) else 0
    of_error = graph.nodes.kind[graph.edges.source[found.edge].long()] == error
    bad = of_error & (gap > 1e-3 * found.weights.abs().sum(1) + 1e-6 * largest)
    if (~of_error & (gap > _TOLERANCE * largest)).any():
        raise VPDError(
            "the heads of an attention edge add up to something else than the edge (by "
            f"{gap.max():.1e}): this model does more between v and o than to weigh values by its "
            "pattern."
        )
    return HeadLoadings(found.layer[~bad], found.edge[~bad], found.weights[~bad])


def _of_layer(
    vpd: Decomposition,
    graph: AttributionGraph,
    layer: int,
    pattern: Float[Tensor, "head query key"],
    inputs: dict[str, Tensor],
    importance: Float[Tensor, "pos C_total"],
) -> tuple[Tensor, Tensor, Tensor]:
    nodes, edges = graph.nodes, graph.edges
    v, o = (f"blocks.{layer}.attn.{part}" for part in "vo")
    if not {v, o} <= set(nodes.places):
        return (torch.empty(0, dtype=torch.long),) * 2 + (torch.empty(0, len(pattern)),)  # type: ignore
    writers = nodes.of_kind("subcomponent", *_REST) & (nodes.place == nodes.places.index(v))
    readers = nodes.of_kind("subcomponent") & (nodes.place == nodes.places.index(o))
    chosen = (writers[edges.source.long()] & readers[edges.target.long()]).nonzero()[:, 0]
    source, target = edges.source[chosen].long(), edges.target[chosen].long()
    g = importance[:, vpd.layout.columns(v)].cpu()
    y = _written(vpd, v, inputs[v][0].float().cpu(), g, nodes.where(source))
    reads = vpd.v(o).float().cpu().T.unflatten(-1, heads_of(vpd, layer, "o"))
    y, reads = y.unflatten(-1, heads_of(vpd, layer, "v")), reads[nodes.index[target].long()]
    y = y.repeat_interleave(reads.shape[1] // y.shape[1], dim=1)
    looks = pattern[:, nodes.position[target].long(), nodes.position[source].long()].T
    return torch.full_like(chosen, layer), chosen, looks * (y * reads).sum(-1)


def _written(
    vpd: Decomposition,
    site: str,
    x: Float[Tensor, "pos d_in"],
    g: Float[Tensor, "pos C"],
    nodes: Nodes,
) -> Float[Tensor, "n d_out"]:
    """What some nodes of a matrix write."""
    v, u, delta = (part.float().cpu() for part in (vpd.v(site), vpd.u(site), vpd.delta(site)))
    a, bias = x @ v, vpd.site(site).bias
    constant = x.new_zeros(u.shape[1]) if bias is None else bias.float().cpu()
    rest = torch.stack([((1 - g) * a) @ u, x @ delta, constant.expand(len(x), -1)])
    position, index = nodes.position.long(), nodes.index.long().clamp(min=0)
    own = (a * g)[position, index][:, None] * u[index]
    which = torch.tensor([_REST.index(kind) if kind in _REST else 0 for kind in KINDS])
    subcomponent = nodes.of_kind("subcomponent")[:, None]
    return torch.where(subcomponent, own, rest[which[nodes.kind.long()], position])


def attention_pairs(
    model: nn.Module, graph: AttributionGraph, n_scores: int = 20, n_pairs: int = 20
) -> list[AttentionPair]:
    """The q and k subcomponents behind a graph's most influential attention.

    Takes the `n_scores` looks, of one head from one position to another, that carry the largest
    share of the influence of the graph's edges from v to o, and of each look's score the `n_pairs`
    pairs of nodes that contribute most.

    Raises:
        ArtefactError: If the graph is of another decomposition.
        InputError: If no layer has q, k, v and o decomposed.
        VPDError: If attention is no softmax of scores that are bilinear in q and k.
    """
    loadings, attention = head_loadings(model, graph), Attention(model, None, 0.0)
    prompt = attention.on(list(graph.tokens), prepend_bos=False)
    important = graph.importance(attention.vpd) > 0
    found = []
    for layer, head, query, key in _influential_looks(graph, loadings)[:n_scores]:
        if layer in prompt.layers:
            found += _pairs_of(prompt, important, layer, head, query, key)[:n_pairs]
    return found


def _pairs_of(
    prompt: PromptAttention, important: Tensor, layer: int, head: int, query: int, key: int
) -> list[AttentionPair]:
    """Pairs of nodes by the size of what they add to one score."""
    own = prompt.contributions(layer, head, query, key)
    ends = [prompt.vpd.layout.columns(f"blocks.{layer}.attn.{part}") for part in "qk"]
    nodes = important[query, ends[0]][:, None] & important[key, ends[1]]
    values = own.values.clone()
    values[: len(nodes), : nodes.shape[1]][~nodes.to(values.device)] = 0
    values[len(nodes) :] = 0  # of delta and bias
    values[:, nodes.shape[1] :] = 0
    own.values = values
    return [pair for pair in own.top(int((values != 0).sum())) if pair.weight]


def _influential_looks(
    graph: AttributionGraph, loadings: HeadLoadings
) -> list[tuple[int, int, int, int]]:
    """(layer, head, query, key), by the influence that the head carries from the key."""
    shares = loadings.weights.abs()
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
    shares = shares * graph.influence().edges[loadings.edge][:, None]
    nodes, edges = graph.nodes, graph.edges
    query = nodes.position[edges.target[loadings.edge].long()].tolist()
    key = nodes.position[edges.source[loadings.edge].long()].tolist()
    totals: Counter[tuple[int, int, int, int]] = Counter()
    for layer, t, s, row in zip(loadings.layer.tolist(), query, key, shares.tolist(), strict=True):
        for head, share in enumerate(row):
            totals[layer, head, t, s] += share
    return [where for where, _ in totals.most_common()]
