"""`token_batches` and `one_pass`: choose the class that reads a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vpd_lens.data.arrays import ArrayBatches, is_rows, load_tokens, rows_of
from vpd_lens.data.batches import BatchSpec, TokenBatches
from vpd_lens.data.documents import DocumentBatches, is_dataset, is_saved, load_hf, load_saved
from vpd_lens.data.iterables import FunctionBatches, IteratorBatches
from vpd_lens.data.text import TextEncoder, tokenize_files
from vpd_lens.errors import DataError


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
    """Endless batches of tokens for `model`, on the CPU, resumable to the bit.

    | `source` | what happens |
    |---|---|
    | tensor or numpy array `[rows, pos]` | rows without replacement, reshuffled every epoch |
    | tensor or numpy array `[n_tokens]` | cut into windows; new window borders every epoch |
    | path to `.npy` (memory-mapped) or `.safetensors` | as the array in it |
    | directory, glob or file of text | tokenised up front, packed into one stream |
    | directory written by `save_to_disk`, `datasets.Dataset` | documents in random order |
    | `"hf:NAME"`, `"hf:NAME:split"`, `"hf:DIRECTORY"` | loaded by `datasets`, streamed |
    | `datasets.IterableDataset` | streamed: tokenised and packed on the fly |
    | list of texts or of lists of tokens, what a tokenizer returns | one row each, padded |
    | iterable or iterator of batches `[batch, pos]` | checked and passed through |
    | function `f(generator, batch_size) -> Tensor` | called with a seeded `torch.Generator` |

    Documents are tokenised by `model.tokenizer`, each ends with EOS if the tokenizer has one, and
    rows are cut from the packed stream without padding. A document that mentions `<eos>` gets no
    control token there; for a chat template, pass the tokens of `apply_chat_template`. Datasets
    with a column `tokens` or `input_ids` are read as rows, others as text; of rows longer than
    `seq_len` the first `seq_len` tokens are used. Where there is an `attention_mask`, `real` of the
    batch says what is padding; pads are moved to the right. Rows that do not fill a last batch of
    an epoch are left out of that epoch.

    Args:
        source: The data; see the table.
        model: A TransformerLens model, or anything with `cfg` (`d_vocab`, `n_ctx`,
            `default_prepend_bos`) and `tokenizer`; each is needed only if used. Without
            `cfg.d_vocab` (toy models) iterables and functions may give floats `[batch, ...]`.
        batch_size: Rows per batch.
        seq_len: Tokens per row, BOS included. None: the model's context, or the length of the rows
            if they are shorter.
        seed: Seed of every random choice, together with the number of the epoch.
        prepend_bos: Whether every row begins with BOS, followed by `seq_len - 1` tokens of data.
            None: for text, `model.cfg.default_prepend_bos` if the tokenizer has a BOS token; for
            tokens, False. Must not be True for data that is cut already.
        text_column: The column of a dataset that holds the text.
        shuffle: False for the data's own order and no random window borders.
        rows: Those of every batch that one of several processes wants; the position does not
            depend on it.

    Raises:
        InputError: If `batch_size` or `seq_len` is out of range.
        DataError: If the source cannot be read or does not fit the model.

    Examples:
        >>> import torch
        >>> from vpd_lens.data import token_batches
        >>> batches = token_batches(torch.arange(12), model=None, batch_size=2, seq_len=3)
        >>> next(batches).tokens.shape
        torch.Size([2, 3])
    """
    spec = BatchSpec(model, batch_size, seq_len, seed, shuffle, prepend_bos, rows)
    return _batches(source, spec, text_column)


def one_pass(
    data: Any,
    *,
    model: Any,
    batch_size: int,
    n_batches: int | None = None,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    state: dict[str, Any] | None = None,
) -> TokenBatches:
    """The data once, in its own order: every row at most once, the short last batch included.

    `data`, `model`, `seq_len`, `prepend_bos` and the errors are those of `token_batches`; what is
    returned ends. Iterables keep their own `batch_size`. After `n_batches` the pass stops; a
    function, which has no end of its own, is called with `seed`. `state`, from `state_dict`, goes
    on after the batches that an earlier pass has given.

    Examples:
        >>> import torch
        >>> from vpd_lens.data import one_pass
        >>> [len(b.tokens) for b in one_pass(torch.ones(5, 3).long(), model=None, batch_size=2)]
        [2, 2, 1]
    """
    arguments = (model, batch_size, seq_len, seed, False, prepend_bos)
    batches = _batches(data, BatchSpec(*arguments, once=True, n_batches=n_batches), "text")
    if state is not None:
        batches.load_state_dict(state)
    return batches


def _batches(source: Any, spec: BatchSpec, text_column: str) -> TokenBatches:
    if isinstance(source, str) and source.startswith("hf:"):
        return DocumentBatches(load_hf(source), spec, text_column, source)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix in (".npy", ".safetensors"):
            return ArrayBatches(load_tokens(path), spec, str(path))
        if is_saved(path):
            return DocumentBatches(load_saved(path), spec, text_column, str(path))
        encoder = TextEncoder(spec)
        tokens, description = tokenize_files(path, encoder)
        return ArrayBatches(tokens, spec, description, encoder.bos)
    if isinstance(source, Tensor | np.ndarray):
        return ArrayBatches(source, spec, "tensor" if isinstance(source, Tensor) else "array")
    if is_dataset(source):
        return DocumentBatches(source, spec, text_column, "dataset")
    if is_rows(source):
        return rows_of(source, spec)
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
