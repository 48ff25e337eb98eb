"""Everything that is measured on one decomposition, as sums, so that memory is bounded.

Every batch counts by its number of positions that are data; a short one has its own weight.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition, Divergence, Layout
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.masks import AnyMasks
from vpd_lens.sites.discovery import attends_both_ways

ALIVE = 1e-6
HISTOGRAM_BINS = 50
_ZERO = 1e-12


def reported_modes(rounding: Sequence[float]) -> dict[str, tuple[str, float]]:
    """The masking modes of a report: name in the report to mode and threshold."""
    return {
        **{mode: (mode, 0.0) for mode in ("unmasked", "stochastic", "stochastic_subset", "ci")},
        **{f"rounded>{threshold:g}": ("rounded", threshold) for threshold in rounding},
        **{mode: (mode, 0.0) for mode in ("random", "zero")},
    }


class Means:
    """Running means by name, weighted by the number of positions of each batch."""

    def __init__(self) -> None:
        self.sums: dict[Hashable, float] = defaultdict(float)
        self.counts: dict[Hashable, int] = defaultdict(int)

    def add(self, name: Hashable, mean: float, n_positions: int) -> None:
        """Add the mean of one batch."""
        if n_positions:
            self.sums[name] += mean * n_positions
            self.counts[name] += n_positions

    def means(self) -> dict[Any, float]:
        """All means."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}


def predicts_next_token(model: nn.Module, tokens: Tensor, output: Tensor) -> bool:
    """Whether the cross-entropy of the next token means something.

    The model must be causal, `tokens` integers `[batch, pos]`, and `output` `[batch, pos, vocab]`
    with a logit for every token.
    """
    if attends_both_ways(model) or tokens.is_floating_point():
        return False
    if tokens.ndim != 2 or output.shape[:-1] != tokens.shape:
        return False
    d_vocab = getattr(getattr(model, "cfg", None), "d_vocab", 0)
    return output.shape[-1] >= (d_vocab if d_vocab > 0 else int(tokens.max()) + 1)


