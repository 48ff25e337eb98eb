"""Importance and frequency minimality: few subcomponents at a position, and none everywhere.

Each causal importance costs `phi(g)`, a count of it that grows sharper during training: the
paper's `g^p` with a falling exponent, or the smooth `g^2 / (g^2 + gamma^2)` with a falling gamma,
whose slope stays bounded. With `f_c` the mean of `phi` over the positions of the global batch,

    sum_c f_c + beta f_c log2(1 + N f_c)

where `N` is the number of those positions (VPD) or a fixed reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.config import MinimalityConfig
from vpd_lens.decomposition.importance import LEAK, row_blocks, upper_leaky, where_above
from vpd_lens.training.distributed import Processes
from vpd_lens.training.losses import Part


@dataclass(frozen=True)
class Power:
    """`phi(g) = (g + eps)^p` (VPD)."""

    p: float
    eps: float = 1e-12

    def with_slope(self, g: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """`phi(g)` and its derivative; `g` is overwritten."""
        value = g.add_(self.eps).pow(self.p)
        return value, torch.div(value, g, out=g).mul_(self.p)


@dataclass(frozen=True)
class SmoothL0:
    """`phi(g) = (1 + gamma^2) g^2 / (g^2 + gamma^2)`, 1 at 1; slopes below `1.3/gamma`."""

    gamma: float

    def with_slope(self, g: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """`phi(g)` and its derivative; `g` is overwritten."""
        square = self.gamma**2
        above = g.square().add_(square).reciprocal_().mul_(square)  # gamma^2 / (g^2 + gamma^2)
        value = (1 - above).mul_(1 + square)
        return value, g.mul_(above).mul_(above).mul_(2 * (1 + square) / square)


Penalty = Power | SmoothL0


def penalty(config: MinimalityConfig, step: int, steps: int) -> Penalty:
    """`phi` at a step: its parameter is linear, and reaches its end after `anneal` of training."""
    progress = min(1.0, step / (config.anneal * steps))

    def between(start: float, end: float) -> float:
        return start + (end - start) * progress

    if config.penalty == "smooth_l0":
        return SmoothL0(between(config.gamma_start, config.gamma_end))
    return Power(between(config.p_start, config.p_end), config.eps)


class _PenaltySum(torch.autograd.Function):
    """Its backward pass is one multiplication: the slopes are computed with the values."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, phi: Penalty, leak: float, real: Tensor | None) -> Tensor:
        slope = torch.empty_like(z)
        total = z.new_zeros(z.shape[-1])
        kept = [] if real is None else [real.unsqueeze(-1).to(z.dtype).contiguous()]
        for rows, out, *weight in row_blocks(z.contiguous(), slope, *kept):
            value, derivative = phi.with_slope(upper_leaky(rows, leak))
            if weight:
                value.mul_(weight[0])
                derivative.mul_(weight[0])
            total += value.sum(0)
            out.copy_(where_above(derivative, rows, 0.0))
            out.sub_(where_above(derivative, rows, 1.0), alpha=1 - leak)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None, None


def penalty_sum(
    z: Float[Tensor, "*batch C_total"],
    phi: Penalty,
    real: Bool[Tensor, "*batch"] | None = None,
    leak: float = LEAK,
) -> Float[Tensor, " C_total"]:
    """`sum_{b,t} phi(g)` of every subcomponent, over `real` positions (or all).

    `g` is the upper-leaky sigmoid of `z`, the pre-sigmoid importances: its slope above 1 is `leak`.
    """
    return _PenaltySum.apply(z, phi, leak, real)  # type: ignore[no-any-return]


def minimality(
    sums: Float[Tensor, " C_total"],
    n_positions: int | Tensor,
    frequency: float,
    reference: int | None = None,
    average: Float[Tensor, " C_total"] | None = None,
) -> Float[Tensor, ""]:
    """`sum_c f_c + beta f_c log2(1 + N f_c)`, with `f_c` the mean of `phi` over positions.

    Args:
        sums: `sum_{b,t} phi(g)` of the global batch.
        n_positions: Its positions `B T`.
        frequency: `beta`.
        reference: `N`; `None`: the positions of the batch (VPD).
        average: What takes the place of `f_c` in the frequency term, with the gradient of `f_c`.
    """
    f = sums / n_positions
    usual = f if average is None else average + (f - f.detach())
    n = n_positions if reference is None else reference
    return (f + frequency * usual * torch.log2(1 + n * usual)).sum()


class Minimality:
    """The minimality losses of the global batch, and the moving average that they may look at.

    Attributes:
        average: Moving average of every `f_c`, `[C_total]`, not debiased; `None` if unused.
    """

    def __init__(self, config: MinimalityConfig, like: Float[Tensor, " C_total"]) -> None:
        self.config = config
        self.average = torch.zeros_like(like) if config.half_life else None

    def of(
        self, parts: Sequence[Part], step: int, steps: int, processes: Processes
    ) -> tuple[Float[Tensor, ""], Callable[[Part], Float[Tensor, ""]]]:
        """The losses, and what has their gradient, part by part.

        The gradient of what the function gives for a part is that of the losses by its importances.
        """
        config, phi = self.config, penalty(self.config, step, steps)

        def sums_of(part: Part) -> Float[Tensor, " C_total"]:
            return penalty_sum(part.z, phi, part.real, config.leak)

        sums = [sums_of(part) for part in parts]
        total = torch.stack(sums).sum(0).detach()
        processes.sum_([total])
        n = parts[0].n_real
        if n is None:
            n = sum(part.z[..., 0].numel() for part in parts) * processes.world
        average = self._updated(total / n, step)
        loss = minimality(total.requires_grad_(), n, config.frequency, config.reference, average)
        (slope,) = torch.autograd.grad(loss, total)
        alone = sums[0] if len(parts) == 1 else None
        return loss.detach(), lambda part: (
            slope * (sums_of(part) if alone is None else alone)
        ).sum()

    def _updated(self, frequencies: Float[Tensor, " C_total"], step: int) -> Tensor | None:
        """The moving average after another batch, debiased."""
        if self.average is None:
            return None
        decay = 0.5 ** (1 / self.config.half_life)
        self.average.lerp_(frequencies, 1 - decay)
        return self.average / (1 - decay ** (step + 1))
