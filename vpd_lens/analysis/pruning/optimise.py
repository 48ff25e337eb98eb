"""`prune`: the fewest subcomponents that carry a behaviour, found by optimising importances.

Everything is frozen except the values `phi` before the sigmoid of the subcomponents that are
important on a prompt; those of the importance function are where they start. The behaviour must
survive random and adversarial ablation of what is not important.

Source: VPD, pruning to one behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from vpd_lens.analysis.prompts import decomposition_of
from vpd_lens.analysis.pruning.attack import attack
from vpd_lens.analysis.pruning.behaviour import (
    Behaviour,
    BehaviourTarget,
    Prompts,
    behaviour_of,
)
from vpd_lens.analysis.pruning.config import PruneConfig
from vpd_lens.analysis.pruning.report import CircuitReport, circuit_report
from vpd_lens.analysis.targets import LogitDifference
from vpd_lens.config import OptimiserConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attachment import without_user_hooks
from vpd_lens.decomposition.masks import AnyMasks, Masks, uniform_sources
from vpd_lens.decomposition.sigmoids import lower_leaky, upper_leaky
from vpd_lens.errors import InputError
from vpd_lens.training.schedules import learning_rate

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
        """Importances on one prompt, for `vpd_lens.attribute(importance=...)`."""
        return self.importance[index, : int(self.behaviour.lengths[index])]

    def __repr__(self) -> str:
        return f"Circuit({self.report!r})"


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
        progress: Show a progress bar with the losses and the number of nodes.

    Returns:
        The circuit; `print(circuit.report)`.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If prompts or targets cannot be used.

    Example:
        >>> circuit = prune(model, "def f(self", target=",")  # doctest: +SKIP
        >>> vpd_lens.attribute(model, "def f(self", ",", prune=circuit)  # doctest: +SKIP
    """
    if config is None:
        differs = isinstance(target, LogitDifference)
        config = PruneConfig(objective="logit_difference" if differs else "ce")
    vpd = decomposition_of(model)
    behaviour = behaviour_of(model, prompts, target, config.objective, prepend_bos)
    with without_user_hooks(model), vpd.frozen_subcomponents():
        search = _Search(vpd, behaviour, config)
        importance = search.run(progress)
        report = circuit_report(
            vpd, behaviour, importance, search.before, search.clean_logits, config
        )
    return Circuit(importance, behaviour, report, config)


@torch.no_grad()
def _importances_before(
    vpd: Decomposition, behaviour: Behaviour
) -> Float[Tensor, "prompt pos C_total"]:
    """Values before the sigmoid, of each prompt alone: the importance function sees padding."""
    z = torch.zeros(*behaviour.tokens.shape, vpd.layout.total, device=vpd.device)
    for index, length in enumerate(behaviour.lengths.tolist()):
        _, inputs = vpd.target(behaviour.tokens[index : index + 1, :length])
        z[index, :length] = vpd.pre_importance(inputs)[0]
    return z


class _Search:
    def __init__(self, vpd: Decomposition, behaviour: Behaviour, config: PruneConfig) -> None:
        self.vpd, self.behaviour, self.config = vpd, behaviour, config
        self.clean_logits, _ = vpd.target(behaviour.tokens)
        self.clean = behaviour.at_position(self.clean_logits)
        z = _importances_before(vpd, behaviour)
        self.before = lower_leaky(z) * behaviour.relevant[..., None]
        self.alive: Bool[Tensor, "prompt pos C_total"] = self.before > 0
        if not bool(self.alive.any()):
            raise InputError(
                "no subcomponent is important on these prompts, so there is nothing to prune. "
                "Is the decomposition trained?"
            )
        self.phi = z[self.alive].clone().requires_grad_()
        self.where = self.alive.nonzero(as_tuple=True)
        self.generator = torch.Generator(device=vpd.device).manual_seed(config.seed)

    def run(self, progress: bool) -> Float[Tensor, "prompt pos C_total"]:
        config = self.config
        schedule = OptimiserConfig(warmup=config.warmup, schedule="cosine", final_fraction=0)
        optimiser = torch.optim.AdamW([self.phi], lr=config.lr, weight_decay=0)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task = bar.add_task("Pruning", total=config.steps)
            for step in range(config.steps):
                for group in optimiser.param_groups:
                    # The first step of a warm-up from 0 would do nothing.
                    group["lr"] = learning_rate(schedule, config.lr, step + 1, config.steps + 1)
                loss = self._reconstruction()
                total = loss + config.coefficient * self._minimality()
                (self.phi.grad,) = torch.autograd.grad(total, [self.phi])
                optimiser.step()
                if step % 10 == 9:
                    nodes = int((self.phi > 0).sum()) / len(self.behaviour.tokens)
                    text = f"Pruning  loss {float(loss.detach()):.2f}  nodes {nodes:.0f}"
                    bar.update(task, description=text)
                bar.advance(task)
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
        sources = attack(
            self._loss,
            g.detach(),
            self.alive,
            uniform_sources(g, layout, self.generator),
            self.config.adversary_steps,
            self.config.adversary_step_size,
        )
        return 0.5 * stochastic + 0.5 * self._loss(sources.over(g))

    def _loss(self, masks: AnyMasks) -> Float[Tensor, ""]:
        logits = self.vpd.run(masks, self.behaviour.tokens)
        return self.behaviour.loss(logits, self.clean, self.config.objective).mean()
