"""`prune`: the fewest subcomponents that carry a behaviour, found by optimising importances.

1. The values `phi` before the sigmoid, of every subcomponent that the importance function calls
   important on a prompt, are where the search starts; everything else is constant.
2. Each step lowers the behaviour's loss under random masks, and under the masks of an adversary
   who starts anew at every step, plus the price of the nodes.
3. What is left above 0 is the circuit; it is measured under attacks that it was not trained on
   (`report`).

Source: VPD, pruning to one behaviour.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from vpd_lens.analysis.circuits.behaviour import (
    Behaviour,
    BehaviourTarget,
    Prompts,
    PruneConfig,
    behaviour_of,
)
from vpd_lens.analysis.circuits.cut_forward import narrowed_unembedding
from vpd_lens.analysis.circuits.report import CircuitReport, CircuitTest
from vpd_lens.analysis.circuits.targets import explained_decomposition
from vpd_lens.config import OptimiserConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.adversary import ascend
from vpd_lens.decomposition.importance import lower_leaky, upper_leaky
from vpd_lens.decomposition.masks import AnyMasks, Masks, uniform_sources
from vpd_lens.errors import InputError
from vpd_lens.training.optimiser import learning_rate

EPS = 1e-6  # keeps the slope of g^p finite at 0


@dataclass
class Circuit:
    """The subcomponents that carry a behaviour.

    Attributes:
        importance: Optimised importances, `[prompt, pos, C_total]`; 0 for what is not in the
            circuit.
        behaviour: Prompts and targets.
        report: What the circuit is worth under every kind of mask.
        config: How it was found.
    """

    importance: Float[Tensor, "prompt pos C_total"]
    behaviour: Behaviour
    report: CircuitReport
    config: PruneConfig

    def of_prompt(self, index: int = 0) -> Float[Tensor, "pos C_total"]:
        """Importances on one prompt, for `vpd_lens.attribute(importance=...)`.

        Args:
            index: Number of the prompt.

        Returns:
            In [0, 1], without the padding of shorter prompts.
        """
        return self.importance[index, : int(self.behaviour.lengths[index])]

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
        progress: Say how long it will take, and show a bar, or lines where the output is no
            terminal.

    Returns:
        The circuit; `print(circuit.report)`.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If prompts or targets cannot be used.

    Examples:
        >>> circuit = prune(model, "def f(self", target=",")  # doctest: +SKIP
        >>> vpd_lens.attribute(model, "def f(self", ",", prune=circuit)  # doctest: +SKIP
    """
    config = config or PruneConfig.of_target(target)
    vpd = explained_decomposition(model)
    behaviour = behaviour_of(model, prompts, target, config.objective, prepend_bos)
    with ExitStack() as stack:
        stack.enter_context(vpd.undisturbed())
        stack.enter_context(vpd.frozen_subcomponents())
        z = _before_sigmoid(vpd, behaviour)
        if "unembed" not in vpd.layout.names:
            stack.enter_context(narrowed_unembedding(model, behaviour.at_position))
        meter = stack.enter_context(_Meter(_n_passes(config), progress))
        search = _Search(vpd, behaviour, z, config, meter)
        importance = search.run()
        test = CircuitTest(search.logits_under, behaviour, search.alive, vpd.layout, config)
        report = test.report(importance, search.before, search.clean)
    return Circuit(importance, behaviour, report, config)


@torch.no_grad()
def _before_sigmoid(
    vpd: Decomposition, behaviour: Behaviour
) -> Float[Tensor, "prompt pos C_total"]:
    """Values before the sigmoid, of each prompt alone: the importance function sees padding."""
    z = torch.zeros(*behaviour.tokens.shape, vpd.layout.total, device=behaviour.tokens.device)
    for index, length in enumerate(behaviour.lengths.tolist()):
        _, inputs = vpd.target(behaviour.tokens[index : index + 1, :length])
        z[index, :length] = vpd.pre_importance(inputs)[0]
    return z


