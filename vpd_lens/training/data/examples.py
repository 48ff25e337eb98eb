"""The examples of a Hugging Face dataset in a definite order, from any position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

from vpd_lens.errors import DataError
from vpd_lens.training.data.batches import BatchSpec


class Examples(Protocol):
    """One column of a dataset, epoch after epoch."""

    def seek(self, epoch: int, position: Any) -> None:
        """Go to a position in an epoch; None is its beginning."""

    def read(self, n: int) -> list[Any]:
        """Up to `n` more examples; none at the end of the epoch."""
        ...

    def position(self) -> Any:
        """What `seek` needs to read on from here, JSON-serialisable."""


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what goes wrong in reading a dataset into a `DataError`.

    Args:
        where: Where in the dataset, for the message.

    Raises:
        DataError: If a file is missing, truncated or damaged, or the network fails.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"source, a Hugging Face dataset, cannot be read {where}: {error}. Are all its files "
            "complete, and is the network up?"
        ) from error


class MappedExamples:
    """A `datasets.Dataset`: random access, so every epoch is a new permutation."""

    def __init__(self, dataset: Any, column: str, spec: BatchSpec) -> None:
        self._dataset = dataset.with_format(None).select_columns([column])
        self._column, self._spec = column, spec

    def seek(self, epoch: int, position: int | None) -> None:
        """See `Examples`."""
        self._order = self._spec.order(len(self._dataset), self._spec.generator(epoch)).tolist()
        self._next = position or 0

    def read(self, n: int) -> list[Any]:
        """See `Examples`."""
        indices = self._order[self._next : self._next + n]
        self._next += len(indices)
        with readable(f"at the examples {indices[:3]}..."):
            return list(self._dataset[indices][self._column]) if indices else []

    def position(self) -> int:
        """See `Examples`."""
        return self._next


class StreamedExamples:
    """A `datasets.IterableDataset`, in its own order.

    Its own position is exact unless it was shuffled: a shuffle buffer is not part of it. Then the
    position is a count, and resuming draws that many examples again.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column
        self._has_position = hasattr(dataset, "state_dict") and not _is_shuffled(
            getattr(dataset, "_ex_iterable", None)
        )

    def seek(self, epoch: int, position: dict[str, Any] | None) -> None:
        """See `Examples`."""
        position = position or {"count": 0, "dataset": None}
        # A new object each time: a loaded position would be where every later epoch begins.
        self._current = self._dataset.with_format(None)
        self._current.set_epoch(epoch)
        skip = position["count"]
        if position["dataset"] is not None:
            self._current.load_state_dict(position["dataset"])
            skip = 0
        self._iterator: Iterator[dict[str, Any]] = islice(iter(self._current), skip, None)
        self._start, self._n_read = position, 0

    def read(self, n: int) -> list[Any]:
        """See `Examples`."""
        with readable(f"after {self._start['count'] + self._n_read} examples"):
            examples = [example[self._column] for example in islice(self._iterator, n)]
        self._n_read += len(examples)
        return examples

    def position(self) -> dict[str, Any]:
        """See `Examples`."""
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
