"""Where subcomponents fire in one batch.

Few subcomponents are needed at any position, so everything after the forward pass works on the
list of firings instead of on every pair of position and subcomponent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Windows(NamedTuple):
    """The text around `m` firings; `W = 2 context + 1`, the firing in the middle.

    Attributes:
        tokens: `[m, W]`, -1 beyond the ends of the sequence.
        importance: `[m, W]`, of the subcomponent that fires; 0 beyond the ends.
        activation: `[m, W]`, likewise.
    """

    tokens: Tensor
    importance: Tensor
    activation: Tensor


@dataclass(frozen=True)
class Firings:
    """One batch, and the places where an importance exceeds the threshold.

    Attributes:
        tokens: The batch.
        importance: Causal importances `g`.
        activation: Activations `a ||U_c||`, with their sign.
        sequence: Row of every firing.
        position: Position of every firing.
        subcomponent: Which subcomponent fires there.
    """

    tokens: Int[Tensor, "batch pos"]
    importance: Float[Tensor, "batch pos C_total"]
    activation: Float[Tensor, "batch pos C_total"]
    sequence: Int[Tensor, " n_firings"]
    position: Int[Tensor, " n_firings"]
    subcomponent: Int[Tensor, " n_firings"]

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "batch pos"],
        importance: Float[Tensor, "batch pos C_total"],
        activation: Float[Tensor, "batch pos C_total"],
        threshold: float,
    ) -> Firings:
        """Find the firings of a batch, ordered by sequence, position and subcomponent."""
        where = (importance > threshold).nonzero(as_tuple=True)
        return cls(tokens, importance, activation, *where)

    def __len__(self) -> int:
        return len(self.subcomponent)

    def at(self, values: Float[Tensor, "batch pos C_total"]) -> Float[Tensor, " n_firings"]:
        """What `values` are where subcomponents fire."""
        return values[self.sequence, self.position, self.subcomponent]

    def windows(self, which: Int[Tensor, " m"], context: int) -> Windows:
        """The text around some firings.

        Args:
            which: Which firings.
            context: Tokens on either side.
        """
        sequence = self.sequence[which, None]
        subcomponent = self.subcomponent[which, None]
        offsets = torch.arange(-context, context + 1, device=which.device)
        position = self.position[which, None] + offsets  # [m, W]
        beyond = (position < 0) | (position >= self.tokens.shape[1])
        position = position.clamp(0, self.tokens.shape[1] - 1)
        return Windows(
            self.tokens[sequence, position].masked_fill(beyond, -1).int(),
            self.importance[sequence, position, subcomponent].masked_fill(beyond, 0),
            self.activation[sequence, position, subcomponent].masked_fill(beyond, 0),
        )
