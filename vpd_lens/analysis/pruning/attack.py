"""An adversary against one behaviour: sources for every subcomponent at every position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.decomposition.masks import AnyMasks, Sources


def attack(
    loss_of: Callable[[AnyMasks], Tensor],
    importance: Float[Tensor, "prompt pos C_total"],
    attacked: Bool[Tensor, "prompt pos C_total"] | None,
    start: Sources,
    steps: int,
    step_size: float,
) -> Sources:
    """Sources that raise a loss, by sign ascent: `r <- clamp(r + step sign(grad), 0, 1)`.

    Not shared over prompts and positions, unlike the adversary of training and evaluation: a
    circuit is of one prompt, so an adversary may know the prompt.

    Args:
        loss_of: The loss under masks.
        importance: Importances, constant.
        attacked: Which sources the adversary moves; the others, and the deltas', stay as they
            start. `None`: all, and the deltas.
        start: Where the sources start.
        steps: Sign steps.
        step_size: Their size.
    """
    sources = start
    for _ in range(steps):
        components = sources.components.detach().requires_grad_()
        delta = sources.delta.detach().requires_grad_(attacked is None)
        leaves = [components] + ([delta] if attacked is None else [])
        loss = loss_of(Sources(components, delta).over(importance))
        gradients = torch.autograd.grad(loss, leaves)
        moved = components.detach() + step_size * gradients[0].sign()
        if attacked is None:
            moved_delta = (delta.detach() + step_size * gradients[1].sign()).clamp_(0, 1)
        else:
            moved = torch.where(attacked, moved, components.detach())
            moved_delta = delta.detach()
        sources = Sources(moved.clamp_(0, 1), moved_delta)
    return sources
