"""`token_batches`: choose the class that reads a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vpd_lens.errors import DataError
from vpd_lens.training.data.arrays import ArrayBatches, load_tokens, to_array
from vpd_lens.training.data.batches import BatchSpec, ModelLimits, TokenBatches
from vpd_lens.training.data.documents import (
    DocumentBatches,
    is_dataset,
    is_saved_dataset,
    load_hf,
    load_saved,
)
from vpd_lens.training.data.iterators import FunctionBatches, IteratorBatches
from vpd_lens.training.data.text import TextEncoder, find_text_files, tokenize_files


def token_batches(
    source: Any,
    *,
    model: Any,
    batch_size: int,
    seq_len: int | None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    text_column: str = "text",
    shuffle: bool = True,
    rows: slice = slice(None),
) -> TokenBatches:
    """Endless batches of tokens for `model`, resumable to the bit.

    | `source` | what happens |
    |---|---|
    | tensor or numpy array `[rows, pos]` | rows without replacement, reshuffled every epoch |
    | tensor or numpy array `[n_tokens]` | cut into windows; new window borders every epoch |
    | path to `.npy` (memory-mapped) or `.safetensors` | as the array in it |
    | directory, glob or file of text | tokenised up front, packed into one stream |
    | directory written by `save_to_disk`, `datasets.Dataset` | documents in random order |
    | `"hf:NAME"`, `"hf:NAME:split"`, `"hf:DIRECTORY"` | loaded by `datasets`, streamed |
    | `datasets.IterableDataset` | streamed: tokenised and packed on the fly |
    | iterable or iterator of batches `[batch, pos]` | checked and passed through |
    | function `f(generator, batch_size) -> Tensor` | called with a seeded `torch.Generator` |

    Text is tokenised by `model.tokenizer`, each document ends with EOS if the tokenizer has one,
    and rows are cut from the packed stream without padding. Rows that do not fill a last batch of
    an epoch are left out of that epoch. Of rows longer than `seq_len` the first `seq_len` tokens
    are used. Datasets with a column `tokens` or `input_ids` are read as rows, others as text.

    Args:
        source: The data; see the table.
        model: A TransformerLens model, or anything with `cfg` (`d_vocab`, `n_ctx`,
            `default_prepend_bos`) and `tokenizer`; each is needed only if used. Without
            `cfg.d_vocab` (toy models) iterables and functions may give floats `[batch, ...]`.
        batch_size: Rows per batch.
        seq_len: Tokens per row, BOS included. None: the model's context, or the length of the rows
            if they are shorter.
        seed: Seed of every random choice; epoch e uses `seed + e`.
        prepend_bos: Whether every row begins with BOS, followed by `seq_len - 1` tokens of data.
            None: for text, `model.cfg.default_prepend_bos` if the tokenizer has a BOS token; for
            tokens, they are used as they are. Must not be True for data that is cut already.
        text_column: The column of a dataset that holds the text.
        shuffle: False for the data's own order and no random window borders.
        rows: Which rows of every batch to give, for one of several processes. The position
            does not depend on it.

    Returns:
        An endless iterator of int64 tensors `[batch_size, seq_len]` on the CPU, or of the
        `rows` of them.

    Raises:
        InputError: If `batch_size` or `seq_len` is out of range.
        DataError: If the source cannot be read or does not fit the model.
    """
    limits = ModelLimits.of(model)
    spec = BatchSpec(batch_size, seq_len, seed, shuffle, prepend_bos, limits, rows)

    if isinstance(source, str) and source.startswith("hf:"):
        source, name = load_hf(source)
        return DocumentBatches(source, spec, text_column, name)
    if isinstance(source, str | Path):
        return _from_path(Path(source), spec, text_column)
    if isinstance(source, Tensor):
        return ArrayBatches(to_array(source, "source"), spec, "tensor")
    if isinstance(source, np.ndarray):
        return ArrayBatches(source, spec, "array")
    if is_dataset(source):
        return DocumentBatches(source, spec, text_column, "dataset")
    if isinstance(source, Mapping):
        raise DataError(
            f"source is a {type(source).__name__} with the keys {list(source)}; expected one data "
            "set. Pass one of its values, for example source['train']."
        )
    if isinstance(source, Iterable):
        return IteratorBatches(source, spec)
    if isinstance(source, Callable):
        return FunctionBatches(source, spec)
    raise DataError(
        f"source is a {type(source).__name__}, which is no kind of data that token_batches reads. "
        "Pass a token tensor, a path, a Hugging Face dataset, an iterable of batches or a function."
    )


def _from_path(path: Path, spec: BatchSpec, text_column: str) -> TokenBatches:
    if path.suffix in (".npy", ".safetensors"):
        return ArrayBatches(load_tokens(path), spec, str(path))
    if is_saved_dataset(path):
        return DocumentBatches(load_saved(path), spec, text_column, str(path))
    encoder = TextEncoder.of(spec)
    tokens, description = tokenize_files(find_text_files(path), encoder, str(path))
    return ArrayBatches(tokens, spec, description, bos=encoder.bos)
