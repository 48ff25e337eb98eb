"""Tokens that are there already: tensors, arrays, files of them, and rows of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpd_lens.data.batches import PAD, Batch, BatchSpec, TokenBatches
from vpd_lens.data.checks import (
    check_all_tokens,
    check_range,
    is_integer,
    not_integers,
    padded_rows,
    to_tensor,
)
from vpd_lens.data.text import TextEncoder, bos_of
from vpd_lens.errors import DataError


class ArrayBatches(TokenBatches):
    """Rows `[rows, pos]`, or windows of a stream `[n_tokens]`, without replacement per epoch.

    A stream is cut at a new random offset every epoch, so that window borders fall elsewhere. The
    data is checked completely; it may be memory-mapped. `padded`: rows may end in `PAD`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        spec: BatchSpec,
        name: str,
        bos: int | None = None,
        padded: bool = False,
    ) -> None:
        checksum = check_all_tokens(tokens, spec.d_vocab, PAD if padded else 0)
        stream = tokens.ndim == 1
        if stream and bos is None and spec.prepend_bos:
            bos = bos_of(spec)
        if not stream:
            spec.forbid_bos("a 2-D array")
        length = spec.length(None if stream else tokens.shape[1], bos is not None)
        self._window = length - (bos is not None)
        n_rows = len(tokens) // self._window if stream else len(tokens)
        if n_rows < (1 if spec.once else spec.batch_size):
            raise DataError(
                f"source has {n_rows} rows of {self._window} tokens, fewer than "
                f"batch_size={spec.batch_size}. Pass a smaller batch_size"
                + (" or seq_len," if stream else ",")
                + " or more data."
            )
        size = (
            f"{len(tokens)} tokens" if stream else f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
        )
        policy = "no BOS added" if bos is None else f"BOS ({bos}) before every row"
        super().__init__(
            spec,
            length,
            f"{name}: {size}, {n_rows} rows of {length}; {policy}",
            {"shape": list(tokens.shape), "crc32": checksum, "bos": bos},
        )
        self._tokens, self._bos, self._padded = tokens, bos, padded
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        generator = self._generator(epoch)
        if self._tokens.ndim == 2:
            self._rows = self._tokens[:, : self._window]
        else:
            slack = len(self._tokens) - self.batch_size * self._window
            offset = 0
            if self._spec.shuffle:
                limit = min(self._window, slack + 1)
                offset = int(torch.randint(limit, (), generator=generator))
            n = (len(self._tokens) - offset) // self._window
            used = self._tokens[offset : offset + n * self._window]
            self._rows = used.reshape(n, self._window)
        self._indices = self._order(len(self._rows), generator).numpy()
        self.epoch, self._batch = epoch, 0

    def _draw(self) -> Batch:
        start = self._batch * self.batch_size
        left = len(self._rows) - start
        if self._spec.once and left <= 0:
            raise StopIteration
        if not self._spec.once and left < self.batch_size:
            self._begin(self.epoch + 1)
            start = 0
        self._batch += 1
        chosen = self._indices[start : start + self.batch_size]
        if self._padded:  # whether there are pads is a matter of the whole batch, on all processes
            rows = to_tensor(self._rows[chosen])
            return Batch.of_rows(rows, self._spec.pad).rows(self._spec.rows)
        rows = to_tensor(self._rows[chosen[self._spec.rows]])
        return Batch(rows if self._bos is None else with_bos(rows, self._bos))

    def _position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self._batch}

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["epoch"])
        self._batch = position["batch"]


def with_bos(rows: Tensor, bos: int) -> Tensor:
    """Rows `[rows, n]` with the BOS token in front, `[rows, n + 1]`."""
    return torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)


def rows_of(source: Any, spec: BatchSpec) -> ArrayBatches:
    """Rows of unequal length, padded on the right: texts, lists of tokens, what a tokenizer gives.

    The latter is a mapping with `input_ids` and perhaps `attention_mask`. Only texts get a BOS.
    """
    if isinstance(source, Mapping):
        ids, masks = source["input_ids"], source.get("attention_mask")
        rows = [token_row(row, "input_ids") for row in ids]
        if masks is not None:
            rows = [row[np.asarray(mask, bool)] for row, mask in zip(rows, masks, strict=True)]
        name = f"{len(rows)} tokenised rows"
    elif isinstance(source[0], str):
        rows, name = TextEncoder.of(spec).rows(source), f"{len(source)} texts"
        spec = replace(spec, prepend_bos=None)
    else:
        rows, name = [token_row(row, "source") for row in source], f"{len(source)} lists of tokens"
    longest = max(map(len, rows))
    length = spec.seq_len or min(longest, spec.n_ctx or longest)
    array = padded_rows(rows, length)
    check_range(np.concatenate(rows), spec.d_vocab, "source")
    return ArrayBatches(array, spec, name, padded=bool((array == PAD).any()))


def is_rows(source: Any) -> bool:
    """Whether `rows_of` reads this."""
    if isinstance(source, Mapping):
        return "input_ids" in source
    if not isinstance(source, Sequence) or isinstance(source, str) or not source:
        return False
    first = source[0]
    return isinstance(first, str) or (
        isinstance(first, list | tuple) and bool(first) and isinstance(first[0], int)
    )


def token_row(example: Any, column: str) -> np.ndarray:
    """One row of tokens, int64 `[pos]`."""
    row = np.asarray(example)
    if row.ndim != 1 or not (np.issubdtype(row.dtype, np.integer) or not row.size):
        raise DataError(
            f"source has in the column {column!r} a value of dtype {row.dtype} and shape "
            f"{list(row.shape)}; expected a list of token numbers per row."
        )
    return row.astype(np.int64)


def to_array(tokens: Tensor, what: str) -> np.ndarray:
    """A tensor of tokens as an array, which shares its memory if it is on the CPU."""
    # Here and not only in `check_all_tokens`, because numpy has no bfloat16.
    if not is_integer(tokens):
        raise DataError(not_integers(what, str(tokens.dtype)))
    return tokens.detach().cpu().numpy()


def load_tokens(path: Path) -> np.ndarray:
    """Open a `.npy` file (memory-mapped), or the one tensor, or `tokens`, of `.safetensors`."""
    if not path.is_file():
        raise DataError(f"source is {path}, but there is no such file.")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else "tokens"
            tokens = file.get_tensor(name) if name in names else None
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as a {path.suffix} file of numbers: {error}. It may be "
            "truncated or damaged; write it again."
        ) from error
    if tokens is None:
        raise DataError(
            f"{path} holds the tensors {names}; expected a single one, or one called 'tokens'."
        )
    return to_array(tokens, str(path))
