"""Sources, masks and routing, for all sites at once, and the output of one site under them.

Causal importances, sources and masks of every site live side by side in one tensor
`[*batch, C_total]`, and the deltas in `[*batch, n_sites]`: one elementwise pass instead of one
per site. `Layout` says which columns belong to which site.

With `y = x W + b` computed by the model itself, the site under masks is

    y' = m_delta y + (1 - m_delta) b + ((m - m_delta) * (x V)) U

which equals `x (V diag(m) U + m_delta Delta) + b` exactly, because `Delta = W - V U`. Where the
difference from another model's weight W_0 is decomposed, `x W_0 + b` takes the place of `b`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

NEEDED = 0.1  # importance above which a position needs a subcomponent


@dataclass(frozen=True)
class Layout:
    """Which columns of a concatenated tensor belong to which site: names and sizes `C_l`."""

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

    def split(self, x: Shaped[Tensor, "*batch C_total"]) -> tuple[Tensor, ...]:
        """Per-site views `[*batch, C_l]`."""
        return x.split(self.sizes, dim=-1)

    def columns(self, name: str) -> slice:
        """The columns of one site."""
        index = self.names.index(name)
        return slice(sum(self.sizes[:index]), sum(self.sizes[: index + 1]))

    def sum_per_site(self, x: Float[Tensor, "*batch C_total"]) -> Float[Tensor, "*batch n_sites"]:
        """Sum over the subcomponents of each site."""
        return torch.stack([part.sum(-1) for part in self.split(x)], dim=-1)


@dataclass
class Masks:
    """The masks of all subcomponents and deltas in one forward; size 1 is broadcast.

    `routed` says which sites are masked at each position; elsewhere they keep their original
    weight, as if all their masks were 1. `None`: all are.
    """

    components: Float[Tensor, "*batch C_total"]
    delta: Float[Tensor, "*batch n_sites"]
    routed: Bool[Tensor, "*batch n_sites"] | None = None

    def per_site(self, layout: Layout) -> list[Masks]:
        """Those of each site, as views: `[*batch, C]`, and `[*batch, 1]` of delta and `routed`."""
        deltas = self.delta.split(1, dim=-1)
        routed = [None] * layout.n_sites if self.routed is None else self.routed.split(1, dim=-1)
        parts = zip(layout.split(self.components), deltas, routed, strict=True)
        return [Masks(*part) for part in parts]


@dataclass
class SourceMasks:
    """Masks `m = g + (1 - g) r`, not computed yet; sources share their dimensions of size 1."""

    importance: Float[Tensor, "*batch C_total"]
    components: Float[Tensor, "*#batch C_total"]
    delta: Float[Tensor, "*batch n_sites"]
    routed: Bool[Tensor, "*batch n_sites"] | None = None

    def computed(self) -> Masks:
        """The masks themselves."""
        return Masks(interpolate(self.importance, self.components), self.delta, self.routed)


@dataclass
class Sources:
    """What decides masks between `g` and 1: a source `r` of every subcomponent and delta."""

    components: Float[Tensor, "*batch C_total"]
    delta: Float[Tensor, "*batch n_sites"]

    def over(self, importance: Float[Tensor, "*batch C_total"]) -> SourceMasks:
        """What `masks` returns, not computed yet."""
        delta = self.delta.expand(*importance.shape[:-1], -1)
        return SourceMasks(importance, self.components, delta)

    def masks(self, importance: Float[Tensor, "*batch C_total"]) -> Masks:
        """`m = g + (1 - g) r`; the delta's mask is its own source, its importance being 0."""
        return self.over(importance).computed()


AnyMasks = Masks | SourceMasks


def uniform_sources(
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    generator: torch.Generator | None = None,
    real: Bool[Tensor, "*batch"] | None = None,
) -> Sources:
    """Sources `r ~ U(0, 1)`, independently for every subcomponent and every delta.

    `importance` gives shape, dtype and device, which is the generator's too. With `real`, they are
    drawn at these positions only and left 0 at the others (padding), so that a sequence meets the
    same numbers in a padded batch as alone.
    """
    *batch, c_total = importance.shape if real is None else importance[real].shape
    both = [_uniform(importance.new_empty(*batch, n), generator) for n in (c_total, layout.n_sites)]
    if real is not None:
        whole = [importance.new_zeros(*real.shape, drawn.shape[-1]) for drawn in both]
        both = [zeros.index_put_((real,), drawn) for zeros, drawn in zip(whole, both, strict=True)]
    return Sources(*both)


