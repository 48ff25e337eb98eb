"""Which subcomponents a model uses, and which of its attention heads each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.idle import idle
from vpd_lens.errors import InputError
from vpd_lens.evaluation.metrics import ALIVE
from vpd_lens.sites.discovery import head_count

# By site; sizes differ from one to the next, so their names are not checked against each other.
Alive = Mapping[str, Int[Tensor, " _n_alive"]]


@torch.no_grad()
def mean_importance(
    vpd: Decomposition, batches: Iterable[Tensor | Batch]
) -> Float[Tensor, " C_total"]:
    """Mean causal importance of every subcomponent over all positions, on the CPU."""
    total, n = torch.zeros(vpd.layout.total, dtype=torch.float64, device=vpd.device), 0
    for batch in batches:
        batch = (Batch(batch) if isinstance(batch, Tensor) else batch).to(vpd.device)
        g = vpd.causal_importance(batch.tokens, **batch.mask_argument())
        g = g.flatten(0, -2) if batch.real is None else g[batch.real]
        total, n = total + g.sum(0), n + len(g)
    if not n:
        raise InputError("batches is empty; a mean importance needs data.")
    return (total / n).float().cpu()


def alive_subcomponents(
    vpd: Decomposition, batches: Iterable[Tensor | Batch], threshold: float = ALIVE
) -> Alive:
    """Indices of the subcomponents that are used: mean causal importance above a threshold.

    Those too small to contribute anything (`vpd_lens.decomposition.idle.idle`) are left out.
    Returns `{site: indices}`, on the CPU. Batches are inputs of the model, such as
    `vpd_lens.data.one_pass` gives, whose pads do not count; the threshold is in [0, 1].

    Raises:
        InputError: If there are no batches.
    """
    return above(vpd, mean_importance(vpd, batches), threshold)


def above(
    vpd: Decomposition, means: Float[Tensor, " C_total"], threshold: float
) -> dict[str, Int[Tensor, " _n_alive"]]:
    """`{site: indices}` of those subcomponents, not idle, whose mean exceeds a threshold."""
    chosen = (means > threshold) & ~idle(vpd).to(means.device)
    parts = zip(vpd.layout.names, vpd.layout.split(chosen), strict=True)
    return {name: part.nonzero().squeeze(1) for name, part in parts}


@torch.no_grad()
def head_shares(vpd: Decomposition, name: str) -> Float[Tensor, "C heads"]:
    """Share of each head in every subcomponent of an attention matrix.

    A decomposition sees all heads as one matrix, so that a subcomponent may serve several.

    The share is that of the squared norm of the write direction `U_c` at `q`, `k` and `v`, where
    heads of `k` and `v` are the key-value heads, and of the read direction `V_c` at `o`. Shares add
    up to 1, or are all 0 where the direction is zero.

    Raises:
        InputError: If the site is not one of attention.
    """
    kind = name.rpartition(".")[2]
    if ".attn." not in name or kind not in ("q", "k", "v", "o"):
        raise InputError(f"{name!r} is not the q, k, v or o matrix of an attention layer.")
    vectors = vpd.v(name).T if kind == "o" else vpd.u(name)  # [C, heads * d_head]
    n_heads = head_count(vpd.model.cfg, kind)
    squares = vectors.double().square()  # fp32 squares of small directions would be 0
    squared = reduce(squares, "c (head d_head) -> c head", "sum", head=n_heads)
    total = squared.sum(-1, keepdim=True)
    return torch.where(total > 0, squared / total, 0).to(vectors.dtype)
