"""What a causal importance costs in the total loss: a coefficient, or what a tolerance makes of it.

A user knows what divergence is tolerable, not what a coefficient does. With a tolerance the
coefficient is a dual variable of "as few subcomponents as keep the divergence there": it rises
while the reconstruction losses are below what is tolerated, and falls while they are above,

    log lambda <- log lambda + rate (log D*(t) - log D)

Early in training every divergence is larger than at its end, so D*(t) begins at several times the
tolerance and reaches it before the end (ours; not in the paper).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.config import MinimalityConfig

HALF_LIFE = 0.01  # of the moving average of the divergence, as a fraction of training
BOUND = 1e3  # largest factor between the coefficient and where it began


class Price:
    """The coefficient of the minimality losses, from step to step.

    Attributes:
        state: `[log(lambda / coefficient), average of log D, worst]`, on the device: what a
            checkpoint keeps.
        unmasked: With a tolerance, from the middle of training on: the divergence of the
            subcomponents alone with nothing ablated, below which none can be expected.
    """

    def __init__(self, config: MinimalityConfig, device: torch.device) -> None:
        self.config = config
        self.state = torch.zeros(3, device=device)
        self.unmasked: Tensor | None = None

    @property
    def worst(self) -> Float[Tensor, ""]:
        """The divergence of ablating everything, or of predicting the same, if that is smaller."""
        return self.state[2]

    @property
    def coefficient(self) -> Float[Tensor, ""]:
        """What the minimality losses are multiplied by."""
        return self.config.coefficient * self._unit() * self.state[0].exp()

    def begin(self, worst: Float[Tensor, ""]) -> None:
        """Take note of the worst divergence."""
        self.state = torch.stack([self.state[0], self.state[1], worst])

    def see(self, divergence: Float[Tensor, ""], step: int, steps: int) -> None:
        """Follow the mean of the reconstruction losses of a step."""
        config = self.config
        if config.tolerance is None:
            return
        decay = 0.5 ** (1 / max(1.0, HALF_LIFE * steps))
        log_d = divergence.detach().clamp(min=1e-12).log()
        average = self.state[1].lerp(log_d, 1 - decay if step else 1.0)
        allowed = config.tolerance * allowance(step / steps, config.slack)
        wanted = (allowed * self._unit()).log()
        price = self.state[0] + config.rate / steps * (wanted - average)
        bound = math.log(BOUND)
        self.state = torch.stack([price.clamp(-bound, bound), average, self.worst])

    def _unit(self) -> Float[Tensor, ""]:
        return self.worst if self.config.relative else torch.ones_like(self.worst)


def allowance(progress: float, slack: float) -> float:
    """By what factor a divergence may exceed the tolerance: `slack` at first, 1 from 80 % on."""
    return slack ** max(0.0, 1 - progress / 0.8)
