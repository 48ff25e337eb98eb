"""Everything that is measured on one decomposition (VPD, evaluation), as running means.

Each class takes batches one at a time and keeps only sums, so that any amount of data can be
evaluated in bounded memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vpd_lens.decomposition import Decomposition, Divergence, Layout, Masks
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.masks import uniform_k_subset, uniform_sources

ALIVE = 1e-6
HISTOGRAM_BINS = 50


def next_token_cross_entropy(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> float:
    """Mean cross-entropy of the next token in nats, over `batch * (pos - 1)` predictions."""
    return float(F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()))


MaskMaker = Callable[[Tensor, Layout, torch.Generator], Masks]


def masking_modes(rounding: Sequence[float]) -> dict[str, MaskMaker]:
    """The masking modes of the evaluation table, each from importances to masks.

    The delta is excluded (mask 0) except in the stochastic modes, where it is drawn from U(0, 1)
    as in training.

    Args:
        rounding: Thresholds of the rounded modes.
    """

    def without_delta(components: Callable[[Tensor, torch.Generator], Tensor]) -> MaskMaker:
        return lambda g, layout, generator: Masks(
            components(g, generator), g.new_zeros(*g.shape[:-1], layout.n_sites)
        )

    def stochastic(g: Tensor, layout: Layout, generator: torch.Generator) -> Masks:
        return uniform_sources(g, layout, generator).masks(g)

    def subset(g: Tensor, layout: Layout, generator: torch.Generator) -> Masks:
        masks = stochastic(g, layout, generator)
        masks.routed = uniform_k_subset(masks.delta.shape, g.device, generator)
        return masks

    def rounded(threshold: float) -> MaskMaker:
        return without_delta(lambda g, _: (g > threshold).to(g.dtype))

    return {
        "unmasked": without_delta(lambda g, _: torch.ones_like(g)),
        "stochastic": stochastic,
        "stochastic_subset": subset,
        "ci": without_delta(lambda g, _: g),
        **{f"rounded>{t:g}": rounded(t) for t in rounding},
        "random": without_delta(
            lambda g, generator: torch.empty_like(g).uniform_(generator=generator)
        ),
        "zero": without_delta(lambda g, _: torch.zeros_like(g)),
    }


class Means:
    """Running means by name, weighted by the number of positions."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add one batch' mean."""
        self.sums[name] += value * weight
        self.counts[name] += weight

    def means(self) -> dict[str, float]:
        """All means."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


class Sparsity:
    """L0, alive counts, the CI histogram and the mean CI of every subcomponent.

    Args:
        layout: The columns of each site.
        thresholds: L0 counts subcomponents with importance above each.
        device: Where the sums live.
    """

    def __init__(self, layout: Layout, thresholds: Sequence[float], device: torch.device) -> None:
        self.layout = layout
        self.thresholds = thresholds
        self.n_positions = 0
        self.total = torch.zeros(layout.total, device=device, dtype=torch.float64)
        self.active = torch.zeros(len(thresholds), layout.total, device=device, dtype=torch.float64)
        self.histogram = torch.zeros(HISTOGRAM_BINS, device=device, dtype=torch.float64)

    def add(self, importance: Float[Tensor, "*batch C_total"]) -> None:
        """Add the importances of one batch."""
        g = importance.flatten(0, -2)
        self.n_positions += g.shape[0]
        self.total += g.sum(0)
        for row, threshold in zip(self.active, self.thresholds, strict=True):
            row += (g > threshold).sum(0)
        self.histogram += torch.histc(g, HISTOGRAM_BINS, 0, 1)

    def mean_importance(self) -> Tensor:
        """Mean CI of every subcomponent, `[C_total]`."""
        return (self.total / self.n_positions).float()

    def l0(self) -> dict[str, dict[str, float]]:
        """`{threshold: {site: L0, ..., layer sums, total}}`, means per position."""
        result = {}
        for row, threshold in zip(self.active, self.thresholds, strict=True):
            per_site = self.layout.sum_per_site(row / self.n_positions).tolist()
            result[f"{threshold:g}"] = grouped(self.layout.names, per_site)
        return result

    def alive(self) -> dict[str, float]:
        """Number of subcomponents with mean CI above 1e-6: per site, layer and in all."""
        alive = (self.mean_importance() > ALIVE).float()
        return grouped(self.layout.names, self.layout.sum_per_site(alive).tolist())


def grouped(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Values by site, their sums by layer (`blocks.0`, ...), and their `total`."""
    result = dict(zip(names, values, strict=True))
    layers: dict[str, float] = defaultdict(float)
    for name, value in zip(names, values, strict=True):
        if name.startswith("blocks."):
            layers[".".join(name.split(".")[:2])] += value
    return {**result, **layers, "total": float(sum(values))}


@torch.no_grad()
def delta_sizes(vpd: Decomposition) -> dict[str, dict[str, float]]:
    """What the subcomponents leave over: `mse` (per entry), `relative` (`||.||_F / ||W||_F`).

    Subcomponents folded into a delta count as explained, so this is of `W - F - V U`;
    `folded` is the relative size of their sum F, which the delta's mask switches with the rest.

    Args:
        vpd: The decomposition.
    """
    weights = [site.weight.float() for site in vpd.sites]
    references = vpd.subcomponents.references(weights)
    deltas = vpd.subcomponents.deltas(references)
    folded = [w - reference for w, reference in zip(weights, references, strict=True)]
    rows = zip(vpd.layout.names, deltas, folded, weights, strict=True)
    result = {
        name: {
            "mse": float(delta.square().mean()),
            "relative": float(delta.norm() / weight.norm()),
            "folded": float(gone.norm() / weight.norm()),
        }
        for name, delta, gone, weight in rows
    }
    squares, gone, whole = (
        sum(float(part.square().sum()) for part in parts) for parts in (deltas, folded, weights)
    )
    result["total"] = {
        "mse": squares / sum(delta.numel() for delta in deltas),
        "relative": (squares / whole) ** 0.5,
        "folded": (gone / whole) ** 0.5,
    }
    return result


def hidden_error(
    vpd: Decomposition, batch: Tensor, masks: Masks, clean: Sequence[Tensor]
) -> dict[str, float]:
    """Error of every site's output in a masked forward, relative to the output's mean square.

    Errors of earlier sites propagate; nothing is teacher-forced.

    Args:
        vpd: The decomposition.
        batch: Tokens.
        masks: The masks.
        clean: The target's outputs at every site.
    """
    _, masked = vpd.run_recording(masks, batch)
    return {
        name: float((y - target).square().mean() / target.square().mean().clamp(min=1e-12))
        for name, y, target in zip(vpd.layout.names, masked, clean, strict=True)
    }


def pgd_curve(
    vpd: Decomposition,
    batch: Tensor,
    importance: Tensor,
    divergence: Divergence,
    steps: Sequence[int],
    step_size: float,
    generator: torch.Generator,
) -> dict[int, float]:
    """Divergence under a fresh shared adversary after each of several step counts.

    Args:
        vpd: The decomposition.
        batch: Tokens.
        importance: Causal importances on them.
        divergence: Distance from the target's output.
        steps: Step counts, along one trajectory.
        step_size: Size of a sign step.
        generator: Random generator of the start.
    """
    with vpd.frozen_subcomponents():
        _, curve = ascend(
            lambda masks: divergence(vpd.run(masks, batch)),
            importance,
            shared_sources(importance, vpd.layout, generator),
            max(steps),
            step_size,
            checkpoints=steps,
        )
    return curve
