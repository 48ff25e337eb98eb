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
from vpd_lens.training.optimiser import keep_moments
from vpd_lens.training.step import Stepper
from vpd_lens.training.window import StepImportance


def survivors(
    mean_importance: Float[Tensor, " C_total"], layout: Layout, threshold: float
) -> list[list[int]]:
    """The subcomponents of every site that are not dead, as column numbers in the site.

    A function of these means alone, so that processes which agree on them agree on the result.
    A site of which nothing is alive keeps one: the most important, the first of equals.

    Args:
        mean_importance: Mean causal importance over the window.
        layout: The columns of each site.
        threshold: Alive is what lies above.
    """
    kept = []
    for means in (part.tolist() for part in layout.split(mean_importance.cpu())):
        alive = [column for column, mean in enumerate(means) if mean > threshold]
        kept.append(alive or [means.index(max(means))])
    return kept


def compact_when_due(stepper: Stepper, importance: StepImportance, done: int) -> int:
    """Count the importances of a finished step, and fold what is dead if a window ends here.

    Args:
        stepper: Everything that training carries forward.
        importance: Causal importances of the step.
        done: Finished steps.

    Returns:
        How many subcomponents were folded.
    """
    window, config, layout = stepper.window, stepper.config.compaction, stepper.vpd.layout
    window.add(importance)
    if config.window == 0 or done % config.window:
        return 0
    mean = window.restart() / stepper.processes.world
    stepper.processes.sum_([mean])
    if done < config.start * stepper.config.steps:
        return 0
    kept = survivors(mean, layout, config.threshold)
    gone = layout.total - sum(map(len, kept))
    if gone:
        compact(stepper, Columns(layout.sizes, kept, stepper.device))
    return gone


def compact(stepper: Stepper, keep: Columns) -> None:
    """Fold all but some subcomponents, in everything that training carries forward.

    Args:
        stepper: Changed in place; its parameters stay the same objects.
        keep: Who stays.
    """
    vpd = stepper.vpd
    fold(vpd, keep)
    for parameter, dim, site, _ in per_subcomponent(vpd):
        for optimiser in stepper.optimisers:
            keep_moments(optimiser, parameter, dim, keep.of(site))
    if stepper.adversary is not None:
        stepper.adversary.keep(keep.joined, vpd.layout)
    stepper.window.keep(keep.joined)
    stepper.renew()


def sizes(stepper: Stepper) -> dict[str, float]:
    """The metric `n_subcomponents`, in all and by site; none where nothing is ever folded."""
    if stepper.config.compaction.window == 0:
        return {}
    layout = stepper.vpd.layout
    by_site = zip(layout.names, layout.sizes, strict=True)
    return {
        "n_subcomponents": float(layout.total),
        **{f"n_subcomponents/{name}": float(size) for name, size in by_site},
    }
