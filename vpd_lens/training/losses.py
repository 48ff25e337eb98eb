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

from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.masks import Layout, SourceMasks, routed, uniform_sources
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

    `divergence_of(masks)` is how far the output under them is from the target's. `routing` says
    which sites are masked at a position (see `routed`).
    """
    losses = []
    for _ in range(n_samples):
        masks = uniform_sources(importance, layout, generator).over(importance)
        masks.routed = routed(routing, masks.delta.shape, masks.delta.device, generator)
        losses.append(divergence_of(masks))
    return torch.stack(losses).mean()


def mixed(
    attacked: SourceMasks,
    share: float,
    layout: Layout,
    routing: str = "subset",
    generator: torch.Generator | None = None,
) -> SourceMasks:
    """One pass for two losses: some positions are `attacked` on every site, the others drawn.

    A position is attacked with probability `share`; else its sources are fresh and uniform, and
    `routing` is that of the stochastic loss.
    """
    importance = attacked.importance
    drawn = uniform_sources(importance, layout, generator)
    shape = (*importance.shape[:-1], 1)
    coin = torch.rand(shape, device=importance.device, generator=generator) < share
    masks = SourceMasks(
        importance,
        torch.where(coin, attacked.components, drawn.components),
        torch.where(coin, attacked.delta, drawn.delta),
    )
    others = routed(routing, masks.delta.shape, coin.device, generator)
    masks.routed = None if others is None else coin | others
    return masks


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


def faithfulness(
    deltas: Sequence[Float[Tensor, "_i _o"]], weights: Sequence[Tensor] | None = None
) -> Float[Tensor, ""]:
    """Delta-L2: `1/N sum_l ||W_l - V_l U_l||_F^2`, N the number of decomposed parameters.

    Relative to the `weights` `W_l`, if given: the mean over sites of `||Delta_l||^2 / ||W_l||^2`.
    """
    squares = torch.stack([delta.square().sum() for delta in deltas])
    if weights is None:
        return squares.sum() / sum(delta.numel() for delta in deltas)
    sizes = [weight.float().square().sum() for weight in weights]
    # A matrix of zeros has no size of its own; it counts as one whose entries are 1.
    sizes = [torch.where(s > 0, s, w.numel()) for s, w in zip(sizes, weights, strict=True)]
    return (squares / torch.stack(sizes)).mean()


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
