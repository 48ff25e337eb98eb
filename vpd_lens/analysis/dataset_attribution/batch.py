"""One batch, run through the cut model: what sources put in, and where gradients are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, Cut, CutForward
from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.importance import lower_leaky

# By site; sizes differ from one to the next, so their names are not checked against each other.
Alive = Mapping[str, Int[Tensor, " _n_alive"]]


@dataclass
class Directions:
    """Read and write directions of the alive subcomponents.

    Attributes:
        read: By site, `[d_in, S]`.
        write: By site, `[S, d_out]`.
        n_tokens: Size of the vocabulary, whose tokens are sources too.
    """

    read: dict[str, Float[Tensor, "_d_in _S"]]
    write: dict[str, Float[Tensor, "_S _d_out"]]
    n_tokens: int

    @classmethod
    def of(cls, vpd: Decomposition, alive: Alive) -> Directions:
        """The directions of a decomposition's alive subcomponents."""
        index = {name: part.to(vpd.device) for name, part in alive.items()}
        return cls(
            {name: vpd.v(name).detach()[:, index[name]] for name in vpd.layout.names},
            {name: vpd.u(name).detach()[index[name]] for name in vpd.layout.names},
            int(vpd.model.cfg.d_vocab),
        )

    def n_sources(self, place: str) -> int:
        """Number of sources at a site, or of tokens at `embed`."""
        return self.n_tokens if place == EMBEDDING else len(self.write[place])


@dataclass
class Observed:
    """One batch after its forward pass, positions of all its sequences in one dimension.

    At pads all of it is 0, so that they are neither sources nor counted.

    Attributes:
        cut: The forward pass.
        directions: Of the alive subcomponents.
        tokens: The batch, `[n]`.
        real: False at pads, `[n]`; `None`: there are none.
        embeddings: Token embeddings `[n, d_model]`.
        acts: Activations `a = x V` of the alive subcomponents, by site `[n, S]`.
        importance: Their causal importances `g`, `[n, S]`.
        weighted: `g a`, `[n, S]`.
        count_pass: Called after each backward pass, to show progress.
    """

    cut: Cut
    directions: Directions
    tokens: Int[Tensor, " n"]
    real: Bool[Tensor, " n"] | None
    embeddings: Float[Tensor, "n d_model"]
    acts: dict[str, Float[Tensor, "n _S"]]
    importance: dict[str, Float[Tensor, "n _S"]]
    weighted: dict[str, Float[Tensor, "n _S"]]
    count_pass: Callable[[], None] = field(default=lambda: None)

    def gradients(
        self, matrix: str, places: Sequence[str], cotangent: Float[Tensor, "n d_in"]
    ) -> list[Float[Tensor, "n _d_out"]]:
        """One backward pass from a matrix' input to the outputs of the places before it.

        Args:
            matrix: The matrix that reads.
            places: Where gradients are wanted.
            cotangent: Of the input; pads are left out.
        """
        x = self.cut.inputs[matrix]
        cotangent = zero_at_pads(cotangent, self.real).to(x.dtype).reshape(x.shape)
        leaves = [self.cut.leaves[place] for place in places]
        found = torch.autograd.grad(x, leaves, cotangent, retain_graph=True)
        self.count_pass()
        return [gradient.flatten(0, -2).float() for gradient in found]

    def contribution(
        self, place: str, gradient: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, " n_sources"]:
        """What every source at a place adds to a target with that gradient at its output."""
        if place == EMBEDDING:
            per_position = torch.linalg.vecdot(gradient, self.embeddings)
            return self.by_token(per_position[:, None])[0]
        return ((self.weighted[place].T @ gradient) * self.directions.write[place]).sum(1)

    def by_token(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "k n_tokens"]:
        """Sums over the positions of every token."""
        sums = values.new_zeros(self.directions.n_tokens, values.shape[1])
        return sums.index_add_(0, self.tokens, values).T


def observe(
    forward: CutForward,
    directions: Directions,
    alive: Alive,
    batch: Batch,
) -> Observed:
    """Run one batch; its pads are on the right, where a causal model does not see them."""
    vpd = forward.vpd
    cut = forward(batch.tokens)
    rows = None if batch.real is None else batch.real.flatten()
    inputs = {name: cut.inputs[name].detach() for name in vpd.layout.names}
    with torch.no_grad():
        z = vpd.pre_importance(list(inputs.values()), batch.real)
        parts = vpd.layout.split(lower_leaky(z))
    importance = {
        name: zero_at_pads(part.flatten(0, -2)[:, alive[name].to(part.device)], rows)
        for name, part in zip(vpd.layout.names, parts, strict=True)
    }
    acts = {
        name: zero_at_pads(x.flatten(0, -2).float() @ directions.read[name], rows)
        for name, x in inputs.items()
    }
    return Observed(
        cut,
        directions,
        batch.tokens.flatten(),
        rows,
        zero_at_pads(cut.embeddings.flatten(0, -2).float(), rows),
        acts,
        importance,
        {name: g * acts[name] for name, g in importance.items()},
    )


def zero_at_pads(
    values: Float[Tensor, "n d"], real: Bool[Tensor, " n"] | None
) -> Float[Tensor, "n d"]:
    """`values` with 0 in the rows of pads."""
    return values if real is None else values.masked_fill(~real[:, None], 0)
