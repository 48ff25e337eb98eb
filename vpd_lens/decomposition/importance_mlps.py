"""The causal importance functions that are MLPs: SPD's, which serve toys.

| `kind` | one MLP per | it reads |
|---|---|---|
| `mlp` | subcomponent | the subcomponent's own activation |
| `vector_mlp` | subcomponent | the input of its site |
| `shared_mlp` | site | the input of the site |
| `global_mlp` | model | the inputs of all sites, side by side |

Each has hidden layers of some widths with GELUs between; with none it is affine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from vpd_lens.decomposition.subcomponents import PerSubcomponent, Subcomponents

Inputs = Sequence[Float[Tensor, "*batch _d_in"]]
Widths = int | Sequence[int]  # of the hidden layers; an int: of one, or 0 for none

OFF = -1.0  # a pre-sigmoid importance that makes the importance 0


def widths(hidden: Widths) -> tuple[int, ...]:
    """The widths of all hidden layers, from first to last."""
    if isinstance(hidden, int):
        return (hidden,) if hidden else ()
    return tuple(hidden)


class PerSubcomponentMLP(nn.Module):
    """SPD's toy causal importance function: one MLP per subcomponent, on its own activation.

    Its hidden width is `hidden`; at 0 it is the affine function `w act + b`. Several widths are of
    several hidden layers.
    """

    def __init__(self, c_total: int, hidden: Widths, generator: Generator | None = None) -> None:
        super().__init__()
        sizes = widths(hidden)
        self.affine = not sizes
        if self.affine:
            self.w = nn.Parameter(torch.randn(c_total, generator=generator) * math.sqrt(2))
            self.b = nn.Parameter(torch.zeros(c_total))
            return
        w_in = torch.randn(c_total, sizes[0], generator=generator) * math.sqrt(2)
        w_out = torch.randn(c_total, sizes[-1], generator=generator) / math.sqrt(sizes[-1])
        self.w_in, self.b_in = nn.Parameter(w_in), nn.Parameter(torch.zeros(c_total, sizes[0]))
        self.w_out, self.b_out = nn.Parameter(w_out), nn.Parameter(torch.zeros(c_total))
        middle = (_Layers(c_total, *pair, generator) for pair in pairwise(sizes))
        self.middle = nn.ModuleList(middle)

    def forward(
        self, inputs: Inputs, subcomponents: Subcomponents, real: Tensor | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid importances; gradients reach `V` through the activations."""
        acts = subcomponents.acts(inputs)
        if self.affine:
            return torch.addcmul(self.b, acts, self.w)
        hidden = F.gelu(torch.addcmul(self.b_in, acts.unsqueeze(-1), self.w_in))
        for layer in self.middle:
            hidden = F.gelu(layer(hidden))
        return torch.einsum("...ch,ch->...c", hidden, self.w_out) + self.b_out

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """All parameters."""
        last = self.b if self.affine else self.b_out
        return [PerSubcomponent(p, 0, None, OFF if p is last else 0.0) for p in self.parameters()]


