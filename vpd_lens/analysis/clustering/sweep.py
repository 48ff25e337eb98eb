"""`sweep`: how much the groups depend on alpha, which nothing settles, and on chance.

Partitions are compared as they are, whatever their groups are called: the distance of two is the
share of subcomponents that would have to change their group to make them equal, under the best
matching of groups (the assignment problem; Hungarian algorithm).

Source: VPD, clustering (ensembles of runs), and the authors' code (the distance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Int
from rich.console import RenderableType
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from scipy.sparse import block_array, coo_array
from scipy.sparse.csgraph import connected_components

from vpd_lens.analysis.clustering.activity import Activity
from vpd_lens.analysis.clustering.cluster import check_alpha, merge
from vpd_lens.analysis.clustering.clusters import Clusters
from vpd_lens.analysis.clustering.samplers import Rank, Sampler
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown, titled


@dataclass(repr=False, eq=False)
class Sweep(Shown):
    """Clusters of the same activity, by alpha.

    Attributes:
        runs: Those of every alpha, one for each seed.
    """

    runs: dict[float, list[Clusters]]

    def distance(self, alpha: float) -> tuple[float, float]:
        """Mean distance of the runs of an alpha, and what it would be by chance.

        By chance: with the subcomponents of one of each two exchanged at random.
        """
        rng, found = np.random.default_rng(0), []
        for first, second in combinations(self.runs[alpha], 2):
            a, b = first.labels.numpy(), second.labels.numpy()
            found.append((labels_distance(a, b), labels_distance(a, rng.permutation(b))))
        own, chance = np.mean(found, axis=0) if found else (np.nan, np.nan)
        return float(own), float(chance)

    def __rich__(self) -> RenderableType:
        some = next(iter(self.runs.values()))[0]
        title, table = f"{len(some.names)} subcomponents, {some.n_positions} positions", Table()
        for heading in ("alpha", "groups", "of more than one", "in them", "bits saved", "distance",
                        "by chance"):  # fmt: skip
            table.add_column(heading, justify="right")
        for alpha, runs in self.runs.items():
            sizes = [np.bincount(run.labels.numpy()) for run in runs]
            means = (
                np.mean([len(run) for run in runs]),
                np.mean([(size > 1).sum() for size in sizes]),
                np.mean([size[size > 1].sum() for size in sizes]),
            )
            saved = np.mean([float(run.lengths[0] - run.length) for run in runs])
            own, chance = (f"{x:.3f}" for x in self.distance(alpha))
            cells = (f"{x:.0f}" for x in means)
            table.add_row(f"{alpha:g}", *cells, f"{saved:.1f}", own, chance)
        return titled(title, table)


def sweep(
    found: Activity,
    alphas: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    seeds: Sequence[int] = (0, 1, 2),
    sampler: Sampler = Rank(),  # noqa: B008  (frozen)
    progress: bool = True,
) -> Sweep:
    """Group an activity's subcomponents at several alphas, several times each.

    Args:
        found: Where subcomponents are active, as `activity` finds it.
        alphas: Bits to describe one subcomponent of an active group.
        seeds: Of the sampler; one run for each.
        sampler: How pairs are chosen; with `Best`, runs do not differ.
        progress: Show how far it is and how long it will still take.

    Raises:
        InputError: If an alpha is negative, or there is none, or no seed.
    """
    if not alphas or not seeds:
        raise InputError(f"alphas={alphas!r}, seeds={seeds!r}; expected at least one of each.")
    for alpha in alphas:
        check_alpha(alpha)
    with Progress("Sweeping", len(alphas) * len(seeds), 0, progress) as bar:
        runs: dict[float, list[Clusters]] = {}
        for alpha, seed in bar.counting((a, s) for a in alphas for s in seeds):
            runs.setdefault(alpha, []).append(merge(found, alpha, sampler, seed=seed))
    return Sweep(runs)


def distance(first: Clusters, second: Clusters) -> float:
    """Share of subcomponents that must change their group to make two partitions equal.

    Raises:
        InputError: If they are not of the same subcomponents.
    """
    if first.names != second.names:
        raise InputError(
            "these clusters are of different subcomponents; compare runs on the same activity."
        )
    return labels_distance(first.labels.numpy(), second.labels.numpy())


def labels_distance(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]) -> float:
    """The distance of two partitions, by the number of everything's group."""
    n, n_groups = len(first), int(first.max()) + 1
    shared = coo_array((np.ones(n, np.int64), (first, second))).tocsr()
    # Groups that share nothing, not even by way of others, are matched apart.
    _, part = connected_components(block_array([[None, shared], [shared.T, None]]), directed=False)
    groups, others = part[:n_groups], part[n_groups:]
    by_part = [np.split(np.argsort(p, kind="stable"), np.bincount(p).cumsum()[:-1])
               for p in (groups, others)]  # fmt: skip
    kept = 0
    for own, other in zip(*by_part, strict=True):
        table = shared[own][:, other].toarray()
        kept += int(table[linear_sum_assignment(table, maximize=True)].sum())
    return 1 - kept / n
