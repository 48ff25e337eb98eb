"""Before and during a run: does it fit the memory, and if not, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vpd_lens.errors import OutOfMemoryError
from vpd_lens.training.cost.available import available_memory
from vpd_lens.training.cost.memory import Memory, attached, memory
from vpd_lens.training.cost.remedies import remedies
from vpd_lens.training.cost.workload import Workload

# An estimate this much above what is free is beyond its own error.
_CLEARLY = 1.2
_SHOWN_ITEMS = 6


def require_memory(work: Workload, device: torch.device) -> str:
    """Compare the estimate with what is free.

    Args:
        work: The run, its decomposition attached already.
        device: Where it will run.

    Returns:
        One line for the log.

    Raises:
        OutOfMemoryError: If the run clearly cannot fit.
    """
    estimate, free = memory(work), available_memory(device)
    line = f"Estimated peak memory: {_gb(estimate.total)}"
    if free is None:
        return line + "."
    here = attached(work)
    if estimate.total - here > _CLEARLY * free:
        raise OutOfMemoryError(
            f"this run needs about {_gb(estimate.total)} on {device} ({_gb(here)} of it is there "
            f"already), and {_gb(free)} are free. {_explanation(work, estimate, here + free)}"
        )
    return f"{line}, {_gb(here)} of it in use already; free on {device}: {_gb(free)}."


@contextmanager
def explained_out_of_memory(work: Workload, device: torch.device) -> Iterator[None]:
    """PyTorch running out of memory becomes an error that says what takes it and what helps.

    Raises:
        OutOfMemoryError: In place of PyTorch's error.
    """
    free = available_memory(device)
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        estimate = memory(work)
        limit = estimate.total if free is None else min(free, estimate.total)
        reason = str(error).partition("\n")[0]
        raise OutOfMemoryError(
            f"training ran out of memory on {device}: {reason} "
            # What has failed has not fitted, whatever the estimate says.
            f"{_explanation(work, estimate, 0.9 * limit)} The last checkpoint is kept."
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _explanation(work: Workload, estimate: Memory, limit: float) -> str:
    """The largest items, and what would make the run fit."""
    largest = sorted(estimate.items.items(), key=lambda item: -item[1])[:_SHOWN_ITEMS]
    items = "\n".join(f"  {size / 1e9:8.2f} GB  {name}" for name, size in largest)
    found = remedies(work, limit)
    ways = "\n".join(f"  {remedy}" for remedy in found)
    advice = f"Any of these is enough, by the same estimate:\n{ways}" if found else _NO_REMEDY
    return f"Largest at its peak ({estimate.moment}):\n{items}\n{advice}"


_NO_REMEDY = (
    "Neither micro_batches nor adversary.scope='sequence' nor 64 subcomponents per site are "
    "enough: choose fewer sites, a smaller importance function (importance.d_model, "
    "importance.n_blocks), shorter sequences, or a device with more memory; vpd-lens plan shows "
    "what each takes."
)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
