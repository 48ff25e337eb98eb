"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: torch.device) -> float | None:
    """Bytes that this process may still take, or `None` where it cannot be told.

    What PyTorch has reserved on a GPU without using it counts as free. Of RAM it is what Linux
    calls available, or less if the process runs under a control group's limit.

    Args:
        device: A GPU, or the CPU for RAM.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + unused)
    if device.type != "cpu":
        return None
    limits = [size for size in (_available_ram(), _left_of_control_group()) if size is not None]
    return min(limits, default=None)


def _available_ram() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return 1024.0 * int(sizes["MemAvailable"]) if "MemAvailable" in sizes else None


def _left_of_control_group() -> float | None:
    """Version 2 of control groups, as a container sees its own."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = float((group / "memory.current").read_text())
        counts = dict(
            line.split() for line in (group / "memory.stat").read_text().splitlines() if line
        )
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # Pages of files are given up when memory runs short.
    return max(0.0, float(limit) - used + float(counts.get("inactive_file", 0)))
