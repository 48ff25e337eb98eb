"""The sections of `VPDConfig`, with the paper's defaults.

A section is all that the code behind it needs to know of a run's configuration.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from vpd_lens.config.base import BelowOne, Config, Count, Fraction, Natural, NonNegative, Positive


class CausalImportanceConfig(Config):
    """Which causal importance function, and its size."""

    kind: Literal["transformer", "mlp", "vector_mlp", "shared_mlp", "global_mlp"] = "transformer"
    """`"transformer"`: one bidirectional transformer over all sites' inputs (VPD); `"mlp"`: an
    independent MLP per subcomponent on its own activation (SPD); `"vector_mlp"`: one per
    subcomponent on its site's input; `"shared_mlp"`: one MLP per site on the site's input;
    `"global_mlp"`: one MLP on the inputs of all sites."""
    d_model: Annotated[int, Field(ge=2)] | None = None
    """Width of the transformer; `None`: twice the target's, the authors' guide, or less where the
    function would have more than five times as many parameters as V and U together."""
    n_blocks: Count | None = None
    """Depth of the transformer; `None`: as many blocks as the target has with decomposed
    matrices."""
    n_heads: Count | None = None
    """Attention heads of the transformer; `None`: one per 32 dimensions."""
    d_ffn: Count | None = None
    """Hidden width of the transformer's feed-forward layers; `None`: four times `d_model`."""
    causal: bool = False
    """Whether the transformer looks at earlier positions only, so that an importance never depends
    on later tokens; `False`: both ways (the paper)."""
    conditioning: bool = False
    """Whether every importance also depends, by two leaky hard sigmoids, on the activation of its
    own subcomponent (the authors' later work)."""
    reads: Literal["sites", "blocks"] = "sites"
    """What the transformer reads: `"sites"`, the input of every site (the paper), or `"blocks"`,
    that of the first site of every block: the normalised residual stream before the block (as in
    the authors' later work)."""
    rope_base: Positive = 10_000.0
    """Base of the transformer's rotary position embedding."""
    hidden: Natural | tuple[Count, ...] = 16
    """Hidden width of the MLP variants, or the widths of several hidden layers. 0 makes them
    affine: an importance is then a monotone function of the activation (`"mlp"`) or of one
    direction (the others)."""

    def filled(self, target_width: int, target_depth: int) -> CausalImportanceConfig:
        """The same with the gaps of a transformer's size filled from the target's."""
        n_heads = self.n_heads or max(1, (self.d_model or 2 * target_width) // 32)
        d_model = self.d_model or 2 * n_heads * math.ceil(target_width / n_heads)
        size = {"d_model": d_model, "n_heads": n_heads, "d_ffn": self.d_ffn or 4 * d_model}
        return self.model_copy(update={"n_blocks": self.n_blocks or target_depth, **size})


class StochasticConfig(Config):
    """Stochastic reconstruction: random masks must not change the output."""

    coefficient: NonNegative = 0.5
    """Weight of stochastic reconstruction in the total loss."""
    routing: Literal["subset", "all", "mixed"] = "subset"
    """`"subset"`: a random subset of sites is masked at each position (VPD); `"all"`: all;
    `"mixed"`: all at every second position, by a fair coin, and a subset at the others."""
    n_samples: Count = 1
    """Mask draws per step, averaged."""
    donors: Fraction = 0.0
    """Share of the positions at which no mask is random: what 1 to 64 other positions of the batch
    need is fully on, all else at its importance, the deltas are off and every site is masked (the
    attack of the audit). So also in the merged pass, where the adversary is not; 0: the paper."""
    layerwise_coefficient: NonNegative = 0.0
    """Weight of the same loss, one site masked at a time, mean over sites (SPD): a forward each."""


class AdversaryConfig(Config):
    """Adversarial reconstruction by persistent projected gradient descent."""

    coefficient: NonNegative = 0.5
    """Weight of adversarial reconstruction in the total loss; 0 trains without an adversary."""
    inner_steps: Natural = 2
    """Updates of the sources on the current batch before the loss."""
    lr: Positive = 0.01
    """Adam learning rate of the sources."""
    lr_warmup: Fraction = 0.025
    """Fraction of training over which the sources' learning rate rises linearly from 0."""
    beta1: BelowOne = 0.5
    """Decay of the first moment in the sources' Adam."""
    beta2: BelowOne = 0.99
    """Decay of the second moment in the sources' Adam."""
    eps: Positive = 1e-8
    """Epsilon of the sources' Adam. The gradient it is compared with is that of the divergence
    summed over positions, so that it does not depend on the batch size."""
    routing: Literal["all", "subset", "mixed"] = "all"
    """`"all"` masks every site (the authors' code), `"subset"` a random subset (their text),
    `"mixed"` one or the other, as in the stochastic loss. Inner updates always mask every site, so
    that each source has a gradient."""
    scope: Literal["position", "sequence", "pool", "batch", "single"] = "position"
    """Which positions share sources: `"position"` none (the paper), `"sequence"` one set per
    sequence, `"pool"` each draws one of a few sets of its sequence at every step, `"batch"` one per
    position for the whole batch, `"single"` one."""
    pool: Count = 4
    """Sets of sources per sequence in the scope `"pool"`."""
    merge: Fraction = 0.0
    """Probability that a position of *one* masked pass has the adversary's sources on every site,
    and else fresh random ones, routed as in the stochastic loss. The pass takes the place of both,
    with the sum of their coefficients; 0: two passes (the paper)."""
    restart: Fraction = 0.0
    """Probability, per training step, that a set of sources starts over from U(0, 1), so that they
    do not settle on one attack for ever; 0 is the paper's."""


class MinimalityConfig(Config):
    """Importance and frequency minimality, fused."""

    coefficient: NonNegative = 2e-4
    """Weight of `sum_l sum_c (f + frequency * f * log2(1 + N f))`, `f` the mean of `phi`."""
    frequency: NonNegative = 0.5
    """The `beta` before the frequency term."""
    reference: Count | None = None
    """The `N` of the frequency term; `None`: the positions of a batch (the paper). With a number,
    the term does not depend on the batch size."""
    half_life: NonNegative = 0.0
    """Steps of the half-life of a moving average of `f` that takes its place in the frequency term
    (the gradient is that of the current one); 0: none (the paper)."""
    penalty: Literal["power", "smooth_l0"] = "power"
    """`phi(g)`: `"power"`, `g^p` (the paper); `"smooth_l0"`, `(1 + gamma^2) g^2 / (g^2 + gamma^2)`,
    whose slope is bounded (the authors' later work)."""
    p_start: Positive = 2.0
    """Exponent of the importances at the first step."""
    p_end: Positive = 0.4
    """Exponent that is reached, linearly."""
    eps: Positive = 1e-12
    """Added to an importance before the power."""
    gamma_start: Positive = 1.0
    """The `gamma` of the smooth penalty at the first step."""
    gamma_end: Positive = 0.01
    """The `gamma` that is reached, linearly."""
    anneal: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of training after which the end of `p` or `gamma` is reached."""
    relative: bool = False
    """Whether the coefficient (and the tolerance) is a multiple of the worst divergence, so that it
    depends less on model and divergence: that of ablating everything on the first batch, or of
    predicting the same at every position, if that is smaller."""
    tolerance: Positive | None = None
    """Divergence to end at: the mean of the reconstruction losses by their weights. The coefficient
    is only where the search for it begins. `None`: the coefficient stays (the paper)."""
    slack: Annotated[float, Field(ge=1)] = 4.0
    """How many times the tolerance is allowed at first; it is reached after 80 % of training."""
    rate: Positive = 30.0
    """How fast the coefficient follows: its change, over the whole run, for a divergence that is
    too large or too small by a factor of e, as a power of e."""
    leak: Fraction = 0.01
    """Slope of the importances above 1 that the penalty sees. What is small lets them stay far
    above 1 for long after nothing needs them any more; 1 keeps them near 1."""


class FaithfulnessConfig(Config):
    """Delta-L2: the subcomponents must sum to the weights."""

    coefficient: NonNegative = 1e7
    """Weight of `1/N sum_l ||Delta_l||_F^2`, N the number of decomposed parameters."""
    relative: bool = False
    """Whether every site counts by `||Delta_l||^2 / ||W_l||^2` instead, and their mean is taken
    (the authors' later work)."""
    warmup_steps: Natural = 400
    """AdamW steps on U and V alone against this loss, before training."""
    warmup_lr: Positive = 1e-3
    """Learning rate of the warm-up."""
    warmup_weight_decay: NonNegative = 0.0
    """Weight decay of the warm-up."""


class ElsewhereConfig(Config):
    """A second stream of data, on which the decomposition of one behaviour has to do no harm."""

    coefficient: NonNegative = 0.0
    """Weight of reconstruction there: random masks, the deltas on. 0: no second stream, the
    subcomponents are to explain the whole of the weights (the paper)."""
    minimality: NonNegative = 2.0
    """How many times minimality weighs there what it weighs on the behaviour's own data."""
    seq_len: Count | None = None
    """Tokens per sequence there; `None`: as in the behaviour's own data."""


class LocalityConfig(Config):
    """Nonlinearity locality: a subcomponent should touch few neurons, or few attention heads."""

    coefficient: NonNegative = 0.0
    """Weight of the mean soft count of the neurons plus that of the heads which a subcomponent
    writes to or reads from; 0: none (the paper)."""
    threshold_start: Positive = 8.0
    """Share of a direction's squared norm at which a neuron or head counts half, as a multiple of
    the share that each has where all have the same; at the first step."""
    threshold_end: Positive = 2.0
    """The threshold that is reached, linearly."""


class OptimiserConfig(Config):
    """The optimiser of U, V and the causal importance function."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`"adamw"` (the paper), or `"muon"`: Muon for matrices, AdamW for biases (the authors'
    later work)."""
    lr: Positive = 5e-5
    """Peak learning rate of U and V."""
    importance_lr: Positive | None = None
    """Peak learning rate of the causal importance function; `None`: `lr`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`"cosine"` falls to `final_fraction` at the last step; `"constant"` stays."""
    final_fraction: Fraction = 0.1
    """Fraction of `lr` at the end of the cosine."""
    warmup: BelowOne = 0.0
    """Fraction of training over which the rate rises linearly from 0."""
    beta1: BelowOne = 0.9
    """Adam's decay of the first moment."""
    beta2: BelowOne = 0.999
    """Adam's decay of the second moment."""
    momentum: BelowOne = 0.95
    """Muon's momentum."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    clip_subcomponents: Positive | None = 0.01
    """Largest total gradient norm of U and V; `None` does not clip."""
    clip_importance: Positive | None = None
    """Largest total gradient norm of the causal importance function; `None` does not clip."""


class CompactionConfig(Config):
    """Subcomponents that are dead for good are folded into the delta while training goes on."""

    window: Natural = 0
    """Steps over which importances are averaged; at the end of every window the dead ones are
    folded. 0: never."""
    threshold: BelowOne = 1e-6
    """Largest mean importance, over positions and the window's steps, of a dead subcomponent."""
    start: Fraction = 0.0
    """Fraction of training before which nothing is folded."""
