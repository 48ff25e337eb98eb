"""The training losses, of a batch and of its parts.

Each reconstruction loss is the divergence between the target's output and the output under
masks; the others look at the importances and at the deltas alone. A batch may be cut into
micro-batches and shared between processes: losses and gradients are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.config import MinimalityConfig
from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.importance import LEAK, row_blocks, upper_leaky, where_above
from vpd_lens.decomposition.masks import Layout, SourceMasks, uniform_k_subset, uniform_sources
from vpd_lens.training.distributed import Processes

DivergenceOf = Callable[[SourceMasks], Tensor]


def stochastic_reconstruction(
    divergence_of: DivergenceOf,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    routing: str = "subset",
    n_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """`E_r D(f(x | masks(g, r)))`, the mean of `n_samples` draws of masks.

    `divergence_of(masks)` is how far the output under them is from the target's. `routing` is
    `"subset"`, a random one of sites at each position, or `"all"`, every site.
    """
    losses = []
    for _ in range(n_samples):
        masks = uniform_sources(importance, layout, generator).over(importance)
        if routing == "subset":
            masks.routed = uniform_k_subset(masks.delta.shape, masks.delta.device, generator)
        losses.append(divergence_of(masks))
    return torch.stack(losses).mean()


def layerwise_reconstruction(
    divergence_of: DivergenceOf,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """SPD's layer-wise loss: as `stochastic_reconstruction`, one site at a time, their mean."""
    masks = uniform_sources(importance, layout, generator).over(importance)
    losses = []
    for index in range(layout.n_sites):
        masks.routed = torch.zeros_like(masks.delta, dtype=torch.bool)
        masks.routed[..., index] = True
        losses.append(divergence_of(masks))
    return torch.stack(losses).mean()


class _PowerSum(torch.autograd.Function):
    """`sum_{b,t} (upper_leaky(z) + eps)^p` per subcomponent; its backward is one multiplication."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: float, eps: float, real: Tensor | None) -> Tensor:
        slope = torch.empty_like(z)
        total = z.new_zeros(z.shape[-1])
        kept = [] if real is None else [real.unsqueeze(-1).to(z.dtype).contiguous()]
        for rows, out, *weight in row_blocks(z.contiguous(), slope, *kept):
            g = upper_leaky(rows).add_(eps)
            torch.pow(g, p, out=out)
            if weight:
                out.mul_(weight[0])
            total += out.sum(0)
            out.div_(g).mul_(p)
            above_one = where_above(out, rows, 1.0)
            out.copy_(where_above(out, rows, 0.0)).sub_(above_one, alpha=1 - LEAK)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None, None


def importance_power_sum(
    z: Float[Tensor, "*batch C_total"],
    p: float,
    eps: float = 1e-12,
    real: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, " C_total"]:
    """`s_c = sum_{b,t} (g_upper + eps)^p` of every subcomponent, over `real` positions (or all).

    `g_upper` is the upper-leaky sigmoid of `z`, the pre-sigmoid importances.
    """
    return _PowerSum.apply(z, p, eps, real)  # type: ignore[no-any-return]


def minimality(
    power_sum: Float[Tensor, " C_total"], n_positions: int | Tensor, frequency: float
) -> Float[Tensor, ""]:
    """Importance and frequency minimality: `1/(B T) sum_c (s_c + beta s_c log2(1 + s_c))`.

    `power_sum` has `s_c` of the global batch and `n_positions` is its `B T`; `frequency` is `beta`.
    """
    s = power_sum
    return (s + frequency * s * torch.log2(1 + s)).sum() / n_positions


def faithfulness(deltas: Sequence[Float[Tensor, "_i _o"]]) -> Float[Tensor, ""]:
    """Delta-L2: `1/N sum_l ||W_l - V_l U_l||_F^2`, N the number of decomposed parameters."""
    total = torch.stack([delta.square().sum() for delta in deltas]).sum()
    return total / sum(delta.numel() for delta in deltas)


@dataclass
class Part:
    """One micro-batch of this process: its rows, what the target did on them, its importances."""

    rows: slice  # of this process's batch
    tokens: Tensor  # [rows, pos], or whatever the model takes
    real: Bool[Tensor, "rows pos"] | None  # positions that are no padding; None: all
    share: float | Tensor  # of the global batch's positions
    n_real: Tensor | None = None  # how many of those are no padding; None: all
    arguments: dict[str, Any] = field(default_factory=dict)  # besides the tokens, for the model
    inputs: list[Float[Tensor, "rows pos _d_in"]] = field(default_factory=list)  # of every site
    divergence: Divergence = field(init=False)  # distance from the target's output
    z: Float[Tensor, "rows pos C_total"] = field(init=False)  # pre-sigmoid importances


def cut(
    tokens: Tensor, real: Bool[Tensor, "batch pos"] | None, count: int, processes: Processes
) -> list[Part]:
    """Some micro-batches of this process's rows; `real` are positions that are no padding."""
    size = tokens.shape[0] // count
    rows = [slice(index * size, (index + 1) * size) for index in range(count)]
    rows = rows if count > 1 else [slice(None)]
    if real is None:
        return [Part(r, tokens[r], None, 1 / (count * processes.world)) for r in rows]
    n_real = real.sum().float()
    processes.sum_([n_real])
    return [Part(r, tokens[r], real[r], real[r].sum() / n_real, n_real) for r in rows]


def whole_minimality(
    parts: Sequence[Part], p: float, config: MinimalityConfig, processes: Processes
) -> tuple[Float[Tensor, ""], Callable[[Part], Float[Tensor, ""]]]:
    """The minimality losses of the global batch, and what has their gradient, part by part.

    The gradient of what the function gives for a part is that of the losses by its importances.
    """

    def power_sum(part: Part) -> Float[Tensor, " C_total"]:
        return importance_power_sum(part.z, p, config.eps, part.real)

    sums = [power_sum(part) for part in parts]
    total = torch.stack(sums).sum(0).detach()
    processes.sum_([total])
    n = parts[0].n_real
    if n is None:
        n = sum(part.z[..., 0].numel() for part in parts) * processes.world
    loss = minimality(total.requires_grad_(), n, config.frequency)
    (slope,) = torch.autograd.grad(loss, total)
    alone = sums[0] if len(parts) == 1 else None
    return loss.detach(), lambda part: (slope * (power_sum(part) if alone is None else alone)).sum()


@dataclass
class StepImportance:
    """Causal importances of a finished step; nothing is computed until it is asked for.

    `parts` are pre-sigmoid importances `[rows, pos, C_total]`, and which positions are real.
    """

    parts: list[tuple[Tensor, Tensor | None]]

    def whole(self) -> Float[Tensor, "batch *pos C_total"]:
        """The importances of this process's rows, 0 where there is padding."""
        found = ((z.clamp(0, 1), real) for z, real in self.parts)
        return torch.cat([g if real is None else g * real.unsqueeze(-1) for g, real in found])

    def mean(self, per_position: Tensor) -> Tensor:
        """The mean over real positions of a value `[batch, pos, ...]` that is 0 at padding."""
        total = per_position.float().flatten(0, self.parts[0][0].ndim - 2).sum(0)
        counts = [z[..., 0].numel() if r is None else r.sum() for z, r in self.parts]
        return total / sum(counts)
