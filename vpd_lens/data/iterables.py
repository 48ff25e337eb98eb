"""Batches that the user makes: iterables, iterators and generator functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpd_lens.data import arrays
from vpd_lens.data.batches import Batch, BatchSpec, TokenBatches
from vpd_lens.errors import DataError

_ITERABLE = "an iterable (a list, a DataLoader, an object with __iter__)"


class IteratorBatches(TokenBatches):
    """Batches of an iterable or iterator, checked and passed through.

    An iterable is started again when it ends. It is resumed by its own `load_state_dict`, or else
    by drawing again; a bare iterator is not. A last batch with fewer rows than the others is left
    out, except in a single pass, which takes batches of any size.
    """

    def __init__(self, source: Iterable[Any], spec: BatchSpec) -> None:
        spec.forbid_bos("an iterable of batches")
        self._source: Any = source
        self._kind = type(source).__name__
        self._again = not isinstance(source, Iterator)
        self._has_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        resume = "resumed by drawing again" if self._again else "cannot be resumed"
        if self._has_state:
            self._source_state()  # rather an error now than at the first checkpoint
            resume = "resumed by its own state"
        super().__init__(spec, spec.seq_len, f"batches from a {self._kind}, {resume}")
        self._begin(0)

    def _begin(self, consumed: int) -> None:
        self._batches, self._consumed = self._checked(), consumed
        self._last: Batch | None = None

    def _checked(self) -> Iterator[Batch]:
        """The source's batches, one pass after the other."""
        begun = self._consumed > 0  # by its own state, a source goes on in the middle of a pass
        while True:
            batches = (check_batch(given, self._spec) for given in self._source)
            for batch in batches:
                n = len(batch.tokens)
                if n != self.batch_size and not self._spec.once:
                    if begun and n < self.batch_size and next(batches, None) is None:
                        break
                    raise DataError(
                        f"source gave a batch of {n} rows; expected batch_size={self.batch_size}. "
                        "Only the last batch of a pass may have fewer (it is left out)."
                    )
                begun = True
                yield batch
            if self._spec.once and self._consumed:
                return
            if not self._again:
                raise DataError(
                    f"source, a {self._kind}, ended after {self._consumed} batches and cannot be "
                    f"started again. Pass {_ITERABLE}, or an endless generator."
                )
            if not begun:
                raise DataError("source is an iterable that gives no batches. Is it empty?")
            begun = False
            self.epoch += 1

    def _draw(self) -> Batch:
        self._last = next(self._batches)
        self._consumed += 1
        return self._last

    def _source_state(self) -> Any:
        state = self._source.state_dict()
        try:
            json.dumps(state)
        except TypeError as error:
            raise DataError(
                f"source, a {self._kind}, has a state_dict that JSON cannot hold ({error}). Let it "
                "return numbers, text, lists and dictionaries."
            ) from error
        return state

    def _position(self) -> dict[str, Any]:
        if self._has_state:
            return {"consumed": self._consumed, "source": self._source_state()}
        crc32 = None if self._last is None else arrays.checksum(self._last.tokens)
        return {"consumed": self._consumed, "crc32": crc32}

    def _seek(self, position: dict[str, Any]) -> None:
        consumed = position["consumed"]
        if self._has_state:
            self._source.load_state_dict(position["source"])
            self._begin(consumed)
        elif self._again:
            self._begin(0)
            self.epoch = 0
            with suppress(StopIteration):  # fewer batches than then: noticed below
                for _ in range(consumed):
                    self._draw()
            if self._last is not None and arrays.checksum(self._last.tokens) != position["crc32"]:
                raise DataError(
                    "source gave other batches than before the interruption. Make its order depend "
                    "on a seed (for a DataLoader: generator=), or give it (load_)state_dict."
                )
        elif consumed != self._consumed:
            raise DataError(
                f"source, a {self._kind}, cannot be resumed: it has no state_dict, and {consumed} "
                f"batches are consumed. Pass {_ITERABLE}, or a function f(generator, batch_size)."
            )


class FunctionBatches(TokenBatches):
    """Batches of a function `f(generator, batch_size)`; the position is the generator's state."""

    def __init__(self, function: Callable[[torch.Generator, int], Any], spec: BatchSpec) -> None:
        spec.forbid_bos("a function")
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(spec, spec.seq_len, f"batches generated by {name}")
        self._function = function
        self._state = torch.Generator().manual_seed(spec.seed)

    def _draw(self) -> Batch:
        batch = check_batch(self._function(self._state, self.batch_size), self._spec)
        if len(batch.tokens) != self.batch_size:
            raise DataError(
                f"source gave {len(batch.tokens)} rows when asked for batch_size={self.batch_size}."
            )
        return batch

    def _position(self) -> dict[str, Any]:
        return {"generator": self._state.get_state().numpy().tobytes().hex()}

    def _seek(self, position: dict[str, Any]) -> None:
        state = bytearray.fromhex(position["generator"])
        self._state.set_state(torch.frombuffer(state, dtype=torch.uint8))


def check_batch(given: Any, spec: BatchSpec) -> Batch:
    """Check one batch from a user's iterable or function, apart from its number of rows."""
    mask = None
    if isinstance(given, Batch):
        given, mask = given
    elif isinstance(given, Mapping) and "input_ids" in given:
        given, mask = given["input_ids"], given.get("attention_mask")
    tokens = arrays.to_tensor(given) if isinstance(given, np.ndarray) else given
    if not isinstance(tokens, Tensor):
        raise DataError(
            f"source gave a {type(given).__name__}; expected a token tensor [batch, pos], or a "
            "mapping with input_ids and attention_mask, as in (b['tokens'] for b in loader)."
        )
    tokens, shape = tokens.detach().cpu(), list(tokens.shape)
    if tokens.is_inference():  # made in inference_mode; no backward pass may use it
        tokens = tokens.clone()
    if spec.d_vocab is None and not (arrays.is_integer(tokens) and tokens.ndim == 2):
        if tokens.ndim < 2:
            raise DataError(f"source gave a batch of shape {shape}; expected [batch, features].")
        return Batch(tokens)
    arrays.require_integers(tokens, "a batch of source")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise DataError(f"source gave a batch of shape {shape}; expected tokens [batch, pos].")
    if spec.seq_len is not None and shape[1] != spec.seq_len:
        raise DataError(
            f"source gave rows of {shape[1]} tokens; expected seq_len={spec.seq_len}. Batches are "
            "passed through uncut: change the source, or seq_len."
        )
    if spec.n_ctx is not None and shape[1] > spec.n_ctx:
        raise DataError(
            f"source gave rows of {shape[1]} tokens; model.cfg.n_ctx = {spec.n_ctx}. Cut them."
        )
    arrays.check_range(tokens.numpy(), spec.d_vocab, "a batch of source")
    if mask is None:
        return Batch(tokens.long())
    real = torch.as_tensor(mask).detach().cpu().bool()
    if real.shape != tokens.shape:
        raise DataError(
            f"source gave an attention mask of shape {list(real.shape)} for tokens of {shape}."
        )
    rows = [row[keep].numpy() for row, keep in zip(tokens.long(), real, strict=True)]
    return Batch.of_rows(torch.from_numpy(arrays.padded_rows(rows, shape[1])), spec.pad)
