"""Sparse features: the inputs of every toy model, and what the target is trained to output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SparseFeatures:
    """Batches in which every feature is active independently with a small probability.

    Called with a generator and a batch size, it is a data source for `vpd_lens.train`.

    Attributes:
        n_features: Number of features.
        probability: That of a feature being active.
        low: Active values are uniform between this and 1; 0 for TMS, -1 for the residual MLP.
        nonzero: Whether inputs without an active feature are left out. A decomposition learns
            nothing from them: whatever the masks, the output is that of the biases alone.
    """

    n_features: int
    probability: float
    low: float = 0.0
    nonzero: bool = False

    def __call__(self, generator: torch.Generator, batch_size: int) -> Float[Tensor, "batch n"]:
        """One batch, all of its randomness from `generator`."""
        if not self.nonzero:
            return self._draw(generator, batch_size)
        rows = torch.zeros(0, self.n_features)
        while len(rows) < batch_size:
            drawn = self._draw(generator, batch_size)
            rows = torch.cat([rows, drawn[drawn.any(dim=1)]])
        return rows[:batch_size]

    def _draw(self, generator: torch.Generator, n_rows: int) -> Tensor:
        shape = (n_rows, self.n_features)
        values = torch.rand(shape, generator=generator) * (1 - self.low) + self.low
        return values * (torch.rand(shape, generator=generator) < self.probability)


def reconstruct(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """The label of TMS: the input."""
    return x


def add_relu(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """The label of the residual MLP: `x + relu(x)`."""
    return x + F.relu(x)
