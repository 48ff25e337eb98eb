"""One training step, in the order of the paper: everything that a step computes is here.

1. The target's output and every site's input, without masks or gradients.
2. Causal importances.
3. The adversary's inner updates on this batch.
4. All losses and one backward pass, which also yields the adversary's last gradient.
5. The adversary's last update, gradient clipping, the optimiser.

To decompose one behaviour, a step has a batch from `elsewhere`, too: there the deltas stay on, no
adversary looks, and one more loss asks that random masks change nothing (tPD, arXiv 2607.13047).

How a batch is cut into micro-batches and shared between processes is in `losses.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from vpd_lens.config import VPDConfig
from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition, Divergence
from vpd_lens.decomposition.call import right_padding
from vpd_lens.decomposition.divergence import last_of_rows
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import SourceMasks, routed
from vpd_lens.errors import ConfigError, NonFiniteLossError
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.distributed import ALONE, Processes
from vpd_lens.training.forwards import CompiledForwards, recomputed
from vpd_lens.training.locality import Locality
from vpd_lens.training.losses import (
    Part,
    StepImportance,
    cut,
    faithfulness,
    layerwise_reconstruction,
    mixed,
    squared_sizes,
    stochastic_reconstruction,
)
from vpd_lens.training.minimality import Minimality
from vpd_lens.training.optimiser import adversary_lr, learning_rate, optimisers
from vpd_lens.training.price import Price
from vpd_lens.training.sharding import is_sharded, whole

Losses = dict[str, Tensor]


class Stepper:
    """What a training step carries forward, and the step itself, on one of `processes`.

    Attributes:
        coefficients: Weight of every loss in the total but minimality.
        price: The weight of minimality.
        parameters: Those of `"subcomponents"`, U and V, and of the `"importance"` function.
        optimisers: What updates them.
        adversary: The persistent sources; made at the first batch, whose shape they take.
        generator: Source of all randomness of the steps.
        run: Masked forwards of the model, compiled if the configuration says so.
        weights: What `V U` should add up to: what is decomposed, less what was folded.
        sizes: What their deltas are relative to, if to anything.
        locality: The locality loss at a fraction of training, if it has a weight.
        window: Sum over steps, since compaction last looked, of the mean importance `[C_total]`.

    Raises:
        ConfigError: If the target is in fp16, whose logits would get gradients of 0, or only the
            last positions are to count and the divergence is the user's own.
    """

    def __init__(self, vpd: Decomposition, config: VPDConfig, processes: Processes = ALONE) -> None:
        self.vpd, self.config, self.processes = vpd, config, processes
        self.device = vpd.device
        if config.positions == "last" and not isinstance(vpd.divergence, str):
            raise ConfigError(
                "positions='last' and a divergence of your own, which takes the mean over "
                "positions itself. Let it look at the last position only, with positions='all'."
            )
        if vpd.sites[0].weight.dtype == torch.float16:
            raise ConfigError(
                "the model is in float16, where the gradient of a mean over many positions rounds "
                "to 0. Load it in bfloat16 or float32 to train."
            )
        self.autocast = config.autocast and self.device.type == "cuda"
        self.mask_dtype = getattr(torch, config.mask_dtype)
        random, adversary = config.stochastic.coefficient, config.adversary.coefficient
        merged = config.adversary.merge > 0 and adversary > 0
        self.coefficients = {
            "stochastic": 0.0 if merged else random,
            "layerwise": config.stochastic.layerwise_coefficient,
            "adversarial": 0.0 if merged else adversary,
            "merged": random + adversary if merged else 0.0,
            "elsewhere": config.elsewhere.coefficient,
            "faithfulness": config.faithfulness.coefficient,
            "locality": config.locality.coefficient,
        }
        # The weight of the loss through which the sources get the last gradient of a step.
        self.attack = self.coefficients["merged" if merged else "adversarial"]
        self.price = Price(config.minimality, self.device)
        self.minimality = Minimality(
            config.minimality, torch.zeros(vpd.layout.total, device=self.device)
        )
        self.locality = Locality(config.locality, vpd) if config.locality.coefficient else None
        self.renew()
        self.generator = processes.generator(config.seed, self.device)
        self.adversary: PersistentAdversary | None = None
        trained = {"subcomponents": vpd.subcomponents, "importance": vpd.importance}
        self.parameters = {name: list(part.parameters()) for name, part in trained.items()}
        self.optimisers = optimisers(self.parameters, config.optimiser)
        self.window = torch.zeros(vpd.layout.total, device=self.device)

    def renew(self) -> None:
        """Make what depends on which subcomponents there are: again after a compaction."""
        vpd, config = self.vpd, self.config
        self.run: Callable[..., Tensor] = vpd.run
        if config.compile:
            self.run = CompiledForwards(vpd).run
        elif config.recompute:
            self.run = recomputed(vpd)
        self.weights = vpd.subcomponents.references([site.decomposed for site in vpd.sites])
        self.sizes = squared_sizes(self.weights) if config.faithfulness.relative else None

    def step(
        self,
        batch: Tensor,
        step: int,
        real: Tensor | None = None,
        elsewhere: Batch | None = None,
    ) -> tuple[Losses, StepImportance]:
        """Train on one batch.

        Args:
            batch: Tokens `[batch, pos]` (or whatever the model takes): this process's rows.
            step: The step, from 0; it decides learning rates and the penalty.
            real: Positions that are no padding, `[batch, pos]`; `None`: all.
            elsewhere: Rows of the second stream, if `config.elsewhere` asks for one.

        Returns:
            The losses of the global batch by name (unweighted, plus `total` and the gradient
            norms) as tensors that are still on the device, and the importances of these rows.

        Raises:
            NonFiniteLossError: On CPU, if a loss is not finite; the parameters are untouched.
        """
        parts = self._cut(Batch(batch, real), self.config.positions == "last")
        others = [] if elsewhere is None else self._cut(elsewhere)
        with self.vpd.undisturbed(), self.vpd.kept_below():
            with self._autocast():
                for part in parts:
                    self._look(part, gradient=len(parts) == 1, first=step == 0)
                for part in others:
                    self._look(part, gradient=len(others) == 1)
                if step == 0:
                    self.price.begin(self._worst(parts))
                if step == self.config.steps // 2 and self.config.minimality.tolerance:
                    self.price.unmasked = self._unmasked(parts)
                if self.attack > 0:
                    self._refine_adversary(parts, batch.shape[0], step)
            losses = self._backward(parts, others, step)
        importance = StepImportance.of(parts)
        importance.elsewhere = StepImportance.of(others) if others else None
        with record_function("vpd::update"):
            self._update(losses, parts, step)
        return losses, importance

    def _cut(self, batch: Batch, last: bool = False) -> list[Part]:
        """The micro-batches of a batch, on the device."""
        tokens, real = batch.to(self.device)
        return cut(tokens, real, self.config.micro_batches, self.processes, last)

    def _look(self, part: Part, gradient: bool, first: bool = False) -> None:
        """1 and 2: the target's output on a part, and its importances."""
        if part.real is not None:
            part.arguments = right_padding(self.vpd.model, part.real)
        with record_function("vpd::target"):
            output, part.inputs = self.vpd.target(part.tokens, **part.arguments)
            where = last_of_rows(output, part.real) if part.last else part.real
            part.divergence = Divergence(output, self.vpd.divergence, where)
        if first and (own := getattr(self.vpd.importance, "conditioning", None)) is not None:
            own.calibrate(self.vpd.subcomponents.acts(part.inputs))
            self.processes.first_(list(own.parameters()))
        # With several parts the graph of the importances is rebuilt part by part later.
        with record_function("vpd::importance"), torch.set_grad_enabled(gradient):
            part.z = self.vpd.pre_importance(part.inputs, part.real)

    @torch.no_grad()
    def _worst(self, parts: list[Part]) -> Tensor:
        """The divergence of ablating everything, or of predicting the same everywhere, if smaller.

        Of the global batch: what divergences are measured by.
        """
        worst = [torch.minimum(self._all_at(0.0, p), p.divergence.blind()) for p in parts]
        return self._mean(parts, worst)

    @torch.no_grad()
    def _unmasked(self, parts: list[Part]) -> Tensor:
        """The divergence of all subcomponents together without the deltas, of the global batch."""
        return self._mean(parts, [self._all_at(1.0, part) for part in parts])

    def _all_at(self, mask: float, part: Part) -> Tensor:
        """The divergence of a part where every subcomponent has the same mask, 0 or 1."""
        g = torch.full_like(part.z, mask)
        masks = SourceMasks(g, g, torch.zeros_like(g[..., : len(self.vpd.sites)]))
        return part.divergence(self.vpd.run(masks, part.tokens, **part.arguments))

    def _mean(self, parts: list[Part], of_parts: list[Tensor]) -> Tensor:
        """The mean over the global batch of what each part has a mean of."""
        total = torch.stack([p.share * mean for p, mean in zip(parts, of_parts, strict=True)]).sum()
        self.processes.sum_([total])
        return total

    def new_adversary(self, batch_shape: tuple[int, ...]) -> PersistentAdversary:
        """Fresh sources for batches of this leading shape."""
        of = (self.config.adversary, self.vpd.layout, batch_shape, self.device)
        return PersistentAdversary(*of, self.generator, self.processes, self.mask_dtype)

    def _refine_adversary(self, parts: list[Part], n_rows: int, step: int) -> None:
        """3: the inner updates of the sources."""
        shape = (n_rows, *parts[0].z.shape[1:-1])
        if self.adversary is None:
            self.adversary = self.new_adversary(shape)
        self.adversary.draw(shape)
        self.adversary.set_lr(adversary_lr(self.config.adversary, step, self.config.steps))
        with record_function("vpd::adversary"), self.vpd.frozen_subcomponents():
            importances = [part.z.detach().clamp(0, 1).to(self.mask_dtype) for part in parts]
            for _ in range(self.config.adversary.inner_steps):
                for part, g in zip(parts, importances, strict=True):
                    # On every site, whatever the routing of the loss.
                    loss = self._divergence(part, self.adversary.masks(g, part.rows)) * part.share
                    loss = self.attack * loss
                    loss.backward(inputs=self.adversary.leaves())
                self.adversary.ascend(self._scale(parts))

    def _backward(self, parts: list[Part], others: list[Part], step: int) -> Losses:
        """4: gradients of the total, and every loss of the global batch."""
        at = (step, self.config.steps, self.processes)
        whole_batch: Losses = {}  # on every process that of the global batch already
        whole_batch["minimality"], minimal_of = self.minimality.of(parts, *at)
        work = [(p, partial(self._losses, p, minimal_of, i, step)) for i, p in enumerate(parts)]
        if others:
            whole_batch["minimality_elsewhere"], minimal_of = self.minimality.of(others, *at)
            work += [(part, partial(self._losses_elsewhere, part, minimal_of)) for part in others]
        losses: Losses = {}
        price = self.price.coefficient
        weights = {**self.coefficients, "minimality": price}
        weights["minimality_elsewhere"] = price * self.config.elsewhere.minimality
        for part, losses_of in work:
            with record_function("vpd::losses"), self._autocast():
                if len(parts) > 1:
                    part.z = self.vpd.pre_importance(part.inputs, part.real)
                own = losses_of()
                total = torch.stack([weights[name] * own[name] for name in own]).sum()
            with record_function("vpd::backward"):
                total.backward()
            for name, loss in own.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        losses |= whole_batch
        if self.processes.world > 1:
            parameters = [p for group in self.parameters.values() for p in group]
            gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
            shares = [loss for name, loss in losses.items() if name not in whole_batch]
            self.processes.sum_(gradients + shares)
        weighted = [weights[name] * loss for name, loss in losses.items()]
        losses["total"] = torch.stack(weighted).sum()
        self.price.see(self._reconstruction(losses), step, self.config.steps)
        return losses

    def _reconstruction(self, losses: Losses) -> Tensor:
        """The mean of the reconstruction losses by their weights."""
        names = [n for n in ("stochastic", "layerwise", "adversarial", "merged") if n in losses]
        weighted = [self.coefficients[name] * losses[name] for name in names]
        return torch.stack(weighted).sum() / sum(self.coefficients[name] for name in names)

    def _losses(
        self, part: Part, minimal_of: Callable[[Part], Tensor], index: int, step: int
    ) -> Losses:
        """The losses on one part, each by its share of the global batch."""
        config, layout, draws = self.config.stochastic, self.vpd.layout, self.generator
        g = lower_leaky(part.z).to(self.mask_dtype)
        under = partial(self._divergence, part)
        losses: Losses = {}
        if self.coefficients["stochastic"] > 0:
            losses["stochastic"] = part.share * stochastic_reconstruction(
                under, g, layout, config.routing, config.n_samples, draws, config.donors, part.real
            )
        if self.coefficients["layerwise"] > 0:
            losses["layerwise"] = part.share * layerwise_reconstruction(under, g, layout, draws)
        if self.adversary is not None and self.config.adversary.merge:
            attacked = self.adversary.masks(g, part.rows)
            share = self.config.adversary.merge
            others = config.routing, draws, config.donors, part.real
            masks = mixed(attacked, share, layout, *others)
            losses["merged"] = part.share * under(masks)
        elif self.adversary is not None:
            masks = self.adversary.masks(g, part.rows)
            routing = self.config.adversary.routing
            masks.routed = routed(routing, masks.delta.shape, self.device, draws)
            losses["adversarial"] = part.share * under(masks)
        losses["minimality"] = minimal_of(part)
        if index == 0:  # they are of the weights, not of the data
            world = self.processes.world
            with self._autocast(False):
                loss = faithfulness(self.vpd.subcomponents.deltas(self.weights), self.sizes)
                losses["faithfulness"] = loss if world == 1 else loss / world
                if self.locality is not None:
                    losses["locality"] = self.locality(step / self.config.steps) / world
        return losses

    def _losses_elsewhere(self, part: Part, minimal_of: Callable[[Part], Tensor]) -> Losses:
        """The losses on a part of the second stream: the deltas hold all that happens there."""
        config = self.config.stochastic
        g = lower_leaky(part.z).to(self.mask_dtype)
        draws = (config.routing, config.n_samples, self.generator)
        under = partial(self._divergence, part)
        harm = stochastic_reconstruction(under, g, self.vpd.layout, *draws, delta=1.0)
        return {"elsewhere": part.share * harm, "minimality_elsewhere": minimal_of(part)}

    def _divergence(self, part: Part, masks: SourceMasks) -> Tensor:
        """How far the output under masks is from the target's."""
        return part.divergence(self.run(masks, part.tokens, **part.arguments))

    def _update(self, losses: Losses, parts: list[Part], step: int) -> None:
        """5: the last update of the sources, clipping, and the optimisers."""
        if self.device.type == "cpu":
            require_finite(losses)
        if self.adversary is not None:
            # Only the adversarial loss reaches the sources, so the backward pass of the total
            # has left its gradient there, times the coefficient; no second one is needed.
            self.adversary.ascend(self._scale(parts))
            self.adversary.restart()
        opt = self.config.optimiser
        limits = {"subcomponents": opt.clip_subcomponents, "importance": opt.clip_importance}
        for name, parameters in self.parameters.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if limit := limits[name]:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            losses[f"grad_norm/{name}"] = whole(norm)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(opt, group["base"], step, self.config.steps)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def _scale(self, parts: list[Part]) -> float:
        """What the sources' gradients are, relative to those of a sum over positions."""
        n_positions = sum(part.z[..., 0].numel() for part in parts) * self.processes.world
        return self.attack / n_positions

    def _autocast(self, on: bool = True) -> AbstractContextManager[Any]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)


def require_finite(losses: Losses) -> None:
    """Raise a `NonFiniteLossError` that names the losses which are NaN or infinite, if any."""
    bad = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
    if bad:
        terms = [name for name in bad if name != "total"] or bad
        raise NonFiniteLossError(
            f"the {', '.join(terms)} loss is not finite. Lower optimiser.lr, set "
            "optimiser.clip_importance=1.0, or check the data; the last checkpoint is kept."
        )


def warm_up_faithfulness(stepper: Stepper) -> float:
    """Fit `V U` to the weights before training, by AdamW; returns the last Delta-L2."""
    config = stepper.config.faithfulness
    parameters = list(stepper.vpd.subcomponents.parameters())
    lr, decay = config.warmup_lr, config.warmup_weight_decay
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
    loss = torch.zeros(())
    for _ in range(config.warmup_steps):
        optimiser.zero_grad()
        loss = faithfulness(stepper.vpd.subcomponents.deltas(stepper.weights))
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())