def next_token_cross_entropy(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[float, int]:
    """Mean cross-entropy of the next token in nats, and the number of predictions, less pads."""
    targets = tokens[:, 1:] if real is None else tokens[:, 1:].masked_fill(~real[:, 1:], -100)
    n = int((targets >= 0).sum())
    flat = logits[:, :-1].float().flatten(0, 1)
    return float(F.cross_entropy(flat, targets.flatten(), ignore_index=-100)), n


class Sparsity:
    """L0 above each threshold, alive counts, the CI histogram and every subcomponent's mean CI."""

    def __init__(self, layout: Layout, thresholds: Sequence[float], device: torch.device) -> None:
        self.layout, self.thresholds = layout, thresholds
        self.n_positions = 0
        zeros = partial(torch.zeros, device=device, dtype=torch.float64)
        self.total = zeros(layout.total)
        self.largest = torch.zeros(layout.total, device=device)
        self.active = zeros(len(thresholds), layout.total)
        self.histogram = zeros(HISTOGRAM_BINS)

    def add(
        self,
        importance: Float[Tensor, "*batch C_total"],
        real: Bool[Tensor, "*batch"] | None = None,
    ) -> None:
        """Add the importances of one batch, at the positions that are data."""
        g = importance.flatten(0, -2) if real is None else importance[real]
        self.n_positions += g.shape[0]
        self.total += g.sum(0)
        if len(g):
            self.largest = torch.maximum(self.largest, g.amax(0))
        for row, threshold in zip(self.active, self.thresholds, strict=True):
            row += (g > threshold).sum(0)
        self.histogram += torch.histc(g, HISTOGRAM_BINS, 0, 1)

    def mean_importance(self) -> Float[Tensor, " C_total"]:
        """Mean CI of every subcomponent."""
        return (self.total / self.n_positions).float()

    def sorted_by_site(self) -> dict[str, list[float]]:
        """The mean CIs of every site, largest first."""
        parts = zip(self.layout.names, self.layout.split(self.mean_importance()), strict=True)
        return {name: part.sort(descending=True).values.tolist() for name, part in parts}

    def l0(self) -> dict[str, dict[str, float]]:
        """`{threshold: {site: L0, ..., layer sums, total}}`, means per position."""
        l0 = self.active / self.n_positions
        return {f"{t:g}": self._grouped(row) for t, row in zip(self.thresholds, l0, strict=True)}

    def alive(self) -> dict[str, float]:
        """Number of subcomponents with mean CI above 1e-6: per site, layer and in all."""
        return self._grouped((self.mean_importance() > ALIVE).float())

    def _grouped(self, values: Float[Tensor, " C_total"]) -> dict[str, float]:
        """Sums by site and by layer (`blocks.0`, ...), and their `total`."""
        sites = self.layout.sum_per_site(values).tolist()
        result = dict(zip(self.layout.names, sites, strict=True))
        layers: dict[str, float] = defaultdict(float)
        for name, value in result.items():
            if name.startswith("blocks."):
                layers[".".join(name.split(".")[:2])] += value
        return {**result, **layers, "total": float(sum(sites))}


@torch.no_grad()
def delta_sizes(vpd: Decomposition) -> dict[str, dict[str, float]]:
    """What the subcomponents leave over, by site and in `total`.

    Subcomponents folded into a delta count as explained, so this is of `W - F - V U`, where F is
    their sum, which the delta's mask switches with the rest: `mse` per entry, `relative` =
    `||W - F - V U||_F / ||W||_F`, `folded` = `||F||_F / ||W||_F`. The last two are NaN for a matrix
    of zeros that is not explained as zeros.
    """
    weights = [site.decomposed.float() for site in vpd.sites]
    references = vpd.subcomponents.references(weights)
    deltas = vpd.subcomponents.deltas(references)
    rows = [
        [float(part.square().sum()) for part in (delta, w - reference, w)] + [w.numel()]
        for delta, reference, w in zip(deltas, references, weights, strict=True)
    ]
    by_name = dict(zip(vpd.layout.names, rows, strict=True))
    by_name["total"] = [sum(column) for column in zip(*rows, strict=True)]
    return {
        name: {"mse": delta / n, "relative": _ratio(delta, w) ** 0.5, "folded": _ratio(f, w) ** 0.5}
        for name, (delta, f, w, n) in by_name.items()
    }


def _ratio(part: float, whole: float) -> float:
    if whole > _ZERO:
        return part / whole
    return 0.0 if part <= _ZERO else math.nan


@torch.no_grad()
def hidden_errors(
    vpd: Decomposition,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    real: Bool[Tensor, "*batch"] | None = None,
) -> dict[str, float]:
    """Error of every site's output in a masked forward, relative to the target's mean square.

    Errors of earlier sites propagate; nothing is teacher-forced. The target is computed from its
    `inputs` `[*batch, d_in]` at every site, and compared with `outputs` `[*batch, d_out]` of the
    masked forward, at the positions that are `real`.
    """
    errors = {}
    for site, x, y in zip(vpd.sites, inputs, outputs, strict=True):
        target = x.float() @ site.weight.float()
        target = target if site.bias is None else target + site.bias.float()
        pair = (y.float() - target, target)
        error, size = (float((t if real is None else t[real]).square().mean()) for t in pair)
        errors[site.name] = _ratio(error, size)
    return errors


def pgd_curve(
    vpd: Decomposition,
    batch: Batch,
    importance: Float[Tensor, "*batch C_total"],
    divergence: Divergence,
    steps: Sequence[int],
    step_size: float,
    generator: torch.Generator,
    tick: Callable[[], Any] = lambda: None,
) -> dict[int, float]:
    """Divergence under a fresh shared adversary after each of several step counts.

    They lie along one trajectory, whose start is drawn from `generator`. `divergence` is from the
    target's output, `step_size` that of a sign step; `tick` is called before every forward.
    """

    def divergence_of(masks: AnyMasks) -> Tensor:
        tick()
        return divergence(vpd.run(masks, batch.tokens, **batch.mask_argument()))

    with vpd.frozen_subcomponents():
        start = shared_sources(importance, vpd.layout, generator)
        return ascend(divergence_of, importance, start, max(steps), step_size, checkpoints=steps)[1]
