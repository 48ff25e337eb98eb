"""The toys: TMS and the residual MLP, their data and labels, and how their targets are trained.

Plain modules whose linear layers are the sites. From Elhage et al. 2022 (arXiv:2209.10652), APD
(arXiv:2501.14926) and SPD (arXiv:2506.20790).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.progress import track
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class SparseFeatures:
    """Batches in which every feature is active independently with a small probability.

    Called with a generator and a batch size, it is a data source for `vpd_lens.train`. Active
    values are uniform between `low` (0 for TMS, -1 for the residual MLP) and 1. With `nonzero`,
    inputs without an active feature, whose output no mask changes, are left out.
    """

    n_features: int
    probability: float
    low: float = 0.0
    nonzero: bool = False

    def __call__(self, generator: Generator, batch_size: int) -> Float[Tensor, "batch n"]:
        """One batch, all of its randomness from `generator`."""
        shape, rows = (batch_size, self.n_features), torch.zeros(0, self.n_features)
        while len(rows) < batch_size:
            values = torch.rand(shape, generator=generator) * (1 - self.low) + self.low
            values = values * (torch.rand(shape, generator=generator) < self.probability)
            rows = torch.cat([rows, values[values.any(dim=1)] if self.nonzero else values])
        return rows[:batch_size]


def add_relu(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """The label of the residual MLP: `x + relu(x)`."""
    return x + F.relu(x)


class TMS(nn.Module):
    """Toy model of superposition: `relu(h(x W) W^T + b)`, with fewer hidden units than features.

    The two matrices are one while the target is trained (`forward_tied`). `untie` then gives the
    second layer a copy of its own: a decomposition treats the layers as separate sites. `h`
    (`hidden`) is a fixed identity layer, or nothing (`None`); of `linear1` and `linear2` the second
    has a bias. Without a generator, the weights come from PyTorch's global one.
    """

    def __init__(
        self,
        n_features: int,
        d_hidden: int,
        identity: bool = False,
        generator: Generator | None = None,
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
        return F.relu(self.linear2(h if self.hidden is None else self.hidden(h)))

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

    `r = x W_E; r += relu(r W_in) W_out` per block; the output is `r W_E^T`. The rows of `W_E`
    (`embedding`) are random unit vectors, never trained; the blocks, `layers`, have `mlp_in` and
    `mlp_out` of `d_mlp` neurons, without biases. `generator` is as for `TMS`.
    """

    embedding: Tensor

    def __init__(
        self,
        n_features: int,
        d_embed: int,
        d_mlp: int,
        n_layers: int,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(n_features, d_embed, generator=generator), dim=-1)
        self.register_buffer("embedding", directions)
        shapes = {"mlp_in": (d_embed, d_mlp), "mlp_out": (d_mlp, d_embed)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: _linear(*shape, generator) for name, shape in shapes.items()})
            for _ in range(n_layers)
        )

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The network."""
        residual = x @ self.embedding
        for layer in self.layers:
            residual = residual + layer["mlp_out"](F.relu(layer["mlp_in"](residual)))
        return residual @ self.embedding.T


def _linear(d_in: int, d_out: int, generator: Generator | None, bias: bool = False) -> nn.Linear:
    """A layer as PyTorch initialises it, but from `generator`."""
    layer: nn.Linear = skip_init(nn.Linear, d_in, d_out, bias=bias)  # type: ignore[assignment]
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        nn.init.uniform_(layer.bias, -(d_in**-0.5), d_in**-0.5, generator=generator)
    return layer


def fit(
    model: Model, steps: int, loss: Callable[[], Tensor], schedule: LRScheduler, progress: bool
) -> Model:
    """Train a target by the optimiser of a schedule; returns it in evaluation mode."""
    for _ in track(range(steps), "Training the target", disable=not progress):
        schedule.optimizer.zero_grad()
        loss().backward()
        schedule.optimizer.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Toy:
    """A network whose mechanisms are known, and the recipe that trains it.

    `build` makes the untrained network from a generator. `dense_sites` are those that are one
    mechanism, with its rank; at the others every feature should get one subcomponent of its own.
    """

    name: str
    build: Callable[[Generator], TMS | ResidualMLP]
    data: SparseFeatures
    label: Callable[[Tensor], Tensor]
    steps: int
    batch_size: int
    lr: float  # AdamW's; the weight decay is 0.01
    cosine: bool  # whether the rate falls to 0 along a cosine
    dense_sites: dict[str, int]

    def train_target(self, seed: int) -> TMS | ResidualMLP:
        """Train the target from scratch; the same seed gives the same weights."""
        model = self.build(Generator().manual_seed(seed))
        generator = Generator().manual_seed(seed)
        parameters, forward = model.parameters(), model
        if isinstance(model, TMS):
            parameters, forward = [model.linear1.weight, model.linear2.bias], model.forward_tied
        optimiser = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01, fused=True)

        def rate(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0

        def loss() -> Tensor:
            x = self.data(generator, self.batch_size)
            return F.mse_loss(forward(x), self.label(x))

        fit(model, self.steps, loss, LambdaLR(optimiser, rate), progress=False)
        if isinstance(model, TMS):
            model.untie()
        return model


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


_TMS = [_tms(*size, identity) for size in ((5, 2), (40, 10)) for identity in (False, True)]
_MLPS = [_resid_mlp(1, 100, 50, 1000), _resid_mlp(2, 100, 25, 1000), _resid_mlp(3, 102, 17, 3000)]
TOYS = {toy.name: toy for toy in (*_TMS, *_MLPS)}
