"""The two leaky hard sigmoids of the causal importance function (VPD, causal importance function)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        (grad,) = grads
        # Below zero only the push upwards (negative gradient) passes, scaled by alpha, so that a
        # dead subcomponent can revive without its mask ever turning negative.
        leak = grad.clamp(max=0).mul_(ctx.alpha)
        return torch.where(z > 0, grad, leak).masked_fill_(z > 1, 0), None


def lower_leaky(z: Float[Tensor, "*shape"], alpha: float = LEAK) -> Float[Tensor, "*shape"]:
    """Hard sigmoid for masks: `clamp(z, 0, 1)` with a one-sided leak in its gradient.

    Backward: 1 on `(0, 1]`, 0 above 1; at `z <= 0` the gradient passes times `alpha` only if it
    is negative, that is, only if descent would raise `z`. The forward value is never negative:
    negative masks made training unstable in SPD.

    Args:
        z: Pre-sigmoid causal importances.
        alpha: The leak.

    Returns:
        Causal importances in `[0, 1]`.
    """
    return _LowerLeaky.apply(z, alpha)  # type: ignore[no-any-return]


def upper_leaky(z: Float[Tensor, "*shape"], alpha: float = LEAK) -> Float[Tensor, "*shape"]:
    """Hard sigmoid for the minimality losses: `clamp(z, 0, 1)` up to 1, slope `alpha` above.

    Args:
        z: Pre-sigmoid causal importances.
        alpha: The slope above 1.

    Returns:
        Values in `[0, inf)`; those above 1 keep a gradient that pulls them back.
    """
    return torch.where(z > 1, 1 + alpha * (z - 1), z.clamp(min=0))
