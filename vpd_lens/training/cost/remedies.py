"""The smallest changes that make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vpd_lens.training.cost.memory import memory
from vpd_lens.training.cost.workload import Workload

_FEWEST_SUBCOMPONENTS = 64


@dataclass(frozen=True)
class Remedy:
    """Settings that make a run fit.

    Attributes:
        changes: Values by dotted path in a `VPDConfig`.
        memory: Bytes on one rank with them.
    """

    changes: dict[str, Any]
    memory: float

    def __str__(self) -> str:
        settings = " ".join(f"{path}={value}" for path, value in self.changes.items())
        return f"{settings} ({self.memory / 1e9:.1f} GB)"


def remedies(work: Workload, limit: float) -> list[Remedy]:
    """Ways to keep a run within `limit` bytes per rank, the smallest change of each kind.

    Those that leave the result alone (micro-batches, sharding) stand beside those that change the
    method (the adversary's scope); fewer subcomponents come last, if nothing else is enough.
    """
    found: list[Remedy] = []
    for ladder in _ladders(work):
        for changes in ladder:
            size = memory(changed(work, changes)).total
            if size <= limit:
                found.append(Remedy(changes, size))
                break
    if found:
        return found
    strongest: dict[str, Any] = {}
    for ladder in _ladders(work):
        strongest |= ladder[-1]
    count = 2 ** (max(work.counts) - 1).bit_length() // 2
    while count >= _FEWEST_SUBCOMPONENTS:
        changes = {**strongest, "n_subcomponents": count}
        size = memory(changed(work, changes)).total
        if size <= limit:
            return [Remedy(changes, size)]
        count //= 2
    return []


def changed(work: Workload, changes: dict[str, Any]) -> Workload:
    """The run with settings replaced."""
    changes = dict(changes)
    count = changes.pop("n_subcomponents", None)
    counts = work.counts if count is None else (count,) * len(work.sites)
    config = work.config.replaced(changes)
    return replace(work, config=config, counts=counts)


def _ladders(work: Workload) -> Iterator[list[dict[str, Any]]]:
    """Changes of one kind, from the smallest to the largest."""
    config = work.config
    parts = range(config.micro_batches + 1, work.sequences + 1)
    splits: list[dict[str, Any]] = [{"micro_batches": n} for n in parts if work.sequences % n == 0]
    # Sources shared across the batch exclude micro-batches.
    splits = splits if config.adversary.scope in ("position", "sequence") else []
    scope: dict[str, Any] = {}
    if work.sources and config.adversary.scope == "position":
        scope = {"adversary.scope": "sequence"}
    can_shard = work.n_ranks > 1 and not (config.shard_importance or config.compaction.window)
    shard = {"shard_importance": True} if can_shard else {}
    if work.target.n_layers and not (config.recompute or config.compile):
        yield [{"recompute": True}]
    if splits:
        yield splits
    if scope:
        yield [scope]
    if shard:
        yield [shard]
    if splits and (scope or shard):
        if shard:
            yield [shard | split for split in splits]
        if scope:
            yield [scope | split for split in splits]
        if scope and shard:
            yield [scope | shard | split for split in splits]
