"""`cluster`: subcomponents that are active together become the components of a mechanism."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from vpd_lens.analysis.clustering.activity import Activity, activity
from vpd_lens.analysis.clustering.clusters import Clusters
from vpd_lens.analysis.clustering.merging import Groups
from vpd_lens.analysis.clustering.samplers import Choice, Rank, Sampler
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress


def cluster(
    model: nn.Module,
    data: Any,
    *,
    alpha: float = 1.0,
    sampler: Sampler = Rank(),  # noqa: B008  (frozen)
    until_one: bool = False,
    seed: int = 0,
    progress: bool = True,
    **reading: Any,
) -> Clusters:
    """Group subcomponents that are active together, so that a description gets shortest.

    Args:
        model: A decomposed model with positions.
        data: As for `vpd_lens.train`. Read in order, not shuffled, and once at most.
        alpha: Bits to describe one subcomponent of an active group. 0 merges whatever saves
            names, large values only what is always active together.
        sampler: How the next pair to merge is chosen: `Rank`, `Best`, `Range` or `Boltzmann` of
            `vpd_lens.analysis.clustering`.
        until_one: Go on merging, past the shortest, to a single group, and keep all of it.
        seed: Of the sampler, and of the positions if they are drawn.
        progress: Show how far it is and how long it will still take.
        **reading: `threshold`, `n_batches`, `batch_size`, `seq_len`, `per_sequence`, `sites` and
            `prepend_bos`, as for `vpd_lens.analysis.clustering.activity`.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If an argument is out of range, or nothing is active.
        DataError: If the data does not fit the model, or there is none.

    Examples:
        >>> import vpd_lens
        >>> model = vpd_lens.load_example()
        >>> text = ["def read(self, path):", "import os"] * 4
        >>> clusters = vpd_lens.cluster(model, text, sites=["blocks.0.mlp.gate"], progress=False)
        >>> clusters.top(1)[0].number
        0
    """
    check_alpha(alpha)
    found = activity(model, data, seed=seed, progress=progress, **reading)
    return merge(found, alpha, sampler, until_one=until_one, seed=seed, progress=progress)


def check_alpha(alpha: float) -> None:
    """Refuse what is no number of bits."""
    if not (alpha >= 0 and isfinite(alpha)):
        raise InputError(f"alpha={alpha}; expected a number of bits, at least 0.")


def merge(
    found: Activity,
    alpha: float = 1.0,
    sampler: Sampler = Rank(),  # noqa: B008
    *,
    until_one: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Clusters:
    """Group what an activity says is active together; arguments as for `vpd_lens.cluster`.

    Merging ends, or the result is cut, where the cheapest merge no longer saves anything.

    Raises:
        InputError: If `alpha` is negative.
    """
    check_alpha(alpha)
    groups, rng = Groups(found.bits, alpha, found.n_positions), np.random.default_rng(seed)
    counts = torch.from_numpy(groups.counts.copy())
    choices: list[Choice] = []
    best, unions, lengths = [], [], [groups.length()]
    kept = None
    with Progress("Merging", len(found.names) - 1, 0, progress) as bar:
        while groups.n > 1:
            choice = sampler.choose(groups, rng.random())
            best.append(choice.best)
            if kept is None and choice.best >= 0:
                kept = groups.n
            if kept is not None and not until_one:
                break
            groups.merge(choice.first, choice.second)
            choices.append(choice)
            unions.append(int(groups.counts[min(choice.first, choice.second)]))
            lengths.append(groups.length())
            bar.advance()
    return Clusters(
        names=found.names,
        counts=counts,
        merges=torch.tensor([choice[:2] for choice in choices], dtype=torch.long).view(-1, 2),
        unions=torch.tensor(unions, dtype=torch.long),
        costs=torch.tensor([choice.cost for choice in choices], dtype=torch.float64),
        best=torch.tensor(best, dtype=torch.float64),
        lengths=torch.tensor(lengths, dtype=torch.float64) / found.n_positions,
        n_groups=groups.n if kept is None else kept,
        alpha=alpha,
        sampler=repr(sampler),
        seed=seed,
        threshold=found.threshold,
        n_positions=found.n_positions,
        n_dead=found.n_dead,
        fingerprint=found.fingerprint,
    )
