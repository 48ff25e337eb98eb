"""How much every subcomponent is used, as running sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vpd_lens.analysis.harvest.firings import Firings


class Summary(NamedTuple):
    """How much one subcomponent is used.

    Attributes:
        index: Its number within its site.
        density: Share of positions where it fires.
        mean_importance: Mean causal importance over all positions.
        mean_activation: Mean of `|a| ||U_c||` over all positions, the size of what it writes.
        firing_activation: Mean of `a ||U_c||` where it fires, with the sign; NaN if nowhere. The
            sign of one subcomponent is a convention of its V and U together; signs of its
            activations can be compared with each other.
    """

    index: int
    density: float
    mean_importance: float
    mean_activation: float
    firing_activation: float


@dataclass
class Usage:
    """Sums over positions, by subcomponent.

    Attributes:
        firings: Number of positions where it fires.
        importance: Sum of importances.
        magnitude: Sum of absolute activations `|a| ||U_c||`.
        signed: Sum of activations `a ||U_c||` where it fires.
        n_positions: `[]`, all positions.
    """

    firings: Int64[Tensor, " C_total"]
    importance: Float[Tensor, " C_total"]
    magnitude: Float[Tensor, " C_total"]
    signed: Float[Tensor, " C_total"]
    n_positions: Int64[Tensor, ""]

    @classmethod
    def empty(cls, c_total: int, device: torch.device) -> Usage:
        """Sums over no positions.

        Args:
            c_total: Number of subcomponents.
            device: Where they live.
        """
        sums = [torch.zeros(c_total, device=device, dtype=torch.float64) for _ in range(3)]
        firings = torch.zeros(c_total, device=device, dtype=torch.int64)
        return cls(firings, *sums, torch.zeros((), device=device, dtype=torch.int64))

    def add(self, firings: Firings) -> None:
        """Add one batch."""
        self.n_positions += firings.tokens.numel()
        self.firings += firings.subcomponent.bincount(minlength=len(self.firings))
        self.importance += firings.importance.sum((0, 1), dtype=torch.float64)
        self.magnitude += firings.activation.abs().sum((0, 1), dtype=torch.float64)
        self.signed.index_add_(
            0, firings.subcomponent, firings.at(firings.activation).to(self.signed.dtype)
        )

    def summaries(self, columns: slice) -> list[Summary]:
        """The means of some subcomponents, those with the largest mean importance first."""
        per_position = [
            (total[columns].double() / self.n_positions).tolist()
            for total in (self.firings, self.importance, self.magnitude)
        ]
        where_it_fires = (self.signed[columns] / self.firings[columns]).tolist()
        rows = [
            Summary(index, *values)
            for index, values in enumerate(zip(*per_position, where_it_fires, strict=True))
        ]
        return sorted(rows, key=lambda row: (-row.mean_importance, row.index))
