"""Which attention heads a subcomponent belongs to."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError


@torch.no_grad()
def head_shares(vpd: Decomposition, name: str) -> Float[Tensor, "C heads"]:
    """Share of each head in every subcomponent of an attention matrix.

    A decomposition sees all heads of a layer as one matrix, so a subcomponent may serve several.
    At `q`, `k` and `v` a share is that of the squared norm of the write direction `U_c`; at `o`
    that of the read direction `V_c`. Shares add up to 1.

    Args:
        vpd: A decomposition.
        name: The site of a query, key, value or output matrix.

    Raises:
        InputError: If the site is not one of attention.
    """
    kind = name.rpartition(".")[2]
    if ".attn." not in name or kind not in ("q", "k", "v", "o"):
        raise InputError(f"{name!r} is not the q, k, v or o matrix of an attention layer.")
    cfg = vpd.model.cfg
    vectors = vpd.v(name).T if kind == "o" else vpd.u(name)  # [C, heads * d_head]
    grouped = kind in ("k", "v") and getattr(cfg, "n_key_value_heads", None)
    n_heads = cfg.n_key_value_heads if grouped else cfg.n_heads
    squared = rearrange(vectors.square(), "c (head d_head) -> c head d_head", head=n_heads).sum(-1)
    return squared / squared.sum(-1, keepdim=True)
