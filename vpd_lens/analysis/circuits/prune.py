"""`prune`: the fewest subcomponents that carry a behaviour, found by optimising importances.

Optimised are the values `phi` before the sigmoid of what the importance function calls important.
Each step lowers the behaviour's loss under random masks, and under those of an adversary who starts
anew, plus the price of the nodes. What is left above 0 is the circuit; it is measured under attacks
that it was not trained on.

Source: VPD, pruning to one behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vpd_lens.analysis.circuits.behaviour import Behaviour, Prompts, PruneConfig, behaviour_of
from vpd_lens.analysis.circuits.cut_forward import narrowed_unembedding
from vpd_lens.analysis.circuits.targets import BehaviourTarget, explained_decomposition, token_text
from vpd_lens.config import OptimiserConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.adversary import ascend
from vpd_lens.decomposition.importance import lower_leaky, upper_leaky
from vpd_lens.decomposition.masks import AnyMasks, Masks, uniform_sources
from vpd_lens.decomposition.modes import masks_of
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown, titled
from vpd_lens.training.optimiser import learning_rate

EPS = 1e-6  # keeps the slope of g^p finite at 0


class CircuitReport(Shown, BaseModel):
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
        return {name: fmean(p) for name, p in self.probability.items()}

    @property
    def mean_before(self) -> dict[str, float]:
        """Probabilities before pruning by kind of mask, mean over prompts."""
        return {name: fmean(p) for name, p in self.probability_before.items()}

    def table(self) -> Table:
        """As a rich table."""
        table = Table(
            "masks", "circuit", "before pruning", title=f"probability of {escape(self._target)}"
        )
        table.add_row("nodes", f"{self.nodes:.0f}", f"{self.nodes_before:.0f}", end_section=True)
        before = self.mean_before
        for name, value in self.mean.items():
            table.add_row(name, f"{value:.3f}", f"{before[name]:.3f}")
        table.add_section()
        for site, n in self.nodes_by_site.items():
            if n:
                table.add_row(f"nodes at {site}", f"{n:.0f}")
        return table

    @property
    def _target(self) -> str:
        return ", ".join(map(repr, dict.fromkeys(self.targets)))

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {self.mean[name]:.2f}" for name in ("target", "ci"))
        return f"CircuitReport({self._target}, {self.method}: {self.nodes:.0f} nodes, {held})"


@dataclass(repr=False)
class Circuit(Shown):
    """The subcomponents that carry a behaviour.

    Attributes:
        importance: Optimised importances; 0 for what is not in the circuit.
        behaviour: Prompts and targets.
        report: What the circuit is worth under every kind of mask.
        config: How it was found.
    """

    importance: Float[Tensor, "prompt pos C_total"]
    behaviour: Behaviour
    report: CircuitReport
    config: PruneConfig

    def of_prompt(self, index: int = 0) -> Float[Tensor, "pos C_total"]:
        """Importances in [0, 1] on one of the prompts, without the padding of shorter ones."""
        return self.importance[index, : int(self.behaviour.lengths[index])]

    def __rich__(self) -> Group:
        return titled(f"{len(self.importance)} prompts, {self.report.method}", self.report.table())

    def __repr__(self) -> str:
        return f"Circuit({len(self.importance)} prompts, {self.report!r})"


@torch.inference_mode(False)
@torch.enable_grad()
def prune(
    model: nn.Module,
    prompts: Prompts,
    target: BehaviourTarget | Sequence[BehaviourTarget] | None = None,
    config: PruneConfig | None = None,
    *,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Circuit:
    """Find the subcomponents that a behaviour needs, at each position of its prompts.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        prompts: One or several prompts that show the behaviour; each gets a circuit of its own,
            optimised at the same time.
        target: The token that the model is to predict, for all prompts or one for each: text,
            id, `Token`, or `LogitDifference`. `None`: the model's own likeliest.
        config: Settings; by default adversarial pruning, on cross-entropy or the difference.
        prepend_bos: Whether text gets a BOS token; `None`: the model's own default.
        progress: Say how far the search is, and how long it will take.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If prompts or targets cannot be used.

    Examples:
        >>> circuit = prune(model, "def f(self", target=",")  # doctest: +SKIP
        >>> print(circuit.report)  # doctest: +SKIP
        >>> vpd_lens.attribute(model, "def f(self", ",", prune=circuit)  # doctest: +SKIP
    """
    config = config or PruneConfig.of_target(target)
    vpd = explained_decomposition(model)
    behaviour = behaviour_of(model, prompts, target, config.objective, prepend_bos)
    with ExitStack() as stack:
        stack.enter_context(vpd.undisturbed())
        stack.enter_context(vpd.frozen_subcomponents())
        stack.enter_context(vpd.kept_below())
        with torch.no_grad():  # each prompt alone, as the importance function sees padding
            alone = [vpd.inputs(behaviour.prompt(i)[None]) for i in range(len(behaviour.tokens))]
            z = pad_sequence([vpd.pre_importance(x)[0].float() for x in alone], batch_first=True)
        if "unembed" not in vpd.layout.names:
            stack.enter_context(narrowed_unembedding(model, behaviour.at_position))
        n_passes, shape = _n_passes(config), tuple(behaviour.tokens.shape)
        cost = f"{n_passes} passes forward or backward of {shape[0]} x {shape[1]} tokens"
        bar = stack.enter_context(Progress("Pruning", n_passes, show=progress, cost=cost))
        search = _Search(vpd, behaviour, z, config, bar)
        importance = search.run()
        report = search.report(importance)
    return Circuit(importance, behaviour, report, config)


def _n_passes(config: PruneConfig) -> int:
    """Forwards and backwards of a search and of the report on it."""
    step = 2 * config.adversary_steps + 4 if config.method == "adversarial" else 2
    attacks = 1 + sum(2 * steps + 1 for steps in config.attack_steps)
    test = 2 + config.draws + 2 * config.attack_restarts * attacks
    return 1 + config.steps * step + 2 * test


class _Search:
    """The optimisation of one circuit for each prompt, from `z` on, and the test of the result."""

    def __init__(
        self,
        vpd: Decomposition,
        behaviour: Behaviour,
        z: Float[Tensor, "prompt pos C_total"],
        config: PruneConfig,
        bar: Progress,
    ) -> None:
        self.vpd, self.behaviour, self.config, self.bar = vpd, behaviour, config, bar
        self.before = lower_leaky(z) * behaviour.relevant[..., None]
        self.alive: Bool[Tensor, "prompt pos C_total"] = self.before > 0
        if not bool(self.alive.any()):
            raise InputError(
                "no subcomponent is important on these prompts, so there is nothing to prune. "
                "Is the decomposition trained?"
            )
        with torch.no_grad():
            self.clean = self._logits(None)
        self.phi = z[self.alive].clone().requires_grad_()
        self.generator = torch.Generator(device=z.device).manual_seed(config.seed)

    def _logits(self, masks: AnyMasks | None) -> Float[Tensor, "prompt vocab"]:
        """Logits at the behaviour's positions."""
        logits = self.vpd.run(masks, self.behaviour.tokens)
        self.bar.advance(2 if torch.is_grad_enabled() else 1)
        if logits.shape[1] > 1:
            logits = self.behaviour.at_position(logits)
        return logits[:, 0].float()

    def run(self) -> Float[Tensor, "prompt pos C_total"]:
        """The importances that are left."""
        config = self.config
        schedule = OptimiserConfig(warmup=config.warmup, schedule="cosine", final_fraction=0)
        optimiser = torch.optim.AdamW([self.phi], lr=config.lr, weight_decay=0)
        for step in range(config.steps):
            for group in optimiser.param_groups:
                # The first step of a warm-up from 0 would do nothing.
                group["lr"] = learning_rate(schedule, config.lr, step + 1, config.steps + 1)
            loss = self._reconstruction()
            price = ((upper_leaky(self.phi) + EPS) ** config.p).sum() / len(self.clean)
            (self.phi.grad,) = torch.autograd.grad(loss + config.coefficient * price, [self.phi])
            optimiser.step()
            if step % max(1, config.steps // 10) == 0:
                nodes = int((self.phi > 0).sum()) / len(self.clean)
                text = f"step {step + 1}  loss {float(loss.detach()):.2f}  nodes {nodes:.0f}"
                self.bar.say(text)
        return self._importance().detach()

    def _importance(self) -> Float[Tensor, "prompt pos C_total"]:
        return torch.zeros_like(self.before).masked_scatter(self.alive, lower_leaky(self.phi))

    def _reconstruction(self) -> Float[Tensor, ""]:
        g, config, layout = self._importance(), self.config, self.vpd.layout
        if config.method == "ci":
            return self._loss(masks_of("ci", g, layout))
        stochastic = self._loss(uniform_sources(g, layout, self.generator).over(g))
        if config.method == "stochastic":
            return stochastic
        # Not shared over positions, unlike in training: a circuit is of one prompt, so its
        # adversary may know the prompt.
        start = uniform_sources(g, layout, self.generator)
        steps = config.adversary_steps, config.adversary_step_size
        sources, _ = ascend(self._distance, g, start, *steps, self.alive)
        return 0.5 * stochastic + 0.5 * self._loss(sources.over(g))

    def _loss(self, masks: AnyMasks) -> Float[Tensor, ""]:
        return self.behaviour.loss(self._logits(masks), self.clean).mean()

    def _distance(self, masks: AnyMasks) -> Float[Tensor, ""]:
        """What the adversary raises: not clamped, as a clamped loss has no slope where it is 0."""
        return self.behaviour.distance(self._logits(masks), self.clean).mean()

    def report(self, circuit: Float[Tensor, "prompt pos C_total"]) -> CircuitReport:
        """Compare a circuit with what it was found in."""
        counts, layout = (circuit > 0).float().sum(1), self.vpd.layout
        by_site = layout.sum_per_site(counts).mean(0).tolist()
        return CircuitReport(
            targets=tuple(token_text(self.vpd.model, t) for t in self.behaviour.target.tolist()),
            method=self.config.method,
            nodes=float(counts.sum(-1).mean()),
            nodes_before=float(self.alive.float().sum((1, 2)).mean()),
            nodes_by_site=dict(zip(layout.names, by_site, strict=True)),
            probability=self._tested(circuit),
            probability_before=self._tested(self.before),
        )

    @torch.no_grad()
    def _tested(self, g: Float[Tensor, "prompt pos C_total"]) -> dict[str, tuple[float, ...]]:
        """Probability of each prompt's token under every kind of mask; see `CircuitReport`."""
        config, layout, p = self.config, self.vpd.layout, self._probability
        generator = torch.Generator(device=g.device).manual_seed(config.seed + 1)
        ci = masks_of("ci", g, layout)
        random = (uniform_sources(g, layout, generator).over(g) for _ in range(config.draws))
        draws = torch.stack([p(masks) for masks in random])
        found = {
            "target": self.behaviour.probability(self.clean),
            "ci": p(ci),
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
        found["ablated"] = p(Masks(1 - ci.components, 1 - ci.delta))
        return {name: tuple(values.tolist()) for name, values in found.items()}

    def _probability(self, masks: AnyMasks) -> Float[Tensor, " prompt"]:
        return self.behaviour.probability(self._logits(masks))

    def _surprise(self, masks: AnyMasks) -> Float[Tensor, ""]:
        return -self._probability(masks).clamp(min=1e-30).log().sum()
