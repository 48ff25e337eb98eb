"""Which pairs of q and k subcomponents make a head attend where it does.

An attention score is bilinear in the outputs of q and k at two positions. With `M` the matrix of
that form (the head's share, the rotation by the distance and the scale, whatever the model has),
the pair (c, c') contributes `a_q[c] (U_q[c] M U_k[c']) a_k[c']`; summed over all pairs, with the
deltas and biases, this is the score. A norm on q or k, or a soft cap on scores, makes `M` a local
linearisation, and terms that depend on neither (ALiBi) are not part of it.

Source: VPD, attention (data-dependent interaction).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.analysis.circuits.cut_forward import Cut, CutForward, keep_in
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.tables import AttentionPair
from vpd_lens.analysis.circuits.targets import explained_decomposition, prompt_tokens
from vpd_lens.errors import InputError, VPDError


class AttentionScores:
    """The attention scores of one prompt, text or token ids, as functions of q and k."""

    def __init__(self, model: nn.Module, prompt: str | Sequence[int] | Tensor) -> None:
        self.vpd = explained_decomposition(model)
        tokens = prompt_tokens(model, prompt)
        self.scores: dict[int, Tensor] = {}
        self.patterns: dict[int, Tensor] = {}
        hooks = [
            (f"blocks.{layer}.attn.hook_{name}", keep_in(store, layer))
            for layer in range(len(model.blocks))  # type: ignore[arg-type]
            for name, store in (("attn_scores", self.scores), ("pattern", self.patterns))
        ]
        self.cut: Cut = CutForward(self.vpd, frozen=False, through_delta=False)(tokens, 1, hooks)

    @torch.enable_grad()
    def form(self, layer: int, head: int, query: int, key: int) -> Float[Tensor, "d_q d_k"]:
        """The matrix `M` of the score of one head between two positions, the key not the later.

        Raises:
            InputError: If q or k of the layer is not decomposed, or there is no such score.
            VPDError: If the model does not show its scores.
        """
        places = [f"blocks.{layer}.attn.{part}" for part in "qk"]
        if not set(places) <= set(self.vpd.layout.names):
            raise InputError(f"{' and '.join(places)} are not both decomposed.")
        scores = self.scores.get(layer)
        # Some bridges show the pattern under both names.
        if scores is None or torch.equal(scores, self.patterns[layer]):
            raise VPDError(
                f"hook_attn_scores of block {layer} does not show the scores before the softmax "
                "(native bridges, and models without eager attention), so they cannot be traced."
            )
        n_heads, n_positions = scores.shape[1:3]
        if not (0 <= head < n_heads and 0 <= key <= query < n_positions):
            raise InputError(
                f"head {head}, query {query}, key {key}: block {layer} has {n_heads} heads on "
                f"{n_positions} positions, and a key is not after its query."
            )
        q, k = (self.cut.leaves[place] for place in places)
        by_q = torch.autograd.grad(scores[0, head, query, key], q, create_graph=True)[0][0, query]
        # Only the head's own part of q counts; all its rows of the form in one backward pass.
        rows = by_q.detach().nonzero()[:, 0]
        form = by_q.new_zeros(len(by_q), k.shape[-1])
        if len(rows):
            settings = {"retain_graph": True, "is_grads_batched": True}
            each = torch.eye(len(by_q), dtype=by_q.dtype, device=by_q.device)[rows]
            form[rows] = torch.autograd.grad(by_q, k, each, **settings)[0][:, 0, key]
        return form.detach()

    @torch.no_grad()
    def pairs(self, layer: int, head: int, query: int, key: int) -> Float[Tensor, "C_q C_k"]:
        """Every pair's contribution to one score, as `form` names it."""
        form = self.form(layer, head, query, key).float()
        ends = {f"blocks.{layer}.attn.q": query, f"blocks.{layer}.attn.k": key}
        xs = [self.cut.inputs[name][0, position].float() for name, position in ends.items()]
        both = zip(xs, ends, strict=True)
        q, k = ((x @ self.vpd.v(name))[:, None] * self.vpd.u(name) for x, name in both)
        return q @ form @ k.T


def attention_pairs(
    model: nn.Module, graph: AttributionGraph, n_scores: int = 20, n_pairs: int = 20
) -> list[AttentionPair]:
    """The q and k subcomponents behind a graph's most influential attention.

    Takes the `n_scores` pairs of positions of a layer whose v-to-o edges have the most influence,
    in each of them the head that attends most, and of that head's score the `n_pairs` pairs of
    nodes that contribute most.

    Raises:
        ArtefactError: If the graph is of another decomposition.
        InputError: If no v and o matrices are decomposed.
        VPDError: If the model does not show its attention scores.
    """
    vpd = explained_decomposition(model)
    importance = graph.importance(vpd) > 0
    if not any(name.endswith(".attn.o") for name in vpd.layout.names):
        raise InputError("attention_pairs needs decomposed v and o matrices to find attention.")
    scores = AttentionScores(model, list(graph.tokens))
    found = []
    for layer, query, key in _influential_attention(graph)[:n_scores]:
        names = [f"blocks.{layer}.attn.{part}" for part in "qk"]
        if not set(names) <= set(vpd.layout.names):
            continue
        head = int(scores.patterns[layer][0, :, query, key].argmax())
        of_q, of_k = (vpd.layout.columns(name) for name in names)
        nodes = importance[query, of_q][:, None] & importance[key, of_k]
        weight = torch.where(nodes, scores.pairs(layer, head, query, key), 0)
        best = weight.abs().flatten().topk(min(n_pairs, weight.numel())).indices
        for q, k in torch.stack(torch.unravel_index(best, weight.shape), 1).tolist():
            if value := float(weight[q, k]):
                ends = f"{names[0]}:{q}@{query}", f"{names[1]}:{k}@{key}"
                found.append(AttentionPair(layer, head, query, key, *ends, value))
    return found


def _influential_attention(graph: AttributionGraph) -> list[tuple[int, int, int]]:
    """(layer, query, key), by the influence of the edges from v to o between them."""
    places, nodes, edges = graph.nodes.places, graph.nodes, graph.edges
    influence = graph.influence().edges
    totals: Counter[tuple[int, int, int]] = Counter()
    for layer in {int(p.split(".")[1]) for p in places if p.endswith(".attn.o")}:
        v, o = (places.index(f"blocks.{layer}.attn.{part}") for part in "vo")
        chosen = (nodes.place[edges.source] == v) & (nodes.place[edges.target] == o)
        query, key = (nodes.position[end[chosen]] for end in (edges.target, edges.source))
        columns = query.tolist(), key.tolist(), influence[chosen].tolist()
        for query, key, value in zip(*columns, strict=True):
            totals[layer, query, key] += value
    return [where for where, _ in totals.most_common()]
