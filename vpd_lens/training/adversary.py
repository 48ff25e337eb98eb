"""The persistent adversary: sources that live across training steps (VPD, persistent PGD)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_lens.config import AdversaryConfig
from vpd_lens.decomposition.masks import Layout, SourceMasks, Sources, uniform_sources
from vpd_lens.errors import ConfigError, InputError
from vpd_lens.training.distributed import ALONE, Processes
from vpd_lens.training.optimiser import keep_moments

# Scopes in which every sequence of the batch has sources of its own.
PER_ROW = ("position", "sequence", "pool")


class PersistentAdversary:
    """Sources in [0, 1] for every subcomponent and delta, improved by Adam ascent.

    They are for batches with the leading shape `batch_shape`, `(batch, pos)` for language models,
    one in each of `processes`, and start at U(0, 1), drawn from `generator`. The masks made of them
    and their moments have their `dtype`.

    Attributes:
        sources: `[*scope, C_total]` for the subcomponents and `[*scope, n_sites]` for the deltas.
        chosen: Which set of a pool each position has in this step, one-hot `[batch, pos, pool]`.
        optimiser: Adam, ascending.
        sharing: The processes with which this one shares its sources: all, or no other.
        per_row: The processes over which the sources are spread: all, or no other.

    Raises:
        ConfigError: If a pool has more sets than a sequence has positions.
    """

    def __init__(
        self,
        config: AdversaryConfig,
        layout: Layout,
        batch_shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | None = None,
        processes: Processes = ALONE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.layout, self.generator = config, layout, generator
        own, same = config.scope in PER_ROW, config.scope in ("sequence", "single")
        self.sharing, self.per_row = (ALONE, processes) if own else (processes, ALONE)
        batch, *positions = batch_shape
        scope = (batch if own else 1, *(1 if same else n for n in positions))
        self.chosen: Tensor | None = None
        if config.scope == "pool":
            if config.pool > (served := math.prod(positions)):
                raise ConfigError(
                    f"adversary.pool={config.pool} sets of sources are more than the {served} "
                    "positions of a sequence that draw from them; give fewer sets, or a set to "
                    'every position by adversary.scope="position".'
                )
            scope = (batch, config.pool)
        start = torch.empty(*scope, layout.total, device=device, dtype=dtype)
        self.sources = uniform_sources(start, layout, generator)
        self.sharing.first_(self.leaves())
        leaves = [leaf.requires_grad_() for leaf in self.leaves()]
        rates = (config.lr, (config.beta1, config.beta2), config.eps)
        self.optimiser = torch.optim.Adam(leaves, *rates, maximize=True, fused=True)

    def masks(self, importance: Tensor, rows: slice = slice(None)) -> SourceMasks:
        """The masks that the sources now make of importances `[*batch, C_total]` in their dtype.

        Of a micro-batch, `rows` says which sequences of the batch it has.

        Raises:
            InputError: If the batch does not fit the sources.
        """
        sources = self.sources
        if rows != slice(None):
            sources = Sources(sources.components[rows], sources.delta[rows])
        if self.chosen is not None:
            chosen = self.chosen[rows]  # a product, whose gradient is one, too
            sources = Sources(chosen @ sources.components, chosen @ sources.delta)
        try:
            return sources.over(importance)
        except RuntimeError as error:
            made, given = self.sources.delta.shape[:-1], importance.shape[:-1]
            raise InputError(
                f"the adversary keeps sources for batches of shape {tuple(made)}, which do not fit "
                f"one of shape {tuple(given)}; every batch must have the same shape."
            ) from error

    def draw(self, batch_shape: tuple[int, ...]) -> None:
        """Let every position of a batch `(batch, pos)` draw its sources from the pool, if any.

        Raises:
            ConfigError: If the batch has no positions, which a pool could serve.
        """
        if self.config.scope != "pool":
            return
        if len(batch_shape) != 2:
            raise ConfigError(
                'adversary.scope="pool" shares sources over the positions of a sequence, and this '
                'data has none; use "position", "batch" or "single".'
            )
        device, pool = self.sources.delta.device, self.config.pool
        index = torch.randint(pool, batch_shape, device=device, generator=self.generator)
        self.chosen = F.one_hot(index, pool).to(self.sources.delta.dtype)

    def leaves(self) -> list[Tensor]:
        """The source tensors, to differentiate by."""
        return [self.sources.components, self.sources.delta]

    def ascend(self, scale: float) -> None:
        """One Adam step up the divergence, then clamp to [0, 1].

        The gradients lie in `grad` of the `leaves`. Adam's epsilon is meant for the gradient of
        the divergence *summed* over positions; scaling epsilon instead of every gradient gives
        the same step, and does not let epsilon swallow gradients that shrink as `1/(B T)`.

        `scale` is what the gradients are relative to those of the sum: the loss coefficient
        divided by the number of positions, the same for every update.
        """
        for group in self.optimiser.param_groups:
            group["eps"] = self.config.eps * scale
        self.sharing.sum_([leaf.grad for leaf in self.leaves() if leaf.grad is not None])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for leaf in self.leaves():
                leaf.clamp_(0, 1)

    @torch.no_grad()
    def restart(self) -> None:
        """Let each set of sources start over with the configured probability, moments forgotten.

        Adam's bias correction goes on counting from the start of the run, so the first updates
        of a new set are up to five times the learning rate: it reaches a corner within a few.
        """
        if self.config.restart == 0:
            return
        # In fp32 whatever the sources are: bf16 uniforms on a CPU are multiples of 2^-8.
        sets = self.sources.delta[..., :1]
        chance = torch.empty_like(sets, dtype=torch.float32).uniform_(generator=self.generator)
        again = chance < self.config.restart
        new = uniform_sources(self.sources.components, self.layout, self.generator)
        self.sharing.first_([again, new.components, new.delta])
        for leaf, start in zip(self.leaves(), (new.components, new.delta), strict=True):
            leaf.copy_(torch.where(again, start, leaf))
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[leaf][moment].mul_(~again)

    def keep(self, columns: Tensor, layout: Layout) -> None:
        """Keep the sources of some subcomponents, those of the new layout, and of every delta."""
        leaf = self.sources.components
        leaf.data = leaf.data.index_select(-1, columns)
        leaf.grad = None
        keep_moments(self.optimiser, leaf, -1, columns)
        self.layout = layout

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next updates."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
