"""The causal importance function in shards: every process keeps a part of its parameters (FSDP2).

A shard's gradient is the sum over processes, as of every other parameter; PyTorch gathers the
parameters of a block while it computes, and its optimisers work on the shards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.training.processes import Processes


def shard_importance(vpd: Decomposition, processes: Processes) -> Callable[[], None]:
    """Share out the parameters of the causal importance function, block by block.

    Args:
        vpd: Its `importance` is sharded in place.
        processes: Who gets the shards; a single one keeps everything.

    Returns:
        A function for all processes to call together, which puts an ordinary importance function
        with the trained parameters back into `vpd`.
    """
    if processes.world == 1:
        return lambda: None
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # The step only reads what the function returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    module, device = vpd.importance, vpd.device
    blank = _without_values(module)
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    for block in getattr(module, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The losses are divided by the number of processes already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    def restore() -> None:
        plain = blank.to_empty(device=device)
        plain.load_state_dict({k: whole(t) for k, t in module.state_dict().items()})
        vpd.importance = plain

    return restore


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


def _without_values(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, which takes no memory."""
    blanks = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    return copy.deepcopy(module, blanks)
