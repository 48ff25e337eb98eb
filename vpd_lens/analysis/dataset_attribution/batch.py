"""One batch, run through the cut model: what sources put in, and where gradients are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, Cut, CutForward
from vpd_lens.analysis.usage import Alive
from vpd_lens.data import Batch
from vpd_lens.decomposition.importance import lower_leaky


class Observer:
    """Runs batches through the cut model, whose sources are tokens and subcomponents.

    `alive` has the latter by site; `read` and `write` their directions `[d_in, S]`, `[S, d_out]`.
    After each forward or backward pass `count_pass` is called.
    """

    def __init__(self, forward: CutForward, alive: Alive) -> None:
        vpd, self.forward = forward.vpd, forward
        self.count_pass: Callable[[], object] = lambda: None
        self.alive = {name: alive[name].to(vpd.device) for name in vpd.layout.names}
        self.read = {name: vpd.v(name).detach()[:, index] for name, index in self.alive.items()}
        self.write = {name: vpd.u(name).detach()[index] for name, index in self.alive.items()}
        self.n_tokens = int(vpd.model.cfg.d_vocab)

    def __call__(self, batch: Batch) -> Observed:
        """One batch; its pads are on the right, where a causal model does not see them."""
        vpd, cut = self.forward.vpd, self.forward(batch.tokens)
        inputs = {name: cut.inputs[name].detach() for name in self.alive}
        with torch.no_grad():
            z = vpd.pre_importance(list(inputs.values()), batch.real)
            parts = dict(zip(self.alive, vpd.layout.split(lower_leaky(z)), strict=True))
        real = slice(None) if batch.real is None else batch.real.flatten()
        g = {name: flat(parts[name][..., index], real) for name, index in self.alive.items()}
        acts = {name: flat(x, real) @ self.read[name] for name, x in inputs.items()}
        weighted = {name: g[name] * acts[name] for name in g}
        embeddings, tokens = flat(cut.embeddings, real), batch.tokens.flatten()[real]
        self.count_pass()
        return Observed(self, cut, real, tokens, embeddings, acts, g, weighted)


@dataclass
class Observed:
    """One batch after its forward pass: the positions of all its sequences that are no pads."""

    observer: Observer
    cut: Cut
    real: Bool[Tensor, " _n_all"] | slice  # which of all positions those are
    tokens: Int[Tensor, " n"]
    embeddings: Float[Tensor, "n d_model"]
    acts: dict[str, Float[Tensor, "n _S"]]  # `a = x V` of the alive subcomponents, by site
    importance: dict[str, Float[Tensor, "n _S"]]  # `g`
    weighted: dict[str, Float[Tensor, "n _S"]]  # `g a`

    def gradients(
        self, matrix: str, places: Sequence[str], cotangent: Float[Tensor, "n d_in"]
    ) -> list[Float[Tensor, "n _d_out"]]:
        """One backward pass from a matrix' input to the outputs of the places before it."""
        x = self.cut.inputs[matrix]
        everywhere = x.new_zeros(x.shape)  # contiguous, so that the view below writes to it
        everywhere.flatten(0, -2)[self.real] = cotangent.to(x.dtype)
        leaves = [self.cut.leaves[place] for place in places]
        found = torch.autograd.grad(x, leaves, everywhere, retain_graph=True)
        self.observer.count_pass()
        return [flat(gradient, self.real) for gradient in found]

    def contributions(
        self, matrix: str, places: Sequence[str], cotangent: Float[Tensor, "n d_in"], n_heads: int
    ) -> Float[Tensor, "n_heads n_sources"]:
        """What every source adds to `sum (cotangent * x)`, by the heads that it writes to."""
        columns = []
        for place, gradient in zip(places, self.gradients(matrix, places, cotangent), strict=True):
            if place == EMBEDDING:
                per_position = torch.linalg.vecdot(gradient, self.embeddings)
                columns.append(self.by_token(per_position[:, None]))
                continue
            products = (self.weighted[place].T @ gradient) * self.observer.write[place]
            columns.append(products.unflatten(1, (n_heads, -1)).sum(-1).T)
        return torch.cat(columns, 1)

    def by_token(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "k n_tokens"]:
        """Sums over the positions of every token."""
        sums = values.new_zeros(self.observer.n_tokens, values.shape[1])
        return sums.index_add_(0, self.tokens, values).T


def flat(x: Float[Tensor, "*pos d"], real: Bool[Tensor, " _n_all"] | slice) -> Float[Tensor, "n d"]:
    """The rows of all positions that are no pads, in fp32."""
    return x.flatten(0, -2)[real].float()
