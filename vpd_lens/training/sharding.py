"""The causal importance function in shards: every process keeps a part of its parameters (FSDP2).

A shard's gradient is the sum over processes, as of every other parameter; PyTorch gathers the
parameters of a block while it computes, and its optimisers work on the shards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import ProcessError
from vpd_lens.training.distributed import Processes


@contextmanager
def sharded_importance(vpd: Decomposition, processes: Processes, on: bool) -> Iterator[None]:
    """Share out the causal importance function, block by block, for a while.

    Afterwards `vpd` has an ordinary one again, with the trained parameters; also after an error,
    unless only some of the processes have met it. A single process keeps everything.
    """
    if processes.world == 1 or not on:
        yield
        return
    module = vpd.importance
    # On the meta device, where it takes no memory.
    blanks = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    blank = copy.deepcopy(module, blanks)
    _shard(module, vpd.device)
    together = True
    try:
        yield
    except BaseException as error:
        together = not isinstance(error, ProcessError) and processes.all_here()
        raise
    finally:
        if together:
            plain = blank.to_empty(device=vpd.device)
            plain.load_state_dict({k: whole(t) for k, t in module.state_dict().items()})
            vpd.importance = plain


def _shard(module: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # The step only reads what the function returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # type: ignore[arg-type]
    for block in getattr(module, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The losses are divided by the number of processes already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is one process's shard of a larger tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing what defines it


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of which this process may have a shard; all processes call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, cut like `model` if that is sharded; every process has the whole."""
    if not is_sharded(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )
