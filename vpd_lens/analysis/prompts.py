"""Prompts and tokens as users give them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import AttachError, InputError


def decomposition_of(model: nn.Module) -> Decomposition:
    """The decomposition that a model carries, with a warning if it is untrained.

    Raises:
        AttachError: If there is none.
    """
    vpd = model.__dict__.get("vpd")
    if vpd is None:
        raise AttachError("This model carries no decomposition. Call vpd_lens.decompose first.")
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

    Args:
        model: The model.
        prompt: Text, ids, or a tensor of one row.
        prepend_bos: Whether text gets a BOS token; `None`: the model's own default.

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
