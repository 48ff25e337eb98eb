"""Which subcomponents contribute nothing, whatever their importance.

Importances come from a network that is not told what a subcomponent does, and the price of a few
that stay on is small, so some keep an importance for ever although they hardly write anything.
Ablating such a one changes nothing, so that no loss settles its importance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.decomposition.handle import Decomposition

IDLE = 1e-3


@torch.no_grad()
def idle(vpd: Decomposition, share: float = IDLE) -> Bool[Tensor, " C_total"]:
    """Subcomponents that are too small anywhere: `||V_c|| ||U_c||` at most a share of `||W||`.

    The norm of W is Frobenius'. It takes no singular values, and adds up like its parts: the
    squares of n equal, orthogonal subcomponents are an n-th of its own, so that at a share of 1e-3
    only a site with a million of them would lose those of ordinary size.
    """
    found = []
    for site in vpd.sites:
        sizes = vpd.v(site.name).norm(dim=0) * vpd.u(site.name).norm(dim=1)
        found.append(sizes <= share * site.decomposed.float().norm())
    return torch.cat(found)


@torch.no_grad()
def contributing(
    vpd: Decomposition, inputs: Sequence[Float[Tensor, "*batch _d_in"]], share: float = IDLE
) -> Bool[Tensor, "*batch C_total"]:
    """Where subcomponents add more than a share of `||x W||` to their site, and are not `idle`.

    Of each position `|x V_c| ||U_c||` is compared with the output there, without the bias, which
    no subcomponent is a part of. `inputs` are every site's, as `vpd.target` returns them.
    """
    found = []
    for site, x in zip(vpd.sites, inputs, strict=True):
        x = x.float()
        sizes = (x @ vpd.v(site.name)).abs() * vpd.u(site.name).norm(dim=1)
        found.append(sizes > share * (x @ site.decomposed.float()).norm(dim=-1, keepdim=True))
    return torch.cat(found, dim=-1) & ~idle(vpd, share)
