"""The toys: TMS and the residual MLP, their data and labels, and how their targets are trained.

Plain modules whose linear layers are the sites. From Elhage et al. 2022 (arXiv:2209.10652), APD
(arXiv:2501.14926) and SPD (arXiv:2506.20790).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init


@dataclass(frozen=True)
class SparseFeatures:
    """Batches in which every feature is active independently with a small probability.

    Called with a generator and a batch size, it is a data source for `vpd_lens.train`.

    Attributes:
        n_features: Number of features.
        probability: That of a feature being active.
        low: Active values are uniform between this and 1; 0 for TMS, -1 for the residual MLP.
        nonzero: Whether inputs without an active feature are left out. A decomposition learns
            nothing from them: whatever the masks, the output is that of the biases alone.
    """

    n_features: int
    probability: float
    low: float = 0.0
    nonzero: bool = False

    def __call__(self, generator: torch.Generator, batch_size: int) -> Float[Tensor, "batch n"]:
        """One batch, all of its randomness from `generator`."""
        if not self.nonzero:
            return self._draw(generator, batch_size)
        rows = torch.zeros(0, self.n_features)
        while len(rows) < batch_size:
            drawn = self._draw(generator, batch_size)
            rows = torch.cat([rows, drawn[drawn.any(dim=1)]])
        return rows[:batch_size]

    def _draw(self, generator: torch.Generator, n_rows: int) -> Tensor:
        shape = (n_rows, self.n_features)
        values = torch.rand(shape, generator=generator) * (1 - self.low) + self.low
        return values * (torch.rand(shape, generator=generator) < self.probability)


def add_relu(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """The label of the residual MLP: `x + relu(x)`."""
    return x + F.relu(x)


class TMS(nn.Module):
    """Toy model of superposition: `relu(h(x W) W^T + b)`, with fewer hidden units than features.

    The two matrices are one while the target is trained (`forward_tied`). `untie` then gives the
    second layer a copy of its own: a decomposition treats the layers as separate sites.

    Args:
        n_features: Number of features `n`.
        d_hidden: Hidden units `m`.
        identity: Whether a fixed identity layer `h` lies between the two (`tms-...-id`).
        generator: Source of the weights; `None`: PyTorch's global one.

    Attributes:
        linear1: `[n, m]`, no bias.
        hidden: The identity `[m, m]`, or `None`.
        linear2: `[m, n]`, with a bias.
    """

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        identity: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.linear1 = _linear(n_features, d_hidden, generator)
        self.hidden = _linear(d_hidden, d_hidden, generator) if identity else None
        self.linear2 = _linear(d_hidden, n_features, generator, bias=True)
        nn.init.xavier_normal_(self.linear1.weight, generator=generator)
        nn.init.zeros_(self.linear2.bias)
        if self.hidden is not None:
            nn.init.eye_(self.hidden.weight)
        self.untie()

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network, layer by layer."""
        h = self.linear1(x)
        if self.hidden is not None:
            h = self.hidden(h)
        return F.relu(self.linear2(h))

    def forward_tied(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The same function of `linear1.weight` and the bias alone."""
        w = self.linear1.weight
        return F.relu(F.linear(x @ w.T, w.T, self.linear2.bias))

    @torch.no_grad()
    def untie(self) -> None:
        """Copy the transposed first matrix into the second layer."""
        self.linear2.weight.copy_(self.linear1.weight.T)


class ResidualMLP(nn.Module):
    """Residual MLP blocks between a fixed random embedding and its transpose.

    `r = x W_E; r += relu(r W_in) W_out` per block; the output is `r W_E^T`. The rows of `W_E` are
    random unit vectors.

    Args:
        n_features: Number of features `n`.
        d_embed: Width of the residual stream.
        d_mlp: Neurons of each block.
        n_layers: Number of blocks.
        generator: Source of the weights; `None`: PyTorch's global one.

    Attributes:
        embedding: `W_E [n, d_embed]`, never trained.
        layers: The blocks; each has `mlp_in` and `mlp_out`, without biases.
    """

    embedding: Tensor

    def __init__(
        self,
        n_features: int,
        d_embed: int,
        d_mlp: int,
        n_layers: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(n_features, d_embed, generator=generator), dim=-1)
        self.register_buffer("embedding", directions)
        self.layers = nn.ModuleList(_Block(d_embed, d_mlp, generator) for _ in range(n_layers))

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network."""
        residual = x @ self.embedding
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual @ self.embedding.T


class _Block(nn.Module):
    def __init__(self, d_embed: int, d_mlp: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.mlp_in = _linear(d_embed, d_mlp, generator)
        self.mlp_out = _linear(d_mlp, d_embed, generator)

    def forward(self, residual: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(residual)))  # type: ignore[no-any-return]


def _linear(
    d_in: int, d_out: int, generator: torch.Generator | None, bias: bool = False
) -> nn.Linear:
    """A layer as PyTorch initialises it, but from `generator`."""
    layer: nn.Linear = skip_init(nn.Linear, d_in, d_out, bias=bias)  # type: ignore[assignment]
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.uniform_(layer.bias, -(d_in**-0.5), d_in**-0.5, generator=generator)
    return layer


@dataclass(frozen=True)
class Toy:
    """A network whose mechanisms are known, and the recipe that trains it.

    Attributes:
        name: As on the command line.
        build: Makes the untrained network from a generator.
        data: Its inputs.
        label: What it learns to output.
        steps: Training steps of the target.
        batch_size: Inputs per step.
        lr: AdamW's learning rate (weight decay 0.01).
        cosine: Whether the rate falls to 0 along a cosine.
        dense_sites: Sites that are one mechanism, with its rank; at the others every feature
            should get one subcomponent of its own.
    """

    name: str
    build: Callable[[torch.Generator], TMS | ResidualMLP]
    data: SparseFeatures
    label: Callable[[Tensor], Tensor]
    steps: int
    batch_size: int
    lr: float
    cosine: bool
    dense_sites: dict[str, int]

    def train_target(self, seed: int) -> TMS | ResidualMLP:
        """Train the target from scratch; the same seed gives the same weights.

        Args:
            seed: Seed of initialisation and data.
        """
        model = self.build(torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        tied = isinstance(model, TMS)
        parameters = (
            [model.linear1.weight, model.linear2.bias] if tied else list(model.parameters())
        )
        forward: Callable[[Tensor], Tensor] = model.forward_tied if tied else model
        optimiser = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01, fused=True)
        for step in range(self.steps):
            if self.cosine:
                rate = 0.5 * self.lr * (1 + math.cos(math.pi * step / self.steps))
                optimiser.param_groups[0]["lr"] = rate
            x = self.data(generator, self.batch_size)
            loss = F.mse_loss(forward(x), self.label(x))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if tied:
            model.untie()
        return model.eval()


def _tms(n_features: int, d_hidden: int, identity: bool = False) -> Toy:
    return Toy(
        name=f"tms-{n_features}-{d_hidden}" + ("-id" if identity else ""),
        build=lambda generator: TMS(n_features, d_hidden, identity, generator),
        data=SparseFeatures(n_features, 0.05),
        label=lambda x: x,
        steps=10_000,
        batch_size=1024,
        lr=5e-3,
        cosine=False,
        dense_sites={"hidden": d_hidden} if identity else {},
    )


def _resid_mlp(n_layers: int, n_features: int, d_mlp: int, steps: int) -> Toy:
    return Toy(
        name=f"resid-mlp-{n_layers}",
        build=lambda generator: ResidualMLP(n_features, 1000, d_mlp, n_layers, generator),
        data=SparseFeatures(n_features, 0.01, low=-1.0),
        label=add_relu,
        steps=steps,
        batch_size=2048,
        lr=3e-3,
        cosine=True,
        dense_sites={f"layers.{i}.mlp_out": d_mlp for i in range(n_layers)},
    )


TOYS = {
    toy.name: toy
    for toy in (
        _tms(5, 2),
        _tms(5, 2, identity=True),
        _tms(40, 10),
        _tms(40, 10, identity=True),
        _resid_mlp(1, 100, 50, 1000),
        _resid_mlp(2, 100, 25, 1000),
        _resid_mlp(3, 102, 17, 3000),
    )
}
