"""The toys: which network, data and label, and how the target is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_lens.toys.data import SparseFeatures, add_relu, reconstruct
from vpd_lens.toys.models import TMS, ResidualMLP


@dataclass(frozen=True)
class Toy:
    """A network whose mechanisms are known, and the recipe that trains it.

    Attributes:
        name: As on the command line.
        build: Makes the untrained network.
        data: Its inputs.
        label: What it learns to output.
        steps: Training steps of the target.
        batch_size: Inputs per step.
        lr: AdamW's learning rate (weight decay 0.01).
        cosine: Whether the rate falls to 0 along a cosine.
        identity_sites: Sites of which every feature should get one subcomponent of its own.
        dense_sites: Sites that are one mechanism, with its rank.
    """

    name: str
    build: Callable[[], TMS | ResidualMLP]
    data: SparseFeatures
    label: Callable[[Tensor], Tensor]
    steps: int
    batch_size: int
    lr: float
    cosine: bool
    identity_sites: tuple[str, ...]
    dense_sites: dict[str, int]

    def train_target(self, seed: int) -> TMS | ResidualMLP:
        """Train the target from scratch; the same seed gives the same weights.

        Args:
            seed: Seed of initialisation and data.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
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


def _tms(n_features: int, d_hidden: int, identity: bool, batch_size: int) -> Toy:
    return Toy(
        name=f"tms-{n_features}-{d_hidden}" + ("-id" if identity else ""),
        build=lambda: TMS(n_features, d_hidden, identity),
        data=SparseFeatures(n_features, 0.05),
        label=reconstruct,
        steps=10_000,
        batch_size=batch_size,
        lr=5e-3,
        cosine=False,
        identity_sites=("linear1", "linear2"),
        dense_sites={"hidden": d_hidden} if identity else {},
    )


def _resid_mlp(n_layers: int, n_features: int, d_mlp: int, steps: int) -> Toy:
    return Toy(
        name=f"resid-mlp-{n_layers}",
        build=lambda: ResidualMLP(n_features, 1000, d_mlp, n_layers),
        data=SparseFeatures(n_features, 0.01, low=-1.0),
        label=add_relu,
        steps=steps,
        batch_size=2048,
        lr=3e-3,
        cosine=True,
        identity_sites=tuple(f"layers.{i}.mlp_in" for i in range(n_layers)),
        dense_sites={f"layers.{i}.mlp_out": d_mlp for i in range(n_layers)},
    )


TOYS = {
    toy.name: toy
    for toy in (
        _tms(5, 2, False, 1024),
        _tms(5, 2, True, 1024),
        _tms(40, 10, False, 1024),
        _tms(40, 10, True, 1024),
        _resid_mlp(1, 100, 50, 1000),
        _resid_mlp(2, 100, 25, 1000),
        _resid_mlp(3, 102, 17, 3000),
    )
}
