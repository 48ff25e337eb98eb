"""The sections of `VPDConfig`: losses, optimiser and compaction, with the paper's defaults.

A section is all that the code behind it needs to know of a run's configuration.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A configuration that cannot change, and refuses fields that it does not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StochasticConfig(Frozen):
    """Stochastic reconstruction: random masks must not change the output.

    Attributes:
        coefficient: Weight in the total loss.
        routing: `"subset"`: a random subset of sites per position (VPD); `"all"`: every site.
        n_samples: Mask draws per step, averaged.
        layerwise_coefficient: Weight of the same loss with one site masked at a time, mean over
            sites (SPD); one forward per site.
    """

    coefficient: float = Field(default=0.5, ge=0)
    routing: Literal["subset", "all"] = "subset"
    n_samples: int = Field(default=1, ge=1)
    layerwise_coefficient: float = Field(default=0.0, ge=0)


class AdversaryConfig(Frozen):
    """Adversarial reconstruction by persistent projected gradient descent.

    Attributes:
        coefficient: Weight in the total loss; 0 trains without an adversary.
        inner_steps: Source updates on the current batch before the loss.
        lr: Adam learning rate of the sources.
        lr_warmup: Fraction of training over which it rises linearly from 0.
        beta1: Adam's first decay.
        beta2: Adam's second decay.
        eps: Adam's epsilon. The gradient it is compared with is that of the divergence summed
            over positions, so that it does not depend on the batch size.
        routing: `"all"` masks every site (the authors' code), `"subset"` routes as the
            stochastic loss does (their text). Inner updates always mask every site.
        scope: Which positions share sources: `"position"` none (the paper), `"sequence"` one
            set per sequence, `"batch"` one per position for the whole batch, `"single"` one.
        restart: Probability, per training step, that a set of sources starts over from U(0, 1),
            so that they do not settle on one attack for ever; 0 is the paper's.
    """

    coefficient: float = Field(default=0.5, ge=0)
    inner_steps: int = Field(default=2, ge=0)
    lr: float = Field(default=0.01, gt=0)
    lr_warmup: float = Field(default=0.025, ge=0, le=1)
    beta1: float = Field(default=0.5, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    routing: Literal["all", "subset"] = "all"
    scope: Literal["position", "sequence", "batch", "single"] = "position"
    restart: float = Field(default=0.0, ge=0, le=1)


class MinimalityConfig(Frozen):
    """Importance and frequency minimality, fused.

    Attributes:
        coefficient: Weight of `1/(B T) sum_l sum_c (s + frequency * s * log2(1 + s))`.
        frequency: The `beta` before the frequency term.
        p_start: Exponent at the first step.
        p_end: Exponent that is reached, linearly, as the last step ends.
        eps: Added to an importance before the power.
    """

    coefficient: float = Field(default=2e-4, ge=0)
    frequency: float = Field(default=0.5, ge=0)
    p_start: float = Field(default=2.0, gt=0)
    p_end: float = Field(default=0.4, gt=0)
    eps: float = Field(default=1e-12, gt=0)


class FaithfulnessConfig(Frozen):
    """Delta-L2: the subcomponents must sum to the weights.

    Attributes:
        coefficient: Weight of `1/N sum_l ||Delta_l||_F^2`, N the number of decomposed parameters.
        warmup_steps: AdamW steps on U and V alone against this loss, before training.
        warmup_lr: Their learning rate.
        warmup_weight_decay: Their weight decay.
    """

    coefficient: float = Field(default=1e7, ge=0)
    warmup_steps: int = Field(default=400, ge=0)
    warmup_lr: float = Field(default=1e-3, gt=0)
    warmup_weight_decay: float = Field(default=0.0, ge=0)


class OptimiserConfig(Frozen):
    """The optimiser of U, V and the causal importance function.

    Attributes:
        kind: `"adamw"` (the paper), or `"muon"`: Muon for matrices, AdamW for biases (the
            authors' later work).
        lr: Peak learning rate of U and V.
        importance_lr: That of the causal importance function; `None`: the same.
        schedule: `"cosine"` falls to `final_fraction` at the last step; `"constant"` stays.
        final_fraction: Fraction of `lr` at the end of the cosine.
        warmup: Fraction of training over which the rate rises linearly from 0.
        beta1: Adam's first decay.
        beta2: Adam's second decay.
        momentum: Muon's.
        weight_decay: Decoupled weight decay.
        clip_subcomponents: Largest total gradient norm of U and V; `None` does not clip.
        clip_importance: The same for the causal importance function.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=5e-5, gt=0)
    importance_lr: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_subcomponents: float | None = Field(default=0.01, gt=0)
    clip_importance: float | None = Field(default=None, gt=0)


class CompactionConfig(Frozen):
    """Subcomponents that are dead for good are folded into the delta while training goes on.

    Attributes:
        window: Steps over which importances are averaged; at the end of every window the dead
            ones are folded. 0: never.
        threshold: Dead is a mean importance, over positions and the window's steps, of at most
            this.
        start: Fraction of training before which nothing is folded.
    """

    window: int = Field(default=0, ge=0)
    threshold: float = Field(default=1e-6, ge=0, lt=1)
    start: float = Field(default=0.0, ge=0, le=1)
