"""Hugging Face datasets: documents drawn, tokenised and packed while training goes on.

Rows are made in blocks. A block is read until it has enough rows, then shuffled as a whole; what
is left of the last document (less than a row) is carried over to the next block. So the position
is small and exact: where the block began, what was carried into it, and how many of its rows are
gone. Resuming reads that one block again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vpd_lens.errors import DataError
from vpd_lens.training.data.arrays import with_bos
from vpd_lens.training.data.batches import BatchSpec, TokenBatches
from vpd_lens.training.data.checks import check_range, checksum
from vpd_lens.training.data.examples import Examples, MappedExamples, StreamedExamples, readable
from vpd_lens.training.data.text import TextEncoder

READ = 256
"""Examples read and tokenised at once."""

BLOCK_ROWS = 1024
"""Rows that are shuffled together, at least."""

RowMaker = Callable[[list[Any], np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(examples, tokens carried over) -> (rows `[n, seq_len]`, tokens left over)."""


class DocumentBatches(TokenBatches):
    """Batches from a `datasets.Dataset` or `IterableDataset`.

    Args:
        dataset: One split.
        spec: What was asked for.
        text_column: The column of text, if there are no tokens.
        name: What to call the data.

    Raises:
        DataError: If columns, tokenizer or lengths do not fit.
    """

    def __init__(self, dataset: Any, spec: BatchSpec, text_column: str, name: str) -> None:
        self._examples: Examples
        with readable("at its beginning"):
            first = next(iter(dataset.with_format(None)), None)
        if first is None:
            raise DataError(f"source ({name}) is empty: it has no examples.")
        column = _column(list(first), text_column, name)
        count: int | None = None
        if hasattr(dataset, "__len__"):
            self._examples = MappedExamples(dataset, column, spec)
            count = len(dataset)
            size = f"{count} documents"
        else:
            self._examples = StreamedExamples(dataset, column)
            size = "streamed documents"
        if column == text_column and isinstance(first[column], str | None):
            encoder = TextEncoder.of(spec)
            bos = encoder.bos
            length = spec.length(bos=bos is not None)
            self._make_rows = _packer(encoder, length - (bos is not None), column)
            what = f"{size} of text (column {column!r}), {encoder.eos_policy}"
        else:
            spec.forbid_bos(f"tokenised already (column {column!r})")
            bos = None
            length = spec.length(len(_token_row(first[column], column)))
            self._make_rows = _cutter(length, column)
            what = f"{size} of tokens (column {column!r})"
        # With the data's own order, a block need not be larger than a batch.
        self._block_rows = BLOCK_ROWS if spec.shuffle else spec.batch_size
        policy = "no BOS added" if bos is None else f"BOS ({bos}) before every row"
        super().__init__(
            spec,
            length,
            f"{name}: {what}, rows of {length}; {policy}",
            {"documents": count, "column": column, "bos": bos, "block_rows": self._block_rows},
        )
        self._bos = bos
        self._begin({"epoch": 0, "examples": None, "carry": [], "block": 0, "rows": 0})

    def _begin(self, start: dict[str, Any]) -> None:
        """Go to the beginning of a block; it is read when the first row of it is wanted."""
        self._examples.seek(start["epoch"], start["examples"])
        self._epoch, self._n_block = start["epoch"], start["block"]
        self._carry = np.array(start["carry"], np.int64)
        self._rows_in_epoch = start["rows"]
        self._start, self._row = start, 0
        self._block: Tensor = torch.empty(0, self.seq_len or 0, dtype=torch.long)

    def _read_block(self) -> None:
        self._start = {
            "epoch": self._epoch,
            "examples": self._examples.position(),
            "carry": self._carry.tolist(),
            "block": self._n_block,
            "rows": self._rows_in_epoch,
        }
        pieces: list[np.ndarray] = []
        n_rows = 0
        while n_rows < self._block_rows:
            examples = self._examples.read(READ)
            if examples:
                rows, self._carry = self._make_rows(examples, self._carry)
                pieces.append(rows)
                n_rows += len(rows)
                self._rows_in_epoch += len(rows)
                continue
            self._end_epoch()
            if n_rows:  # no row twice in a block
                break
        block = torch.from_numpy(np.concatenate(pieces))
        check_range(block, self._spec.limits.d_vocab, "a document of source")
        order = self._spec.order(n_rows, self._spec.generator(self._n_block))
        self._block, self._row = block[order], 0
        self._n_block += 1

    def _end_epoch(self) -> None:
        if self._rows_in_epoch < (self.batch_size if self._epoch == 0 else 1):
            raise DataError(
                f"source gave {self._rows_in_epoch} rows of {self.seq_len} tokens in a whole pass, "
                f"fewer than batch_size={self.batch_size}. Pass a smaller batch_size or seq_len, "
                "or more data; check that the documents are not empty."
            )
        self._epoch += 1
        self._rows_in_epoch = 0
        self._examples.seek(self._epoch, None)

    def __next__(self) -> Int64[Tensor, "batch seq_len"]:
        """The next batch `[batch_size, seq_len]`."""
        pieces: list[Tensor] = []
        missing = self.batch_size
        while missing:
            if self._row == len(self._block):
                self._read_block()
            rows = self._block[self._row : self._row + missing]
            pieces.append(rows)
            self._row += len(rows)
            missing -= len(rows)
        batch = torch.cat(pieces)[self._spec.rows]
        return batch if self._bos is None else with_bos(batch, self._bos)

    def _position(self) -> dict[str, Any]:
        return {"start": self._start, "row": self._row, "crc32": checksum(self._block)}

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["start"])
        if position["row"]:
            self._read_block()
            if checksum(self._block) != position["crc32"]:
                raise DataError(
                    "source gave other documents than before the interruption, so the run cannot "
                    "go on with the same batches. Has the data changed, or was the dataset "
                    "shuffled without a seed?"
                )
            self._row = position["row"]