class _Search:
    """The optimisation of one circuit for each prompt.

    Args:
        vpd: The decomposition.
        behaviour: Prompts and targets.
        z: The importance function's values before the sigmoid, `[prompt, pos, C_total]`.
        config: Settings.
        meter: Learns of every pass through the model.
    """

    def __init__(
        self,
        vpd: Decomposition,
        behaviour: Behaviour,
        z: Float[Tensor, "prompt pos C_total"],
        config: PruneConfig,
        meter: _Meter,
    ) -> None:
        self.vpd, self.behaviour, self.config, self.meter = vpd, behaviour, config, meter
        self.before = lower_leaky(z) * behaviour.relevant[..., None]
        self.alive: Bool[Tensor, "prompt pos C_total"] = self.before > 0
        if not bool(self.alive.any()):
            raise InputError(
                "no subcomponent is important on these prompts, so there is nothing to prune. "
                "Is the decomposition trained?"
            )
        with torch.no_grad():
            self.clean = self.logits_under(None)
        self.phi = z[self.alive].clone().requires_grad_()
        self.where = self.alive.nonzero(as_tuple=True)
        self.generator = torch.Generator(device=z.device).manual_seed(config.seed)

    def logits_under(self, masks: AnyMasks | None) -> Float[Tensor, "prompt vocab"]:
        """Logits at the behaviour's positions."""
        logits = self.vpd.run(masks, self.behaviour.tokens)
        self.meter.advance(self.meter.task, 2 if torch.is_grad_enabled() else 1)
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
            total = loss + config.coefficient * self._minimality()
            (self.phi.grad,) = torch.autograd.grad(total, [self.phi])
            optimiser.step()
            if step == 0:
                self.meter.estimate()
            if step % max(1, config.steps // 10) == 0:
                nodes = int((self.phi > 0).sum()) / len(self.behaviour.tokens)
                text = f"step {step + 1}  loss {float(loss.detach()):.2f}  nodes {nodes:.0f}"
                self.meter.say(text)
        return self._importance().detach()

    def _importance(self) -> Float[Tensor, "prompt pos C_total"]:
        g = torch.zeros(self.alive.shape, device=self.phi.device)
        return g.index_put(self.where, lower_leaky(self.phi))

    def _minimality(self) -> Float[Tensor, ""]:
        powers = (upper_leaky(self.phi) + EPS) ** self.config.p
        return powers.sum() / len(self.behaviour.tokens)

    def _reconstruction(self) -> Float[Tensor, ""]:
        g, layout = self._importance(), self.vpd.layout
        if self.config.method == "ci":
            return self._loss(Masks(g, g.new_zeros(*g.shape[:-1], layout.n_sites)))
        stochastic = self._loss(uniform_sources(g, layout, self.generator).over(g))
        if self.config.method == "stochastic":
            return stochastic
        # Not shared over positions, unlike in training: a circuit is of one prompt, so its
        # adversary may know the prompt.
        start = uniform_sources(g, layout, self.generator)
        steps = self.config.adversary_steps, self.config.adversary_step_size
        sources, _ = ascend(self._distance, g, start, *steps, moves=self.alive)
        return 0.5 * stochastic + 0.5 * self._loss(sources.over(g))

    def _loss(self, masks: AnyMasks) -> Float[Tensor, ""]:
        logits, objective = self.logits_under(masks), self.config.objective
        return self.behaviour.loss(logits, self.clean, objective).mean()

    def _distance(self, masks: AnyMasks) -> Float[Tensor, ""]:
        """What the adversary raises: not clamped, as a clamped loss has no slope where it is 0."""
        logits, objective = self.logits_under(masks), self.config.objective
        return self.behaviour.distance(logits, self.clean, objective).mean()


def _n_passes(config: PruneConfig) -> int:
    """Forwards and backwards of a search and of the report on it."""
    step = 2 * config.adversary_steps + 4 if config.method == "adversarial" else 2
    attacks = 1 + sum(2 * steps + 1 for steps in config.attack_steps)
    test = 2 + config.draws + 2 * config.attack_restarts * attacks
    return 1 + config.steps * step + 2 * test


class _Meter(Progress):
    """How far a search is: a bar on a terminal, lines elsewhere, and how long all will take."""

    def __init__(self, n_passes: int, progress: bool) -> None:
        console = Console(quiet=not progress)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        hidden = not progress or not console.is_terminal
        super().__init__(*columns, console=console, disable=hidden, transient=True)
        self.task, self.begun = self.add_task("Pruning", total=n_passes), time.perf_counter()

    def estimate(self) -> None:
        """Say how long everything will take, if it is long, going by the passes so far."""
        task = self.tasks[0]
        minutes = (time.perf_counter() - self.begun) / task.completed * (task.total or 0) / 60
        if minutes > 1:
            self.console.print(
                f"Pruning will take about {minutes:.0f} minutes. Fewer steps, attack_steps or "
                "attack_restarts in PruneConfig make it shorter.",
                highlight=False,
            )

    def say(self, text: str) -> None:
        """Show a text in the bar, or as a line."""
        self.update(self.task, description=f"Pruning  {text}")
        if self.disable:
            self.console.print(f"Pruning  {text}", highlight=False)
