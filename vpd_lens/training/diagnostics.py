"""Early warnings for the ways in which a run is known to fail.

Each is given once. They look at logged values only, so they cost nothing between log steps.
"""

from __future__ import annotations

import statistics
import warnings

# Steps in which no causal importance function has learned anything yet.
_TOO_EARLY = 30


class TrainingWarning(UserWarning):
    """A run shows signs of a known failure."""


class Diagnostics:
    """Watches the logged metrics of one run.

    Args:
        c_total: Number of subcomponents.
        steps: Steps of the run.
    """

    def __init__(self, c_total: int, steps: int) -> None:
        self.c_total = c_total
        self.steps = steps
        self.gradient_norms: list[float] = []
        self.given: set[str] = set()

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Compare the metrics of one log step with the known failures.

        Args:
            step: Finished steps.
            metrics: `l0` (mean number of subcomponents with importance above 0), `ci_max` (mean
                over positions of the largest importance) and `grad_norm/importance`.
        """
        progress = step / self.steps
        early = step < _TOO_EARLY
        if progress >= 0.1 and not early and metrics["ci_max"] < 0.5:
            self._warn(
                "collapse",
                f"step {step}: causal importances have collapsed (the largest at a position is "
                f"{metrics['ci_max']:.2f} on average). minimality.coefficient is too high; lower "
                "it by 2-5x.",
            )
        if progress >= 0.6 and not early and metrics["l0"] > 0.5 * self.c_total:
            self._warn(
                "dense",
                f"step {step}: {metrics['l0']:.0f} of {self.c_total} subcomponents are still "
                "active per position. minimality.coefficient is too low (raise it by 2-5x), or "
                "optimiser.lr is too high and importances jumped to 1.",
            )
        norm = metrics["grad_norm/importance"]
        if len(self.gradient_norms) >= 5:
            usual = statistics.median(self.gradient_norms)
            if norm > 30 * usual > 0:
                self._warn(
                    "diverging",
                    f"step {step}: the gradient of the causal importance function is "
                    f"{norm / usual:.0f} times its usual size. Set optimiser.clip_importance=1.0; "
                    "the importance penalty is steep near 0 once p is below 1.",
                )
        self.gradient_norms.append(norm)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            warnings.warn(message, TrainingWarning, stacklevel=4)
