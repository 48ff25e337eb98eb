"""What a graph explains: output tokens, logit differences, directions in the residual stream."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.analysis.prompts import token_id, token_text
from vpd_lens.errors import InputError


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens.

    Attributes:
        mass: Take tokens, likeliest first, until they hold this much probability,
        at_most: but at most so many per position,
        at_least: and none of a probability below this (the paper: 0.01 and 15).
        position: After which token, or `None` for all positions.
    """

    mass: float = 0.95
    at_most: int = 15
    at_least: float = 0.01
    position: int | None = -1


@dataclass(frozen=True)
class Token:
    """The logit of one token.

    Attributes:
        token: The token, as text or id.
        position: After which token of the prompt.
    """

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another.

    Attributes:
        token: The token whose logit counts positively.
        other: The token whose logit is taken off.
        position: After which token of the prompt.
    """

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True)
class Direction:
    """The residual stream's product with a vector.

    Attributes:
        vector: `[d_model]`.
        name: What to call it.
        position: At which token of the prompt.
        layer: Of the residual stream after this block; `None`: after the final norm, where the
            vectors of tokens are the columns of the unembedding.
    """

    vector: Any
    name: str = "direction"
    position: int = -1
    layer: int | None = None


Target = str | SupportsIndex | Token | LogitDifference | Direction | TopTokens


@dataclass(frozen=True)
class Output:
    """One output node of a graph: `vector . stream[position] + bias`.

    Attributes:
        name: What it is called.
        position: Where it is.
        vector: What the stream is multiplied with, `[d_model]`.
        bias: The unembedding's own.
        tokens: Coefficients of logits, by token id; empty for a direction.
        layer: Block whose residual stream is meant; `None`: the unembedding's input.
        probability: The target model's, of a token.
        weight: Share of this output when influences on several are added: its probability where
            the likeliest tokens were asked for, otherwise 1.
    """

    name: str
    position: int
    vector: Float[Tensor, " d_model"]
    bias: float
    tokens: dict[int, float]
    layer: int | None
    probability: float
    weight: float = 1.0

    @property
    def token_id(self) -> int:
        """The token of a plain logit; -1 for anything else."""
        return next(iter(self.tokens)) if list(self.tokens.values()) == [1.0] else -1


def resolve_targets(
    model: nn.Module,
    targets: Target | Sequence[Target] | None,
    logits: Float[Tensor, "pos vocab"],
    unembed: tuple[Float[Tensor, "d_model vocab"], Float[Tensor, " vocab"] | None],
) -> list[Output]:
    """The output nodes that a user's `target` means.

    Args:
        model: The model, for its tokenizer and its size.
        targets: One or several targets; `None` is `TopTokens()`.
        logits: The target model's on the prompt.
        unembed: The unembedding's weight and bias.

    Raises:
        InputError: If a target is not one token, a position is not in the prompt, or a vector
            has the wrong size.
    """
    if targets is None:
        targets = TopTokens()
    several: list[Any] = list(targets) if isinstance(targets, list | tuple) else [targets]
    resolver = _Resolver(model, logits, *unembed)
    outputs = [output for target in several for output in resolver.outputs(target)]
    if not outputs:
        raise InputError("target is empty; name at least one token, or leave it out.")
    # The same logit twice is one node; directions are told apart by their order.
    unique = {
        (o.position, *o.tokens.items()) if o.tokens else number: o
        for number, o in enumerate(outputs)
    }
    return list(unique.values())


def plain_target(target: Any) -> Any:
    """An id from numpy or torch as an `int`; anything else as it is."""
    if isinstance(target, bool | str) or not hasattr(target, "__index__"):
        return target
    try:
        return operator.index(target)
    except TypeError:
        return target


class _Resolver:
    def __init__(
        self, model: nn.Module, logits: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        self.model, self.weight, self.bias = model, weight.float(), bias
        self.probabilities = logits.float().softmax(-1)
        self.n_positions, self.n_vocab = logits.shape

    def outputs(self, target: Target) -> list[Output]:
        target = plain_target(target)
        if isinstance(target, bool) or not isinstance(
            target, str | int | Token | LogitDifference | Direction | TopTokens
        ):
            raise InputError(
                f"target={target!r} is not a token (text or id), Token, LogitDifference, "
                "Direction or TopTokens."
            )
        if isinstance(target, TopTokens):
            return self._top(target)
        if isinstance(target, Direction):
            return [self._direction(target)]
        if isinstance(target, LogitDifference):
            return [self._difference(target)]
        return [self._token(target if isinstance(target, Token) else Token(target))]

    def _position(self, position: int) -> int:
        if not -self.n_positions <= position < self.n_positions:
            raise InputError(
                f"position={position} is not in the prompt, which has {self.n_positions} tokens."
            )
        return position % self.n_positions

    def _logit(self, name: str, position: int, tokens: dict[int, float]) -> Output:
        ids, coefficients = list(tokens), self.weight.new_tensor(list(tokens.values()))
        bias = 0.0 if self.bias is None else float(self.bias.float()[ids] @ coefficients)
        vector = self.weight[:, ids] @ coefficients
        probability = float(self.probabilities[position, ids[0]])
        return Output(name, position, vector, bias, tokens, None, probability)

    def _token(self, target: Token) -> Output:
        token = token_id(self.model, target.token, self.n_vocab)
        return self._logit(self._text(token), self._position(target.position), {token: 1.0})

    def _difference(self, target: LogitDifference) -> Output:
        first = token_id(self.model, target.token, self.n_vocab)
        second = token_id(self.model, target.other, self.n_vocab)
        if first == second:
            raise InputError(f"the logit difference is of token {first} with itself.")
        name = f"{self._text(first)} - {self._text(second)}"
        return self._logit(name, self._position(target.position), {first: 1.0, second: -1.0})

    def _top(self, target: TopTokens) -> list[Output]:
        where = range(self.n_positions)
        if target.position is not None:
            where = [self._position(target.position)]
        outputs = []
        for position in where:
            p, ids = self.probabilities[position].sort(descending=True)
            before = p.cumsum(0) - p
            wanted = (before < target.mass) & (p >= target.at_least)
            wanted[0] = True
            for token in ids[wanted][: target.at_most].tolist():
                output = self._logit(self._text(token), position, {token: 1.0})
                outputs.append(replace(output, weight=output.probability))
        return outputs

    def _direction(self, target: Direction) -> Output:
        vector = torch.as_tensor(target.vector, device=self.weight.device).float().flatten()
        n_layers = len(self.model.blocks)  # type: ignore[arg-type]
        if vector.shape != self.weight.shape[:1] or not bool(vector.isfinite().all()):
            raise InputError(
                f"Direction.vector has shape {tuple(vector.shape)}; expected {len(self.weight)} "
                "finite numbers, one per dimension of the residual stream."
            )
        if target.layer is not None and not 0 <= target.layer < n_layers:
            raise InputError(f"Direction.layer={target.layer}; the model has {n_layers} blocks.")
        position = self._position(target.position)
        return Output(target.name, position, vector, 0.0, {}, target.layer, 1.0)

    def _text(self, token: int) -> str:
        return token_text(self.model, token)
