"""A training run on paper: the target's shape, the sites, and the sizes that follow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vpd_lens.config import CausalImportanceConfig, VPDConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.subcomponents import resolve_counts
from vpd_lens.errors import ConfigError
from vpd_lens.training.cost.target import Matrix, TargetShape


@dataclass(frozen=True)
class Workload:
    """One training step of a run, as one of `n_ranks` processes sees it.

    Attributes:
        target: The target's shape.
        sites: The decomposed matrices, in forward order.
        counts: Subcomponents of each.
        importance: The causal importance function, its size filled in.
        config: The run; `batch_size` is that of all ranks together.
        seq_len: Tokens per sequence.
        n_ranks: Processes among which the batch is divided, one GPU each.
        on_gpu: Whether autocast applies.
    """

    target: TargetShape
    sites: tuple[Matrix, ...]
    counts: tuple[int, ...]
    importance: CausalImportanceConfig
    config: VPDConfig
    seq_len: int
    n_ranks: int = 1
    on_gpu: bool = True

    def __post_init__(self) -> None:
        parts = self.n_ranks * self.config.micro_batches
        if self.config.batch_size % parts:
            raise ConfigError(
                f"batch_size={self.config.batch_size} cannot be divided among {self.n_ranks} GPUs "
                f"and {self.config.micro_batches} micro_batches; give a multiple of {parts}."
            )

    @classmethod
    def planned(
        cls,
        target: TargetShape,
        config: VPDConfig,
        *,
        n_ranks: int = 1,
        on_gpu: bool = True,
    ) -> Workload:
        """A run on a model that is known by its shape alone.

        Args:
            target: The shape.
            config: The run.
            n_ranks: GPUs.
            on_gpu: Whether autocast applies.

        Raises:
            ConfigError: If sites or subcomponents do not fit the shape, or the batch the ranks.
        """
        select = config.sites if isinstance(config.sites, str) else list(config.sites)
        sites = _chosen(target.matrices(), select)
        return cls(
            target,
            tuple(sites),
            resolve_counts(sites, config.n_subcomponents),
            config.importance.filled(target.d_model, target.n_layers),
            config,
            min(config.seq_len or target.n_ctx, target.n_ctx),
            n_ranks,
            on_gpu,
        )

    @classmethod
    def of(
        cls, vpd: Decomposition, config: VPDConfig, seq_len: int | None, n_ranks: int = 1
    ) -> Workload:
        """A run on a model in memory, decomposed already.

        Args:
            vpd: The decomposition.
            config: The run.
            seq_len: Tokens per sequence; where the data decides (`None`) 1 is assumed, so that
                costs are lower bounds.
            n_ranks: Processes that share the batch.
        """
        target = TargetShape.of(vpd.model, vpd.sites)
        known = {matrix.name: matrix for matrix in target.matrices()}
        sites = [
            known.get(site.name, Matrix(site.name, *site.shape, site.name, index))
            for index, site in enumerate(vpd.sites)
        ]
        return cls(
            target,
            tuple(sites),
            vpd.layout.sizes,
            vpd.importance_config.filled(target.d_model, max(target.n_layers, 1)),
            config,
            (seq_len or 1) if target.n_layers else 1,
            n_ranks,
            on_gpu=vpd.device.type == "cuda",
        )

    # ------------------------------------------------------------------ sizes

    @property
    def sequences(self) -> int:
        """Sequences per step on one rank."""
        return self.config.batch_size // self.n_ranks

    @property
    def positions(self) -> int:
        """Positions per step on one rank."""
        return self.sequences * self.seq_len

    @property
    def part(self) -> int:
        """Positions of one micro-batch."""
        return self.positions // self.config.micro_batches

    @property
    def c_total(self) -> int:
        """Subcomponents of all sites."""
        return sum(self.counts)

    @cached_property
    def d_inputs(self) -> int:
        """Width of what the importance function reads: every site's input, q, k and v each."""
        return sum(site.d_in for site in self.sites)

    @cached_property
    def d_distinct_inputs(self) -> int:
        """The same, inputs that several sites share counted once."""
        return sum({site.reads: site.d_in for site in self.sites}.values())

    @cached_property
    def d_outputs(self) -> int:
        """Width of all sites' outputs."""
        return sum(site.d_out for site in self.sites)

    @cached_property
    def decomposed(self) -> int:
        """Weights of all sites."""
        return sum(site.d_in * site.d_out for site in self.sites)

    @cached_property
    def directions(self) -> int:
        """Numbers in V and U."""
        return sum(c * sum(s.shape) for s, c in zip(self.sites, self.counts, strict=True))

    @cached_property
    def importance_matrices(self) -> list[tuple[int, int]]:
        """Shapes of the importance function's matrices."""
        ci = self.importance
        if ci.kind == "mlp":
            # Two layers and the first one's biases.
            return [(self.c_total, ci.hidden)] * 3 if ci.hidden else []
        if ci.kind == "shared_mlp":
            pairs = list(zip(self.sites, self.counts, strict=True))
            if not ci.hidden:
                return [(site.d_in, c) for site, c in pairs]
            return [m for s, c in pairs for m in ((s.d_in, ci.hidden), (ci.hidden, c))]
        d, ffn = self.d_importance, ci.d_ffn or 0
        block = [(d, 3 * d), (d, d), (d, ffn), (ffn, d)]
        return [(self.d_inputs, d), *block * (ci.n_blocks or 0), (d, self.c_total)]

    @property
    def d_importance(self) -> int:
        """Width of the importance function, if it is a transformer."""
        return self.importance.d_model or 0

    @cached_property
    def importance_parameters(self) -> int:
        """Weights of the importance function, without biases."""
        return sum(a * b for a, b in self.importance_matrices)

    @property
    def has_logits(self) -> bool:
        """Whether the divergence is the KL of logits."""
        return self.target.n_layers > 0

    # ----------------------------------------------------------------- passes

    @property
    def inner_passes(self) -> int:
        """Masked forwards of the adversary before the losses."""
        adversary = self.config.adversary
        return adversary.inner_steps if adversary.coefficient > 0 else 0

    @property
    def draws(self) -> int:
        """Draws of stochastic sources."""
        stochastic = self.config.stochastic
        own = stochastic.n_samples if stochastic.coefficient > 0 else 0
        return own + (stochastic.layerwise_coefficient > 0)

    @property
    def loss_passes(self) -> int:
        """Masked forwards of the losses."""
        stochastic = self.config.stochastic
        own = stochastic.n_samples if stochastic.coefficient > 0 else 0
        layerwise = len(self.sites) if stochastic.layerwise_coefficient > 0 else 0
        return own + layerwise + (self.config.adversary.coefficient > 0)

    @cached_property
    def sources(self) -> int:
        """Numbers in the adversary's sources on one rank."""
        if self.config.adversary.coefficient == 0:
            return 0
        sets = {"position": self.positions, "sequence": self.sequences, "batch": self.seq_len}
        columns = self.c_total + len(self.sites)
        return sets.get(self.config.adversary.scope, 1) * columns

    @property
    def importance_shards(self) -> int:
        """Ranks among which the importance function's weights and moments are divided."""
        return self.n_ranks if self.config.shard_importance else 1

    def tracked(self, matrix: Matrix) -> bool:
        """Whether the matrix' input carries gradients: a site lies before it."""
        return matrix.stage > min(site.stage for site in self.sites)

    @cached_property
    def tracked_attentions(self) -> int:
        """Layers whose attention carries gradients: it or something before it is decomposed."""
        return self._layers_from(".attn.q")

    @cached_property
    def tracked_mlps(self) -> int:
        """Layers whose MLP carries gradients."""
        return self._layers_from(".mlp.in")

    def _layers_from(self, matrix: str) -> int:
        first = min(site.stage for site in self.sites)
        stages = [m.stage for m in self.target.matrices() if m.name.endswith(matrix)]
        return sum(1 for stage in stages if stage >= first)

    # -------------------------------------------------------------- precision

    @property
    def _autocast(self) -> bool:
        return self.config.autocast and self.on_gpu

    @property
    def precision(self) -> str:
        """In which the target and the masked sites compute."""
        return "bfloat16" if self._autocast else self.target.dtype

    @property
    def importance_precision(self) -> str:
        """In which the importance function computes."""
        return "bfloat16" if self._autocast else "float32"


def _chosen(matrices: Sequence[Matrix], select: str | list[str]) -> list[Matrix]:
    """As `find_sites` does for a model in memory."""
    if select == "all":
        return [m for m in matrices if m.name != "unembed"]
    if isinstance(select, str):
        chosen = [m for m in matrices if re.search(select, m.name)]
    else:
        chosen = [m for m in matrices if m.name in select]
    missing = [] if isinstance(select, str) else sorted(set(select) - {m.name for m in chosen})
    if missing or not chosen:
        names = ", ".join(m.name for m in matrices[:8])
        raise ConfigError(f"sites={missing or select!r} is no site of this model ({names}, ...).")
    return chosen
