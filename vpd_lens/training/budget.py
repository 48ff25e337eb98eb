"""Does a run fit the memory? A rough count before the first step, and a word when it did not.

The count leaves out what depends on the model's class (what its blocks keep for the backward
pass), so it warns and never refuses. `vpd-lens plan` runs the step itself, without values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vpd_lens.config import VPDConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import OutOfMemoryError

_REMEDIES = (
    "What helps: micro_batches=4 or recompute=True (the same numbers), mask_dtype='bfloat16', "
    "adversary.scope='sequence', a smaller batch_size, fewer n_subcomponents or sites. "
    "`vpd-lens plan` says what a step takes."
)


class MemoryWarning(UserWarning):
    """A run may need more memory than there is."""


def budget(vpd: Decomposition, config: VPDConfig, batch: int, pos: int) -> dict[str, float]:
    """Bytes of the largest things that training holds at once, by name.

    A step of this process has `batch` sequences of `pos` tokens (1 for models without positions).
    """
    part = batch * pos / config.micro_batches
    c_total = vpd.layout.total
    masks = getattr(torch, config.mask_dtype).itemsize * (c_total + len(vpd.sites))
    width = 2 if config.autocast and vpd.device.type == "cuda" else 4
    adversarial, random = config.adversary.coefficient > 0, config.stochastic
    sets = {"position": batch * pos, "sequence": batch, "batch": pos, "single": 1}
    sets["pool"] = batch * config.adversary.pool
    streams = 1 + (config.elsewhere.coefficient > 0)
    passes = random.n_samples * (random.coefficient > 0) + adversarial
    passes += len(vpd.sites) * (random.layerwise_coefficient > 0)
    moments = 1 if config.optimiser.kind == "muon" else 2
    vocabulary = int(getattr(getattr(vpd.model, "cfg", None), "d_vocab", 0) or 0)
    per_position = 2 * c_total + sum(sum(site.shape) for site in vpd.sites)
    trained = sum(p.nbytes for p in vpd.parameters())
    size = {
        "the target's weights": sum(p.nbytes for p in vpd.model.parameters()),
        "V, U and importance function, gradients and moments": (2 + moments) * trained,
        "sources, gradients and moments": 4 * masks * sets[config.adversary.scope] * adversarial,
        "importances": 4 * c_total * (3 * part + batch * pos) * streams,
        "masked passes": passes * part * width * per_position,
        "logits": vocabulary * width * (2 * batch * pos * streams + 2 * passes * part),
    }
    return {name: float(bytes_) for name, bytes_ in size.items() if bytes_}


def warn_if_short(items: dict[str, float], vpd: Decomposition) -> None:
    """Warn if what `budget` has counted, less the parameters that are there, is not free."""
    free, needed = available_memory(vpd.device), sum(items.values())
    there = sum(p.nbytes for p in [*vpd.model.parameters(), *vpd.parameters()])
    if free is not None and needed - there > free:
        warnings.warn(
            f"this run may not fit: it needs at least {gigabytes(needed)} on {vpd.device} "
            f"({gigabytes(there)} of it is there already), and {gigabytes(free)} are free.\n"
            f"{_largest(items)}\n{_REMEDIES}",
            MemoryWarning,
            stacklevel=3,
        )


@contextmanager
def explained_out_of_memory(items: dict[str, float], device: torch.device) -> Iterator[None]:
    """PyTorch running out of memory becomes an error that says what takes it and what helps."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        of_cpu = "DefaultCPUAllocator" in str(error)
        if not of_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            f"training ran out of memory on {device}: {reason}\n{_largest(items)}\n{_REMEDIES} "
            "The last checkpoint is kept."
        ) from error


def _largest(items: dict[str, float]) -> str:
    ranked = sorted(items.items(), key=lambda item: -item[1])
    return "\n".join(f"  {gigabytes(size):>8}  {name}" for name, size in ranked)


def gigabytes(size: float | int) -> str:
    """Bytes as text, in GB or MB of 10^9 and 10^6 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def available_memory(device: torch.device) -> float | None:
    """Bytes that this process may still take, or `None` where it cannot be told.

    What PyTorch has reserved on a GPU without using it counts as free. Of RAM (of the CPU) it is
    what Linux calls available, or less if the process runs under a control group's limit.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + unused)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{what}").read_text() for what in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files are given up when memory runs short.
        left = float(limit) - float(used) + float(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free
    return min(free, max(0.0, left))
