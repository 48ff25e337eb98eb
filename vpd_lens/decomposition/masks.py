"""Sources, masks and routing, for all sites at once.

Causal importances, sources and masks of every site live side by side in one tensor
`[*batch, C_total]`, and the deltas in `[*batch, n_sites]`: one elementwise pass instead of one
per site. `Layout` says which columns belong to which site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which columns of a concatenated tensor belong to which site.

    Attributes:
        names: Site names, in forward order.
        sizes: Number of subcomponents `C_l` of each site.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """`C_total`, the number of subcomponents of all sites."""
        return sum(self.sizes)

    @property
    def n_sites(self) -> int:
        """`L`, the number of sites."""
        return len(self.sizes)

    def split(self, x: Float[Tensor, "*batch C_total"]) -> tuple[Tensor, ...]:
        """Per-site views `[*batch, C_l]`."""
        return x.split(self.sizes, dim=-1)

    def columns(self, name: str) -> slice:
        """The columns of one site."""
        index = self.names.index(name)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def sum_per_site(self, x: Float[Tensor, "*batch C_total"]) -> Float[Tensor, "*batch n_sites"]:
        """Sum over the subcomponents of each site."""
        return torch.stack([part.sum(-1) for part in self.split(x)], dim=-1)


@dataclass
class Masks:
    """The masks of one forward pass.

    Attributes:
        components: Mask `m` of every subcomponent, `[*batch, C_total]`; leading dimensions of
            size 1 are broadcast.
        delta: Mask of every delta, `[*batch, n_sites]`.
    """

    components: Float[Tensor, "*batch C_total"]
    delta: Float[Tensor, "*batch n_sites"]


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, importance: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(importance, sources)
        return torch.addcmul(sources, importance, 1 - sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        importance, sources = ctx.saved_tensors
        need_importance, need_sources = ctx.needs_input_grad
        # grad - grad * s == grad * (1 - s) in one kernel.
        to_importance = torch.addcmul(grad, grad, sources, value=-1) if need_importance else None
        to_sources = torch.addcmul(grad, grad, importance, value=-1) if need_sources else None
        return to_importance, to_sources


def interpolate(
    importance: Float[Tensor, "*batch C"], sources: Float[Tensor, "*#batch C"]
) -> Float[Tensor, "*batch C"]:
    """Masks from causal importances and sources: `m = g + (1 - g) r` (VPD, definition of masks).

    Args:
        importance: Causal importances `g` in `[0, 1]`.
        sources: Sources `r` in `[0, 1]`; dimensions of size 1 are shared.

    Returns:
        Masks in `[g, 1]`.
    """
    return _Interpolate.apply(importance, sources.expand_as(importance))  # type: ignore[no-any-return]


def uniform_k_subset(
    batch_shape: tuple[int, ...],
    n_sites: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*batch n_sites"]:
    """Route a random subset of sites at every position (VPD, uniform-k-subset routing).

    For every position independently `k ~ U{1..n_sites}`, then a uniformly random subset of `k`
    sites. A site is routed with probability `(n_sites + 1) / (2 n_sites)`; no position is
    without any.

    Args:
        batch_shape: Leading shape, for language models `(batch, pos)`.
        n_sites: Number of sites.
        device: Where the result lives.
        generator: Random generator on that device.
    """
    k = torch.randint(1, n_sites + 1, (*batch_shape, 1), device=device, generator=generator)
    noise = torch.rand(*batch_shape, n_sites, device=device, generator=generator)
    rank = noise.argsort(-1).argsort(-1)
    return rank < k


def route(
    masks: Masks, routed: Bool[Tensor, "*batch n_sites"], layout: Layout
) -> Masks:
    """Sites that are not routed keep their original weight: all their masks become 1.

    Args:
        masks: Masks before routing.
        routed: Which sites are masked at each position.
        layout: The columns of each site.
    """
    keep = ~routed
    per_component = torch.cat(
        [keep[..., i : i + 1].expand(*keep.shape[:-1], c) for i, c in enumerate(layout.sizes)], -1
    )
    return Masks(masks.components.masked_fill(per_component, 1), masks.delta.masked_fill(keep, 1))
