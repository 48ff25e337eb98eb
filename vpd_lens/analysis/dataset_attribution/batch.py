"""One batch, run through the cut model: what sources put in, and where gradients are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpd_lens.analysis.circuits.cut_forward import EMBEDDING, Cut, CutForward
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.sigmoids import lower_leaky

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
        """Those of a decomposition.

        Args:
            vpd: The decomposition.
            alive: Which subcomponents.
        """
        index = {name: part.to(vpd.device) for name, part in alive.items()}
        return cls(
            {name: vpd.v(name).detach()[:, index[name]] for name in vpd.layout.names},
            {name: vpd.u(name).detach()[index[name]] for name in vpd.layout.names},
            int(vpd.model.cfg.d_vocab),
        )

    def n_sources(self, place: str) -> int:
        """Number of sources at a site, or of tokens at `embed`.

        Args:
            place: The site, or `embed`.
        """
        return self.n_tokens if place == EMBEDDING else len(self.write[place])


@dataclass
class Batch:
    """One batch after its forward pass, positions of all its sequences in one dimension.

    Attributes:
        cut: The forward pass.
        directions: Of the alive subcomponents.
        tokens: The batch, `[n]`.
        embeddings: Token embeddings `[n, d_model]`.
        acts: Activations `a = x V` of the alive subcomponents, by site `[n, S]`.
        importance: Their causal importances `g`, `[n, S]`.
        weighted: `g a`, `[n, S]`.
    """

    cut: Cut
    directions: Directions
    tokens: Int[Tensor, " n"]
    embeddings: Float[Tensor, "n d_model"]
    acts: dict[str, Float[Tensor, "n _S"]]
    importance: dict[str, Float[Tensor, "n _S"]]
    weighted: dict[str, Float[Tensor, "n _S"]]

    def contribution(
        self, place: str, gradient: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, " n_sources"]:
        """What every source at a place adds to a target, summed over positions.

        Args:
            place: A site, or `embed`.
            gradient: Of the target, at the place's output.
        """
        if place == EMBEDDING:
            per_position = torch.linalg.vecdot(gradient, self.embeddings)
            return self.by_token(per_position[:, None])[0]
        return ((self.weighted[place].T @ gradient) * self.directions.write[place]).sum(1)

    def by_token(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "k n_tokens"]:
        """Sums over the positions of every token.

        Args:
            values: One row per position.
        """
        sums = values.new_zeros(self.directions.n_tokens, values.shape[1])
        return sums.index_add_(0, self.tokens, values).T


def observe(
    forward: CutForward, directions: Directions, alive: Alive, tokens: Int[Tensor, "row pos"]
) -> Batch:
    """Run one batch.

    Args:
        forward: The cut model.
        directions: Of the alive subcomponents.
        alive: Which these are.
        tokens: The batch.
    """
    vpd = forward.vpd
    cut = forward(tokens)
    inputs = {name: cut.inputs[name].detach() for name in vpd.layout.names}
    with torch.no_grad():
        parts = vpd.layout.split(lower_leaky(vpd.pre_importance(list(inputs.values()))))
    importance = {
        name: part.flatten(0, -2)[:, alive[name].to(part.device)]
        for name, part in zip(vpd.layout.names, parts, strict=True)
    }
    acts = {name: x.flatten(0, -2).float() @ directions.read[name] for name, x in inputs.items()}
    return Batch(
        cut,
        directions,
        tokens.flatten(),
        cut.embeddings.flatten(0, -2).float(),
        acts,
        importance,
        {name: g * acts[name] for name, g in importance.items()},
    )
