"""What one training step costs, exactly: the real step, on tensors that have no values.

1. The model without weights and its decomposition are built on the meta device.
2. All their tensors become fake ones: shape, dtype and device, but no memory.
3. `Stepper.step` runs twice, so that optimisers and sources exist, while a meter counts every
   operation's FLOP and every tensor's bytes.

Time is not predicted from this. `measured_step` times real steps, which the FLOP then scale.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from vpd_lens.config import VPDConfig
from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import attach
from vpd_lens.rendering import Shown
from vpd_lens.training.budget import gigabytes
from vpd_lens.training.step import Stepper

_aten = torch.ops.aten
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True, repr=False)
class StepCost(Shown):
    """What a step takes: FLOP of matrix products by phase, and memory in bytes."""

    flop: dict[str, int]
    lasting: int  # what stays: weights, V and U, importance function, moments, sources
    peak: int  # largest sum of the bytes of all tensors, at any moment of the step
    peak_phase: str  # the phase of that moment

    @property
    def total_flop(self) -> int:
        """FLOP of all phases."""
        return sum(self.flop.values())

    def __rich__(self) -> Text:
        shown = {**self.flop, "in all": self.total_flop}.items()
        lines = [f"  {phase:<12} {flop / 1e12:>10.4g} TFLOP" for phase, flop in shown]
        memory = (
            f"Memory: {gigabytes(self.lasting)} stay from step to step, {gigabytes(self.peak)} at "
            f"the peak ({self.peak_phase})"
        )
        return Text("\n".join([*lines, memory]))


def plan_step(
    model: nn.Module, config: VPDConfig, batch: int, pos: int, autocast: bool = True
) -> StepCost:
    """Count one training step on `batch` sequences of `pos` tokens.

    The model, which is used up, need not have weights: best it is on the meta device. With
    `autocast`, products run in bf16 if the configuration says so, as on a GPU.
    """
    config = config.replaced({"compile": False, "device": "cpu", "shard_importance": False})
    with torch.device("meta"):
        _replace_tensors([model], "meta")
        attach(model, config.sites, config.n_subcomponents, config.importance, check=False)
    vpd: Decomposition = model.__dict__["vpd"]
    with FakeTensorMode(), _Meter() as meter:
        _replace_tensors([model, vpd], "cpu")
        stepper = Stepper(vpd, config)
        stepper.autocast = autocast and config.autocast
        tokens = torch.zeros(batch, pos, dtype=torch.long)
        for step in range(2):
            meter.restart()
            stepper.step(tokens, step, elsewhere=_other_rows(config, tokens))
        return StepCost(dict(meter.flop), meter.now, meter.peak, meter.peak_phase)


def measured_step(
    vpd: Decomposition, config: VPDConfig, batch: int, pos: int, steps: int = 3
) -> float:
    """Seconds of a real training step: the fastest of some, after one to warm up.

    The decomposition is trained by these steps, on `batch` sequences of `pos` random tokens.
    """
    stepper = Stepper(vpd, config)
    vocabulary = int(vpd.model.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
    tokens = torch.randint(vocabulary, (batch, pos), generator=torch.Generator().manual_seed(0))
    seconds = []
    for step in range(steps + 1):
        begun = time.perf_counter()
        losses, _ = stepper.step(tokens, step, elsewhere=_other_rows(config, tokens))
        float(losses["total"])  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def _other_rows(config: VPDConfig, tokens: Tensor) -> Batch | None:
    """As many rows for the second stream, if there is one."""
    return Batch(tokens.clone()) if config.elsewhere.coefficient else None


def _replace_tensors(modules: list[nn.Module], device: str) -> None:
    """Put empty tensors in place of all parameters and buffers, shared ones in place of shared."""

    @cache
    def like(old: Tensor) -> Tensor:
        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
        return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new

    for part in nn.ModuleList(modules).modules():
        both: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in both:
            tensors.update({n: like(old) for n, old in tensors.items() if old is not None})


class _Meter(TorchDispatchMode):
    """Counts FLOP by phase, and the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now, self.phases = 0, ["other"]
        self.restart()

    def restart(self) -> None:
        self.flop: Counter[str] = Counter()
        self.peak, self.peak_phase = self.now, self.phases[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return 1.0  # a loss on the CPU is asked whether it is finite
        out = func(*args, **kwargs)
        if func is torch.ops.profiler._record_function_enter_new.default:
            phase = str(args[0]).removeprefix("vpd::")
            self.phases.append(phase if phase != args[0] else self.phases[-1])
        elif func is torch.ops.profiler._record_function_exit._RecordFunction:
            self.phases.pop()
        if count := _FLOPS.get(func._overloadpacket):
            self.flop[self.phases[-1]] += count(*args, **kwargs, out_val=out)
        tree_map_only(Tensor, self._track, out)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)
            if self.now > self.peak:
                self.peak, self.peak_phase = self.now, self.phases[-1]

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
