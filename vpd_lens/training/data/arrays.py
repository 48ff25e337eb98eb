"""Tokens that are there already: tensors, arrays, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpd_lens.errors import DataError
from vpd_lens.training.data.batches import BatchSpec, TokenBatches
from vpd_lens.training.data.checks import check_all_tokens, is_integer, not_integers, to_tensor
from vpd_lens.training.data.text import bos_of


class ArrayBatches(TokenBatches):
    """Rows `[rows, pos]`, or windows of a stream `[n_tokens]`, without replacement per epoch.

    A stream is cut at a new random offset every epoch, so that window borders fall elsewhere.

    Args:
        tokens: The data, checked completely here; may be memory-mapped.
        spec: What was asked for.
        name: What to call the data.
        bos: The BOS token in front of every window; by default as `spec.prepend_bos` says.

    Raises:
        DataError: If the data does not fit `spec`.
    """

    def __init__(
        self, tokens: np.ndarray, spec: BatchSpec, name: str, bos: int | None = None
    ) -> None:
        checksum = check_all_tokens(tokens, spec.limits.d_vocab, "source")
        stream = tokens.ndim == 1
        if stream and bos is None and spec.prepend_bos:
            bos = bos_of(spec.limits)
        if not stream:
            spec.forbid_bos("a 2-D array")
        length = spec.length(None if stream else tokens.shape[1], bos is not None)
        self._window = length - (bos is not None)
        n_rows = len(tokens) // self._window if stream else len(tokens)
        if n_rows < spec.batch_size:
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
        self._tokens, self._bos = tokens, bos
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        generator = self._spec.generator(epoch)
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
        self._order = self._spec.order(len(self._rows), generator).numpy()
        self._epoch, self._batch = epoch, 0

    def __next__(self) -> Int64[Tensor, "batch seq_len"]:
        """The next batch `[batch_size, seq_len]`."""
        start = self._batch * self.batch_size
        if start + self.batch_size > len(self._rows):
            self._begin(self._epoch + 1)
            start = 0
        self._batch += 1
        chosen = self._order[start : start + self.batch_size][self._spec.rows]
        rows = to_tensor(self._rows[chosen])
        return rows if self._bos is None else with_bos(rows, self._bos)

    def _position(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["epoch"])
        self._batch = position["batch"]


def with_bos(rows: Int64[Tensor, "rows n"], bos: int) -> Int64[Tensor, "rows n_plus_1"]:
    """Rows with the BOS token in front."""
    return torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)


def to_array(tokens: Tensor, what: str) -> np.ndarray:
    """A tensor of tokens as an array, which shares its memory if it is on the CPU.

    Raises:
        DataError: If it does not hold integers.
    """
    # Here and not only in `check_all_tokens`, because numpy has no bfloat16.
    if not is_integer(tokens):
        raise DataError(not_integers(what, str(tokens.dtype)))
    return tokens.detach().cpu().numpy()


def load_tokens(path: Path) -> np.ndarray:
    """Open a `.npy` (memory-mapped) or `.safetensors` file of tokens.

    Args:
        path: The file. A `.safetensors` file has one tensor, or one called `tokens`.

    Returns:
        The array in it.

    Raises:
        DataError: If the file is missing, truncated, damaged, or holds something else.
    """
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
