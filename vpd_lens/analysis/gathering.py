"""Sums over one pass of data, stored now and then so that an interruption loses little."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel

from vpd_lens import storage
from vpd_lens.data import Batch, TokenBatches
from vpd_lens.errors import ArtefactError, ConfigError, InputError


@runtime_checkable
class Gathered(Protocol):
    """Sums over the batches so far, which know where in the data to go on."""

    n_batches: int
    data_state: dict[str, Any] | None

    def save(self, path: str | Path) -> Path:
        """Write them to a directory."""
        ...


def gather(
    result: Gathered,
    batches: TokenBatches,
    n_batches: int,
    add: Callable[[Batch], None],
    output: str | Path | None,
    save_every: float,
) -> None:
    """Add batches to a result until there are `n_batches` of them or the data ends.

    Args:
        result: The sums; `result.n_batches` batches are in them.
        batches: One pass over the data, from where it is to go on.
        n_batches: Batches in all.
        add: Adds one batch to the result.
        output: Where the result is stored at the end and every `save_every` seconds; `None`:
            nowhere.
        save_every: Seconds.
    """
    last = time.monotonic()
    while result.n_batches < n_batches and (batch := next(batches, None)) is not None:
        add(batch)
        result.data_state = batches.state_dict()
        if output is not None and time.monotonic() - last >= save_every:
            result.save(output)
            # Measured from the end, so that slow writing never takes most of the time.
            last = time.monotonic()
    if output is not None:
        result.save(output)


def check_output(n_batches: int, output: str | Path | None, resume: bool) -> None:
    """Refuse to go on from nothing, and to write over what is stored in `output`.

    Raises:
        InputError: If `n_batches` is below 1, or `resume` without `output`.
        ConfigError: If something is stored there and `resume` is False.
    """
    if n_batches < 1:
        raise InputError(f"n_batches is {n_batches}; expected at least 1.")
    if resume and output is None:
        raise InputError("resume=True needs output=..., the directory to go on from.")
    there = None if output is None or resume else storage.kind_of(Path(output))
    if there is not None:
        raise ConfigError(
            f"output={str(output)!r} already holds a {there}. Pass resume=True to continue it, or "
            "another directory."
        )


def check_same(
    output: str | Path, then: BaseModel, now: BaseModel, others: Sequence[str] = ()
) -> None:
    """Refuse to go on with other arguments than a result was started with.

    Raises:
        ArtefactError: If the settings differ, or `others` names further differences.
    """
    before, after = then.model_dump(), now.model_dump()
    different = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in after.items()
        if before[name] != value
    ]
    if different := [*different, *others]:
        raise ArtefactError(
            f"{output}: this was started with other arguments: {'; '.join(different)}. Resume with "
            "the same ones, or choose a new output directory."
        )
