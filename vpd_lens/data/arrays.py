"""Tokens that are there already: tensors, arrays, files of them, and rows of unequal length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpd_lens.data.batches import PAD, Batch, BatchSpec, TokenBatches
from vpd_lens.data.checks import check_range, check_source, padded_rows, require_integers, to_tensor
from vpd_lens.data.text import TextEncoder
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
        crc32 = check_source(tokens, spec.d_vocab, PAD if padded else 0)
        stream = tokens.ndim == 1
        if not stream:
            spec.forbid_bos("a 2-D array")
        elif bos is None and spec.prepend_bos:
            bos = spec.bos
        length = spec.length(None if stream else tokens.shape[1], bos)
        window = length - (bos is not None)
        n_rows = len(tokens) // window if stream else len(tokens)
        if n_rows < (1 if spec.once else spec.batch_size):
            raise DataError(
                f"source has {n_rows} rows of {window} tokens, fewer than batch_size="
                f"{spec.batch_size}. Pass a smaller batch_size{' or seq_len,' if stream else ','} "
                "or more data."
            )
        shape = list(tokens.shape)
        what = f"{name}: {' x '.join(map(str, shape))} tokens, {n_rows} rows of {length}"
        super().__init__(spec, length, what, bos, shape=shape, crc32=crc32)
        self._tokens, self._padded = tokens, padded
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        generator, n = self._generator(epoch), self._window
        if self._tokens.ndim == 2:
            self._rows = self._tokens[:, :n]
        else:
            slack = len(self._tokens) - self.batch_size * n
            offset = 0
            if self._spec.shuffle:
                offset = int(torch.randint(min(n, slack + 1), (), generator=generator))
            n_rows = (len(self._tokens) - offset) // n
            self._rows = self._tokens[offset : offset + n_rows * n].reshape(n_rows, n)
        self._indices = self._order(len(self._rows), generator).numpy()
        self.epoch, self._batch = epoch, 0

    def _draw(self) -> Batch:
        left = len(self._rows) - self._batch * self.batch_size
        if self._spec.once and left <= 0:
            raise StopIteration
        if not self._spec.once and left < self.batch_size:
            self._begin(self.epoch + 1)
        start = self._batch * self.batch_size
        self._batch += 1
        rows = to_tensor(self._rows[self._indices[start : start + self.batch_size]])
        return Batch.of_rows(rows, self._spec.pad) if self._padded else Batch(self._with_bos(rows))

    def _position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self._batch}

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["epoch"])
        self._batch = position["batch"]


def rows_of(source: Any, spec: BatchSpec) -> ArrayBatches:
    """Rows of unequal length, padded on the right: texts, lists of tokens, what a tokenizer gives.

    The latter is a mapping with `input_ids` and perhaps `attention_mask`. Only texts get a BOS.
    """
    if isinstance(source, Mapping):
        rows = token_rows(source["input_ids"], "input_ids", source.get("attention_mask"))
        name = f"{len(rows)} tokenised rows"
    elif isinstance(source[0], str):
        rows, name = TextEncoder(spec).rows(source), f"{len(source)} texts"
        spec = replace(spec, prepend_bos=None)
    else:
        rows, name = token_rows(source, "source"), f"{len(source)} lists of tokens"
    longest = max(map(len, rows))
    array = padded_rows(rows, spec.seq_len or min(longest, spec.n_ctx or longest))
    check_range(np.concatenate(rows), spec.d_vocab, "source")
    return ArrayBatches(array, spec, name, padded=bool((array == PAD).any()))


def is_rows(source: Any) -> bool:
    """Whether `rows_of` reads this."""
    if isinstance(source, Mapping):
        return "input_ids" in source
    some = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
    row = source[0] if some else None
    return isinstance(row, str) or (
        isinstance(row, list | tuple) and bool(row) and isinstance(row[0], int)
    )


def token_rows(
    examples: Iterable[Any], column: str, masks: Iterable[Any] | None = None
) -> list[np.ndarray]:
    """Rows of tokens, int64 `[pos]` each, without those that a mask leaves out."""
    rows = list(map(np.asarray, examples))
    for row in rows:
        if row.ndim != 1 or not (np.issubdtype(row.dtype, np.integer) or not row.size):
            raise DataError(
                f"source has in the column {column!r} a value of dtype {row.dtype} and shape "
                f"{list(row.shape)}; expected a list of token numbers per row."
            )
    if masks is not None:
        rows = [row[np.asarray(mask, bool)] for row, mask in zip(rows, masks, strict=True)]
    return [row.astype(np.int64) for row in rows]


def to_array(tokens: Tensor, what: str) -> np.ndarray:
    """A tensor of tokens as an array, which shares its memory if it is on the CPU."""
    require_integers(tokens, what)  # before `check_source`, because numpy has no bfloat16
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
