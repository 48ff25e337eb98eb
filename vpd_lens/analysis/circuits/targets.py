"""Prompts, and targets, what a graph explains: tokens, logit differences, directions."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.errors import InputError


@dataclass(frozen=True)
class TopTokens:
    """The likeliest next tokens after a position, or, with `None`, after every position.

    They are taken, likeliest first, until they hold `mass` of the probability, but at most
    `at_most` per position, and none of a probability below `at_least` (the paper: 15 and 0.01).
    """

    mass: float = 0.95
    at_most: int = 15
    at_least: float = 0.01
    position: int | None = -1


@dataclass(frozen=True)
class Token:
    """The logit of one token, text or id, after a position of the prompt."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another, text or ids, after a position of the prompt."""

    token: str | int
    other: str | int
    position: int = -1


@dataclass(frozen=True)
class Direction:
    """The residual stream's product with a vector `[d_model]` at a position of the prompt.

    The stream is that after block `layer`; with `None`, that after the final norm, where the
    vectors of tokens are columns of the unembedding.
    """

    vector: Any
    name: str = "direction"
    position: int = -1
    layer: int | None = None


BehaviourTarget = str | int | Token | LogitDifference
Target = BehaviourTarget | SupportsIndex | Direction | TopTokens


@dataclass(frozen=True)
class Output:
    """One output node of a graph: `vector . stream[position] + bias`.

    `weight` is its share when influences on several outputs are added: its probability where the
    likeliest tokens were asked for, otherwise 1.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    name: str
    position: int
    # Of a saved graph it is among the tensors beside the record.
    vector: Annotated[Float[Tensor, " d_model"], Field(exclude=True, default=None)]
    bias: float
    tokens: dict[int, float]  # coefficients of logits, by token id; empty for a direction
    layer: int | None  # block whose residual stream is meant; None: the unembedding's input
    probability: float  # the target model's, of a token
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
    """The output nodes that a user's `target` means; an `InputError` if it is none."""
    targets = TopTokens() if targets is None else targets
    several = targets if isinstance(targets, list | tuple) else [targets]
    resolver = _Resolver(model, logits.float().softmax(-1), *unembed)
    outputs = [output for target in several for output in resolver.outputs(target)]
    if not outputs:
        raise InputError("target is empty; name at least one token, or leave it out.")
    # The same logit twice is one node; directions are told apart by their order.
    unique = {(o.position, *o.tokens.items()) if o.tokens else i: o for i, o in enumerate(outputs)}
    return list(unique.values())


@dataclass
class _Resolver:
    """What outputs are made from: the model's probabilities, and its unembedding."""

    model: nn.Module
    probabilities: Float[Tensor, "pos vocab"]
    weight: Float[Tensor, "d_model vocab"]
    bias: Float[Tensor, " vocab"] | None

    def outputs(self, target: Any) -> list[Output]:
        if isinstance(target, TopTokens):
            return self._top(target)
        if isinstance(target, Direction):
            return [self._direction(target)]
        position, token, other = read_tokens(self.model, target, *self.probabilities.shape)
        return [self._logit(position, {token: 1.0} if other < 0 else {token: 1.0, other: -1.0})]

    def _logit(self, position: int, tokens: dict[int, float]) -> Output:
        name, ids = " - ".join(token_text(self.model, token) for token in tokens), list(tokens)
        weight = self.weight[:, ids].float()
        coefficients = weight.new_tensor(list(tokens.values()))
        bias = 0.0 if self.bias is None else float(self.bias[ids].float() @ coefficients)
        probability = float(self.probabilities[position, next(iter(tokens))])
        return Output(name, position, weight @ coefficients, bias, tokens, None, probability)

    def _top(self, target: TopTokens) -> list[Output]:
        n_positions, outputs = len(self.probabilities), []
        one = None if target.position is None else in_prompt(target.position, n_positions)
        for position in range(n_positions) if one is None else [one]:
            p, ids = self.probabilities[position].sort(descending=True)
            wanted = (p.cumsum(0) - p < target.mass) & (p >= target.at_least)
            wanted[0] = True
            for token in ids[wanted][: target.at_most].tolist():
                output = self._logit(position, {token: 1.0})
                outputs.append(replace(output, weight=output.probability))
        return outputs

    def _direction(self, target: Direction) -> Output:
        vector = torch.as_tensor(target.vector, device=self.weight.device).float().flatten()
        if vector.shape != self.weight.shape[:1] or not bool(vector.isfinite().all()):
            raise InputError(
                f"Direction.vector has shape {tuple(vector.shape)}; expected {len(self.weight)} "
                "finite numbers, one per dimension of the residual stream."
            )
        n_layers = len(self.model.blocks)  # type: ignore[arg-type]
        if target.layer is not None and not 0 <= target.layer < n_layers:
            raise InputError(f"Direction.layer={target.layer}; the model has {n_layers} blocks.")
        position = in_prompt(target.position, len(self.probabilities))
        return Output(target.name, position, vector, 0.0, {}, target.layer, 1.0)


