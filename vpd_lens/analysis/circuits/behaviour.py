"""A behaviour, prompts and what the model does at one position of each, and how to prune to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vpd_lens.analysis.circuits import targets
from vpd_lens.analysis.circuits.targets import BehaviourTarget, LogitDifference, Token
from vpd_lens.errors import InputError

Method = Literal["adversarial", "stochastic", "ci"]
Objective = Literal["ce", "kl", "logit_difference"]
Prompts = str | Sequence[int] | Sequence[str | Sequence[int]] | Tensor


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

    @classmethod
    def of_target(cls, target: Any, **settings: Any) -> PruneConfig:
        """Settings whose objective fits a target; see `objective`."""
        differs = isinstance(target, LogitDifference)
        return cls(objective="logit_difference" if differs else "ce", **settings)


Logits = Float[Tensor, "row vocab"]


@dataclass
class Behaviour:
    """Prompts of one behaviour, padded on the right, which a causal model does not see."""

    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    positions: Int[Tensor, " prompt"]  # where each prompt's behaviour is
    target: Int[Tensor, " prompt"]  # its token
    other: Int[Tensor, " prompt"]  # the token it is compared with (`LogitDifference`), or -1
    objective: Objective

    def prompt(self, row: int) -> Int[Tensor, " pos"]:
        """One prompt without its padding."""
        return self.tokens[row, : int(self.lengths[row])]

    def goal(self, row: int) -> Token | LogitDifference:
        """The target of one prompt."""
        columns = torch.stack([self.positions, self.target, self.other])
        position, token, other = columns[:, row].tolist()
        return Token(token, position) if other < 0 else LogitDifference(token, other, position)

    @property
    def relevant(self) -> Bool[Tensor, "prompt pos"]:
        """Which positions can have an effect."""
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return order <= self.positions[:, None]

    def at_position(self, x: Float[Tensor, "prompt pos d"]) -> Float[Tensor, "prompt 1 d"]:
        """Logits, or what they are made from, at the behaviour's positions alone."""
        return x[torch.arange(len(x), device=x.device), self.positions][:, None]

    def probability(self, logits: Logits) -> Float[Tensor, " row"]:
        """Probability of the target token."""
        return logits.softmax(-1).gather(1, self.target[:, None])[:, 0]

    def distance(self, logits: Logits, clean: Logits) -> Float[Tensor, " row"]:
        """How far masked outputs are from the behaviour, in nats or, of a difference, in logits.

        Below 0 where a difference of logits is larger than the target model's.
        """
        if self.objective == "kl":
            return kl_divergence(logits, clean)
        if self.objective == "ce":
            return F.cross_entropy(logits, self.target, reduction="none")
        pair = torch.stack([self.target, self.other], dim=1)
        first, second = (clean - logits).gather(1, pair).unbind(1)
        return first - second

    def loss(self, logits: Logits, clean: Logits) -> Float[Tensor, " row"]:
        """The distance, where a logit difference need not be larger than the target model's."""
        return self.distance(logits, clean).relu()


def kl_divergence(
    logits: Float[Tensor, "*row vocab"], clean: Float[Tensor, "*row vocab"]
) -> Float[Tensor, "*row"]:
    """`KL(clean || logits)` of each row, in nats."""
    q, p = logits.float().log_softmax(-1), clean.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def behaviour_of(
    model: nn.Module,
    prompts: Prompts,
    target: BehaviourTarget | Sequence[BehaviourTarget] | None,
    objective: Objective,
    prepend_bos: bool | None = None,
) -> Behaviour:
    """Read prompts and the target of each; `None` is the model's likeliest token."""
    if isinstance(prompts, Tensor):
        one = prompts.ndim != 2
    else:
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    rows = [targets.prompt_tokens(model, p, prepend_bos) for p in ([prompts] if one else prompts)]
    given = list(target) if isinstance(target, list | tuple) else [target] * len(rows)
    if not rows or len(given) != len(rows):
        raise InputError(f"{len(rows)} prompts, but {len(given)} targets; give one, or as many.")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    goals = zip(rows, given, strict=True)
    read = [(len(row), *_read(model, row, goal, objective)) for row, goal in goals]
    lengths, positions, first, other = torch.tensor(read, device=tokens.device).unbind(1)
    return Behaviour(tokens, lengths, positions, first, other, objective)


def _read(
    model: nn.Module, row: Tensor, target: BehaviourTarget | None, objective: Objective
) -> tuple[int, int, int]:
    """Position, token and the token it is compared with (-1: none)."""
    if isinstance(target, LogitDifference) is not (objective == "logit_difference"):
        raise InputError(
            f"objective={objective!r} with target={target!r}; a LogitDifference goes with "
            "objective='logit_difference', and nothing else does."
        )
    if target is None:
        likeliest = model.vpd.target(row[None])[0][0, -1].argmax()  # type: ignore[operator]
        return len(row) - 1, int(likeliest), -1
    return targets.read_tokens(model, target, len(row), int(model.cfg.d_vocab))  # type: ignore
