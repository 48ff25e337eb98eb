"""Tokens that are there already: tensors, arrays, files of them, and rows of unequal length."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpd_lens.data.batches import PAD, Batch, BatchSpec, TokenBatches
from vpd_lens.data.text import FIRST, TextEncoder
from vpd_lens.errors import DataError
from vpd_lens.progress import Progress

CHUNK = 1 << 24  # tokens checked at once: bounds the memory that a memory-mapped file takes


class ArrayBatches(TokenBatches):
    """Rows `[rows, pos]`, or windows of a stream `[n_tokens]`, without replacement per epoch.

    A stream is cut at a new random offset every epoch, so that window borders fall elsewhere. The
    data is checked completely; it may be memory-mapped. If `lowest` is `PAD`, rows may end in it.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tensor,
        spec: BatchSpec,
        name: str,
        bos: int | None = None,
        lowest: int = 0,
    ) -> None:
        require_integers(tokens, "source")  # before numpy, which has no bfloat16
        tokens = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
        crc32 = check_source(tokens, spec.d_vocab, lowest)
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
                f"{spec.batch_size}. Pass more data, or a smaller "
                f"batch_size{' or seq_len' if stream else ''}."
            )
        shape = list(tokens.shape)
        what = f"{name}: {' x '.join(map(str, shape))} tokens, {n_rows} rows of {length}"
        super().__init__(spec, length, what, bos, shape=shape, crc32=crc32)
        self._tokens, self._padded = tokens, lowest == PAD
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        generator, n, tokens = self._generator(epoch), self._window, self._tokens
        if tokens.ndim == 1:
            if self._spec.shuffle:
                slack = len(tokens) - self.batch_size * n
                tokens = tokens[int(torch.randint(min(n, slack + 1), (), generator=generator)) :]
            tokens = tokens[: len(tokens) // n * n].reshape(-1, n)
        self._rows = tokens[:, :n]
        self._indices = self._order(len(self._rows), generator).numpy()
        self.epoch, self._batch = epoch, 0

    def _draw(self) -> Batch:
        left = len(self._rows) - self._batch * self.batch_size
        if left < (1 if self._spec.once else self.batch_size):
            if self._spec.once:
                raise StopIteration
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
    """Rows padded on the right: texts, after BOS; lists of tokens; or what a tokenizer returns."""
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
    return ArrayBatches(array, spec, name, lowest=PAD if (array == PAD).any() else 0)


def is_rows(source: Any) -> bool:
    """Whether `rows_of` reads this."""
    if isinstance(source, Mapping):
        return "input_ids" in source
    row = source[0] if isinstance(source, Sequence) and source else None
    numbers = isinstance(row, list | tuple) and len(row) > 0 and isinstance(row[0], int)
    return isinstance(row, str) or numbers


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


def load_tokens(path: Path) -> np.ndarray | Tensor:
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
        raise DataError(f"{path} holds the tensors {names}; expected one, or one called 'tokens'.")
    return tokens


def check_source(tokens: np.ndarray, d_vocab: int | None, lowest: int = 0) -> int:
    """Check a whole source `[n_tokens]` or `[rows, pos]` in chunks; returns its CRC-32."""
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
    """Check that integers, at least one, are in the vocabulary; they begin at `first` in `what`."""
    if d_vocab is None or (int(tokens.min()) >= lowest and int(tokens.max()) < d_vocab):
        return
    where = np.argwhere((tokens < lowest) | (tokens >= d_vocab))[0]
    value = int(tokens[tuple(where)])
    where[0] += first
    raise DataError(
        f"{what} holds the token {value} at index {where.tolist()}; the model's vocabulary is 0 to "
        f"{d_vocab - 1} (model.cfg.d_vocab = {d_vocab}). Was the data tokenised for another model?"
    )


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
