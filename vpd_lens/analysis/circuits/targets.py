"""Prompts and targets as users give them.

A target is what a graph explains: output tokens, logit differences, directions in the residual
stream.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
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


def explained_decomposition(model: nn.Module) -> Decomposition:
    """The decomposition that a model carries, with a warning if it is untrained.

    Raises:
        AttachError: If it carries none.
    """
    vpd = decomposition_of(model)
    if not vpd.trained_steps:
        warnings.warn(
            "this decomposition is untrained: its subcomponents and importances mean nothing yet.",
            stacklevel=3,
        )
    return vpd


def token_id(model: nn.Module, token: str | int, n_vocab: int) -> int:
    """The id of a token given as text or id.

    Raises:
        InputError: If the text is not exactly one token, or the id not in the vocabulary.
    """
    if isinstance(token, int):
        if not 0 <= token < n_vocab:
            raise InputError(f"token {token} is not in the vocabulary of {n_vocab}.")
        return token
    if getattr(model, "tokenizer", None) is None:
        raise InputError(f"token {token!r}: the model has no tokenizer; give token ids.")
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        pieces = [token_text(model, i) for i in ids]
        raise InputError(
            f"{token!r} is {len(ids)} tokens, {pieces}; a target is one token. Mind the leading "
            "space, or give the first of them."
        )
    return ids[0]


def token_text(model: nn.Module, token: int) -> str:
    """A token as text, or its id in angle brackets without a tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return f"<{token}>"
    return str(model.to_string(torch.tensor([token])))


def prompt_tokens(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    prepend_bos: bool | None = None,
) -> Int[Tensor, " pos"]:
    """A prompt as token ids.

    Raises:
        InputError: If it is empty, of several rows, out of the vocabulary or too long.
    """
    cfg: Any = model.cfg
    if isinstance(prompt, str):
        if getattr(model, "tokenizer", None) is None:
            raise InputError("prompt: the model has no tokenizer; give token ids.")
        if prompt == "":
            raise InputError("prompt is empty; there is nothing to explain.")
        keywords = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(prompt, truncate=False, **keywords)
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"prompt={prompt!r} is neither text nor the token ids of one prompt."
            ) from None
        if tokens.numel() == 0:
            raise InputError("prompt is empty; there is nothing to explain.")
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise InputError(
            f"prompt has shape {tuple(tokens.shape)} and type {tokens.dtype}; expected the "
            "token ids of one prompt."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= cfg.d_vocab:
        raise InputError(f"prompt has token ids outside the vocabulary of {cfg.d_vocab}.")
    if len(tokens) > cfg.n_ctx:
        raise InputError(
            f"prompt has {len(tokens)} tokens, more than the model's context of {cfg.n_ctx}."
        )
    # A copy, because a tensor made in inference mode can take no part in a backward pass.
    return tokens.to(next(model.parameters()).device).clone()
