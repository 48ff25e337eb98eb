"""`Clusters`: groups of subcomponents, and the whole history of how they came to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens import storage
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.masks import Layout
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.rendering import Shown, titled

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph

_SHOWN = 10


class ClustersRecord(storage.Record):
    """What saved clusters say in JSON."""

    kind = "clusters"
    names: tuple[str, ...]
    alpha: float
    sampler: str
    seed: int
    threshold: float
    n_positions: int
    n_dead: int
    n_groups: int
    fingerprint: str


@dataclass(frozen=True)
class Cluster:
    """One group of subcomponents.

    Attributes:
        number: Its place among all.
        members: Names of the subcomponents, those active most often first.
        density: Share of positions at which any of them is active.
        shares: At what share of these positions each is.
        saves: Bits per position by which the description is longer with each of them for itself,
            at the same number of groups.
    """

    number: int
    members: tuple[str, ...]
    density: float
    shares: tuple[float, ...]
    saves: float

    def __len__(self) -> int:
        return len(self.members)

    @property
    def together(self) -> float:
        """Mean share: 1 if all are always active together, 1 / n if no two ever are."""
        return sum(self.shares) / len(self.shares)

    def masks(
        self, vpd: Decomposition, value: float = 0.0, others: float = 1.0
    ) -> dict[str, Tensor]:
        """For `vpd.masked`: masks `[1, 1, C]` by site, `value` for the members, `others` elsewhere.

        At sites without a member, too, unless `others` is 1. Edits take the members as they are:
        `vpd_lens.Ablate(cluster.members)`.
        """
        layout: Layout = vpd.layout
        masks = {
            site: torch.full((1, 1, n), float(others))
            for site, n in zip(layout.names, layout.sizes, strict=True)
        }
        own = set()
        for name in self.members:
            site, _, index = name.rpartition(":")
            masks[site][..., int(index)] = value
            own.add(site)
        return {site: mask for site, mask in masks.items() if site in own or others != 1}


@dataclass(repr=False, eq=False)
class Clusters(Shown):
    """Subcomponents in groups, those that save most first; `clusters[0]` is a `Cluster`.

    Attributes:
        names: The subcomponents, all that are active anywhere.
        counts: Positions where each is.
        merges: Which two groups were merged in every step; a group has the number of its first
            subcomponent.
        unions: Positions where the merged group is active.
        costs: By how much each step lengthened the description, in bits per position.
        best: How much the cheapest merge would have, also of the step that was not made.
        lengths: Bits per position, before every step and at the end.
        n_groups: How many groups are shown; `at` shows others.
        alpha: Bits for one subcomponent of an active group.
        sampler: How pairs were chosen.
        seed: Of the choice.
        threshold: Importance above which a subcomponent is active.
        n_positions: That were looked at.
        n_dead: Subcomponents that are never active, and in no group.
        fingerprint: Of the decomposition.
    """

    names: tuple[str, ...]
    counts: Int64[Tensor, " n"]
    merges: Int64[Tensor, "steps 2"]
    unions: Int64[Tensor, " steps"]
    costs: Float64[Tensor, " steps"]
    best: Float64[Tensor, " _steps_or_more"]
    lengths: Float64[Tensor, " _steps_and_one"]
    n_groups: int
    alpha: float
    sampler: str
    seed: int
    threshold: float
    n_positions: int
    n_dead: int
    fingerprint: str

    # ---------------------------------------------------------------- looking

    def at(self, n_groups: int) -> Clusters:
        """The same run with another number of groups: that after fewer or more merges.

        Raises:
            InputError: If the run has no such number.
        """
        least = len(self.names) - len(self.merges)
        if not least <= n_groups <= len(self.names):
            more = " Cluster with until_one=True for fewer." if least > 1 else ""
            raise InputError(
                f"n_groups={n_groups}; this run has between {least} and {len(self.names)}.{more}"
            )
        return replace(self, n_groups=n_groups)

    @property
    def length(self) -> float:
        """Bits per position of the description by these groups."""
        return float(self.lengths[len(self.names) - self.n_groups])

    @cached_property
    def labels(self) -> Int64[Tensor, " n"]:
        """The number of every subcomponent's group."""
        labels = torch.empty(len(self.names), dtype=torch.long)
        for number, members in enumerate(self._members):
            labels[members] = number
        return labels

    @cached_property
    def _merged(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The first subcomponent of every one's group, and where groups are active, by that."""
        parent, counts = np.arange(len(self.names)), self.counts.numpy().copy()
        steps = len(self.names) - self.n_groups
        both = zip(self.merges[:steps].tolist(), self.unions[:steps].tolist(), strict=True)
        for (first, second), union in both:
            parent[second], counts[first] = first, union
        for i in range(len(parent)):  # a group's number is that of its first: parents come before
            parent[i] = parent[parent[i]]
        return parent, counts

    @cached_property
    def _saves(self) -> Float[np.ndarray, " n"]:
        """Bits that each group saves, by its first subcomponent."""
        parent, counts = self._merged
        n, bits = len(parent), log2(self.n_groups)
        alone = np.bincount(parent, self.counts.numpy() * (bits + self.alpha), n)
        return alone - counts * (bits + self.alpha * np.bincount(parent, minlength=n))

    @cached_property
    def _members(self) -> list[list[int]]:
        """The numbers of every group's subcomponents, in the order of the groups."""
        (parent, counts), saves = self._merged, self._saves
        groups: dict[int, list[int]] = {}
        for i, first in enumerate(parent.tolist()):
            groups.setdefault(first, []).append(i)
        often = self.counts.tolist()
        order = sorted(groups, key=lambda g: (-round(saves[g], 6), -counts[g], g))
        return [sorted(groups[g], key=lambda i: (-often[i], i)) for g in order]

    def __len__(self) -> int:
        return self.n_groups

    def __getitem__(self, number: int) -> Cluster:
        members = self._members[number]
        first, often = min(members), self.counts[members].tolist()
        union = int(self._merged[1][first])
        return Cluster(
            number=range(self.n_groups)[number],
            members=tuple(self.names[i] for i in members),
            density=union / self.n_positions,
            shares=tuple(count / union for count in often),
            saves=float(self._saves[first]) / self.n_positions,
        )

    def __iter__(self) -> Iterator[Cluster]:
        return (self[number] for number in range(self.n_groups))

    def top(self, n: int = 10) -> list[Cluster]:
        """The `n` groups that save most, of at least two subcomponents."""
        found = (self[g] for g, members in enumerate(self._members) if len(members) > 1)
        return [cluster for _, cluster in zip(range(n), found, strict=False)]

    def of(self, name: str) -> Cluster:
        """The group of a subcomponent, such as `"blocks.0.mlp.out:17"`.

        Raises:
            InputError: If there is no such subcomponent, or it is never active.
        """
        if name not in self._place:
            raise InputError(
                f"{name!r} is in no group: there is no such subcomponent, or it is never active "
                f"at the {self.n_positions} positions that were looked at."
            )
        return self[int(self.labels[self._place[name]])]

    def numbers(self, names: Iterable[str]) -> list[int]:
        """The numbers of some subcomponents' groups; -1 of those that are in none."""
        places = (self._place.get(name) for name in names)
        return [-1 if place is None else int(self.labels[place]) for place in places]

    @cached_property
    def _place(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def groups_in(self, graph: AttributionGraph) -> dict[str, list[str]]:
        """Which nodes of a graph are of one group and position; see `grouped`.

        Raises:
            ArtefactError: If the graph is of another decomposition.
        """
        self.check(graph.settings.get("decomposition", self.fingerprint))
        return self.grouped(graph.nodes.names())

    def grouped(self, nodes: Sequence[str]) -> dict[str, list[str]]:
        """Nodes of a graph by group and position: `{"cluster 3@5": ["blocks.0.mlp.in:31@5", ...]}`.

        Groups of which a position has one node only, and other nodes, are left out.
        """
        found: dict[tuple[int, int], list[str]] = {}
        parts = [node.rpartition("@") for node in nodes]
        numbers = self.numbers(name for name, *_ in parts)
        for node, (*_, position), group in zip(nodes, parts, numbers, strict=True):
            if group >= 0:
                found.setdefault((int(position), group), []).append(node)
        return {
            f"cluster {group}@{position}": members
            for (position, group), members in sorted(found.items())
            if len(members) > 1
        }

    def __rich__(self) -> RenderableType:
        larger = sum(len(members) > 1 for members in self._members)
        title = (
            f"{self.n_groups} groups of {len(self.names)} subcomponents, {larger} of more than one;"
            f" {self.lengths[0]:.1f} -> {self.length:.1f} bits per position (alpha {self.alpha:g}, "
            f"{self.sampler}, seed {self.seed}, {self.n_positions} positions)"
        )
        table = Table()
        for heading in ("", "size", "density", "together", "saves"):
            table.add_column(heading, justify="right")
        table.add_column("members", overflow="fold")
        for cluster in self.top(_SHOWN):
            names = "  ".join(name.removeprefix("blocks.") for name in cluster.members[:4])
            names += f"  and {len(cluster) - 4} more" if len(cluster) > 4 else ""
            figures = f"{cluster.density:.2%}", f"{cluster.together:.2f}", f"{cluster.saves:.2f}"
            table.add_row(str(cluster.number), str(len(cluster)), *figures, Text(names))
        return titled(title, table)

    # ---------------------------------------------------------------- storage

    def check(self, decomposition: Decomposition | str) -> None:
        """Refuse a decomposition, or its `fingerprint`, if it is not the one this is of.

        Raises:
            ArtefactError: If they differ.
        """
        other = decomposition if isinstance(decomposition, str) else fingerprint(decomposition)
        if other != self.fingerprint:
            raise ArtefactError(
                f"these clusters are of another decomposition: its fingerprint is "
                f"{self.fingerprint[:12]}..., this decomposition's is {other[:12]}... Load the "
                "decomposition they were made from, or cluster this one."
            )

    def save(self, path: str | Path) -> Path:
        """Write a directory that `load` reads, whole or not at all; earlier clusters are replaced.

        Raises:
            ArtefactError: If something else is there, or the disk does not take it.
        """
        own = {name: getattr(self, name) for name in ClustersRecord.model_fields}
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return storage.write(path, ClustersRecord(**own), {"clusters": tensors})

    @classmethod
    def load(cls, path: str | Path, vpd: Decomposition | None = None) -> Clusters:
        """Read what `save` wrote.

        Raises:
            ArtefactError: If it is missing, damaged, or of another decomposition than `vpd`.
        """
        artefact = storage.read(path, ClustersRecord)
        tensors = artefact.tensors("clusters")
        n, steps = len(artefact.record.names), len(tensors.get("merges", ()))
        sizes = [[n], [steps, 2], [steps], [steps], [len(tensors.get("best", ()))], [steps + 1]]
        storage.require_shapes(artefact.folder, tensors, dict(zip(_TENSORS, sizes, strict=True)))
        found = cls(**dict(artefact.record), **tensors)
        if vpd is not None:
            found.check(vpd)
        return found


_TENSORS = ("counts", "merges", "unions", "costs", "best", "lengths")
