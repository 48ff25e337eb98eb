"""Results of single attention heads under masks, which TransformerLens computes from `W_O`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.masks import edited_site
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import InputError
from vpd_lens.sites import Site


def head_acts(x: Any, v: Tensor, n_heads: int) -> Float[Tensor, "*batch head C"]:
    """Activations `z_h V_h` of every head of a site `attn.o`, from its input `[*batch, d_in]`."""
    z = rearrange(x, "... (head d) -> ... head d", head=n_heads)
    v = rearrange(v.to(x.dtype), "(head d) c -> head d c", head=n_heads)
    return einsum(z, v, "... head d, head d c -> ... head c")


def empty_heads(site: Site, x: Any, n_heads: int) -> Float[Tensor, "*batch head d_model"] | None:
    """The results of every head with all masks 0, if they are not 0."""
    return None if site.origin is None else head_acts(x, site.origin, n_heads)


@torch.no_grad()
def compute_head_results(
    model: Any, sites: Sequence[Site], subcomponents: Subcomponents, cache: Any
) -> None:
    """Put `blocks.*.attn.hook_result`, `[*batch, head, d_model]`, into a masked run's cache.

    TransformerLens's heads, a cached `z` times `W_O`, would not add up to the attention's
    output: under masks the matrix of the site `attn.o` is another one at every position.
    """
    names = subcomponents.layout.names
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn"
        z = cache["z", layer, "attn"]
        # Under this name a bridge may show the sum of all heads, which has no head axis.
        known = cache.cache_dict.get(f"{name}.hook_result")
        if known is not None and known.ndim == z.ndim:
            continue
        if f"{name}.o" not in names:
            result = einsum(z, model.blocks[layer].attn.W_O, "... h d, h d out -> ... h out")
        else:
            points = [f"{name}.o.vpd.{point}" for point in ("hook_mask", "hook_delta_mask")]
            if missing := [point for point in points if point not in cache.cache_dict]:
                raise InputError(
                    f"the heads of a masked run need {missing} in the cache; cache them too."
                )
            mask, delta = (cache.cache_dict[point].unsqueeze(-2) for point in points)
            index, heads = names.index(f"{name}.o"), z.shape[-2]
            weight = rearrange(sites[index].weight, "(h d) out -> h d out", h=heads)
            kept = einsum(z, weight, "... h d, h d out -> ... h out")
            v, u = subcomponents.v[index], subcomponents.u[index]
            acts = head_acts(z.flatten(-2), v, heads)
            empty = empty_heads(sites[index], z.flatten(-2), heads)
            result = edited_site(kept, u, acts, acts, mask, delta, empty)
        cache.cache_dict[f"{name}.hook_result"] = result
