"""`EvalReport`: what `evaluate` measured, as a table, as JSON and as one HTML page."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console, Group
from rich.table import Table

from vpd_lens.errors import ArtefactError


class EvalReport(BaseModel):
    """Measurements of one decomposition.

    Attributes:
        modes: For each masking mode `kl` (nats, mean per position; the mean squared error for
            models that are not language models), `ce` (nats per token) and `ce_recovered` (1: as
            good as the target, 0: as bad as ablating everything).
        pgd: Divergence under the adversary after each step count: `mean` and `max` over starts.
        l0: Active subcomponents per position, by threshold, then by site, layer and `total`.
        alive: Subcomponents with mean CI above 1e-6, by site, layer and `total`.
        n_subcomponents: How many each site has.
        hidden_error: Relative squared error of every site's output under stochastic and CI masks.
        delta: Size of what the subcomponents leave over, by site and `total`.
        ci_histogram: Counts of importances in equal bins over [0, 1].
        mean_ci: Mean CI of every subcomponent of a site, sorted.
        divergence: `"kl"`, `"mse"` or `"custom"`.
        n_positions: Positions evaluated, pads not counted.
        batch_shape: Shape of one batch, on which each attack of the adversary runs.
        n_pgd_runs: Attacks behind `pgd`.
        seed: Seed of masks and adversary.
        trained_steps: Training steps behind the decomposition.
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

    def to_json(self, path: str | Path) -> Path:
        """Write all figures as JSON."""
        path = Path(path)
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> EvalReport:
        """Read a report that `to_json` wrote.

        Raises:
            ArtefactError: If the file is missing, damaged or not a report.
        """
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

        Args:
            path: The file.
            title: Heading of the page.
            beside: Another report, whose figures are shown in a second column.
            beside_name: What to call it, for example `"without the adversary"`.
        """
        from vpd_lens.evaluation.page import render

        path = Path(path)
        path.write_text(render(self, title, beside, beside_name), encoding="utf-8")
        return path

    def summary(self) -> dict[str, float]:
        """The figures one compares runs by."""
        return {
            "kl_unmasked": self.modes["unmasked"]["kl"],
            "kl_stochastic": self.modes["stochastic"]["kl"],
            "kl_ci": self.modes["ci"]["kl"],
            **{f"kl_pgd_{steps}": value["mean"] for steps, value in self.pgd.items()},
            "l0": self.l0["0"]["total"] if "0" in self.l0 else float("nan"),
            "alive": self.alive["total"],
            "n_subcomponents": float(sum(self.n_subcomponents.values())),
            "delta_relative": self.delta["total"]["relative"],
        }

    def tables(self, beside: EvalReport | None = None, beside_name: str = "beside") -> Group:
        """The report as rich tables.

        Args:
            beside: Another report to show next to this one.
            beside_name: Heading of its columns.
        """
        return Group(self._modes_table(beside, beside_name), self._sites_table())

    def _modes_table(self, beside: EvalReport | None, name: str) -> Table:
        unit = "KL" if self.divergence == "kl" else "divergence"
        with_ce = "ce" in self.modes["zero"]
        table = Table(title=f"Masking modes ({self.n_positions} positions)", title_justify="left")
        table.add_column("masks")
        table.add_column(unit, justify="right")
        if with_ce:
            table.add_column("CE", justify="right")
            table.add_column("CE recovered", justify="right")
        if beside is not None:
            table.add_column(f"{unit}, {name}", justify="right")
        for mode, row in self.modes.items():
            cells = [mode, f"{row['kl']:.4f}"]
            if with_ce:
                cells += [f"{row['ce']:.3f}", f"{row['ce_recovered']:.1%}"]
            if beside is not None:
                cells.append(f"{beside.modes[mode]['kl']:.4f}" if mode in beside.modes else "-")
            table.add_row(*cells)
        table.add_section()
        for steps, value in self.pgd.items():
            cells = [f"adversarial, {steps} steps", f"{value['mean']:.3f} (max {value['max']:.3f})"]
            cells += ["", ""] if with_ce else []
            if beside is not None:
                cells.append(f"{beside.pgd[steps]['mean']:.3f}" if steps in beside.pgd else "-")
            table.add_row(*cells)
        table.add_section()
        for label, key in (("L0", "l0"), ("alive", "alive"), ("subcomponents", "n_subcomponents")):
            cells = [label, f"{self.summary()[key]:.0f}"] + (["", ""] if with_ce else [])
            if beside is not None:
                cells.append(f"{beside.summary()[key]:.0f}")
            table.add_row(*cells)
        return table

    def _sites_table(self) -> Table:
        first = next(iter(self.l0))
        table = Table(title="Sites", title_justify="left")
        columns = ("site", f"L0 (> {first})", "alive", "C", "|delta|/|W|", "hidden error (ci)")
        for column in columns:
            table.add_column(column, justify="left" if column == "site" else "right")
        for site, count in self.n_subcomponents.items():
            table.add_row(
                site,
                f"{self.l0[first][site]:.1f}",
                f"{self.alive[site]:.0f}",
                str(count),
                f"{self.delta[site]['relative']:.4f}",
                f"{self.hidden_error['ci'][site]:.3f}",
            )
        return table

    def __rich__(self) -> Any:
        """What `rich.print(report)` shows."""
        return self.tables()

    def __str__(self) -> str:
        """The tables as plain text."""
        return self._printed().export_text()

    def _repr_html_(self) -> str:
        """The tables in a notebook."""
        return self._printed().export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _printed(self) -> Console:
        console = Console(width=100, no_color=True, record=True, file=StringIO())
        console.print(self.tables())
        return console

    def __repr__(self) -> str:
        """The summary on one line."""
        figures = ", ".join(f"{key}={value:.4g}" for key, value in self.summary().items())
        return f"EvalReport({figures})"
