"""Component conditioning: an importance may look at its own subcomponent's activation.

With `h = x V` the transformer's pre-sigmoid importance of each subcomponent gets

    s+ sigma(a+ h + b+) + s- sigma(-a- h + b-) + bias

where `sigma` is a hard sigmoid that leaks on both sides (the authors' later work). Gradients
reach V.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.decomposition.subcomponents import PerSubcomponent

LEAK = 0.01
QUANTILE = 0.999


def two_sided_leaky(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`clamp(x, 0, 1)`, with a slope of 0.01 below 0 and above 1, in value and gradient."""
    inside = x.clamp(0, 1)
    return inside + LEAK * (x - inside)


class Conditioning(nn.Module):
    """The seven numbers of every subcomponent; scales are 0 until `calibrate` was called."""

    def __init__(self, c_total: int) -> None:
        super().__init__()
        zeros = torch.zeros(c_total)
        self.scale_up, self.scale_down = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())
        self.shift_up, self.shift_down = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())
        self.weight_up, self.weight_down = (nn.Parameter(torch.ones(c_total)) for _ in range(2))
        self.bias = nn.Parameter(zeros.clone())

    def forward(self, acts: Float[Tensor, "*batch C_total"]) -> Float[Tensor, "*batch C_total"]:
        """What the activations `x V` add to the pre-sigmoid importances."""
        up = two_sided_leaky(torch.addcmul(self.shift_up, acts, self.scale_up))
        down = two_sided_leaky(torch.addcmul(self.shift_down, acts, self.scale_down, value=-1))
        return torch.addcmul(self.bias, up, self.weight_up) + down * self.weight_down

    @torch.no_grad()
    def calibrate(self, acts: Float[Tensor, "*batch C_total"]) -> None:
        """Make both scales `1 / q`, with `q` the 99.9th percentile of `|x V|` over positions.

        Nothing happens if they have been set before.
        """
        if bool(self.scale_up.any()) or bool(self.scale_down.any()):
            return
        size = acts.float().abs().flatten(0, -2)
        rank = max(1, round(QUANTILE * size.shape[0]))
        q = size.kthvalue(rank, dim=0).values
        for scale in (self.scale_up, self.scale_down):
            scale.copy_(torch.where(q > 0, 1 / q, 1.0))

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """All parameters; a folded subcomponent gets nothing."""
        return [PerSubcomponent(parameter, 0, None) for parameter in self.parameters()]  # type: ignore[arg-type]
