"""The masked output of one site, without ever forming the dense delta.

With `y = x W + b` computed by the model itself, the site under masks is

    y' = m_delta y + (1 - m_delta) b + ((m - m_delta) * (x V)) U

which equals `x (V diag(m) U + m_delta Delta) + b` exactly, because `Delta = W - V U`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.masks import SiteMasks


class _MaskedSite(torch.autograd.Function):
    """Hand-written backward: one elementwise pass less per product, nothing kept twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        u: Tensor,
        mask: Tensor,
        delta_mask: Tensor,
        bias: Tensor | None,
        routed: Tensor | None,
    ) -> Tensor:
        acts = x @ v
        weight = mask - delta_mask
        if routed is not None:
            weight.mul_(routed)
            delta_mask = torch.where(routed, delta_mask, 1)
        out = y * delta_mask if bias is None else torch.lerp(bias, y, delta_mask)
        out.addmm_(weight * acts, u)
        ctx.save_for_backward(x, y, v, u, delta_mask, bias, acts, weight, routed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y, v, u, delta_mask, bias, acts, weight, routed = ctx.saved_tensors
        need_x, need_y, need_v, need_u, need_mask, need_delta, _, _ = ctx.needs_input_grad
        grad_weighted = grad @ u.T
        grad_u = (weight * acts).T @ grad if need_u else None
        grad_mask = grad_delta = None
        if need_mask or need_delta:
            grad_mask = grad_weighted * acts
            if routed is not None:
                grad_mask.mul_(routed)
        if need_delta and grad_mask is not None:
            kept = y if bias is None else y - bias
            grad_delta = torch.linalg.vecdot(grad, kept).unsqueeze(-1)
            if routed is not None:
                grad_delta.mul_(routed)
            grad_delta -= grad_mask.sum(-1, keepdim=True)
        grad_x = grad_v = None
        if need_x or need_v:
            grad_acts = grad_weighted.mul_(weight)
            grad_x = grad_acts @ v.T if need_x else None
            grad_v = x.T @ grad_acts if need_v else None
        grad_y = grad * delta_mask if need_y else None
        return grad_x, grad_y, grad_v, grad_u, grad_mask, grad_delta, None, None


def masked_site(
    x: Float[Tensor, "*batch d_in"],
    y: Float[Tensor, "*batch d_out"],
    v: Float[Tensor, "d_in C"],
    u: Float[Tensor, "C d_out"],
    masks: SiteMasks,
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """A site's output under masks (the identity at the top of this file).

    Computation runs in the dtype of `y`; masks and subcomponents are cast to it.

    Args:
        x: The matrix' input.
        y: The unmasked output `x W + b`.
        v: Read directions.
        u: Write directions.
        masks: Masks of the subcomponents and the delta; where the site is not routed, all 1.
        bias: The bias contained in `y`, never masked.

    Returns:
        `x (V diag(m) U + m_delta Delta) + bias`.
    """
    dtype = y.dtype
    batch = y.shape[:-1]

    def rows(t: Tensor) -> Tensor:
        return t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1])

    out = _MaskedSite.apply(
        rows(x).to(dtype),
        rows(y),
        v.to(dtype),
        u.to(dtype),
        rows(masks.components).to(dtype),
        rows(masks.delta).to(dtype),
        None if bias is None else bias.to(dtype),
        None if masks.routed is None else rows(masks.routed),
    )
    return out.view(*batch, -1)  # type: ignore[no-any-return]


def edited_site(
    y: Float[Tensor, "*batch d_out"],
    u: Float[Tensor, "C d_out"],
    acts: Float[Tensor, "*batch C"],
    edited_acts: Float[Tensor, "*batch C"],
    mask: Float[Tensor, "*batch C"],
    delta_mask: Float[Tensor, "*batch 1"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*batch d_out"]:
    """The same output when a hook may have replaced the subcomponent activations.

    The delta's share is computed from the activations before the edit, so an intervention is
    never cancelled by the delta.

    Args:
        y: The unmasked output `x W + b`.
        u: Write directions.
        acts: Activations `x V` of the model.
        edited_acts: Activations after the hooks on `hook_acts`.
        mask: Mask of each subcomponent, after the hooks on `hook_mask`.
        delta_mask: Mask of the delta, after the hooks on `hook_delta_mask`.
        bias: The bias contained in `y`.
    """
    delta = delta_mask.to(y.dtype)
    kept = y * delta if bias is None else torch.lerp(bias.to(y.dtype), y, delta)
    moved = mask.to(y.dtype) * edited_acts - delta * acts
    return kept + moved @ u.to(y.dtype)
