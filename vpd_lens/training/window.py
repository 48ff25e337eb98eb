"""Causal importances of a step, and of a window of steps: what logging and compaction look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.config import CompactionConfig


@dataclass
class StepImportance:
    """Causal importances of a finished step; nothing is computed until it is asked for.

    Attributes:
        parts: Pre-sigmoid importances `[rows, pos, C_total]`, and which positions are real.
    """

    parts: list[tuple[Tensor, Tensor | None]]

    def whole(self) -> Float[Tensor, "batch *pos C_total"]:
        """The importances of this process's rows, 0 where there is padding."""
        pieces = [
            z.clamp(0, 1) if real is None else z.clamp(0, 1) * real.unsqueeze(-1)
            for z, real in self.parts
        ]
        return torch.cat(pieces)

    def mean(self, per_position: Tensor) -> Tensor:
        """The mean over real positions of a value `[batch, pos, ...]` that is 0 at padding."""
        total = per_position.float().flatten(0, self.parts[0][0].ndim - 2).sum(0)
        counts = [z[..., 0].numel() if r is None else r.sum() for z, r in self.parts]
        return total / sum(counts)


class ImportanceWindow:
    """Mean causal importance of every subcomponent since the last check, summed on the device.

    Args:
        config: Its length; 0 steps watch nothing.
        c_total: Number of subcomponents.
        device: Where the sum lives.

    Attributes:
        total: Sum over the window's steps of the mean over positions, `[C_total]`.
    """

    def __init__(self, config: CompactionConfig, c_total: int, device: torch.device) -> None:
        self.config = config
        self.total = torch.zeros(c_total, device=device)

    def add(self, importance: StepImportance) -> None:
        """Add the importances of one step."""
        if self.config.window:
            self.total += importance.mean(importance.whole())

    def restart(self) -> Float[Tensor, " C_total"]:
        """The mean over the window that ends here; the next one begins."""
        mean = self.total / self.config.window
        self.total.zero_()
        return mean

    def keep(self, columns: Tensor) -> None:
        """Watch only some of the subcomponents from here on."""
        self.total = self.total.index_select(0, columns)
