"""The two leaky hard sigmoids of the causal importance function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01

# 512 KiB of fp32, a share of a core's second-level cache.
_BLOCK_ELEMENTS = 2**17


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        out = torch.empty_like(z)
        for z_rows, grad, result in row_blocks(z, grads[0].contiguous(), out):
            # Below zero only the push upwards (negative gradient) passes, scaled by alpha, so
            # that a dead subcomponent can revive without its mask ever turning negative.
            torch.clamp(grad, max=0, out=result).mul_(ctx.alpha)
            result -= where_above(result, z_rows, 0.0)
            result += where_above(grad, z_rows, 0.0)
            result -= where_above(grad, z_rows, 1.0)
        return out, None


def where_above(x: Tensor, z: Tensor, threshold: float) -> Tensor:
    """`x` where `z > threshold`, else 0; several times faster on a CPU than `torch.where`."""
    return torch.ops.aten.threshold_backward(x, z, threshold)  # type: ignore[no-any-return]


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors `[*batch, C]` cut into the same blocks of rows, as 2-D views.

    A chain of elementwise operations on a block that fits the cache is several times faster on a
    CPU than each operation sweeping memory; on a GPU there is one block.
    """
    flat = [t.view(-1, t.shape[-1]) for t in tensors]
    rows = flat[0].shape[0]
    if flat[0].device.type == "cpu":
        rows = max(1, _BLOCK_ELEMENTS // flat[0].shape[1])
    yield from zip(*(t.split(rows) for t in flat), strict=True)


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
    positive = z.clamp(min=0)
    # Below 1 the second line lies above the first, beyond 1 below it.
    return torch.minimum(positive, positive * alpha + (1 - alpha))
