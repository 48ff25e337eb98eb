"""Batches that the user makes: iterables, iterators and generator functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from vpd_lens.data.batches import Batch, BatchSpec, TokenBatches
from vpd_lens.data.checks import check_batch, checksum
from vpd_lens.errors import DataError


class IteratorBatches(TokenBatches):
    """Batches of an iterable or iterator, checked and passed through.

    An iterable is started again when it ends. On resume its own `load_state_dict` is used if it
    has one; otherwise the batches consumed so far are drawn again. A bare iterator cannot be
    resumed. A last batch with fewer rows than the others is left out, except in a single pass,
    which takes batches of any size.
    """

    def __init__(self, source: Iterable[Any], spec: BatchSpec) -> None:
        spec.forbid_bos("an iterable of batches")
        self._source: Any = source
        self._again = not isinstance(source, Iterator)
        self._has_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        if self._has_state:
            self._source_state()  # rather an error now than at the first checkpoint
            resume = "resumed by its own state"
        else:
            resume = "resumed by drawing again" if self._again else "cannot be resumed"
        name = f"batches from a {type(source).__name__}, {resume}; no BOS added"
        super().__init__(spec, spec.seq_len, name, {})
        self._iterator: Iterator[Any] | None = None
        self._consumed = 0
        self._last: Batch | None = None

    def _draw(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._source)
        batch = self._checked_next()
        if batch is None and self._spec.once and self._consumed:
            raise StopIteration
        if batch is None or (not self._spec.once and self._is_short_last(batch)):
            batch = self._restart()
        self._consumed += 1
        self._last = batch
        return batch.rows(self._spec.rows)

    def _checked_next(self) -> Batch | None:
        assert self._iterator is not None
        for batch in self._iterator:
            return check_batch(batch, self._spec)
        return None

    def _is_short_last(self, batch: Batch) -> bool:
        n = len(batch.tokens)
        if n == self.batch_size:
            return False
        if n < self.batch_size and self._consumed and self._checked_next() is None:
            return True
        raise DataError(
            f"source gave a batch of {n} rows; expected batch_size={self.batch_size}. "
            "Only the last batch of a pass may have fewer (it is left out)."
        )

    def _restart(self) -> Batch:
        if not self._again:
            raise DataError(
                f"source, a {type(self._source).__name__}, ended after {self._consumed} batches "
                "and cannot be started again. Pass an iterable (a list, a DataLoader, an object "
                "with __iter__) or an endless generator."
            )
        self._iterator = iter(self._source)
        batch = self._checked_next()
        self.epoch += bool(self._consumed)
        if batch is None:
            raise DataError("source is an iterable that gives no batches. Is it empty?")
        if len(batch.tokens) != self.batch_size and not self._spec.once:
            raise DataError(
                f"source began a new pass with a batch of {len(batch.tokens)} rows; expected "
                f"batch_size={self.batch_size}."
            )
        return batch

    def _source_state(self) -> Any:
        state = self._source.state_dict()
        try:
            json.dumps(state)
        except TypeError as error:
            raise DataError(
                f"source, a {type(self._source).__name__}, has a state_dict that JSON cannot hold "
                f"({error}). Let it return numbers, text, lists and dictionaries."
            ) from error
        return state

    def _position(self) -> dict[str, Any]:
        position: dict[str, Any] = {"consumed": self._consumed}
        if self._has_state:
            return {**position, "source": self._source_state()}
        return {**position, "crc32": None if self._last is None else checksum(self._last.tokens)}

    def _seek(self, position: dict[str, Any]) -> None:
        consumed = position["consumed"]
        if not (self._has_state or self._again) and consumed != self._consumed:
            raise DataError(
                f"source, a {type(self._source).__name__}, cannot be resumed: it is an iterator "
                f"without state_dict, and {consumed} batches of it are consumed. Pass an iterable "
                "that can be started again (a list, a DataLoader, an object with __iter__), or a "
                "function f(generator, batch_size)."
            )
        if self._has_state:
            self._source.load_state_dict(position["source"])
            self._iterator, self._consumed, self._last = None, consumed, None
        elif self._again:
            self._iterator, self._consumed, self._last, self.epoch = None, 0, None, 0
            with suppress(StopIteration):  # fewer batches than then: noticed below
                for _ in range(consumed):
                    self._draw()
            if self._last is not None and checksum(self._last.tokens) != position["crc32"]:
                raise DataError(
                    "source gave other batches than before the interruption. Make its order "
                    "depend on a seed (for a DataLoader pass generator=), or give it state_dict "
                    "and load_state_dict."
                )


class FunctionBatches(TokenBatches):
    """Batches of a function that takes all its randomness from a generator, mostly toy data."""

    def __init__(self, function: Callable[[torch.Generator, int], Any], spec: BatchSpec) -> None:
        spec.forbid_bos("a function")
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(spec, spec.seq_len, f"batches generated by {name}; no BOS added", {})
        self._function = function
        self._state = torch.Generator().manual_seed(spec.seed)

    def _draw(self) -> Batch:
        batch = check_batch(self._function(self._state, self.batch_size), self._spec)
        if len(batch.tokens) != self.batch_size:
            raise DataError(
                f"source, a function, gave {len(batch.tokens)} rows when asked for "
                f"batch_size={self.batch_size}."
            )
        return batch.rows(self._spec.rows)

    def _position(self) -> dict[str, Any]:
        return {"generator": self._state.get_state().numpy().tobytes().hex()}

    def _seek(self, position: dict[str, Any]) -> None:
        state = bytearray.fromhex(position["generator"])
        self._state.set_state(torch.frombuffer(state, dtype=torch.uint8))
