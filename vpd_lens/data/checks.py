"""Are these tokens, and are they in the model's vocabulary?"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vpd_lens.data.batches import PAD, Batch, BatchSpec
from vpd_lens.errors import DataError
from vpd_lens.progress import Progress

FIRST = os.environ.get("RANK", "0") == "0"  # one bar for all processes of a job

CHUNK = 1 << 24
"""Tokens checked at once: bounds the memory that a memory-mapped file takes."""


def check_source(tokens: np.ndarray, d_vocab: int | None, lowest: int = 0) -> int:
    """Check a whole source `[n_tokens]` or `[rows, pos]` in chunks; returns its CRC-32."""
    require_integers(tokens, "source")
    if tokens.ndim not in (1, 2):
        raise DataError(
            f"source has shape {list(tokens.shape)}; expected tokens [rows, pos] or a stream "
            "[n_tokens]. Reshape it."
        )
    if tokens.size == 0:
        raise DataError(f"source has shape {list(tokens.shape)}: there are no tokens in it.")
    rows = max(1, CHUNK * len(tokens) // tokens.size)
    starts = range(0, len(tokens), rows)
    crc32 = 0
    with Progress("Checking source", len(starts), show=len(starts) >= 20 and FIRST) as bar:
        for start in bar.counting(starts):
            chunk = np.ascontiguousarray(tokens[start : start + rows])
            check_range(chunk, d_vocab, "source", start, lowest)
            crc32 = zlib.crc32(chunk.data, crc32)
    return crc32


def check_range(
    tokens: np.ndarray, d_vocab: int | None, what: str, first: int = 0, lowest: int = 0
) -> None:
    """Check that integers, at least one, are in the vocabulary.

    The message calls them `what`; they begin at `first` in it. `lowest` is `PAD` for padded rows.
    """
    if d_vocab is None or (int(tokens.min()) >= lowest and int(tokens.max()) < d_vocab):
        return
    where = np.argwhere((tokens < lowest) | (tokens >= d_vocab))[0]
    value = int(tokens[tuple(where)])
    where[0] += first
    raise DataError(
        f"{what} holds the token {value} at index {where.tolist()}; the model's vocabulary is 0 to "
        f"{d_vocab - 1} (model.cfg.d_vocab = {d_vocab}). Was the data tokenised for another model?"
    )


def check_batch(given: Any, spec: BatchSpec) -> Batch:
    """Check one batch from a user's iterable or function; the number of rows is left to the caller.

    It is `[batch, pos]`, or anything `[batch, ...]` for a model without vocabulary, as a tensor, a
    numpy array, a `Batch`, or a mapping with `input_ids` and perhaps `attention_mask`.
    """
    mask = None
    if isinstance(given, Batch):
        given, mask = given
    elif isinstance(given, Mapping) and "input_ids" in given:
        given, mask = given["input_ids"], given.get("attention_mask")
    tokens = to_tensor(given) if isinstance(given, np.ndarray) else given
    if not isinstance(tokens, Tensor):
        raise DataError(
            f"source gave a {type(given).__name__}; expected a token tensor [batch, pos], or a "
            "mapping with input_ids and attention_mask, as in (b['tokens'] for b in loader)."
        )
    tokens, shape = tokens.detach().cpu(), list(tokens.shape)
    if tokens.is_inference():  # made in inference_mode; no backward pass may use it
        tokens = tokens.clone()
    if spec.d_vocab is None and not (is_integer(tokens) and tokens.ndim == 2):
        if tokens.ndim < 2:
            raise DataError(f"source gave a batch of shape {shape}; expected [batch, features].")
        return Batch(tokens)
    require_integers(tokens, "a batch of source")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(f"source gave a batch of shape {shape}; expected tokens [batch, pos].")
    if spec.seq_len is not None and shape[1] != spec.seq_len:
        raise DataError(
            f"source gave rows of {shape[1]} tokens; expected seq_len={spec.seq_len}. Batches are "
            "passed through uncut: change the source, or seq_len."
        )
    if spec.n_ctx is not None and shape[1] > spec.n_ctx:
        raise DataError(
            f"source gave rows of {shape[1]} tokens, longer than the model's context "
            f"model.cfg.n_ctx = {spec.n_ctx}. Cut them."
        )
    check_range(tokens.numpy(), spec.d_vocab, "a batch of source")
    if mask is None:
        return Batch(tokens.long())
    real = torch.as_tensor(mask).detach().cpu().bool()
    if real.shape != tokens.shape:
        raise DataError(
            f"source gave an attention mask of shape {list(real.shape)} for tokens of shape "
            f"{shape}; expected the same."
        )
    if not real.any(1).all():
        raise DataError("source gave a row without a token: its attention mask is 0 everywhere.")
    pads_last = (~real).int().argsort(dim=1, stable=True)
    return Batch.of_rows(torch.where(real, tokens.long(), PAD).gather(1, pads_last), spec.pad)


def padded_rows(rows: Iterable[np.ndarray], length: int) -> Int64[np.ndarray, "rows length"]:
    """The first `length` tokens of each row, then `PAD`."""
    cut = [row[:length] for row in rows]
    if empty := [index for index, row in enumerate(cut) if not len(row)]:
        raise DataError(f"source has no token in row {empty[0]}. Leave empty rows out.")
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=PAD) for row in cut])


def to_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; integers of any width (also unsigned ones) as int64."""
    array = array.astype(np.int64) if is_integer(array) else array
    return torch.from_numpy(np.ascontiguousarray(array))


def checksum(tokens: Tensor) -> int:
    """CRC-32 of a tensor's contents."""
    return zlib.crc32(tokens.contiguous().numpy().data)


def is_integer(tokens: Tensor | np.ndarray) -> bool:
    """Whether these are whole numbers."""
    kind = tokens.dtype
    if isinstance(kind, torch.dtype):
        return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    return np.issubdtype(kind, np.integer)


def require_integers(tokens: Tensor | np.ndarray, what: str) -> None:
    """Refuse a dtype that cannot be tokens."""
    if not is_integer(tokens):
        raise DataError(
            f"{what} has dtype {tokens.dtype}; expected integers (token numbers). For a toy model "
            "without vocabulary pass an iterable or a function that gives float batches."
        )
