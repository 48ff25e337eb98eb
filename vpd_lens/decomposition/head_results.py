"""What each attention head writes in a masked run, for `ActivationCache.stack_head_results`.

TransformerLens multiplies a cached `z` by the model's `W_O`; under masks the matrix of the site
`attn.o` is another one at every position. Here the same entries are computed from what the cache
holds of the site, so that heads add up to the attention's output under masks, too.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.forward import Forwards
from vpd_lens.errors import InputError


@torch.no_grad()
def compute_head_results(forwards: Forwards, cache: Any) -> None:
    """Put `blocks.*.attn.hook_result`, `[*batch, head, d_model]`, into a masked run's cache.

    Args:
        forwards: Those under whose masks the run was.
        cache: An `ActivationCache`, changed in place.

    Raises:
        InputError: If it lacks a layer's `hook_z` or the masks of its site `attn.o`.
    """
    model: Any = forwards.model
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn"
        z = cache["z", layer, "attn"]
        # Under this name a bridge may show the sum of all heads, which has no head axis.
        known = cache.cache_dict.get(f"{name}.hook_result")
        if known is not None and known.ndim == z.ndim:
            continue
        if f"{name}.o" not in forwards.layout.names:
            result = einsum(
                z, forwards.model.blocks[layer].attn.W_O, "... h d, h d out -> ... h out"
            )
        else:
            result = _masked_heads(forwards, cache, f"{name}.o", z)
        cache.cache_dict[f"{name}.hook_result"] = result


def _masked_heads(
    forwards: Forwards, cache: Any, name: str, z: Float[Tensor, "*batch head d_head"]
) -> Float[Tensor, "*batch head d_model"]:
    """`m_delta z_h W_h + ((m - m_delta) * (z_h V_h)) U`, whose sum over heads is the output."""
    points = [f"{name}.vpd.{point}" for point in ("hook_mask", "hook_delta_mask")]
    if missing := [point for point in points if point not in cache.cache_dict]:
        raise InputError(f"the heads of a masked run need {missing} in the cache; cache them too.")
    mask, delta = (cache.cache_dict[point].unsqueeze(-2) for point in points)
    heads = z.shape[-2]
    index = forwards.layout.names.index(name)
    v, u = forwards.subcomponents.v[index], forwards.subcomponents.u[index].to(z.dtype)
    weight = rearrange(forwards.sites[index].weight, "(h d) out -> h d out", h=heads)
    v = rearrange(v, "(h d) c -> h d c", h=heads).to(z.dtype)
    acts = einsum(z, v, "... h d, h d c -> ... h c")
    kept = einsum(z, weight, "... h d, h d out -> ... h out")
    return delta * kept + ((mask - delta) * acts) @ u
