"""A behaviour: prompts, and what the model does at one position of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.prompts import prompt_tokens, token_id, token_text
from vpd_lens.analysis.pruning.config import Objective
from vpd_lens.analysis.targets import LogitDifference, Token, plain_target
from vpd_lens.errors import InputError

BehaviourTarget = str | int | Token | LogitDifference
Prompts = str | Sequence[int] | Sequence[str | Sequence[int]] | Tensor


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
    def relevant(self) -> Tensor:
        """Which positions can have an effect, `[prompt, pos]`."""
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return order <= self.positions[:, None]

    def at_position(self, logits: Float[Tensor, "prompt pos vocab"]) -> Tensor:
        """Logits at the behaviour's position, `[prompt, vocab]`."""
        return logits[torch.arange(len(logits), device=logits.device), self.positions].float()

    def probability(self, logits: Float[Tensor, "prompt pos vocab"]) -> Float[Tensor, " prompt"]:
        """Probability of the target token."""
        p = self.at_position(logits).softmax(-1)
        return p.gather(1, self.target[:, None])[:, 0]

    def loss(
        self,
        logits: Float[Tensor, "prompt pos vocab"],
        clean: Float[Tensor, "prompt vocab"],
        objective: Objective,
    ) -> Float[Tensor, " prompt"]:
        """How far masked outputs are from the behaviour.

        Args:
            logits: Under masks.
            clean: The target model's, at the behaviour's position.
            objective: See `PruneConfig`.
        """
        here = self.at_position(logits)
        if objective == "kl":
            q, p = here.log_softmax(-1), clean.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1)
        if objective == "ce":
            return -here.log_softmax(-1).gather(1, self.target[:, None])[:, 0]
        return torch.relu(self._difference(clean) - self._difference(here))

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
