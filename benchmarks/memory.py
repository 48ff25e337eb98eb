"""Memory of tensors, as a sum over storages: what lives, and the most that a step adds to it."""

from __future__ import annotations

import gc

import torch
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile

from vpd_lens.training.step import Stepper


def live_tensors() -> int:
    """Bytes of all storages that Python can reach; what compilation leaves behind has none."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not isinstance(one, FakeTensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peak_of_step(stepper: Stepper, batch: torch.Tensor, index: int) -> int:
    """Most bytes by which allocations exceed releases during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper.step(batch, index)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak
