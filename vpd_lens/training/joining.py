"""How a process finds the others of its job: what `torchrun` and `accelerate` put around it."""

from __future__ import annotations

import itertools
import os
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from vpd_lens.errors import ConfigError
from vpd_lens.training.processes import Processes, timeout


def join(device: str, model: nn.Module) -> Processes:
    """Join the other processes of a `torchrun` or `accelerate` job; a single one stays alone.

    Args:
        device: As in `VPDConfig.device`; on GPUs every process takes its own.
        model: Where it is decides, if `device` is `"auto"`.

    Raises:
        ConfigError: If there are fewer GPUs than processes on a machine, or `device` names one.
    """
    if not (dist.is_available() and (dist.is_initialized() or launched())):
        return Processes(device=device)
    parameter = next(model.parameters(), None)
    gpu = device.startswith("cuda") or (
        device == "auto" and parameter is not None and parameter.is_cuda
    )
    owned = not dist.is_initialized()
    if owned:
        if gpu:
            claim_gpu(device)
        nccl = gpu and torch.cuda.is_available()
        # Under a name of its own: where another group was before, late readers would find its keys.
        store = dist.PrefixStore(f"vpd_lens/{next(_JOINED)}", _store())
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if nccl else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout()
        )
        device = "cuda" if gpu else device
    world = dist.get_world_size()
    if world == 1:
        return Processes(device=device)
    same = dist.get_backend() == "gloo"
    control = dist.group.WORLD if same else dist.new_group(backend="gloo", timeout=timeout())
    return Processes(dist.get_rank(), world, device, control, owned)


_JOINED = itertools.count()


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
    """Make this process's own GPU the one that `"cuda"` means, if a launcher started it.

    Raises:
        ConfigError: If there are too few, or `device` names one for all processes.
    """
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