def read_tokens(model: nn.Module, target: Any, n_tokens: int, n_vocab: int) -> tuple[int, int, int]:
    """Position, token, and the token whose logit is taken off (-1: none)."""
    with suppress(TypeError):  # an id from numpy or torch
        target = target if isinstance(target, bool) else operator.index(target)
    if isinstance(target, bool) or not isinstance(target, BehaviourTarget):
        raise InputError(
            f"target={target!r}; expected a token (text or id), Token or LogitDifference, or, "
            "where no behaviour is pruned to, Direction or TopTokens."
        )
    if isinstance(target, str | int):
        target = Token(target)
    token, other = token_id(model, target.token, n_vocab), -1
    if isinstance(target, LogitDifference):
        other = token_id(model, target.other, n_vocab)
        if token == other:
            raise InputError(f"the logit difference is of token {token} with itself.")
    return in_prompt(target.position, n_tokens), token, other


def in_prompt(position: int, n_tokens: int) -> int:
    """A position counted from the prompt's beginning; an `InputError` if it has none such."""
    if not -n_tokens <= position < n_tokens:
        raise InputError(f"position={position} is not in the prompt, which has {n_tokens} tokens.")
    return position % n_tokens


def explained_decomposition(model: nn.Module) -> Decomposition:
    """The decomposition that a model carries, with a warning if it is untrained."""
    vpd = decomposition_of(model)
    if any(site.origin is not None for site in vpd.sites):
        raise InputError(
            "attributions add up to what whole weights write, and this decomposition is of the "
            "difference from another model. Decompose the model without base= for them."
        )
    if not vpd.trained_steps:
        warnings.warn(
            "this decomposition is untrained: its subcomponents and importances mean nothing yet.",
            stacklevel=3,
        )
    return vpd


def checked_importance(
    vpd: Decomposition, given: Float[Tensor, "pos C_total"], n_positions: int
) -> Float[Tensor, "pos C_total"]:
    """Importances that a user gave for a prompt, or an `InputError`."""
    given = given[0] if given.ndim == 3 and len(given) == 1 else given
    expected = (n_positions, vpd.layout.total)
    if given.shape != expected:
        raise InputError(
            f"importance has shape {tuple(given.shape)}; expected [pos, C_total] = {expected}."
        )
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise InputError("importance has values outside [0, 1].")
    return given.detach().to(vpd.device).float().clone()


def token_id(model: nn.Module, token: str | int, n_vocab: int) -> int:
    """The id of a token given as text or id; an `InputError` if it is not exactly one token."""
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
    model: nn.Module, prompt: str | Sequence[int] | Tensor, prepend_bos: bool | None = None
) -> Int[Tensor, " pos"]:
    """A prompt as token ids, or an `InputError` if it is none that the model takes."""
    cfg: Any = model.cfg
    if isinstance(prompt, str):
        if getattr(model, "tokenizer", None) is None:
            raise InputError("prompt: the model has no tokenizer; give token ids.")
        bos = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(prompt, truncate=False, **bos) if prompt else torch.empty(0)
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"prompt={prompt!r} is neither text nor ids of one prompt.") from None
    if tokens.numel() == 0:
        raise InputError("prompt is empty; there is nothing to explain.")
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise InputError(
            f"prompt is {tokens.dtype} of shape {tuple(tokens.shape)}; expected ids of one prompt."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= cfg.d_vocab:
        raise InputError(f"prompt has token ids outside the vocabulary of {cfg.d_vocab}.")
    if len(tokens) > cfg.n_ctx:
        raise InputError(
            f"prompt has {len(tokens)} tokens, more than the model's context of {cfg.n_ctx}."
        )
    # A copy, because a tensor made in inference mode can take no part in a backward pass.
    return tokens.to(next(model.parameters()).device).clone()
