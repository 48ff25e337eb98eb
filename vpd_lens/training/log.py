"""Where metrics go: JSON lines always, a progress bar, and wandb when asked for."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from rich import progress as bars
from rich.console import Console

from vpd_lens.config import MinimalityConfig
from vpd_lens.progress import Bar
from vpd_lens.storage import disk_errors, write_text


class MetricsLog:
    """One metrics.jsonl, one progress bar, and optionally one wandb run.

    Of `steps` steps `start` are finished on entry; later lines of an earlier attempt are dropped.
    `progress` shows a bar, or lines where the output is not a terminal; `wandb` has arguments of
    `wandb.init` (`{"project": ..., "mode": "offline"}`).
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int = 0,
        progress: bool = True,
        wandb: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.steps, self.start = steps, start
        self.console = Console(quiet=not progress)
        self.run: Any = None
        self.last: dict[str, float] = {}  # metrics of an earlier attempt
        name = bars.TextColumn("[bold]{task.description}")
        more = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
        self._bar = Bar(name, bars.BarColumn(), *more, console=self.console, show=progress)
        self._task = self._bar.add_task("VPD", total=steps, completed=start)
        if wandb is not None:
            import wandb as wandb_module

            self.run = wandb_module.init(dir=str(folder), **wandb)

    def __enter__(self) -> MetricsLog:
        kept: list[str] = []
        with disk_errors(self.path):
            for line in self.path.read_text().splitlines() if self.path.exists() else ():
                with suppress(ValueError, KeyError):  # a line cut short by an interruption
                    metrics = json.loads(line)
                    if metrics.pop("step") <= self.start:
                        kept.append(line + "\n")
                        self.last = metrics
            write_text(self.path, "".join(kept))
            self._file = self.path.open("a")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        self._bar.draw(pause=0.0)
        self._file.close()
        if self.run is not None:
            self.run.finish(exit_code=0 if kind is None else 1)

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        self._bar.update(self._task, completed=step)
        self._bar.draw()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record one line of metrics, keyed by the finished steps."""
        with disk_errors(self.path):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        names = ("stochastic", "adversarial", "merged", "l0", "faithfulness")
        shown = [name for name in names if name in metrics]
        self._bar.note = text = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown)
        if not (self.console.is_terminal or self.console.is_jupyter):
            seconds = metrics["seconds_per_step"]
            left = f"{(self.steps - step) * seconds / 60:.1f} min left"
            self.say(f"step {step}/{self.steps}  {text}  {seconds * 1e3:.0f} ms/step  {left}")
        if self.run is not None:
            self.run.log(metrics, step=step)


class SilentLog:
    """What processes other than the first log to: nothing."""

    run = None
    last: ClassVar[dict[str, float]] = {}

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing, as every method here."""

    advance = say = write = __exit__


# Losses that compare outputs; the larger, the more is lost.
RANDOM = ("stochastic", "layerwise", "merged")  # merged: at some positions
RECONSTRUCTION = (*RANDOM, "adversarial")


class TrainingWarning(UserWarning):
    """A run shows signs of a known failure."""


class Diagnostics:
    """Watches the logged metrics of a run of `steps` steps on `c_total` subcomponents.

    `minimality` says what tolerance the run has, if any.
    """

    def __init__(
        self, c_total: int, steps: int, minimality: MinimalityConfig | None = None
    ) -> None:
        self.c_total, self.steps = c_total, steps
        self.minimality = minimality or MinimalityConfig()
        self.gradient_norms: list[float] = []
        self.l0: list[float] = []
        self.reconstruction: list[float] = []
        self.given: set[str] = set()
        self.suspicious = self.collapsed = False

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Compare the metrics after `step` steps with the known failures, each warned of once.

        Of the `metrics` it needs `l0` (mean number of subcomponents with importance above 0),
        `ci_max` (mean over positions of the largest importance) and `grad_norm/importance`; of the
        reconstruction losses what there is, and `worst`, what they are judged by; `unmasked` once
        it is known. Afterwards `suspicious` says that the gradient has begun to grow, `collapsed`
        that all is going wrong.
        """
        # In the first steps no causal importance function has learned anything yet.
        progress = step / self.steps if step >= 30 else 0.0
        if progress >= 0.1 and metrics["ci_max"] < 0.5:
            self._warn(
                "collapse",
                f"step {step}: causal importances have collapsed (the largest at a position is "
                f"{metrics['ci_max']:.2f} on average). minimality.coefficient is too high; lower "
                "it by 2-5x.",
            )
        if progress >= 0.6 and metrics["l0"] > 0.5 * self.c_total:
            self._warn(
                "dense",
                f"step {step}: {metrics['l0']:.0f} of {self.c_total} subcomponents are still "
                "active per position. minimality.coefficient is too low (raise it by 2-5x), or "
                "optimiser.lr is too high and importances jumped to 1.",
            )
        norm, before = metrics["grad_norm/importance"], self.gradient_norms
        usual = statistics.median(before) if len(before) >= 5 else 0.0
        if norm > 30 * usual > 0:
            self._warn(
                "diverging",
                f"step {step}: the gradient of the causal importance function is "
                f"{norm / usual:.0f} times its usual size. Set optimiser.clip_importance=1.0; "
                "the importance penalty is steep near 0 once p is below 1.",
            )
        before.append(norm)
        lost = max((metrics[name] for name in RECONSTRUCTION if name in metrics), default=0.0)
        self._look_for_collapse(step, metrics["l0"], lost, norm / usual if usual else 0.0)
        tolerance, alone = self.minimality.tolerance or math.inf, metrics.get("unmasked", 0.0)
        tolerated = tolerance * (metrics["worst"] if self.minimality.relative else 1)
        if progress and alone > tolerated:
            self._warn(
                "out of reach",
                f"step {step}: minimality.tolerance={tolerance:g} allows a divergence of "
                f"{tolerated:.3g}, but the subcomponents alone are at {alone:.3g} with nothing "
                "ablated, which no coefficient can change. Raise faithfulness.coefficient or the "
                'tolerance, or set n_subcomponents="faithful".',
            )
        random = max((metrics[name] for name in RANDOM if name in metrics), default=0.0)
        share = random / metrics["worst"] if metrics.get("worst") else 0.0
        if step == self.steps >= 200 and share > 0.1:
            self._warn(
                "costly",
                f"the divergence under random masks is still {share:.0%} of what knowing nothing "
                f"of the input would cost ({metrics['worst']:.3g}). Train longer, lower "
                "minimality.coefficient, or set minimality.tolerance.",
            )

    def _look_for_collapse(self, step: int, l0: float, lost: float, growth: float) -> None:
        """The gradient grows while less is in use and more is lost, against five lines before."""
        self.l0.append(l0)
        self.reconstruction.append(lost)
        self.suspicious = growth > 3
        if len(self.l0) <= 5:
            return
        falls, rises = l0 < 0.9 * self.l0[-6], lost > 1.2 * self.reconstruction[-6]
        if growth > 10 and falls and rises:
            self.collapsed = True
            self._warn(
                "collapsing",
                f"step {step}: the importance function is collapsing. Its gradient is {growth:.0f} "
                f"times its usual size, L0 fell from {self.l0[-6]:.0f} to {l0:.0f} and the largest "
                f"reconstruction loss rose from {self.reconstruction[-6]:.3g} to {lost:.3g} within "
                "five log lines. Lower minimality.coefficient, set "
                'minimality.penalty="smooth_l0", or raise minimality.p_end.',
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            warnings.warn(message, TrainingWarning, stacklevel=4)
