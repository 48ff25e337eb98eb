"""The training losses, of a batch and of its parts.

Each reconstruction loss is the divergence between the target's output and the output under
masks; the others look at the importances and at the deltas alone. A batch may be cut into
micro-batches and shared between processes: losses and gradients are those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.masks import NEEDED, Layout, SourceMasks, routed, uniform_sources
from vpd_lens.training.distributed import Processes

DivergenceOf = Callable[[SourceMasks], Tensor]
MOST_DONORS = 64


def stochastic_reconstruction(
    divergence_of: DivergenceOf,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    routing: str = "subset",
    n_samples: int = 1,
    generator: torch.Generator | None = None,
    donors: float = 0.0,
    real: Bool[Tensor, "*batch"] | None = None,
    delta: float | None = None,
) -> Float[Tensor, ""]:
    """`E_r D(f(x | masks(g, r)))`, the mean of `n_samples` draws of masks.

    `divergence_of(masks)` is how far the output under them is from the target's. `routing` says
    which sites are masked at a position (see `routed`). A share `donors` of the positions is
    attacked by what others need instead (see `aggregate`). The deltas' masks are random, too, or
    all `delta`.
    """
    losses = []
    for _ in range(n_samples):
        masks = uniform_sources(importance, layout, generator).over(importance)
        if delta is not None:
            masks.delta = torch.full_like(masks.delta, delta)
        masks.routed = routed(routing, masks.delta.shape, masks.delta.device, generator)
        if donors:
            aggregate(masks, donors, real, generator)
        losses.append(divergence_of(masks))
    return torch.stack(losses).mean()


def mixed(
    attacked: SourceMasks,
    share: float,
    layout: Layout,
    routing: str = "subset",
    generator: torch.Generator | None = None,
    donors: float = 0.0,
    real: Bool[Tensor, "*batch"] | None = None,
) -> SourceMasks:
    """One pass for two losses: some positions are `attacked` on every site, the others drawn.

    A position is attacked with probability `share`; else its sources are fresh and uniform, and
    `routing` and `donors` are those of the stochastic loss.
    """
    importance = attacked.importance
    drawn = uniform_sources(importance, layout, generator).over(importance)
    shape = (*importance.shape[:-1], 1)
    coin = torch.rand(shape, device=importance.device, generator=generator) < share
    drawn.routed = routed(routing, drawn.delta.shape, coin.device, generator)
    if donors:
        aggregate(drawn, donors, real, generator)
    return SourceMasks(
        importance,
        torch.where(coin, attacked.components, drawn.components),
        torch.where(coin, attacked.delta, drawn.delta),
        None if drawn.routed is None else coin | drawn.routed,
    )


@torch.no_grad()
def aggregate(
    masks: SourceMasks,
    share: float,
    real: Bool[Tensor, "*batch"] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Switch on, at a random share of positions, all that some others need together, in place.

    The attack of the audit as sources: 1 for what any of k other positions needs (importance above
    0.1), 0 for the rest and the deltas, on every site. The donors are any `real` positions of the
    batch, drawn with replacement; k is spread log-uniformly from 1 to 64 over the attacked
    positions, whose number is `share` of all, rounded up.
    """
    needs = masks.importance.detach().flatten(0, -2) > NEEDED
    attacked, donors = _drawn_donors(len(needs), share, real, needs.device, generator)
    # Every shape is known to the host: the i-th donor is that of so many positions.
    union = needs.index_select(0, donors[0])
    for index in range(1, MOST_DONORS):
        n = round(len(union) * (1 - math.log(index + 1, MOST_DONORS + 1)))
        union[:n] |= needs.index_select(0, donors[index, :n])
    flat = masks.components.flatten(0, -2), masks.delta.flatten(0, -2)
    flat[0].index_copy_(0, attacked, union.to(flat[0].dtype))
    flat[1].index_fill_(0, attacked, 0)
    if masks.routed is not None:
        masks.routed.flatten(0, -2).index_fill_(0, attacked, True)


