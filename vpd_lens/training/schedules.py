"""Learning rates and the exponent p as functions of the training step."""

from __future__ import annotations

import math

from vpd_lens.config import AdversaryConfig, MinimalityConfig, OptimiserConfig


def learning_rate(config: OptimiserConfig, base: float, step: int, steps: int) -> float:
    """Linear warm-up from 0, then cosine to `final_fraction * base` at the last step.

    Args:
        config: Schedule, warm-up and final fraction.
        base: Peak rate.
        step: The step, from 0.
        steps: Steps in all; at `steps - 1` the cosine is exactly at its end.
    """
    warmup = int(config.warmup * steps)
    if step < warmup:
        return base * step / warmup
    if config.schedule == "constant":
        return base
    progress = (step - warmup) / max(1, steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base * (config.final_fraction + (1 - config.final_fraction) * cosine)


def adversary_lr(config: AdversaryConfig, step: int, steps: int) -> float:
    """The sources' rate: linear from 0 over the first `lr_warmup` of training, then constant."""
    warmup = config.lr_warmup * steps
    return config.lr * (min(1.0, step / warmup) if warmup > 0 else 1.0)


def exponent(config: MinimalityConfig, step: int, steps: int) -> float:
    """The importance exponent p: linear from `p_start`, reaching `p_end` after the last step."""
    return config.p_start + (config.p_end - config.p_start) * step / steps
