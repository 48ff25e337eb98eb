"""Going through data once, and what is alive on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from vpd_lens.data import TokenBatches
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError
from vpd_lens.evaluation.metrics import Sparsity

Indices = Mapping[str, Sequence[int] | Int[Tensor, " _n"]]


def one_pass(
    batches: TokenBatches, start: int, stop: int, what: str, progress: bool
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Batches `start` to `stop`, fewer if the data ends before.

    Args:
        batches: The data, at batch `start`.
        start: Number of the first batch.
        stop: Number after the last one.
        what: Title of the progress bar.
        progress: Show it.

    Yields:
        A batch, and the place in the data after it.
    """
    for _ in track(range(start, stop), what, disable=not progress):
        tokens = next(batches).tokens
        state = batches.state_dict()
        if batches.epoch > 0:
            break  # the data began again
        yield tokens, state


def find_alive(
    vpd: Decomposition, batches: TokenBatches, n_batches: int, threshold: float, progress: bool
) -> dict[str, Tensor]:
    """Subcomponents whose mean causal importance on the data exceeds a threshold.

    Args:
        vpd: The decomposition.
        batches: The data, from its beginning.
        n_batches: How many of them.
        threshold: Mean importance that counts as alive.
        progress: Show a progress bar.

    Returns:
        `{site: indices}`.

    Raises:
        InputError: If there are none.
    """
    sparsity = Sparsity(vpd.layout, (), vpd.device)
    for tokens, _ in one_pass(batches, 0, n_batches, "Finding what is alive", progress):
        sparsity.add(vpd.causal_importance(tokens.to(vpd.device)))
    mean = sparsity.mean_importance().cpu()
    if not bool((mean > threshold).any()):
        raise InputError(
            f"alive_threshold={threshold:g}: no subcomponent's mean importance exceeds it; the "
            f"largest is {float(mean.max()):.2g}. Lower it."
        )
    parts = zip(vpd.layout.names, vpd.layout.split(mean), strict=True)
    return {name: (part > threshold).nonzero().squeeze(1) for name, part in parts}


def checked_alive(vpd: Decomposition, alive: Indices) -> dict[str, Tensor]:
    """Indices as users give them, sorted, for every site.

    Args:
        vpd: The decomposition.
        alive: `{site: indices}`; a site left out has none.

    Raises:
        InputError: If a site is unknown or an index out of range.
    """
    names, sizes = vpd.layout.names, vpd.layout.sizes
    if unknown := sorted(set(alive) - set(names)):
        raise InputError(f"alive names {unknown}, which are no sites; sites: {list(names)}.")
    checked = {}
    for name, size in zip(names, sizes, strict=True):
        index = torch.as_tensor(alive.get(name, ()), dtype=torch.long).cpu().unique()
        if len(index) and not (int(index[0]) >= 0 and int(index[-1]) < size):
            raise InputError(
                f"alive[{name!r}] has indices from {int(index[0])} to {int(index[-1])}; expected 0 "
                f"to {size - 1}."
            )
        checked[name] = index
    return checked
