"""One batch as micro-batches on several processes: losses and gradients are those of the whole.

Most losses are means over positions, so a part contributes by its share of them. The frequency
term couples all positions of the batch; its slope at the whole batch's sums makes the gradient of
each part exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.config import MinimalityConfig
from vpd_lens.decomposition import Divergence
from vpd_lens.training.distributed import Processes
from vpd_lens.training.losses import importance_power_sum, minimality


@dataclass
class Part:
    """One micro-batch of this process: its rows, what the target did on them, its importances.

    Attributes:
        rows: Which rows of this process's batch.
        tokens: Those, `[rows, pos]` (or whatever the model takes).
        real: Positions that are no padding, `[rows, pos]`; `None`: all.
        share: Its share of the global batch's positions.
        inputs: Input of every site, `[rows, pos, d_in]`.
        divergence: Distance from the target's output.
        z: Pre-sigmoid importances, `[rows, pos, C_total]`.
    """

    rows: slice
    tokens: Tensor
    real: Bool[Tensor, "rows pos"] | None
    share: float | Tensor
    inputs: list[Tensor] = field(default_factory=list)
    divergence: Divergence = field(init=False)
    z: Tensor = field(init=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model is given besides the tokens."""
        return {} if self.real is None else {"attention_mask": self.real.long()}


def cut(
    tokens: Tensor, real: Bool[Tensor, "batch pos"] | None, count: int, processes: Processes
) -> list[Part]:
    """The micro-batches of this process's rows.

    Args:
        tokens: The rows, `[batch, pos]`.
        real: Positions that are no padding; `None`: all.
        count: Number of micro-batches.
        processes: Those that share the global batch.
    """
    if count == 1:
        rows = [slice(None)]
    else:
        size = tokens.shape[0] // count
        rows = [slice(index * size, (index + 1) * size) for index in range(count)]
    if real is None:
        return [Part(r, tokens[r], None, 1 / (count * processes.world)) for r in rows]
    everywhere = real.sum().float()
    processes.sum_([everywhere])
    return [Part(r, tokens[r], real[r], real[r].sum() / everywhere) for r in rows]


class WholeMinimality:
    """The minimality losses of the global batch, and their gradient part by part.

    Args:
        parts: The micro-batches, with their `z`.
        p: The exponent.
        config: Frequency coefficient and epsilon.
        processes: Those that share the global batch.

    Attributes:
        value: The loss.
    """

    def __init__(
        self, parts: Sequence[Part], p: float, config: MinimalityConfig, processes: Processes
    ) -> None:
        self.p, self.eps = p, config.eps
        self.alone = len(parts) == 1
        self.sums = [self._sum(part) for part in parts]
        total = torch.stack(self.sums).sum(0).detach()
        n = sum(part.z[..., 0].numel() for part in parts) * processes.world
        reals = [part.real.sum().float() for part in parts if part.real is not None]
        n_real = torch.stack(reals).sum() if reals else None
        processes.sum_([total] if n_real is None else [total, n_real])
        total.requires_grad_()
        loss = minimality(total, n if n_real is None else n_real, config.frequency)
        (self.slope,) = torch.autograd.grad(loss, total)
        self.value = loss.detach()

    def of(self, index: int, part: Part) -> Float[Tensor, ""]:
        """A number whose gradient is that of the loss by the importances of one part."""
        power_sum = self.sums[index] if self.alone else self._sum(part)
        return (self.slope * power_sum).sum()

    def _sum(self, part: Part) -> Float[Tensor, " C_total"]:
        return importance_power_sum(part.z, self.p, self.eps, part.real)


@dataclass
class StepImportance:
    """Causal importances of a finished step; nothing is computed until it is asked for.

    Attributes:
        parts: Pre-sigmoid importances `[rows, pos, C_total]`, and which positions are real.
    """

    parts: list[tuple[Tensor, Tensor | None]]

    def whole(self) -> Float[Tensor, "batch pos C_total"]:
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
