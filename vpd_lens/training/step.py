"""One training step, in the order of the paper: everything that a step computes is here.

1. The target's output and every site's input, without masks or gradients.
2. Causal importances.
3. The adversary's inner updates on this batch.
4. All losses and one backward pass, which also yields the adversary's last gradient.
5. The adversary's last update, gradient clipping, the optimiser.

A batch may be cut into micro-batches to save memory; the result is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from vpd_lens.config import VPDConfig
from vpd_lens.decomposition import Decomposition, Divergence
from vpd_lens.decomposition.compiled import CompiledForwards
from vpd_lens.decomposition.masks import SourceMasks, uniform_k_subset
from vpd_lens.decomposition.recomputation import RecomputedForwards
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.errors import NonFiniteLossError
from vpd_lens.training.adversary import PersistentAdversary
from vpd_lens.training.compaction import ImportanceWindow
from vpd_lens.training.losses import (
    faithfulness,
    importance_power_sum,
    layerwise_reconstruction,
    minimality,
    stochastic_reconstruction,
)
from vpd_lens.training.optimiser import optimisers
from vpd_lens.training.processes import ALONE, Processes
from vpd_lens.training.schedules import adversary_lr, exponent, learning_rate
from vpd_lens.training.sharding import is_sharded, whole

Losses = dict[str, Tensor]
MaskedForward = Callable[[SourceMasks, Tensor], Tensor]


@dataclass
class _Part:
    """One micro-batch: its tokens, what the target did on it, and its importances."""

    rows: slice
    batch: Tensor
    inputs: list[Tensor]
    divergence: Divergence
    z: Tensor

    def under(self, run: MaskedForward) -> Callable[[SourceMasks], Tensor]:
        """The divergence of a masked forward from the target's output."""
        return lambda masks: self.divergence(run(masks, self.batch))