def _uniform(out: Tensor, generator: torch.Generator | None) -> Tensor:
    if out.device.type != "cpu":
        return out.uniform_(generator=generator)
    # A CPU draws its numbers one by one: four multiples of 2^-16 from each draw of 64 bits.
    draws = torch.empty(-(-out.numel() // 4), dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    out.view(-1).copy_(draws.view(torch.int16)[: out.numel()])
    return out.mul_(2**-16).add_(0.5)


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, importance: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(importance, sources)
        return torch.lerp(sources, sources.new_ones(()), importance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (importance, sources) = grads, ctx.saved_tensors
        need_importance, need_sources = ctx.needs_input_grad
        # grad - grad * s == grad * (1 - s) in one kernel.
        to_importance = torch.addcmul(grad, grad, sources, value=-1) if need_importance else None
        to_sources = torch.addcmul(grad, grad, importance, value=-1) if need_sources else None
        return to_importance, to_sources


def interpolate(
    importance: Float[Tensor, "*batch C"], sources: Float[Tensor, "*#batch C"]
) -> Float[Tensor, "*batch C"]:
    """Masks `m = g + (1 - g) r` in `[g, 1]` (VPD, definition of masks); size 1 is shared."""
    return _Interpolate.apply(importance, sources.expand_as(importance))  # type: ignore[no-any-return]


def uniform_k_subset(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
) -> Bool[Tensor, "*batch n_sites"]:
    """Route a random subset of sites at every position (VPD, uniform-k-subset routing).

    For every position of `shape`, `(*batch, n_sites)`, independently `k ~ U{1..n_sites}`, then a
    uniformly random subset of `k` sites: one is routed with probability `1/2 + 1 / (2 n_sites)`.
    """
    *batch, n_sites = shape
    k = torch.randint(1, n_sites + 1, (*batch, 1), device=device, generator=generator)
    noise = torch.rand(*batch, n_sites, device=device, generator=generator)
    return noise.argsort(-1).argsort(-1) < k


def routed(
    routing: str,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "*batch n_sites"] | None:
    """Which sites are masked at every position: `"all"` (`None`), `"subset"`, or `"mixed"`.

    Mixed: all of them at every second position, by a fair coin, and a random subset at the others.
    """
    if routing == "all":
        return None
    subset = uniform_k_subset(shape, device, generator)
    if routing == "subset":
        return subset
    return subset | (torch.rand(*shape[:-1], 1, device=device, generator=generator) < 0.5)


class _MaskedSite(torch.autograd.Function):
    """Hand-written backward: one elementwise pass less per product, nothing kept twice."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, y, v, u, mask, delta_mask, empty, routed = args
        acts = x @ v
        weight = mask - delta_mask
        if routed is not None:
            weight.mul_(routed)
            delta_mask = torch.where(routed, delta_mask, 1)
        out = y * delta_mask if empty is None else torch.lerp(empty, y, delta_mask)
        out.addmm_(weight * acts, u)
        ctx.save_for_backward(x, y, v, u, delta_mask, empty, acts, weight, routed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y, v, u, delta_mask, empty, acts, weight, routed = ctx.saved_tensors
        need_x, need_y, need_v, need_u, need_mask, need_delta, need_empty, _ = ctx.needs_input_grad
        grad_weighted = grad @ u.T
        grad_u = (weight * acts).T @ grad if need_u else None
        grad_mask = grad_delta = grad_x = grad_v = None
        if need_mask or need_delta:
            grad_mask = grad_weighted * acts
            if routed is not None:
                grad_mask.mul_(routed)
            if need_delta:
                kept = y if empty is None else y - empty
                grad_delta = torch.linalg.vecdot(grad, kept).unsqueeze(-1)
                if routed is not None:
                    grad_delta.mul_(routed)
                grad_delta -= grad_mask.sum(-1, keepdim=True)
        if need_x or need_v:
            grad_acts = grad_weighted.mul_(weight)
            grad_x = grad_acts @ v.T if need_x else None
            grad_v = x.T @ grad_acts if need_v else None
        grad_y = grad * delta_mask if need_y else None
        grad_empty = grad - grad * delta_mask if need_empty else None
        return grad_x, grad_y, grad_v, grad_u, grad_mask, grad_delta, grad_empty, None


def masked_site(
    x: Float[Tensor, "*batch d_in"],
    y: Float[Tensor, "*batch d_out"],
    v: Float[Tensor, "d_in C"],
    u: Float[Tensor, "C d_out"],
    masks: Masks,
    empty: Float[Tensor, "*n d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """A site's output under masks, `x (V diag(m) U + m_delta Delta) + empty`, in the dtype of `y`.

    By the identity at the top of this file, from the unmasked `y`. `empty` is the output with all
    masks 0: the bias, or one of every position.
    """
    dtype, batch = y.dtype, y.shape[:-1]

    def rows(t: Tensor) -> Tensor:
        return t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1])

    parts = (rows(x), rows(y), v, u, rows(masks.components), rows(masks.delta))
    if empty is not None:
        empty = (empty if empty.ndim == 1 else rows(empty)).to(dtype)
    routed = None if masks.routed is None else rows(masks.routed)
    out = _MaskedSite.apply(*(part.to(dtype) for part in parts), empty, routed)
    return out.view(*batch, -1)  # type: ignore[no-any-return]


def edited_site(
    y: Float[Tensor, "*batch d_out"],
    u: Float[Tensor, "C d_out"],
    acts: Float[Tensor, "*batch C"],
    edited_acts: Float[Tensor, "*batch C"],
    mask: Float[Tensor, "*#batch C"],
    delta_mask: Float[Tensor, "*#batch 1"],
    empty: Float[Tensor, "*n d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """The same output when hooks may have replaced activations `x V` or masks.

    The delta's share is computed from the activations before the edit, so an intervention is
    never cancelled by the delta. Dimensions of size 1 of the masks are shared.
    """
    delta = delta_mask.to(y.dtype)
    kept = y * delta if empty is None else torch.lerp(empty.to(y.dtype), y, delta)
    moved = mask.to(y.dtype) * edited_acts - delta * acts
    return kept + moved @ u.to(y.dtype)
