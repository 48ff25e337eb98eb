"""Start from subcomponents that lie along neurons and heads (the authors' later work)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition import Subcomponents
from vpd_lens.sites import Site

_WRITES_TO_AXES = ("q", "k", "v", "in", "gate")
_READS_FROM_AXES = ("o", "out")

# Size of the subcomponents beyond the number of axes, relative to the random initialisation.
_REST = 0.3


@torch.no_grad()
def align(subcomponents: Subcomponents, sites: Sequence[Site]) -> None:
    """Set subcomponent `j` of every site to what the weight does at neuron or head dimension `j`.

    A matrix that writes to neurons or heads (q, k, v, in, gate) is the sum of its columns, each
    written along one axis; one that reads from them (o, out) the sum of its rows. The first
    `C_l` of these rank-1 matrices become the first subcomponents, their norm shared evenly between
    V and U; further subcomponents keep their random directions, made small. With at least one
    subcomponent per axis `V U` is nearly `W` before any training.

    Args:
        subcomponents: Changed in place.
        sites: Their sites.
    """
    parts = [site.name.rsplit(".", 1)[-1] for site in sites]
    for site, part, v, u in zip(sites, parts, subcomponents.v, subcomponents.u, strict=True):
        weight = site.weight.to(v)
        if part in _WRITES_TO_AXES:
            _along_columns(v, u, weight)
        elif part in _READS_FROM_AXES:
            _along_columns(u.T, v.T, weight.T)


def _along_columns(
    v: Float[Tensor, "d_in C"], u: Float[Tensor, "C d_out"], weight: Float[Tensor, "d_in d_out"]
) -> None:
    v *= _REST
    u *= _REST
    n = min(weight.shape[1], v.shape[1])
    scale = weight[:, :n].norm(dim=0).sqrt().clamp(min=1e-6)
    v[:, :n] = weight[:, :n] / scale
    u[:n] = 0
    u[:n, :n].fill_diagonal_(1)
    u[:n] *= scale[:, None]