class Stepper:
    """The state that a training step carries forward, and the step itself.

    Args:
        vpd: The decomposition to train.
        config: The run.
        processes: Those that train together, each on its rows of the batch.

    Attributes:
        mask_dtype: Of sources and masks.
        parameters: Those of U and V, `"subcomponents"`, and of the `"importance"` function.
        optimisers: What updates them.
        adversary: The persistent sources; made at the first batch, whose shape they take.
        generator: Source of all randomness of the steps.
        run: Masked forwards of the model, compiled if the configuration says so.
        weights: What `V U` should add up to: the base weights, less what was folded.
        window: Importances since compaction last looked at them.
    """

    def __init__(self, vpd: Decomposition, config: VPDConfig, processes: Processes = ALONE) -> None:
        self.vpd = vpd
        self.config = config
        self.processes = processes
        self.device = vpd.device
        self.mask_dtype = getattr(torch, config.mask_dtype)
        self.renew()
        self.generator = processes.generator(config.seed, self.device)
        self.adversary: PersistentAdversary | None = None
        self.parameters = {
            "subcomponents": list(vpd.subcomponents.parameters()),
            "importance": list(vpd.importance.parameters()),
        }
        self.optimisers = optimisers(self.parameters, config.optimiser)
        self.window = ImportanceWindow(config.compaction, vpd.layout.total, self.device)

    def renew(self) -> None:
        """Make what depends on which subcomponents there are: again after a compaction."""
        vpd = self.vpd
        self.run = _masked_forward(vpd, self.config)
        self.weights = vpd.subcomponents.references([site.weight for site in vpd.sites])

    def step(self, batch: Tensor, step: int) -> tuple[Losses, Tensor]:
        """Train on one batch.

        Args:
            batch: Tokens `[batch, pos]` (or whatever the model takes): this process's rows.
            step: The step, from 0; it decides learning rates and the exponent.

        Returns:
            The losses of the global batch by name (unweighted, plus `total` and the gradient
            norms) as tensors that are still on the device, and the causal importances
            `[batch, pos, C_total]` of these rows.

        Raises:
            NonFiniteLossError: On CPU, if a loss is not finite; the parameters are untouched.
        """
        self._schedule(step)
        batch = batch.to(self.device, non_blocking=True)
        with self._autocast():
            parts = self._prepare(batch)
            if self.config.adversary.coefficient > 0:
                with record_function("vpd::adversary"):
                    self._refine_adversary(parts, batch)
        losses = self._backward(parts, step)
        importance = torch.cat([part.z.detach().clamp(0, 1) for part in parts])
        with record_function("vpd::update"):
            self._update(losses, importance[..., 0].numel())
        return losses, importance

    # -------------------------------------------------------------- 1 and 2

    def _prepare(self, batch: Tensor) -> list[_Part]:
        count = self.config.micro_batches
        size = batch.shape[0] // count
        parts = []
        for index in range(count):
            rows = slice(index * size, (index + 1) * size) if count > 1 else slice(None)
            piece = batch[rows]
            with record_function("vpd::target"):
                output, inputs = self.vpd.target(piece)
                divergence = Divergence(output, self.vpd.divergence)
            # With several parts the graph of the importances is rebuilt part by part later.
            with record_function("vpd::importance"), torch.set_grad_enabled(count == 1):
                z = self.vpd.pre_importance(inputs)
            parts.append(_Part(rows, piece, inputs, divergence, z))
        return parts

    # -------------------------------------------------------------------- 3

    def _refine_adversary(self, parts: list[_Part], batch: Tensor) -> None:
        lead = (batch.shape[0], *parts[0].z.shape[1:-1])
        if self.adversary is None:
            self.adversary = PersistentAdversary(
                self.config.adversary,
                self.vpd.layout,
                lead,
                self.device,
                self.generator,
                self.processes,
                self.mask_dtype,
            )
            self.adversary.set_lr(self._adversary_lr)
        importances = [part.z.detach().clamp(0, 1).to(self.mask_dtype) for part in parts]
        n_positions = sum(g[..., 0].numel() for g in importances)
        share = self.config.adversary.coefficient / (len(parts) * self.processes.world)
        for _ in range(self.config.adversary.inner_steps):
            for part, g in zip(parts, importances, strict=True):
                with self.vpd.frozen_subcomponents():
                    loss = part.under(self.run)(self.adversary.masks(g, part.rows))
                (loss * share).backward(inputs=self.adversary.leaves())
            self._ascend(n_positions)

    # -------------------------------------------------------------------- 4

    def _backward(self, parts: list[_Part], step: int) -> Losses:
        p = exponent(self.config.minimality, step, self.config.steps)
        minimal = self.config.minimality
        sums = [importance_power_sum(part.z, p, minimal.eps) for part in parts]
        total_sum = torch.stack(sums).sum(0).detach()
        self.processes.sum_([total_sum])
        n_positions = sum(part.z[..., 0].numel() for part in parts) * self.processes.world
        total_sum.requires_grad_()
        least = minimality(total_sum, n_positions, minimal.frequency)
        # The frequency term couples all positions of the batch. Its slope at the batch's total
        # makes the gradient of each part exact.
        (slope,) = torch.autograd.grad(least, total_sum)
        losses: Losses = {"minimality": least.detach()}
        for index, (part, power_sum) in enumerate(zip(parts, sums, strict=True)):
            with record_function("vpd::losses"), self._autocast():
                own = self._reconstruction(part, len(parts) * self.processes.world)
                if len(parts) > 1:
                    power_sum = importance_power_sum(part.z, p, minimal.eps)
                own["minimality"] = (slope * power_sum).sum()
                if index == 0:
                    own["faithfulness"] = self._faithfulness()
                total = torch.stack([c * own[name] for name, c in self._weights() if name in own])
            with record_function("vpd::backward"):
                total.sum().backward()
            for name, loss in own.items():
                if name != "minimality":
                    losses[name] = losses.get(name, 0) + loss.detach()
        self._sum_over_processes(losses)
        weighted = [c * losses[name] for name, c in self._weights() if name in losses]
        losses["total"] = torch.stack(weighted).sum()
        return losses

    def _reconstruction(self, part: _Part, n_parts: int) -> Losses:
        vpd, config = self.vpd, self.config
        if config.micro_batches > 1:
            part.z = vpd.pre_importance(part.inputs)
        g = lower_leaky(part.z).to(self.mask_dtype)
        under = part.under(self.run)
        losses: Losses = {}
        if config.stochastic.coefficient > 0:
            losses["stochastic"] = (
                stochastic_reconstruction(
                    under,
                    g,
                    vpd.layout,
                    config.stochastic.routing,
                    config.stochastic.n_samples,
                    self.generator,
                )
                / n_parts
            )
        if config.stochastic.layerwise_coefficient > 0:
            losses["layerwise"] = (
                layerwise_reconstruction(under, g, vpd.layout, self.generator) / n_parts
            )
        if self.adversary is not None:
            masks = self.adversary.masks(g, part.rows)
            if config.adversary.routing == "subset":
                masks.routed = uniform_k_subset(masks.delta.shape, g.device, self.generator)
            losses["adversarial"] = under(masks) / n_parts
        return losses

    def _faithfulness(self) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            loss = faithfulness(self.vpd.subcomponents.deltas(self.weights))
        return loss if self.processes.world == 1 else loss / self.processes.world

    def _sum_over_processes(self, losses: Losses) -> None:
        """Gradients and losses of the global batch, from those of every process's share of it."""
        if self.processes.world == 1:
            return
        parameters = [p for group in self.parameters.values() for p in group]
        gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
        # The minimality loss is that of the global batch already, on every process.
        shares = [loss for name, loss in losses.items() if name != "minimality"]
        self.processes.sum_(gradients + shares)

    def _weights(self) -> list[tuple[str, float]]:
        config = self.config
        return [
            ("stochastic", config.stochastic.coefficient),
            ("layerwise", config.stochastic.layerwise_coefficient),
            ("adversarial", config.adversary.coefficient),
            ("minimality", config.minimality.coefficient),
            ("faithfulness", config.faithfulness.coefficient),
        ]

    # -------------------------------------------------------------------- 5

    def _update(self, losses: Losses, n_positions: int) -> None:
        if self.device.type == "cpu":
            require_finite(losses)
        if self.adversary is not None:
            # Only the adversarial loss reaches the sources, so the backward pass of the total
            # has left its gradient there, times the coefficient; no second one is needed.
            self._ascend(n_positions)
            self.adversary.restart()
        opt = self.config.optimiser
        limits = {"subcomponents": opt.clip_subcomponents, "importance": opt.clip_importance}
        for name, parameters in self.parameters.items():
            norm = torch.nn.utils.clip_grad_norm_(parameters, limits[name] or float("inf"))
            losses[f"grad_norm/{name}"] = whole(norm)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def _ascend(self, n_positions: int) -> None:
        assert self.adversary is not None
        n_positions *= self.processes.world
        self.adversary.ascend(self.config.adversary.coefficient / n_positions)

    # ---------------------------------------------------------------- helpers

    def _schedule(self, step: int) -> None:
        config = self.config
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config.optimiser, group["base"], step, config.steps)
        self._adversary_lr = adversary_lr(config.adversary, step, config.steps)
        if self.adversary is not None:
            self.adversary.set_lr(self._adversary_lr)

    def _autocast(self) -> Any:
        on = self.config.autocast and self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)


