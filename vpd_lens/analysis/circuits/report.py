"""What a circuit is worth: the behaviour under every kind of mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vpd_lens.analysis.circuits.behaviour import Behaviour, PruneConfig
from vpd_lens.decomposition.adversary import ascend
from vpd_lens.decomposition.masks import AnyMasks, Layout, Masks, uniform_sources

LogitsUnder = Callable[[AnyMasks], Float[Tensor, "prompt vocab"]]


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
        targets = ", ".join(map(repr, dict.fromkeys(self.targets)))
        table = Table("masks", "circuit", "before pruning", title=f"probability of {targets}")
        table.add_row("nodes", f"{self.nodes:.0f}", f"{self.nodes_before:.0f}", end_section=True)
        before = self.mean_before
        for name, value in self.mean.items():
            table.add_row(name, f"{value:.3f}", f"{before[name]:.3f}")
        sites = [(site, n) for site, n in self.nodes_by_site.items() if n]
        for number, (site, n) in enumerate(sites):
            table.rows[-1].end_section |= number == 0
            table.add_row(f"nodes at {site}", f"{n:.0f}", "")
        return table

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {self.mean[name]:.2f}" for name in ("target", "ci"))
        targets = ", ".join(map(repr, dict.fromkeys(self.targets)))
        return f"CircuitReport({targets}, {self.method}: {self.nodes:.0f} nodes, {held})"


class CircuitTest:
    """Measures how far a behaviour holds under every kind of mask.

    Args:
        logits_under: Logits at the behaviour's positions under masks.
        behaviour: Prompts and targets.
        alive: What the importance function calls important on the prompts: whose sources the
            adversary of `adversarial-N` moves, `[prompt, pos, C_total]`.
        layout: The columns of each site.
        config: Attacks, draws and seed.
    """

    def __init__(
        self,
        logits_under: LogitsUnder,
        behaviour: Behaviour,
        alive: Bool[Tensor, "prompt pos C_total"],
        layout: Layout,
        config: PruneConfig,
    ) -> None:
        self.logits_under, self.behaviour = logits_under, behaviour
        self.alive, self.layout, self.config = alive, layout, config

    def report(
        self,
        circuit: Float[Tensor, "prompt pos C_total"],
        before: Float[Tensor, "prompt pos C_total"],
        clean: Float[Tensor, "prompt vocab"],
    ) -> CircuitReport:
        """Compare a circuit with what it was found in."""
        counts = (circuit > 0).float().sum(1)
        by_site = self.layout.sum_per_site(counts).mean(0).tolist()
        return CircuitReport(
            targets=self.behaviour.names,
            method=self.config.method,
            nodes=float(counts.sum(-1).mean()),
            nodes_before=float((before > 0).float().sum((1, 2)).mean()),
            nodes_by_site=dict(zip(self.layout.names, by_site, strict=True)),
            probability=self.probabilities(circuit, clean),
            probability_before=self.probabilities(before, clean),
        )

    @torch.no_grad()
    def probabilities(
        self, g: Float[Tensor, "prompt pos C_total"], clean: Float[Tensor, "prompt vocab"]
    ) -> dict[str, tuple[float, ...]]:
        """Probability of each prompt's token under every kind of mask; see `CircuitReport`."""
        config, layout, p = self.config, self.layout, self._probability
        generator = torch.Generator(device=g.device).manual_seed(config.seed + 1)
        none = g.new_zeros(*g.shape[:-1], layout.n_sites)
        draws = torch.stack(
            [p(uniform_sources(g, layout, generator).over(g)) for _ in range(config.draws)]
        )
        found = {
            "target": self.behaviour.probability(clean),
            "ci": p(Masks(g, none)),
            "stochastic": draws.mean(0),
            "stochastic, worst": draws.min(0).values,
        }
        # The same starts for all attacks: what an attack does not move differs between starts.
        starts = [uniform_sources(g, layout, generator) for _ in range(config.attack_restarts)]
        for name, attacked in (("", self.alive), (", all", None)):
            worst = torch.stack([p(start.over(g)) for start in starts]).min(0).values
            for steps in sorted(config.attack_steps):
                size = max(config.attack_step_size, 2 / steps)
                for start in starts:
                    with torch.enable_grad():
                        sources, _ = ascend(self._surprise, g, start, steps, size, attacked)
                    worst = torch.minimum(worst, p(sources.over(g)))
                found[f"adversarial-{steps}{name}"] = worst
        found["ablated"] = p(Masks(1 - g, none + 1))
        return {name: tuple(values.tolist()) for name, values in found.items()}

    def _probability(self, masks: AnyMasks) -> Float[Tensor, " prompt"]:
        return self.behaviour.probability(self.logits_under(masks))

    def _surprise(self, masks: AnyMasks) -> Float[Tensor, ""]:
        return -self._probability(masks).clamp(min=1e-30).log().sum()
