"""Figures of what was measured and found, each a function that returns a matplotlib figure.

Notebooks show them in their own colours, light or dark; `figure.savefig` writes files in those of
`theme`. Where there is one panel, `ax=` draws it into axes of yours, in your own style.
"""

from vpd_lens.plots.attention import (
    attention_ablation,
    attention_patterns,
    head_overlap,
    head_spread,
    qk_matrix,
    qk_offsets,
    qk_pair,
    used_together,
)
from vpd_lens.plots.audits import donors, layers, levels, resistance
from vpd_lens.plots.clusters import cluster_lengths, cluster_sizes, interactions
from vpd_lens.plots.edits import doses, edits_pareto, side_effects
from vpd_lens.plots.reports import (
    adversary,
    alive,
    delta,
    hidden_error,
    importance_histogram,
    l0,
    mean_importance,
    pareto,
)
from vpd_lens.plots.runs import training
from vpd_lens.plots.style import as_svg, theme
from vpd_lens.plots.texts import importances, logit_effects, needs

__all__ = ["adversary", "alive", "as_svg", "attention_ablation", "attention_patterns"]
__all__ += ["cluster_lengths", "cluster_sizes", "delta", "donors", "doses", "edits_pareto"]
__all__ += ["head_overlap", "head_spread", "hidden_error", "importance_histogram", "importances"]
__all__ += ["interactions", "l0", "layers", "levels", "logit_effects", "mean_importance", "needs"]
__all__ += ["pareto", "qk_matrix", "qk_offsets", "qk_pair", "resistance", "side_effects", "theme"]
__all__ += ["training", "used_together"]