def _drawn_donors(
    n: int,
    share: float,
    real: Bool[Tensor, "*batch"] | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> tuple[Int[Tensor, " attacked"], Int[Tensor, "donors attacked"]]:
    """Which of `n` positions are attacked, in random order, and the others that they draw."""
    attacked = torch.rand(n, device=device, generator=generator).argsort()[: math.ceil(share * n)]
    shape = (MOST_DONORS, len(attacked))
    ahead = torch.rand(shape, device=device, generator=generator)
    # Real positions stand first in a ring of their own; a donor is so many places ahead in it.
    pads = torch.zeros(n, device=device) if real is None else (~real).flatten().float()
    ring = pads.argsort(stable=True)
    n_real = (n - pads.sum()).clamp(min=1).long()
    place = ring.argsort()[attacked]
    return attacked, ring[(place + 1 + (ahead * (n_real - 1)).long()) % n_real]


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
    deltas: Sequence[Float[Tensor, "_i _o"]], sizes: Float[Tensor, " n_sites"] | None = None
) -> Float[Tensor, ""]:
    """Delta-L2: `1/N sum_l ||W_l - V_l U_l||_F^2`, N the number of decomposed parameters.

    Relative to the `squared_sizes` of the `W_l`, if given: the mean over sites of
    `||Delta_l||^2 / ||W_l||^2`.
    """
    squares = torch.stack([delta.square().sum() for delta in deltas])
    if sizes is None:
        return squares.sum() / sum(delta.numel() for delta in deltas)
    return (squares / sizes).mean()


def squared_sizes(weights: Sequence[Float[Tensor, "_i _o"]]) -> Float[Tensor, " n_sites"]:
    """`||W_l||_F^2` of every site, which never changes in training."""
    sizes = torch.stack([weight.float().square().sum() for weight in weights])
    # A matrix of zeros has no size of its own; it counts as one whose entries are 1.
    return torch.where(sizes > 0, sizes, sizes.new_tensor([w.numel() for w in weights]))


@dataclass
class Part:
    """One micro-batch of this process: its rows, what the target did on them, its importances."""

    rows: slice  # of this process's batch
    tokens: Tensor  # [rows, pos], or whatever the model takes
    real: Bool[Tensor, "rows pos"] | None  # positions that are no padding; None: all
    share: float | Tensor  # of the global batch's positions at which outputs are compared
    n_real: Tensor | None = None  # positions of the global batch, no padding; None: all
    last: bool = False  # whether outputs are compared at the last position of a row only
    arguments: dict[str, Any] = field(default_factory=dict)  # besides the tokens, for the model
    inputs: list[Float[Tensor, "rows pos _d_in"]] = field(default_factory=list)  # of every site
    divergence: Divergence = field(init=False)  # distance from the target's output
    z: Float[Tensor, "rows pos C_total"] = field(init=False)  # pre-sigmoid importances


def cut(
    tokens: Tensor,
    real: Bool[Tensor, "batch pos"] | None,
    count: int,
    processes: Processes,
    last: bool = False,
) -> list[Part]:
    """Some micro-batches of this process's rows; `real` are positions that are no padding.

    Outputs are compared at these, or only at the `last` one of every row.
    """
    size = tokens.shape[0] // count
    rows = [slice(index * size, (index + 1) * size) for index in range(count)]
    rows = rows if count > 1 else [slice(None)]
    equal = 1 / (count * processes.world)
    if real is None:
        return [Part(r, tokens[r], None, equal, last=last) for r in rows]
    n_real = real.sum().float()
    processes.sum_([n_real])
    shares = [equal if last else real[r].sum() / n_real for r in rows]
    parts = zip(rows, shares, strict=True)
    return [Part(r, tokens[r], real[r], share, n_real, last) for r, share in parts]


@dataclass
class StepImportance:
    """Causal importances of a finished step; nothing is computed until it is asked for.

    `parts` are pre-sigmoid importances `[rows, pos, C_total]`, and which positions are real.
    """

    parts: list[tuple[Tensor, Tensor | None]]
    elsewhere: StepImportance | None = None  # those of the second stream

    def whole(self) -> Float[Tensor, "batch *pos C_total"]:
        """The importances of this process's rows, 0 where there is padding."""
        found = ((z.clamp(0, 1), real) for z, real in self.parts)
        return torch.cat([g if real is None else g * real.unsqueeze(-1) for g, real in found])

    @classmethod
    def of(cls, parts: Sequence[Part]) -> StepImportance:
        """Those of the micro-batches of a stream."""
        return cls([(part.z.detach(), part.real) for part in parts])

    def l0(self) -> float:
        """How many subcomponents are active at a position, on the mean."""
        return float(self.mean((self.whole() > 0).sum(-1)))

    def mean(self, per_position: Tensor) -> Tensor:
        """The mean over real positions of a value `[batch, pos, ...]` that is 0 at padding."""
        total = per_position.float().flatten(0, self.parts[0][0].ndim - 2).sum(0)
        counts = [z[..., 0].numel() if r is None else r.sum() for z, r in self.parts]
        return total / sum(counts)
