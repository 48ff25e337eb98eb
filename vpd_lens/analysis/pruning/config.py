"""Settings of pruning to a behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["adversarial", "stochastic", "ci"]
Objective = Literal["ce", "kl", "logit_difference"]


class PruneConfig(BaseModel):
    """How importances are optimised for one behaviour.

    Attributes:
        method: Under which masks the behaviour must survive: `"ci"` (the importances
            themselves, for contrast only), `"stochastic"`, or `"adversarial"` (half stochastic,
            half adversarial).
        objective: `"ce"`: cross-entropy of the target token. `"kl"`: KL from the target model at
            that position. `"logit_difference"`: minus the difference of two logits, up to the
            target model's own.
        coefficient: Weight of `sum g^p` over subcomponents and positions, per prompt: the price
            of one node, whatever the length of the prompt.
        p: Exponent of the importances.
        steps: Optimisation steps.
        lr: Peak learning rate of AdamW on the values before the sigmoid.
        warmup: Share of the steps in which the rate grows from 0; then it follows a cosine to 0.
        adversary_steps: Sign steps of the adversary, anew at every step.
        adversary_step_size: Their size; the sources lie in [0, 1].
        attack_steps: Sign steps of the attacks in the report.
        attack_step_size: Their size, or what lets so few steps cross [0, 1] twice if that is more.
        attack_restarts: Random starts of each; the report takes the worst.
        draws: Random masks behind the report's stochastic probability.
        seed: Seed of all random masks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "adversarial"
    objective: Objective = "ce"
    coefficient: float = Field(default=5e-3, ge=0)
    p: float = Field(default=0.3, gt=0)
    steps: int = Field(default=400, ge=1)
    lr: float = Field(default=0.05, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    adversary_steps: int = Field(default=4, ge=1)
    adversary_step_size: float = Field(default=1.0, gt=0)
    attack_steps: tuple[Annotated[int, Field(ge=1)], ...] = (4, 20, 80)
    attack_step_size: float = Field(default=0.1, gt=0)
    attack_restarts: int = Field(default=3, ge=1)
    draws: int = Field(default=16, ge=1)
    seed: int = 0
