"""A behaviour, prompts and what the model does at one position of each, and how to prune to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vpd_lens.analysis.circuits.targets import (
    LogitDifference,
    Token,
    plain_target,
    prompt_tokens,
    token_id,
    token_text,
)
from vpd_lens.errors import InputError

Method = Literal["adversarial", "stochastic", "ci"]
Objective = Literal["ce", "kl", "logit_difference"]
BehaviourTarget = str | int | Token | LogitDifference
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


@dataclass
class Behaviour:
    """Prompts of one behaviour, padded on the right to one length.

    What follows a position has no effect on it in a causal model, so the padding changes nothing.

    Attributes:
        tokens: `[prompt, pos]`.
        lengths: Number of tokens of each prompt.
        positions: Where each prompt's behaviour is.
        target: The token of the behaviour.
        other: The token it is compared with (`LogitDifference`), or -1.
        names: The target tokens as text.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    positions: Int[Tensor, " prompt"]
    target: Int[Tensor, " prompt"]
    other: Int[Tensor, " prompt"]
    names: tuple[str, ...]

    def row(self, tokens: Int[Tensor, " pos"]) -> int | None:
        """Which of the prompts this is, or `None`."""
        for index, length in enumerate(self.lengths.tolist()):
            if torch.equal(self.tokens[index, :length], tokens):
                return index
        return None

    def goal(self, row: int) -> Token | LogitDifference:
        """The target of one prompt."""
        position, token = int(self.positions[row]), int(self.target[row])
        other = int(self.other[row])
        return Token(token, position) if other < 0 else LogitDifference(token, other, position)

    @property
    def relevant(self) -> Bool[Tensor, "prompt pos"]:
        """Which positions can have an effect."""
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return order <= self.positions[:, None]

    def at_position(self, x: Float[Tensor, "prompt pos d"]) -> Float[Tensor, "prompt 1 d"]:
        """Logits, or what they are made from, at the behaviour's positions alone."""
        return x[torch.arange(len(x), device=x.device), self.positions][:, None]

    def probability(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """Probability of the target token."""
        return logits.softmax(-1).gather(1, self.target[:, None])[:, 0]

    def distance(
        self,
        logits: Float[Tensor, "prompt vocab"],
        clean: Float[Tensor, "prompt vocab"],
        objective: Objective,
    ) -> Float[Tensor, " prompt"]:
        """How far masked outputs are from the behaviour, in nats or, of a difference, in logits.

        Below 0 where a difference of logits is larger than the target model's. An adversary raises
        this; what is minimised is `loss`.
        """
        if objective == "kl":
            q, p = logits.log_softmax(-1), clean.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1)
        if objective == "ce":
            return -logits.log_softmax(-1).gather(1, self.target[:, None])[:, 0]
        return self._difference(clean) - self._difference(logits)

    def loss(
        self,
        logits: Float[Tensor, "prompt vocab"],
        clean: Float[Tensor, "prompt vocab"],
        objective: Objective,
    ) -> Float[Tensor, " prompt"]:
        """The distance, where a difference of logits need not be larger than the target model's."""
        return torch.relu(self.distance(logits, clean, objective))

    def _difference(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        pair = torch.stack([self.target, self.other], dim=1)
        picked = logits.gather(1, pair)
        return picked[:, 0] - picked[:, 1]


def behaviour_of(
    model: nn.Module,
    prompts: Prompts,
    target: BehaviourTarget | Sequence[BehaviourTarget] | None,
    objective: Objective,
    prepend_bos: bool | None = None,
) -> Behaviour:
    """Read prompts and targets.

    Args:
        model: A decomposed model.
        prompts: Text or token ids of one prompt, or several of them.
        target: The token of all prompts, or one for each; `None`: the likeliest one of each.
        objective: `"logit_difference"` needs a `LogitDifference`.
        prepend_bos: Whether text gets a BOS token.

    Raises:
        InputError: If prompts and targets do not fit each other, the model or the objective.
    """
    rows = [prompt_tokens(model, prompt, prepend_bos) for prompt in _as_list(prompts)]
    given = list(target) if isinstance(target, list | tuple) else [target] * len(rows)
    if not rows or len(given) != len(rows):
        raise InputError(f"{len(rows)} prompts, but {len(given)} targets; give one, or as many.")
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    read = [_read(model, row, goal, objective) for row, goal in zip(rows, given, strict=True)]
    device = tokens.device
    positions, first, other = (
        torch.tensor(column, device=device) for column in zip(*read, strict=True)
    )
    names = tuple(token_text(model, token) for token in first.tolist())
    return Behaviour(tokens, lengths.to(device), positions, first, other, names)


def _as_list(prompts: Prompts) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor):
        return list(prompts) if prompts.ndim == 2 else [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


def _read(
    model: nn.Module, row: Tensor, target: BehaviourTarget | None, objective: Objective
) -> tuple[int, int, int]:
    """Position, token and the token it is compared with (-1: none)."""
    n_vocab = int(model.cfg.d_vocab)  # type: ignore[arg-type]
    target = plain_target(target)
    if target is not None and not isinstance(target, str | int | Token | LogitDifference):
        raise InputError(
            f"target={target!r}; a behaviour is of a token (text, id or Token) or a "
            "LogitDifference."
        )
    difference = isinstance(target, LogitDifference)
    if difference is not (objective == "logit_difference"):
        raise InputError(
            f"objective={objective!r} with target={target!r}; a LogitDifference goes with "
            "objective='logit_difference', and nothing else does."
        )
    if target is None:
        likeliest = model.vpd.target(row[None])[0][0, -1].argmax()  # type: ignore[operator]
        return len(row) - 1, int(likeliest), -1
    if isinstance(target, str | int):
        target = Token(target)
    if not -len(row) <= target.position < len(row):
        raise InputError(f"position={target.position}; the prompt has {len(row)} tokens.")
    other = token_id(model, target.other, n_vocab) if isinstance(target, LogitDifference) else -1
    return target.position % len(row), token_id(model, target.token, n_vocab), other