def _masked_forward(vpd: Decomposition, config: VPDConfig) -> MaskedForward:
    if config.compile:
        return CompiledForwards(vpd).run
    return RecomputedForwards(vpd).run if config.recompute else vpd.run


def require_finite(losses: Losses) -> None:
    """Raise if a loss is NaN or infinite.

    Raises:
        NonFiniteLossError: Naming the terms.
    """
    bad = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
    if bad:
        terms = [name for name in bad if name != "total"] or bad
        raise NonFiniteLossError(
            f"the {', '.join(terms)} loss is not finite. Lower optimiser.lr, set "
            "optimiser.clip_importance=1.0, or check the data; the last checkpoint is kept."
        )


def warm_up_faithfulness(stepper: Stepper) -> float:
    """Fit `V U` to the weights before training: AdamW on U and V against Delta-L2 alone.

    Args:
        stepper: Holds the decomposition, its weights and the configuration.

    Returns:
        The last value of the loss.
    """
    config = stepper.config.faithfulness
    parameters = list(stepper.vpd.subcomponents.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=config.warmup_lr, weight_decay=config.warmup_weight_decay, fused=True
    )
    loss = torch.zeros(())
    for _ in range(config.warmup_steps):
        optimiser.zero_grad()
        loss = faithfulness(stepper.vpd.subcomponents.deltas(stepper.weights))
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())
