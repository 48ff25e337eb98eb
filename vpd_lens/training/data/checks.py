"""Are these tokens, and are they in the model's vocabulary?"""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vpd_lens.errors import DataError
from vpd_lens.training.data.batches import BatchSpec

CHUNK = 1 << 24
"""Tokens checked at once: bounds the memory that a memory-mapped file takes."""


def check_all_tokens(tokens: np.ndarray, d_vocab: int | None, what: str) -> int:
    """Check a whole array of tokens, in chunks.

    Args:
        tokens: `[n_tokens]` or `[rows, pos]`, possibly memory-mapped.
        d_vocab: Size of the vocabulary; None skips the range check.
        what: The data's name in messages.

    Returns:
        A checksum (CRC-32) of the contents.

    Raises:
        DataError: If these are not integers, not 1-D or 2-D, empty, or out of the vocabulary.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(not_integers(what, str(tokens.dtype)))
    if tokens.ndim not in (1, 2):
        raise DataError(
            f"{what} has shape {list(tokens.shape)}; expected tokens [rows, pos] or a stream "
            "[n_tokens]. Reshape it."
        )
    if tokens.size == 0:
        raise DataError(f"{what} has shape {list(tokens.shape)}: there are no tokens in it.")
    rows = max(1, CHUNK // (tokens.shape[1] if tokens.ndim == 2 else 1))
    starts = range(0, len(tokens), rows)
    checksum = 0
    for start in progress(starts, f"Checking {what}", hide=len(starts) < 20):
        chunk = np.ascontiguousarray(tokens[start : start + rows])
        check_range(chunk, d_vocab, what, start)
        checksum = zlib.crc32(chunk.data, checksum)
    return checksum


def check_range(tokens: Any, d_vocab: int | None, what: str, first: int = 0) -> None:
    """Check that all tokens are in the vocabulary.

    Args:
        tokens: An integer array or tensor, not empty.
        d_vocab: Size of the vocabulary; None skips the check.
        what: The data's name in messages.
        first: Where `tokens` begins in the data, for the message.

    Raises:
        DataError: If one is not; says which and where.
    """
    if d_vocab is None or (int(tokens.min()) >= 0 and int(tokens.max()) < d_vocab):
        return
    tokens = np.asarray(tokens)
    where = np.argwhere((tokens < 0) | (tokens >= d_vocab))[0]
    value = int(tokens[tuple(where)])
    where[0] += first
    raise DataError(
        f"{what} holds the token {value} at index {where.tolist()}; the model's vocabulary is 0 to "
        f"{d_vocab - 1} (model.cfg.d_vocab = {d_vocab}). Was the data tokenised for another model?"
    )


def check_batch(batch: Any, spec: BatchSpec) -> Tensor:
    """Check one batch from a user's iterable or function.

    Args:
        batch: A tensor or numpy array: tokens `[batch, pos]`, or anything `[batch, ...]` for a
            model without vocabulary.
        spec: What was asked for. The number of rows is left to the caller.

    Returns:
        The batch on the CPU; integers as int64.

    Raises:
        DataError: If it is not such a tensor or does not fit the model.
    """
    if isinstance(batch, np.ndarray):
        batch = to_tensor(batch)
    if not isinstance(batch, Tensor):
        raise DataError(
            f"source gave a {type(batch).__name__}; expected a token tensor [batch, pos]. Map the "
            "iterable to its tensors, for example (b['input_ids'] for b in loader)."
        )
    batch = batch.detach().cpu()
    limits = spec.limits
    integers = is_integer(batch)
    if limits.d_vocab is None and (not integers or batch.ndim != 2):
        if batch.ndim < 2:
            raise DataError(
                f"source gave a batch of shape {list(batch.shape)}; expected [batch, features]."
            )
        return batch
    if not integers:
        raise DataError(not_integers("a batch of source", str(batch.dtype)))
    if batch.ndim != 2 or batch.numel() == 0:
        raise DataError(
            f"source gave a batch of shape {list(batch.shape)}; expected tokens [batch, pos]."
        )
    batch = batch.long()
    length = batch.shape[1]
    if spec.seq_len is not None and length != spec.seq_len:
        raise DataError(
            f"source gave rows of {length} tokens; expected seq_len={spec.seq_len}. Batches are "
            "passed through uncut: change the source, or seq_len."
        )
    if limits.n_ctx is not None and length > limits.n_ctx:
        raise DataError(
            f"source gave rows of {length} tokens, longer than the model's context "
            f"model.cfg.n_ctx = {limits.n_ctx}. Cut them."
        )
    check_range(batch, limits.d_vocab, "a batch of source")
    return batch


def to_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; integers of any width (also unsigned ones) as int64."""
    if np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array))


def checksum(batch: Tensor) -> int:
    """CRC-32 of a tensor's contents."""
    return zlib.crc32(batch.contiguous().numpy().data)


def progress(steps: Any, title: str, hide: bool = False) -> Any:
    """A progress bar on standard error that disappears when done."""
    hide = hide or os.environ.get("RANK", "0") != "0"  # one bar for all processes of a job
    return track(steps, title, transient=True, disable=hide, console=Console(stderr=True))


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def not_integers(what: str, dtype: str) -> str:
    """The message about a dtype that cannot be tokens."""
    return (
        f"{what} has dtype {dtype}; expected integers (token numbers). For a toy model without "
        "vocabulary pass an iterable or a function that gives float batches."
    )
