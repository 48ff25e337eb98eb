"""Compaction: subcomponents that are dead for good stop costing anything, during training.

Dead is what had almost no causal importance over a whole window of steps. It is folded into the
delta of its site (`vpd_lens.decomposition.folding`) and leaves V, U, the importance function, the
adversary and every optimiser, whose state for the others stays as it is.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.folding import Columns, fold, per_subcomponent
from vpd_lens.decomposition.masks import Layout
from vpd_lens.training.losses import StepImportance
from vpd_lens.training.optimiser import keep_moments
from vpd_lens.training.step import Stepper


def survivors(
    mean_importance: Float[Tensor, " C_total"], layout: Layout, threshold: float
) -> list[list[int]]:
    """The subcomponents of every site with a mean importance above a threshold, by column number.

    A site of which nothing is alive keeps one: the most important, the first of equals.
    """
    kept = []
    for means in (part.tolist() for part in layout.split(mean_importance.cpu())):
        alive = [column for column, mean in enumerate(means) if mean > threshold]
        kept.append(alive or [means.index(max(means))])
    return kept


def compact_when_due(stepper: Stepper, importance: StepImportance, done: int) -> int:
    """Count a step's importances, and fold what is dead if a window ends after `done` steps.

    Returns how many subcomponents were folded.
    """
    config, layout = stepper.config.compaction, stepper.vpd.layout
    if config.window == 0:
        return 0
    stepper.window += importance.mean(importance.whole())
    if done % config.window:
        return 0
    mean = stepper.window / config.window / stepper.processes.world
    stepper.window.zero_()
    stepper.processes.sum_([mean])
    if done < config.start * stepper.config.steps:
        return 0
    kept = survivors(mean, layout, config.threshold)
    gone = layout.total - sum(map(len, kept))
    if gone:
        compact(stepper, Columns(layout.sizes, kept, stepper.device))
    return gone


def compact(stepper: Stepper, keep: Columns) -> None:
    """Fold all but some subcomponents, in all that a stepper carries forward, in place."""
    fold(stepper.vpd, keep)
    for parameter, dim, site, _ in per_subcomponent(stepper.vpd):
        for optimiser in stepper.optimisers:
            keep_moments(optimiser, parameter, dim, keep.of(site))
    if stepper.adversary is not None:
        stepper.adversary.keep(keep.joined, stepper.vpd.layout)
    stepper.window = stepper.window.index_select(0, keep.joined)
    if stepper.minimality.average is not None:
        kept = stepper.minimality.average.index_select(0, keep.joined)
        stepper.minimality.average = kept
    stepper.renew()


def sizes(stepper: Stepper) -> dict[str, float]:
    """The metric `n_subcomponents`, in all and by site; none where nothing is ever folded."""
    layout = stepper.vpd.layout
    if stepper.config.compaction.window == 0:
        return {}
    names = ["n_subcomponents", *(f"n_subcomponents/{name}" for name in layout.names)]
    return dict(zip(names, map(float, (layout.total, *layout.sizes)), strict=True))
