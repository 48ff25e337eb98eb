"""A fresh adversary: sources found by projected sign ascent on the divergence (METHOD 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.masks import Layout, Masks, Sources, uniform_sources

DivergenceOf = Callable[[Masks], Tensor]


def pgd_sources(
    divergence_of: DivergenceOf,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    n_steps: int = 20,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
    checkpoints: Sequence[int] = (),
) -> tuple[Sources, dict[int, float]]:
    """Sources that maximise a divergence, shared across batch and position.

    One source per subcomponent and delta, `[1, ..., C_total]` and `[1, ..., n_sites]`, starts
    from U(0, 1) and follows `r <- clamp(r + step * sign(grad), 0, 1)`. It is shared so that the
    adversary must find systematic defects rather than the noise of one datapoint.

    Args:
        divergence_of: The divergence of a masked forward, differentiable in the masks.
        importance: Causal importances, held constant.
        layout: The columns of each site.
        n_steps: Ascent steps.
        step_size: Size of each.
        generator: Random generator of the start.
        checkpoints: Step counts at which to record the divergence reached so far.

    Returns:
        The final sources, and the divergence at each checkpoint (in `divergence_of`'s unit).
    """
    g = importance.detach()
    one = (1,) * (g.ndim - 1)
    sources = uniform_sources(g.new_empty(*one, layout.total), layout, generator)
    curve: dict[int, float] = {}
    for step in range(n_steps):
        leaves = [sources.components.requires_grad_(), sources.delta.requires_grad_()]
        divergence = divergence_of(sources.masks(g))
        if step in checkpoints:
            curve[step] = float(divergence.detach())
        gradients = torch.autograd.grad(divergence, leaves)
        sources = Sources(
            *(
                (leaf.detach() + step_size * gradient.sign()).clamp_(0, 1)
                for leaf, gradient in zip(leaves, gradients, strict=True)
            )
        )
    if n_steps in checkpoints:
        with torch.no_grad():
            curve[n_steps] = float(divergence_of(sources.masks(g)))
    return sources, curve
