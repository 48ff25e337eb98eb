"""Sign ascent: how an adversary finds sources that hurt most."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from vpd_lens.decomposition.masks import AnyMasks, Layout, Sources, uniform_sources


def shared_sources(
    importance: Float[Tensor, "*batch C_total"], layout: Layout, generator: Generator | None = None
) -> Sources:
    """Sources from U(0, 1), one per subcomponent and delta for the whole batch.

    An adversary that shares its sources over batch and positions must find systematic defects
    rather than the noise of one datapoint. All leading dimensions of `importance` become 1.
    """
    one = (1,) * (importance.ndim - 1)
    return uniform_sources(importance.new_empty(*one, layout.total), layout, generator)


def ascend(
    loss_of: Callable[[AnyMasks], Tensor],
    importance: Float[Tensor, "*batch C_total"],
    start: Sources,
    n_steps: int,
    step_size: float,
    moves: Bool[Tensor, "*batch C_total"] | None = None,
    checkpoints: Collection[int] = (),
) -> tuple[Sources, dict[int, float]]:
    """Sources that raise a loss: `r <- clamp(r + step sign(grad), 0, 1)`, `n_steps` times.

    The loss is differentiable in the masks that it is given; causal importances are held constant.
    What shares a source is said by the shape of the `start`. If only some sources move, the others,
    and the deltas', stay as they start. Returned with the loss reached at each of the `checkpoints`
    (numbers of steps), in its own unit.
    """
    g, sources = importance.detach(), start
    # A mean over many positions has gradients that fp16 rounds to 0; only their signs count.
    scale = 2.0 ** math.ceil(math.log2(max(1, g[..., 0].numel())))
    curve: dict[int, float] = {}
    for step in range(n_steps):
        r, delta = sources.components.detach().requires_grad_(), sources.delta.detach()
        leaves = [r] if moves is not None else [r, delta.requires_grad_()]
        loss = loss_of(Sources(r, delta).over(g))
        if step in checkpoints:
            curve[step] = float(loss.detach())
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))
        slopes = zip(leaves, gradients, strict=True)
        moved = [(leaf.detach() + step_size * slope.sign()).clamp_(0, 1) for leaf, slope in slopes]
        if moves is not None:
            moved = [torch.where(moves, moved[0], r.detach()), delta]
        sources = Sources(*moved)
    if n_steps in checkpoints:
        with torch.no_grad():
            curve[n_steps] = float(loss_of(sources.over(g)))
    return sources, curve