class VectorMLP(nn.Module):
    """One MLP per subcomponent, from its site's whole input to its importance."""

    def __init__(
        self,
        d_inputs: Sequence[int],
        sizes: Sequence[int],
        hidden: Widths,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()

        def site(d_in: int, c: int) -> nn.ModuleList:
            pairs = pairwise((d_in, *widths(hidden), 1))
            return nn.ModuleList(_Layers(c, *pair, generator) for pair in pairs)

        self.mlps = nn.ModuleList(site(d, c) for d, c in zip(d_inputs, sizes, strict=True))

    def forward(
        self, inputs: Inputs, subcomponents: Subcomponents, real: Tensor | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid importances."""
        return torch.cat([self._site(*pair) for pair in zip(self.mlps, inputs, strict=True)], -1)

    def _site(self, layers: Any, x: Tensor) -> Float[Tensor, "*batch C"]:
        hidden = x.to(layers[0].weight.dtype).unsqueeze(-2)
        for index, layer in enumerate(layers):
            hidden = layer(F.gelu(hidden) if index else hidden)
        return hidden.squeeze(-1)

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """All parameters."""
        return [
            PerSubcomponent(p, 0, site, OFF if p is layers[-1].bias else 0.0)
            for site, layers in enumerate(self.mlps)
            for p in layers.parameters()
        ]


class SharedMLP(nn.Module):
    """One MLP per site, from its input to its subcomponents' importances; affine at `hidden` 0."""

    def __init__(
        self,
        d_inputs: Sequence[int],
        sizes: Sequence[int],
        hidden: Widths,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        pairs = zip(d_inputs, sizes, strict=True)
        self.mlps = nn.ModuleList(_mlp(d, c, hidden, generator) for d, c in pairs)

    def forward(
        self, inputs: Inputs, subcomponents: Subcomponents, real: Tensor | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid importances."""
        pairs = zip(self.mlps, inputs, strict=True)
        return torch.cat([mlp(x.to(mlp[0].weight.dtype)) for mlp, x in pairs], dim=-1)

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """The rows of every site's last layer."""
        return [row for index, mlp in enumerate(self.mlps) for row in rows(mlp[-1], index)]


class GlobalMLP(nn.Module):
    """One MLP from the inputs of all sites, side by side, to the importances of all."""

    def __init__(
        self,
        d_inputs: Sequence[int],
        c_total: int,
        hidden: Widths,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(sum(d_inputs), c_total, hidden, generator)

    def forward(
        self, inputs: Inputs, subcomponents: Subcomponents, real: Tensor | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid importances."""
        return self.mlp(torch.cat([x.to(self.mlp[0].weight.dtype) for x in inputs], dim=-1))  # type: ignore[no-any-return]

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """The rows of the last layer."""
        return rows(cast(nn.Linear, self.mlp[-1]), None)


class _Layers(nn.Module):
    """A linear layer for each of `n` subcomponents, `[*batch, #n, d_in] -> [*batch, n, d_out]`."""

    def __init__(self, n: int, d_in: int, d_out: int, generator: Generator | None) -> None:
        super().__init__()
        gain = math.sqrt(1 if d_out == 1 else 2)
        weight = torch.randn(n, d_in, d_out, generator=generator) * gain / math.sqrt(d_in)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(n, d_out))

    def forward(self, x: Float[Tensor, "*batch one_or_n d_in"]) -> Float[Tensor, "*batch n d_out"]:
        shared = x.shape[-2] == 1
        terms = "...d,ndh->...nh" if shared else "...nd,ndh->...nh"
        return torch.einsum(terms, x.squeeze(-2) if shared else x, self.weight) + self.bias


def _mlp(d_in: int, d_out: int, hidden: Widths, generator: Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths(hidden):
        layers += [linear(d_in, width, generator, gain=math.sqrt(2)), nn.GELU()]
        d_in = width
    return nn.Sequential(*layers, linear(d_in, d_out, generator))


def rows(layer: nn.Linear, site: int | None) -> list[PerSubcomponent]:
    """A layer's weight and bias, of which every row belongs to one subcomponent."""
    return [PerSubcomponent(layer.weight, 0, site), PerSubcomponent(layer.bias, 0, site, OFF)]  # type: ignore[arg-type]


def linear(
    d_in: int, d_out: int, generator: Generator | None, gain: float | None = 1.0
) -> nn.Linear:
    """A layer with weights `N(0, gain^2 / d_in)` and bias 0; no gain: PyTorch's own, no bias."""
    layer = nn.Linear(d_in, d_out, bias=gain is not None, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(d_in)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    if gain is not None:
        # Drawn twice, as in version 0.1: a seed goes on meaning the same start.
        nn.init.normal_(layer.weight, std=gain / math.sqrt(d_in), generator=generator)
        nn.init.zeros_(layer.bias)
    return layer