def _column(columns: list[str], text_column: str, name: str) -> str:
    for column in ("tokens", "input_ids", text_column):
        if column in columns:
            return column
    raise DataError(
        f"source ({name}) has the columns {columns}; expected 'tokens' or 'input_ids', or the text "
        f"column {text_column!r}. Name the column of text with text_column=."
    )


def _packer(encoder: TextEncoder, window: int, column: str) -> RowMaker:
    def pack(texts: list[Any], carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"source has a {type(text).__name__} in the column {column!r}; expected text."
                )
        stream = np.concatenate([carry, encoder.encode(texts)])
        used = len(stream) // window * window
        return stream[:used].reshape(-1, window), stream[used:]

    return pack


def _cutter(length: int, column: str) -> RowMaker:
    def cut(examples: list[Any], carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [_token_row(example, column) for example in examples]
        shortest = min(map(len, rows))
        if shortest < length:
            raise DataError(
                f"source has a row of {shortest} tokens in the column {column!r}, shorter than "
                f"seq_len={length}. Pass seq_len={shortest} or less, or give the text instead, "
                "which is packed into full rows."
            )
        return np.stack([row[:length] for row in rows]), carry

    return cut


def _token_row(example: Any, column: str) -> np.ndarray:
    row = np.asarray(example)
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise DataError(
            f"source has in the column {column!r} a value of dtype {row.dtype} and shape "
            f"{list(row.shape)}; expected a list of token numbers per row."
        )
    return row.astype(np.int64)


def is_dataset(source: Any) -> bool:
    """Whether this is one split of a Hugging Face dataset, without importing the library."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset)


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    one_split = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one_split or (path / "dataset_dict.json").is_file()


def load_saved(path: Path, split: str | None = None) -> Any:
    """A dataset written by `save_to_disk`, memory-mapped.

    Raises:
        DataError: If it cannot be read, or has splits and none of them is chosen.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"The saved dataset {path} cannot be read: {error}") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(
            f"The saved dataset {path} has the splits {list(dataset)}; expected one data set. "
            f"Choose one with 'hf:{path}:SPLIT'."
        )
    return dataset[split]


def load_hf(source: str) -> tuple[Any, str]:
    """Load `"hf:NAME"` or `"hf:NAME:split"`, streaming; NAME may be a local directory.

    Returns:
        The dataset and its name.

    Raises:
        DataError: If there is no such dataset or split.
    """
    import datasets

    name, split = source.removeprefix("hf:"), "train"
    if ":" in name and not Path(name).exists():
        name, split = name.rsplit(":", 1)
    if is_saved_dataset(Path(name)):
        return load_saved(Path(name), split), source
    try:
        return datasets.load_dataset(name, split=split, streaming=True), source
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"source is {source!r}, but datasets.load_dataset({name!r}, split={split!r}) failed: "
            f"{error}. Check name, split ('hf:NAME:SPLIT') and network; for other options load it "
            "yourself and pass the dataset."
        ) from error
