"""What a circuit is worth: the behaviour under every kind of mask."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table


class CircuitReport(BaseModel):
    """Probability of the target token under masks made from a circuit's importances.

    Attributes:
        targets: The target token of each prompt.
        method: How the circuit was found.
        nodes: Subcomponents with an importance above 0, over all positions; mean over prompts.
        nodes_before: The same count for the importance function itself.
        nodes_by_site: `nodes`, by site.
        probability: By kind of mask, of each prompt. `target`: the model itself. `ci`: the
            importances as masks. `stochastic`: mean over random masks; `stochastic, worst`: the
            lowest. `adversarial-N`: the worst that up to N sign steps from several starts do,
            on the sources of what the importance function calls important here, the others
            random; `adversarial-N, all`: on all sources, deltas included. `ablated`: the target
            model without the circuit.
        probability_before: The same with the importance function's importances.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...]
    method: str
    nodes: float
    nodes_before: float
    nodes_by_site: dict[str, float]
    probability: dict[str, tuple[float, ...]]
    probability_before: dict[str, tuple[float, ...]]

    @property
    def mean(self) -> dict[str, float]:
        """Probabilities by kind of mask, mean over prompts."""
        return {name: sum(p) / len(p) for name, p in self.probability.items()}

    @property
    def mean_before(self) -> dict[str, float]:
        """Probabilities before pruning by kind of mask, mean over prompts."""
        return {name: sum(p) / len(p) for name, p in self.probability_before.items()}

    def table(self) -> Table:
        """As a rich table."""
        table = Table("masks", "circuit", "before pruning", title=f"probability of {self._target}")
        table.add_row("nodes", f"{self.nodes:.0f}", f"{self.nodes_before:.0f}", end_section=True)
        before = self.mean_before
        for name, value in self.mean.items():
            table.add_row(name, f"{value:.3f}", f"{before[name]:.3f}")
        table.add_section()
        for site, n in self.nodes_by_site.items():
            if n:
                table.add_row(f"nodes at {site}", f"{n:.0f}", "")
        return table

    @property
    def _target(self) -> str:
        return ", ".join(map(repr, dict.fromkeys(self.targets)))

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {self.mean[name]:.2f}" for name in ("target", "ci"))
        return f"CircuitReport({self._target}, {self.method}: {self.nodes:.0f} nodes, {held})"
