"""What updates U, V and the causal importance function, and how fast: AdamW (VPD), or Muon.

Learning rates are functions of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.config import AdversaryConfig, OptimiserConfig


def optimisers(
    parameters: Mapping[str, Sequence[nn.Parameter]], config: OptimiserConfig
) -> list[torch.optim.Optimizer]:
    """The optimisers that together update `"subcomponents"` and `"importance"`.

    Muon moves along the gradient's momentum with all its singular values set to 1, so that weak
    directions of a matrix learn as fast as strong ones; its step is scaled to the size of an
    AdamW step, and biases are left to AdamW. Parameter groups carry their peak rate as `base`.
    """
    base = {"subcomponents": config.lr, "importance": config.importance_lr or config.lr}
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}

    def groups(by_muon: bool) -> list[dict]:
        chosen = {
            name: [p for p in group if (p.ndim == 2 and config.kind == "muon") == by_muon]
            for name, group in parameters.items()
        }
        return [{"params": p, "base": base[name]} for name, p in chosen.items() if p]

    made: list[torch.optim.Optimizer] = []
    if matrices := groups(by_muon=True):
        made.append(Muon(matrices, momentum=config.momentum, **shared))
    if rest := groups(by_muon=False):
        betas = (config.beta1, config.beta2)
        made.append(torch.optim.AdamW(rest, betas=betas, fused=True, **shared))
    return made


class Muon(torch.optim.Muon):
    """PyTorch's Muon with steps of AdamW's size, orthogonalised in fp32 on a CPU.

    PyTorch orthogonalises in bf16, which a GPU multiplies fastest and a CPU without bf16 units
    many times more slowly than fp32. State and numbers are PyTorch's, up to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                dtype = gradient.dtype if gradient.device.type == "cpu" else torch.bfloat16
                ahead = gradient.lerp(mean, momentum).to(dtype)
                update = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                # The root mean square of an AdamW step is about 0.2 lr.
                size = 0.2 * lr * math.sqrt(max(parameter.shape))
                parameter.add_(update, alpha=-size)


def orthogonalised(
    matrix: Float[Tensor, "rows columns"], coefficients: tuple[float, float, float], steps: int
) -> Float[Tensor, "rows columns"]:
    """The matrix with all its singular values near 1, by Newton-Schulz iterations.

    They are `X <- a X + (b X X^T + c (X X^T)^2) X`, with the coefficients `a, b, c`.
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def keep_moments(
    optimiser: torch.optim.Optimizer, parameter: Tensor, dim: int, index: Tensor
) -> None:
    """Keep an optimiser's state, if any, of the rows `index` along `dim` of a parameter."""
    state = optimiser.state.get(parameter, {})
    for name, value in state.items():
        if value.ndim:  # all but the count of steps
            state[name] = value.index_select(dim, index)


def learning_rate(config: OptimiserConfig, base: float, step: int, steps: int) -> float:
    """The rate at a step: linear from 0 up to `base`, then a cosine to `final_fraction * base`.

    The first step is 0; at the last, `steps - 1`, the cosine is exactly at its end.
    """
    warmup = int(config.warmup * steps)
    if step < warmup:
        return base * step / warmup
    if config.schedule == "constant":
        return base
    progress = (step - warmup) / max(1, steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base * (config.final_fraction + (1 - config.final_fraction) * cosine)


def adversary_lr(config: AdversaryConfig, step: int, steps: int) -> float:
    """The sources' rate: linear from 0 over the first `lr_warmup` of training, then constant."""
    warmup = config.lr_warmup * steps
    return config.lr * (min(1.0, step / warmup) if warmup > 0 else 1.0)
