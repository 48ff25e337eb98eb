"""Training on many processes: who they are, and all that they tell each other.

Every process computes the step on its own rows of the global batch, with losses divided by the
number of processes. The sum of gradients over processes is then the gradient of the global batch.
`join` finds the others by what `torchrun` and `accelerate` put around a process.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate, count, groupby
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpd_lens.errors import ConfigError, ProcessError

Value = TypeVar("Value")

# Numbers sent in one collective: few large ones, without doubling the memory of the gradients.
_BUCKET = 1 << 26


@dataclass(frozen=True)
class Processes:
    """The processes that train together, of which this is number `rank` of `world`.

    Where one is alone, no method costs anything. `device` is where this one trains, as in
    `VPDConfig.device`; `control` the group for small values, which lie on the CPU; `owned` whether
    `close` ends the process group, because `join` began it.
    """

    rank: int = 0
    world: int = 1
    device: str = "auto"
    control: Any = None
    owned: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def rows(self, batch_size: int, parts: int = 1) -> slice:
        """Which rows of a global batch are this process's, to be cut into equal `parts`."""
        if self.world == 1:
            return slice(None)
        if batch_size % (self.world * parts):
            raise ConfigError(
                f"batch_size={batch_size} must be a multiple of {self.world} processes x "
                f"{parts} micro_batches; it is that of all processes together."
            )
        size = batch_size // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def generator(self, seed: int, device: torch.device, step: int = 0) -> torch.Generator:
        """The random generator of the steps, another one on every process.

        The first begins with the seed itself, as a single process does; after some finished steps,
        for a process that joins a run under way, it is another one again.
        """
        if self.rank or step:
            words = np.random.SeedSequence([seed % 2**64, self.rank, step])
            seed = int(words.generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(device=device).manual_seed(seed)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over processes, bit for bit the same on all."""
        if self.world > 1:
            _in_buckets(tensors, dist.all_reduce)

    def first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by that of the first process."""
        if self.world > 1:
            _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0))

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order, on the first; on the others their own."""
        if self.world == 1:
            return rows
        own = rows.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.first else None
        dist.gather(own, parts, dst=0, group=self.control)
        return own if parts is None else torch.cat(parts)

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def all(self, value: Value) -> list[Value]:
        """The value of every process."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def require_same(self, **values: str) -> None:
        """Check that all processes mean the same run; the error, on all, names what differs."""
        found = self.all(values)
        if different := [name for name in values if len({v[name] for v in found}) > 1]:
            raise ProcessError(
                f"the processes do not have the same {', '.join(different)}. Every process must be "
                "given the same model, data and configuration; anything random needs a seed (for "
                "a DataLoader that shuffles: generator=)."
            )

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def all_here(self, seconds: float = 10.0) -> bool:
        """Whether all processes call this within some seconds: whether they fail together."""
        try:
            if self.world > 1:
                dist.monitored_barrier(self.control, timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Go on alone: what a process does from now on, the others do not wait for."""
        if self.owned:
            dist.destroy_process_group()
        elif self.control not in (None, dist.group.WORLD):
            dist.destroy_process_group(self.control)

    @contextmanager
    def contact(self, what_is_left: Callable[[], str]) -> Iterator[None]:
        """Explain the errors that a process sees when another one dies or falls silent."""
        try:
            yield
        except RuntimeError as error:
            lost = re.search("gloo|nccl|connection (closed|reset)", str(error).lower())
            if self.world == 1 or not (lost or isinstance(error, dist.DistError)):
                raise
            line = re.split(r"\n|\. This is typically", str(error))[0]
            line = re.sub(r"^\[[^]]*\] ", "", line)  # the place in PyTorch's source
            cause = (
                f"did not answer within {timeout().seconds} s ({line}). The one that reports "
                "nothing is the one that hangs."
                if "timed out" in line.lower()
                else f"died ({line}). The launcher's report names the one that failed first."
            )
            raise ProcessError(
                f"process {self.rank} of {self.world} lost contact with another one, which {cause} "
                + what_is_left()
            ) from None


ALONE = Processes()


def _in_buckets(tensors: Sequence[Tensor], send: Callable[[Tensor], Any]) -> None:
    """Replace tensors by what `send` makes of many at once, of the same dtype, end to end."""
    before = accumulate((tensor.numel() for tensor in tensors), initial=0)
    placed = zip(tensors, before, strict=False)  # the last number is behind the last tensor
    for _, bucket in groupby(placed, lambda pair: (pair[0].dtype, pair[1] // _BUCKET)):
        own = [tensor.detach() for tensor, _ in bucket]
        flat = torch.cat([t.reshape(-1) for t in own])
        send(flat)
        for t, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
            t.copy_(part.view_as(t))


def timeout() -> timedelta:
    """How long a process waits for the others before it gives up."""
    return timedelta(seconds=float(os.environ.get("VPD_LENS_TIMEOUT", "600")))


def join(device: str, model: nn.Module) -> Processes:
    """Join the other processes of a `torchrun` or `accelerate` job; a single one stays alone.

    On GPUs, where `device` or (if that is `"auto"`) the model is, every process takes its own.
    """
    if not (dist.is_available() and (dist.is_initialized() or launched())):
        return Processes(device=device)
    there = device == "auto" and any(parameter.is_cuda for parameter in model.parameters())
    gpu = there or device.startswith("cuda")
    owned = not dist.is_initialized()
    if owned:
        if gpu:
            claim_gpu(device)
        # Under a name of its own: where another group was before, late readers would find its keys.
        store = dist.PrefixStore(f"vpd_lens/{next(_JOINED)}", _store())
        kind = "nccl" if gpu and torch.cuda.is_available() else "gloo"
        rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        dist.init_process_group(kind, timeout=timeout(), world_size=world, rank=rank, store=store)
        device = "cuda" if gpu else device
    world = dist.get_world_size()
    if world == 1:
        return Processes(device=device)
    control: Any = dist.group.WORLD
    if dist.get_backend() != "gloo":
        control = dist.new_group(backend="gloo", timeout=timeout())
    return Processes(dist.get_rank(), world, device, control, owned)


_JOINED = count()


@cache
def _store() -> dist.Store:
    """The launcher's store, through which processes find each other; kept as long as this one."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout()))
    return store


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    named = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return named and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the first of its job, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def claim_gpu(device: str = "auto") -> None:
    """Make this process's own GPU the one that `"cuda"` means, if a launcher started it."""
    if not launched() or device == "cpu" or not torch.cuda.is_available():
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ":" in device and n_local > 1:
        raise ConfigError(
            f"device={device!r} names one GPU for {n_local} processes on this machine. Use "
            "device='cuda': every process takes its own."
        )
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"{n_local} processes on a machine with {torch.cuda.device_count()} GPUs. Start as "
            "many processes as there are GPUs (--nproc-per-node)."
        )
    torch.cuda.set_device(local)


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Collects Ctrl-C and SIGTERM instead of dying; a second signal acts at once."""
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    def note(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number))
        restore()

    if threading.current_thread() is threading.main_thread():  # only there can they be handled
        before |= {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for s in before:
            signal.signal(s, note)
    try:
        yield received
    finally:
        restore()
