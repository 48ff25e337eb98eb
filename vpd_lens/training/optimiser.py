"""The optimisers of U, V and the causal importance function: AdamW (VPD), or Muon for matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vpd_lens.training.sections import OptimiserConfig


def optimisers(
    parameters: Mapping[str, Sequence[nn.Parameter]], config: OptimiserConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers that together update all parameters.

    Muon moves along the gradient's momentum with all its singular values set to 1, so that weak
    directions of a matrix learn as fast as strong ones; its step is scaled to the size of an
    AdamW step, and biases are left to AdamW.

    Args:
        parameters: Those of `"subcomponents"` and of `"importance"`.
        config: Kind and hyperparameters.

    Returns:
        Optimisers whose parameter groups carry their peak learning rate as `base`.
    """
    base = {"subcomponents": config.lr, "importance": config.importance_lr or config.lr}

    def groups(by_muon: bool) -> list[dict]:
        chosen = {
            name: [p for p in group if (p.ndim == 2 and config.kind == "muon") == by_muon]
            for name, group in parameters.items()
        }
        return [{"params": p, "base": base[name]} for name, p in chosen.items() if p]

    made: list[torch.optim.Optimizer] = []
    if config.kind == "muon":
        made.append(
            torch.optim.Muon(
                groups(by_muon=True),
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest := groups(by_muon=False):
        betas = (config.beta1, config.beta2)
        made.append(
            torch.optim.AdamW(
                rest, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True
            )
        )
    return made


def keep_moments(
    optimiser: torch.optim.Optimizer, parameter: Tensor, dim: int, index: Tensor
) -> None:
    """Keep an optimiser's state of some rows of a parameter, and forget that of the others.

    Args:
        optimiser: It may hold no state for the parameter yet.
        parameter: The parameter.
        dim: The dimension of the rows.
        index: Which ones stay.
    """
    state = optimiser.state.get(parameter, {})
    for name, value in state.items():
        if value.ndim:  # all but the count of steps
            state[name] = value.index_select(dim, index)
