"""Ratios of things measured in turns: what slows a machine down reaches both of a pair."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def ratio(own: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of `own / base`, pair by pair; NaN where the base is zero.

    Args:
        own: Measurements, one per round; at least two.
        base: Those they were in turns with.
    """
    each = [a / b if b else float("nan") for a, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}
