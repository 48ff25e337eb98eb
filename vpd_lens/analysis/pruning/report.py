"""What a circuit is worth: the behaviour under every kind of mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vpd_lens.analysis.pruning.attack import attack
from vpd_lens.analysis.pruning.behaviour import Behaviour
from vpd_lens.analysis.pruning.config import PruneConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.masks import AnyMasks, Masks, uniform_sources


class CircuitReport(BaseModel):
    """Probability of the target token under masks made from a circuit's importances.

    Attributes:
        targets: The target token of each prompt.
        method: How the circuit was found.
        nodes: Subcomponents with an importance above 0, over all positions; mean over prompts.
        nodes_before: The same for the importance function itself.
        nodes_by_site: The same by site.
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
        """The same before pruning."""
        return {name: sum(p) / len(p) for name, p in self.probability_before.items()}

    def table(self) -> Table:
        """As a rich table."""
        targets = ", ".join(map(repr, dict.fromkeys(self.targets)))
        sites = ", ".join(f"{site} {n:.0f}" for site, n in self.nodes_by_site.items() if n)
        table = Table(
            *("masks", "circuit", "before pruning"),
            title=f"probability of {targets}",
            caption=f"nodes by site: {sites}",
        )
        table.add_row("nodes", f"{self.nodes:.0f}", f"{self.nodes_before:.0f}", end_section=True)
        before = self.mean_before
        for name, value in self.mean.items():
            table.add_row(name, f"{value:.3f}", f"{before[name]:.3f}")
        return table

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def circuit_report(
    vpd: Decomposition,
    behaviour: Behaviour,
    importance: Float[Tensor, "prompt pos C_total"],
    before: Float[Tensor, "prompt pos C_total"],
    clean_logits: Float[Tensor, "prompt pos vocab"],
    config: PruneConfig,
) -> CircuitReport:
    """Measure a circuit.

    Args:
        vpd: The decomposition.
        behaviour: Prompts and targets.
        importance: The circuit's importances.
        before: Those of the importance function.
        clean_logits: The target model's.
        config: Attacks, draws and seed.
    """
    counts = (importance > 0).float().sum(1)
    by_site = vpd.layout.sum_per_site(counts).mean(0).tolist()
    measured = [
        probabilities(vpd, behaviour, g, before > 0, clean_logits, config)
        for g in (importance, before)
    ]
    return CircuitReport(
        targets=behaviour.names,
        method=config.method,
        nodes=float(counts.sum(-1).mean()),
        nodes_before=float((before > 0).float().sum((1, 2)).mean()),
        nodes_by_site=dict(zip(vpd.layout.names, by_site, strict=True)),
        probability=measured[0],
        probability_before=measured[1],
    )


@torch.no_grad()
def probabilities(
    vpd: Decomposition,
    behaviour: Behaviour,
    importance: Float[Tensor, "prompt pos C_total"],
    alive: Bool[Tensor, "prompt pos C_total"],
    clean_logits: Float[Tensor, "prompt pos vocab"],
    config: PruneConfig,
) -> dict[str, tuple[float, ...]]:
    """Probability of each prompt's token under every kind of mask; see `CircuitReport`.

    Args:
        vpd: The decomposition.
        behaviour: Prompts and targets.
        importance: Importances `g`.
        alive: Whose sources the adversary of `adversarial-N` moves.
        clean_logits: The target model's.
        config: Attacks, draws and seed.
    """
    g, layout = importance, vpd.layout
    generator = torch.Generator(device=g.device).manual_seed(config.seed + 1)
    none = g.new_zeros(*g.shape[:-1], layout.n_sites)

    def p(masks: AnyMasks) -> Tensor:
        return behaviour.probability(vpd.run(masks, behaviour.tokens))

    draws = torch.stack(
        [p(uniform_sources(g, layout, generator).over(g)) for _ in range(config.draws)]
    )
    found: dict[str, Tensor] = {
        "target": behaviour.probability(clean_logits),
        "ci": p(Masks(g, none)),
        "stochastic": draws.mean(0),
        "stochastic, worst": draws.min(0).values,
    }

    def loss_of(masks: AnyMasks) -> Tensor:
        return -p(masks).clamp(min=1e-30).log().sum()

    # The same starts for all attacks: what an attack does not move differs from start to start.
    starts = [uniform_sources(g, layout, generator) for _ in range(config.attack_restarts)]
    for name, attacked in (("", alive), (", all", None)):
        worst = torch.stack([p(start.over(g)) for start in starts]).min(0).values
        for steps in sorted(config.attack_steps):
            size = max(config.attack_step_size, 2 / steps)
            for start in starts:
                with torch.enable_grad():
                    sources = attack(loss_of, g, attacked, start, steps, size)
                worst = torch.minimum(worst, p(sources.over(g)))
            found[f"adversarial-{steps}{name}"] = worst
    found["ablated"] = p(Masks(1 - g, none + 1))
    return {name: tuple(values.tolist()) for name, values in found.items()}
