"""Ideas of the method's authors, each a subclass of this library's training step.

`ideas.py` trains with them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.masks import uniform_sources
from vpd_lens.decomposition.sigmoids import lower_leaky, upper_leaky
from vpd_lens.training import VPDConfig
from vpd_lens.training.losses import importance_power_sum, minimality
from vpd_lens.training.optimiser import exponent
from vpd_lens.training.step import Losses, Stepper


class Idea(Stepper):
    """`VPDConfig.small()` as it is.

    Args:
        vpd: The decomposition to train.
        config: The run.
        options: Numbers that the idea has to choose, in place of its `defaults`.

    Attributes:
        changes: What the idea changes in the configuration.
    """

    defaults: ClassVar[dict[str, float]] = {}
    changes: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, vpd: Decomposition, config: VPDConfig, options: dict[str, float] | None = None
    ) -> None:
        super().__init__(vpd, config)
        self.options = {**self.defaults, **(options or {})}

    def step(self, batch: Tensor, step: int) -> tuple[Losses, Tensor]:
        """As always, but the losses may ask how far training is."""
        self.now = step
        return super().step(batch, step)


class NoRestart(Idea):
    """The fast adversary alone: lr 0.1, and sources never start over."""

    changes: ClassVar = {"adversary.restart": 0.0}


class Penalty(Idea):
    """Another minimality loss in place of the fused one, and with its coefficient."""

    def size(self, z: Tensor) -> Tensor:
        """How much of each subcomponent is in use, summed over positions, `[C_total]`."""
        minimal = self.config.minimality
        p = exponent(minimal, self.now, self.config.steps)
        return importance_power_sum(z, p, minimal.eps)

    def price(self, size: Tensor, n_positions: int) -> Tensor:
        """The loss, from the sizes."""
        return minimality(size, n_positions, self.config.minimality.frequency)

    def _reconstruction(self, part: Any, n_parts: int) -> Losses:
        losses = super()._reconstruction(part, n_parts)
        return losses | {"penalty": self.price(self.size(part.z), part.z[..., 0].numel())}

    def _weights(self) -> list[tuple[str, float]]:
        renamed = {"minimality": "penalty"}
        return [(renamed.get(name, name), weight) for name, weight in super()._weights()]


class SmoothL0(Penalty):
    """`c^2 / (c^2 + gamma^2)`, scaled to 1 at `c = 1`, in place of `c^p`: its slope is bounded.

    Gamma falls linearly from 1 to its end over the first 90 % of training.
    """

    defaults: ClassVar = {"gamma_end": 0.01}

    def size(self, z: Tensor) -> Tensor:
        """The sum of the smooth L0 of each subcomponent's importances."""
        done = min(1.0, self.now / (0.9 * self.config.steps))
        gamma = 1 + (self.options["gamma_end"] - 1) * done
        square = upper_leaky(z).square()
        return ((1 + gamma**2) * square / (square + gamma**2)).flatten(0, -2).sum(0)


class Frequency(Penalty):
    """Importance plus `weight * sum_c f_c log2(1 + reference f_c)`, f the mean use of c.

    The frequency term sees a debiased moving average of f over many batches, its gradient flows
    through this batch's f. With `half_life` 0, weight `beta` and reference `B T` this is the
    fused loss.
    """

    defaults: ClassVar = {"weight": 0.5, "reference": 1024.0, "half_life": 20.0}

    def price(self, size: Tensor, n_positions: int) -> Tensor:
        """The loss, from the sizes."""
        f = size / n_positions
        average = self._average(f.detach()) + f - f.detach()
        frequency = average * torch.log2(1 + self.options["reference"] * average)
        return f.sum() + self.options["weight"] * frequency.sum()

    def _average(self, f: Tensor) -> Tensor:
        half_life = self.options["half_life"]
        decay = 0.5 ** (1 / half_life) if half_life else 0.0
        self.sum = decay * getattr(self, "sum", 0.0) + (1 - decay) * f
        return self.sum / (1 - decay ** (self.now + 1))


class RelativeFaithfulness(Idea):
    """`mean_l ||Delta_l||^2 / ||W_l||^2`: small sites count as much as large ones.

    The faithfulness warm-up stays as it is.
    """

    changes: ClassVar = {"faithfulness.coefficient": 1e3}

    def _faithfulness(self) -> Tensor:
        deltas = self.vpd.subcomponents.deltas(self.weights)
        pairs = zip(deltas, self.weights, strict=True)
        return torch.stack([d.square().sum() / w.square().sum() for d, w in pairs]).mean()


class Merged(Idea):
    """One masked forward for the stochastic and the adversarial loss together.

    Each sequence takes the adversary's sources with the probability that makes the expected loss
    that of the two apart, random ones otherwise.
    """

    def _reconstruction(self, part: Any, n_parts: int) -> Losses:
        assert self.adversary is not None
        g = lower_leaky(part.z)
        adversarial = self.adversary.masks(g, part.rows)
        masks = uniform_sources(g, self.vpd.layout, self.generator).over(g)
        fraction = self.config.adversary.coefficient / self._merged_weight()
        chance = torch.rand(len(g), 1, 1, generator=self.generator, device=g.device)
        chosen = chance < fraction
        masks.components = torch.where(chosen, adversarial.components, masks.components)
        masks.delta = torch.where(chosen, adversarial.delta, masks.delta)
        return {"merged": part.under(self.run)(masks)}

    def _merged_weight(self) -> float:
        return self.config.stochastic.coefficient + self.config.adversary.coefficient

    def _weights(self) -> list[tuple[str, float]]:
        return [("merged", self._merged_weight()), *super()._weights()]


IDEAS: dict[str, type[Idea]] = {
    "base": Idea,
    "no-restart": NoRestart,
    "smooth-l0": SmoothL0,
    "frequency": Frequency,
    "relative-faithfulness": RelativeFaithfulness,
    "merged": Merged,
}
