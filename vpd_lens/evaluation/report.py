"""`EvalReport`: what `evaluate` measured, as a table, as JSON and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Group
from rich.table import Table

from vpd_lens.errors import ArtefactError
from vpd_lens.evaluation.audit import Audit
from vpd_lens.evaluation.verdict import findings, in_words
from vpd_lens.rendering import Shown

UNITS = {"kl": "KL", "mse": "MSE", "custom": "divergence"}


class EvalReport(Shown, BaseModel):
    """Measurements of one decomposition.

    Attributes:
        modes: For each masking mode `kl` (nats, mean per position; the mean squared error for
            models that are not language models), `ce` (nats per token) and `ce_recovered` (1: as
            good as the target, 0: as bad as ablating everything).
        pgd: Divergence under the adversary after each step count: `mean` and `max` over attacks,
            and the standard `error` of the mean, if there are several.
        l0: Active subcomponents per position, by threshold, then by site, layer and `total`.
        alive: Subcomponents with mean CI above 1e-6, by site, layer and `total`.
        l0_contributing: The same as `l0` of those that contribute something at the position (see
            `vpd_lens.decomposition.idle`); `None` in reports written before this was measured.
        alive_contributing: The same as `alive`, where importances count only at such positions.
        n_subcomponents: How many each site has.
        hidden_error: Relative squared error of every site's output under stochastic and CI masks.
        delta: Size of what the subcomponents leave over, by site and `total`.
        ci_histogram: Counts of importances in equal bins over [0, 1].
        mean_ci: Mean CI of every subcomponent of a site, sorted.
        blind: Divergence of an output that is the target's mean prediction at every position.
        divergence: `"kl"`, `"mse"` or `"custom"`.
        n_positions: Positions evaluated, pads not counted.
        batch_shape: Shape of one batch, on which each attack of the adversary runs.
        n_pgd_runs: Attacks behind `pgd`.
        seed: Seed of masks and adversary.
        trained_steps: Training steps behind the decomposition.
        audit: What `evaluate(..., audit=True)` found; `None` without it.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    modes: dict[str, dict[str, float]]
    pgd: dict[str, dict[str, float]]
    l0: dict[str, dict[str, float]]
    alive: dict[str, float]
    n_subcomponents: dict[str, int]
    hidden_error: dict[str, dict[str, float]]
    delta: dict[str, dict[str, float]]
    ci_histogram: list[float]
    mean_ci: dict[str, list[float]]
    divergence: str
    n_positions: int
    batch_shape: list[int]
    n_pgd_runs: int
    seed: int
    trained_steps: int
    blind: float = math.inf
    audit: Audit | None = None
    l0_contributing: dict[str, dict[str, float]] | None = None
    alive_contributing: dict[str, float] | None = None

    def to_json(self, path: str | Path) -> Path:
        """Write all figures as JSON."""
        path = Path(path)
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> EvalReport:
        """Read what `to_json` wrote; an `ArtefactError` if it is missing, damaged or no report."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, ValidationError) as error:
            raise ArtefactError(f"{path}: not a readable evaluation report ({error}).") from None

    def to_html(
        self,
        path: str | Path,
        title: str = "VPD evaluation",
        beside: EvalReport | None = None,
        beside_name: str = "beside",
    ) -> Path:
        """Write one self-contained HTML page with tables and plots.

        `beside` is another report, whose figures are shown in a second column; `beside_name` is
        what to call it, for example `"without the adversary"`.
        """
        from vpd_lens.evaluation.page import render

        path = Path(path)
        path.write_text(render(self, title, beside, beside_name), encoding="utf-8")
        return path

    def to_png(self, folder: str | Path) -> dict[str, str]:
        """Write the main plots into a folder; the name of each file, with what it shows."""
        from vpd_lens.evaluation.page import pictures

        return pictures(self, Path(folder))

    @property
    def worst(self) -> float:
        """What a divergence is judged by: the smaller of ablating everything, and of `blind`.

        Ablating everything may do far more than to forget all about the input.
        """
        return min(self.modes["zero"]["kl"], self.blind)

    def idle(self, site: str = "total") -> float:
        """Share of L0 that contributes nothing, at the lowest threshold; NaN if not measured.

        `site` may also be a layer, or a site.
        """
        if self.l0_contributing is None:
            return math.nan
        lowest = min(self.l0, key=float)
        active, useful = (l0[lowest][site] for l0 in (self.l0, self.l0_contributing))
        return 1 - useful / active if active else 0.0

    def verdict(self) -> str:
        """What holds of what a good decomposition promises, what does not, and what to change.

        See `vpd_lens.evaluation.verdict.PROMISES` for the bounds.
        """
        return in_words(self)

    def summary(self) -> dict[str, float]:
        """The figures one compares runs by."""
        figures = {
            **{f"kl_{mode}": self.modes[mode]["kl"] for mode in ("unmasked", "stochastic", "ci")},
            **{f"kl_pgd_{steps}": value["mean"] for steps, value in self.pgd.items()},
            "l0": self.l0["0"]["total"] if "0" in self.l0 else math.nan,
            "alive": self.alive["total"],
            "n_subcomponents": float(sum(self.n_subcomponents.values())),
            "delta_relative": self.delta["total"]["relative"],
        }
        if self.l0_contributing and self.alive_contributing:
            l0 = self.l0_contributing.get("0", {}).get("total", math.nan)
            figures["l0_contributing"] = l0
            figures["alive_contributing"] = self.alive_contributing["total"]
        return figures

    def tables(self, beside: EvalReport | None = None, beside_name: str = "beside") -> Group:
        """The report as rich tables, with the figures of another report in a further column."""
        parts = [self.verdict(), "", self._promises_table(), self._modes_table(beside, beside_name)]
        if self.audit is not None:
            parts += self.audit.tables()
        return Group(*parts, self._sites_table())

    def _promises_table(self) -> Table:
        table = Table(title="What it promises", title_justify="left")
        for column in ("", "", "share"):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for found in findings(self):
            table.add_row(found.status, found.promise.question, f"{found.value:.1%}")
        return table

    def _modes_table(self, beside: EvalReport | None, name: str) -> Table:
        unit = "KL" if self.divergence == "kl" else "divergence"
        them, with_ce = beside or self, "ce" in self.modes["zero"]
        table = Table(title=f"Masking modes ({self.n_positions} positions)", title_justify="left")
        table.add_column("masks", overflow="fold")
        ce_columns = ["CE", "CE recovered"] if with_ce else []
        for column in [unit, *ce_columns, *([f"{unit}, {name}"] if beside else [])]:
            table.add_column(column, justify="right")

        def add(label: str, value: str, other: str, ce: Sequence[str] = ("", "")) -> None:
            table.add_row(label, value, *(ce if with_ce else ()), *([other] if beside else ()))

        for mode, row in self.modes.items():
            ce = [f"{row['ce']:.3f}", f"{row['ce_recovered']:.1%}"] if with_ce else []
            other = f"{them.modes[mode]['kl']:.4f}" if mode in them.modes else "-"
            add(mode, f"{row['kl']:.4f}", other, ce)
        table.add_section()
        for steps, value in self.pgd.items():
            other = f"{them.pgd[steps]['mean']:.3f}" if steps in them.pgd else "-"
            figure = f"{value['mean']:.3f} (max {value['max']:.3f})"
            add(f"adversarial, {steps} steps", figure, other)
        table.add_section()
        mine, others = self.summary(), them.summary()
        labels = {"l0": "L0", "l0_contributing": "L0, contributing", "alive": "alive"}
        labels |= {"alive_contributing": "alive, contributing", "n_subcomponents": "subcomponents"}
        for key, label in labels.items():
            if key in mine:
                add(label, f"{mine[key]:.0f}", f"{others[key]:.0f}" if key in others else "-")
        return table

    def _sites_table(self) -> Table:
        threshold, l0 = next(iter(self.l0.items()))
        table = Table(title="Sites", title_justify="left")
        table.add_column("site", no_wrap=True)
        columns = f"L0 (> {threshold})", "idle", "alive", "C", "|delta|/|W|", "hidden error (ci)"
        for column in columns:
            table.add_column(column, justify="right")
        for site, count in self.n_subcomponents.items():
            delta, error = self.delta[site]["relative"], self.hidden_error["ci"][site]
            idle = "-" if math.isnan(self.idle(site)) else f"{self.idle(site):.0%}"
            figures = f"{l0[site]:.1f}", idle, f"{self.alive[site]:.0f}", f"{count}"
            table.add_row(site, *figures, f"{delta:.4f}", f"{error:.3f}")
        return table

    def __rich__(self) -> Group:
        return self.tables()

    def __repr__(self) -> str:
        figures = ", ".join(f"{key}={value:.4g}" for key, value in self.summary().items())
        return f"EvalReport({figures})"


def headline_attack(report: EvalReport) -> str | None:
    """20 steps, the paper's headline, or the strongest attack there is."""
    return "20" if "20" in report.pgd else max(report.pgd, key=int, default=None)
