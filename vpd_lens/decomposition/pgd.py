"""A fresh adversary: sources found by projected sign ascent on the divergence (METHOD 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.masks import Layout, Masks, interpolate

DivergenceOf = Callable[[Masks], Tensor]


def pgd_sources(
    divergence_of: DivergenceOf,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    n_steps: int = 20,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
    checkpoints: Sequence[int] = (),
) -> tuple[Float[Tensor, "*one C_plus"], dict[int, float]]:
    """Sources that maximise a divergence, shared across batch and position.

    One vector `[1, ..., C_total + n_sites]` (the deltas' sources come last) starts from U(0, 1)
    and follows `r <- clamp(r + step * sign(grad), 0, 1)`. It is shared so that the adversary must
    find systematic defects rather than the noise of one datapoint.

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
    shape = (1,) * (g.ndim - 1) + (layout.total + layout.n_sites,)
    sources = torch.rand(shape, device=g.device, generator=generator)
    curve: dict[int, float] = {}
    for step in range(n_steps + 1):
        wanted = step in checkpoints
        if step == n_steps and not wanted:
            break
        sources.requires_grad_(step < n_steps)
        with torch.set_grad_enabled(step < n_steps):
            divergence = divergence_of(adversarial_masks(g, sources, layout))
        if wanted:
            curve[step] = float(divergence)
        if step < n_steps:
            (gradient,) = torch.autograd.grad(divergence, sources)
            sources = (sources.detach() + step_size * gradient.sign()).clamp_(0, 1)
    return sources.detach(), curve


def adversarial_masks(
    importance: Float[Tensor, "*batch C_total"],
    sources: Float[Tensor, "*#batch C_plus"],
    layout: Layout,
) -> Masks:
    """Masks from joint sources whose last `n_sites` columns belong to the deltas.

    Args:
        importance: Causal importances.
        sources: `[*, C_total + n_sites]`.
        layout: The columns of each site.
    """
    components, delta = sources.split([layout.total, layout.n_sites], dim=-1)
    return Masks(
        interpolate(importance, components), delta.expand(*importance.shape[:-1], layout.n_sites)
    )
