"""Hugging Face datasets: documents drawn, tokenised and packed while training goes on.

Rows are made in blocks. A block is read until it has enough rows, then shuffled as a whole; what
is left of the last document (less than a row) is carried over to the next. The position is where
the block began, what was carried into it, and how many of its rows are gone: resuming rereads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpd_lens.data.arrays import check_range, checksum, padded_rows, token_rows
from vpd_lens.data.batches import Batch, BatchSpec, TokenBatches
from vpd_lens.data.text import TextEncoder
from vpd_lens.errors import DataError

READ = 256  # examples read and tokenised at once
BLOCK_ROWS = 1024  # rows that are shuffled together, at least


class DocumentBatches(TokenBatches):
    """Batches from one split of a `datasets.Dataset` or `IterableDataset`."""

    def __init__(self, dataset: Any, spec: BatchSpec, text_column: str, name: str) -> None:
        with _reading("at its beginning"):
            first = next(iter(dataset.with_format(None)), None)
        if first is None:
            raise DataError(f"source ({name}) is empty: it has no examples.")
        column = next((c for c in ("tokens", "input_ids", text_column) if c in first), None)
        if column is None:
            raise DataError(
                f"source ({name}) has the columns {list(first)}; expected 'tokens', 'input_ids' or "
                f"text in {text_column!r}. Name the column of text with text_column=."
            )
        self._column, self._mask, bos = column, None, None
        self._encoder: TextEncoder | None = None
        if column == text_column and isinstance(first[column], str | None):
            self._encoder = TextEncoder(spec)
            bos = self._encoder.bos
            length = spec.length(bos=bos)
            what = f"text (column {column!r}), {self._encoder.eos_policy}"
        else:
            spec.forbid_bos(f"tokenised already (column {column!r})")
            (row,) = token_rows([first[column]], column)
            what = f"tokens (column {column!r})"
            if "attention_mask" in first:
                self._mask = "attention_mask"
                what += ", without those that attention_mask leaves out"
            length = spec.length(None if self._mask and spec.seq_len else len(row))
        # With the data's own order, a block need not be larger than a batch.
        self._block_rows = BLOCK_ROWS if spec.shuffle else spec.batch_size
        count = len(dataset) if hasattr(dataset, "__len__") else None
        what = f"{'streamed' if count is None else count} documents of {what}, rows of {length}"
        identity = {"documents": count, "column": column, "block_rows": self._block_rows}
        super().__init__(spec, length, f"{name}: {what}", bos, **identity)
        if count is not None:  # streams go on with all columns, as their positions were saved
            dataset = dataset.select_columns([column, self._mask] if self._mask else [column])
        order = None if count is None else lambda epoch: self._order(count, self._generator(epoch))
        self._examples = _Examples(dataset, order)
        self._begin({"epoch": 0, "examples": None, "carry": [], "block": 0, "rows": 0})

    def _begin(self, start: dict[str, Any]) -> None:
        """Go to the beginning of a block; it is read when the first row of it is wanted."""
        self._examples.seek(start["epoch"], start["examples"])
        self.epoch, self._n_block, self._n_rows = start["epoch"], start["block"], start["rows"]
        self._carry = np.array(start["carry"], np.int64)
        self._start, self._row, self._ended = start, 0, False
        self._block = torch.empty(0, self._window, dtype=torch.long)

    def _read_block(self) -> None:
        self._start = {"epoch": self.epoch, "block": self._n_block, "rows": self._n_rows}
        self._start |= {"examples": self._examples.position(), "carry": self._carry.tolist()}
        pieces = [np.empty((0, self._window), np.int64)]
        n_rows = 0
        while n_rows < self._block_rows:
            if examples := self._examples.read(READ):
                pieces.append(self._pack(examples) if self._encoder else self._cut(examples))
                n_rows += len(pieces[-1])
                self._n_rows += len(pieces[-1])
                continue
            self._end_epoch()
            if n_rows or self._ended:  # no row twice in a block
                break
        order = self._order(n_rows, self._generator(self._n_block))
        self._block, self._row = torch.from_numpy(np.concatenate(pieces))[order], 0
        self._n_block += 1

    def _end_epoch(self) -> None:
        self._ended = self._spec.once
        if self._n_rows < (self.batch_size if self.epoch == 0 and not self._ended else 1):
            raise DataError(
                f"source gave {self._n_rows} rows of {self.seq_len} tokens in a whole pass, "
                f"fewer than batch_size={self.batch_size}. Pass a smaller batch_size or seq_len, "
                "or more data; check that the documents are not empty."
            )
        if not self._ended:
            self.epoch, self._n_rows = self.epoch + 1, 0
            self._examples.seek(self.epoch)

    def _pack(self, examples: list[dict[str, Any]]) -> np.ndarray:
        """Rows from what was carried over and these texts; the rest is carried over."""
        assert self._encoder is not None
        texts = [example[self._column] for example in examples]
        if strange := [text for text in texts if not isinstance(text, str | None)]:
            kind = type(strange[0]).__name__
            raise DataError(f"source has a {kind} in the column {self._column!r}; expected text.")
        stream = np.concatenate([self._carry, self._encoder.encode(texts)])
        if len(stream):
            check_range(stream, self._spec.d_vocab, "a document of source")
        used = len(stream) // self._window * self._window
        self._carry = stream[used:]
        return stream[:used].reshape(-1, self._window)

    def _cut(self, examples: list[dict[str, Any]]) -> np.ndarray:
        """One row from each of these; short ones are padded if a mask says what is padding."""
        masks = [example[self._mask] for example in examples] if self._mask else None
        rows = token_rows([example[self._column] for example in examples], self._column, masks)
        if masks is None and (shortest := min(map(len, rows))) < self._window:
            raise DataError(
                f"source has a row of {shortest} tokens in the column {self._column!r}, shorter "
                f"than seq_len={self._window}. Pass seq_len={shortest} or less, add a column "
                "attention_mask (then short rows are padded), or give the text, which is packed."
            )
        check_range(np.concatenate(rows), self._spec.d_vocab, "a document of source")
        return padded_rows(rows, self._window)

    def _draw(self) -> Batch:
        pieces: list[Tensor] = []
        missing = self.batch_size
        while missing and not (self._ended and self._row == len(self._block)):
            if self._row == len(self._block):
                self._read_block()
            pieces.append(self._block[self._row : self._row + missing])
            self._row += len(pieces[-1])
            missing -= len(pieces[-1])
        if missing == self.batch_size:
            raise StopIteration
        return Batch.of_rows(self._with_bos(torch.cat(pieces)), self._spec.pad)

    def _position(self) -> dict[str, Any]:
        return {"start": self._start, "row": self._row, "crc32": checksum(self._block)}

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["start"])
        if position["row"]:
            self._read_block()
            if checksum(self._block) != position["crc32"]:
                raise DataError(
                    "source gave other documents than before the interruption. Has the data "
                    "changed, or was the dataset shuffled without a seed?"
                )
            self._row = position["row"]


class _Examples:
    """The examples of a dataset, epoch after epoch, from any position.

    A `Dataset` is permuted by `order(epoch)`, a stream keeps its own order. The position is that of
    the `datasets` library, which is exact unless the stream was shuffled: a shuffle buffer is not
    part of it. Then it is a count, and resuming draws that many examples again.
    """

    def __init__(self, dataset: Any, order: Callable[[int], Tensor] | None) -> None:
        self._dataset, self._order = dataset.with_format(None), order
        self._has_position = not _is_shuffled(getattr(dataset, "_ex_iterable", None))

    def seek(self, epoch: int, position: dict[str, Any] | int | None = None) -> None:
        """Go to a position in an epoch; None is its beginning, a number a count of examples."""
        whole = isinstance(position, dict)
        self._start = position if whole else {"count": position or 0, "dataset": None}
        self._n_read, skip, state = 0, self._start["count"], self._start["dataset"]
        # A new object each time: a loaded position would be where every later epoch begins.
        self._current = self._dataset.with_format(None)
        if self._order is not None:
            self._current = self._current.select(self._order(epoch)).to_iterable_dataset()
        self._current.set_epoch(epoch)
        if state is not None:
            self._current.load_state_dict(state)
            skip = 0
        self._iterator: Iterator[dict[str, Any]] = islice(iter(self._current), skip, None)

    def read(self, n: int) -> list[dict[str, Any]]:
        """Up to `n` more examples; none at the end of the epoch."""
        with _reading(f"after {self._start['count'] + self._n_read} examples"):
            examples = list(islice(self._iterator, n))
        self._n_read += len(examples)
        return examples

    def position(self) -> dict[str, Any]:
        """What `seek` needs to read on from here, JSON-serialisable."""
        if not self._n_read:  # the library takes over a loaded position at the first example only
            return self._start
        state = self._current.state_dict() if self._has_position else None
        return {"count": self._start["count"] + self._n_read, "dataset": state}


def _is_shuffled(iterable: Any) -> bool:
    """Whether a shuffle buffer is anywhere in the chain that makes up an IterableDataset."""
    if iterable is None:
        return False
    inner = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", [])]
    return "Shuffled" in type(iterable).__name__ or any(map(_is_shuffled, inner))


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Turn what goes wrong in the `datasets` library into a `DataError`."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise DataError(f"{what}: {error}. {advice}") from error


def _reading(where: str) -> Any:
    advice = "Are all its files complete, and is the network up?"
    return _explained(f"source, a Hugging Face dataset, cannot be read {where}", advice)


def is_dataset(source: Any) -> bool:
    """Whether this is one split of a Hugging Face dataset, without importing the library."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    one_split = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one_split or (path / "dataset_dict.json").is_file()


def load_saved(path: Path, split: str | None = None) -> Any:
    """A dataset written by `save_to_disk`, memory-mapped."""
    import datasets

    with _explained(f"The saved dataset {path} cannot be read", "Is it complete?"):
        dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(
            f"The saved dataset {path} has the splits {list(dataset)}. Choose 'hf:{path}:SPLIT'."
        )
    return dataset[split]


def load_hf(source: str) -> Any:
    """Load `"hf:NAME"` or `"hf:NAME:split"`, streaming; NAME may be a local directory."""
    import datasets

    name, split = source.removeprefix("hf:"), "train"
    if ":" in name and not Path(name).exists():
        name, split = name.rsplit(":", 1)
    if is_saved(Path(name)):
        return load_saved(Path(name), split)
    what = f"source is {source!r}, but datasets.load_dataset({name!r}, split={split!r}) failed"
    advice = "Check name, split ('hf:NAME:SPLIT') and network, or load it yourself and pass it."
    with _explained(what, advice):
        return datasets.load_dataset(name, split=split, streaming=True)
