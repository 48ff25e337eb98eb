"""`VPDConfig`: everything that decides a training run, validated, with the paper's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vpd_lens.decomposition.causal_importance import CausalImportanceConfig
from vpd_lens.errors import ConfigError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StochasticConfig(_Frozen):
    """Stochastic reconstruction: random masks must not change the output.

    Attributes:
        coefficient: Weight in the total loss.
        routing: `"subset"`: a random subset of sites per position (VPD); `"all"`: every site.
        n_samples: Mask draws per step, averaged.
        layerwise_coefficient: Weight of the same loss with one site masked at a time, mean over
            sites (SPD); one forward per site.
    """

    coefficient: float = Field(default=0.5, ge=0)
    routing: Literal["subset", "all"] = "subset"
    n_samples: int = Field(default=1, ge=1)
    layerwise_coefficient: float = Field(default=0.0, ge=0)


class AdversaryConfig(_Frozen):
    """Adversarial reconstruction by persistent projected gradient descent.

    Attributes:
        coefficient: Weight in the total loss; 0 trains without an adversary.
        inner_steps: Source updates on the current batch before the loss.
        lr: Adam learning rate of the sources.
        lr_warmup: Fraction of training over which it rises linearly from 0.
        beta1: Adam's first decay.
        beta2: Adam's second decay.
        eps: Adam's epsilon. The gradient it is compared with is that of the divergence summed
            over positions, so that it does not depend on the batch size.
        routing: `"all"` masks every site (the authors' code), `"subset"` routes as the
            stochastic loss does (their text). Inner updates always mask every site.
        scope: Which positions share sources: `"position"` none (the paper), `"sequence"` one
            set per sequence, `"batch"` one per position for the whole batch, `"single"` one.
        restart: Probability, per training step, that a set of sources starts over from U(0, 1),
            so that they do not settle on one attack for ever; 0 is the paper's.
    """

    coefficient: float = Field(default=0.5, ge=0)
    inner_steps: int = Field(default=2, ge=0)
    lr: float = Field(default=0.01, gt=0)
    lr_warmup: float = Field(default=0.025, ge=0, le=1)
    beta1: float = Field(default=0.5, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    routing: Literal["all", "subset"] = "all"
    scope: Literal["position", "sequence", "batch", "single"] = "position"
    restart: float = Field(default=0.0, ge=0, le=1)


class MinimalityConfig(_Frozen):
    """Importance and frequency minimality, fused.

    Attributes:
        coefficient: Weight of `1/(B T) sum_l sum_c (s + frequency * s * log2(1 + s))`.
        frequency: The `beta` before the frequency term.
        p_start: Exponent at the first step.
        p_end: Exponent that is reached, linearly, as the last step ends.
        eps: Added to an importance before the power.
    """

    coefficient: float = Field(default=2e-4, ge=0)
    frequency: float = Field(default=0.5, ge=0)
    p_start: float = Field(default=2.0, gt=0)
    p_end: float = Field(default=0.4, gt=0)
    eps: float = Field(default=1e-12, gt=0)


class FaithfulnessConfig(_Frozen):
    """Delta-L2: the subcomponents must sum to the weights.

    Attributes:
        coefficient: Weight of `1/N sum_l ||Delta_l||_F^2`, N the number of decomposed parameters.
        warmup_steps: AdamW steps on U and V alone against this loss, before training.
        warmup_lr: Their learning rate.
        warmup_weight_decay: Their weight decay.
    """

    coefficient: float = Field(default=1e7, ge=0)
    warmup_steps: int = Field(default=400, ge=0)
    warmup_lr: float = Field(default=1e-3, gt=0)
    warmup_weight_decay: float = Field(default=0.0, ge=0)


class OptimiserConfig(_Frozen):
    """The optimiser of U, V and the causal importance function.

    Attributes:
        kind: `"adamw"` (the paper), or `"muon"`: Muon for matrices, AdamW for biases (the
            authors' later work).
        lr: Peak learning rate of U and V.
        importance_lr: That of the causal importance function; `None`: the same.
        schedule: `"cosine"` falls to `final_fraction` at the last step; `"constant"` stays.
        final_fraction: Fraction of `lr` at the end of the cosine.
        warmup: Fraction of training over which the rate rises linearly from 0.
        beta1: Adam's first decay.
        beta2: Adam's second decay.
        momentum: Muon's.
        weight_decay: Decoupled weight decay.
        clip_subcomponents: Largest total gradient norm of U and V; `None` does not clip.
        clip_importance: The same for the causal importance function.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=5e-5, gt=0)
    importance_lr: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_subcomponents: float | None = Field(default=0.01, gt=0)
    clip_importance: float | None = Field(default=None, gt=0)


class CompactionConfig(_Frozen):
    """Subcomponents that are dead for good are folded into the delta while training goes on.

    Attributes:
        window: Steps over which importances are averaged; at the end of every window the dead
            ones are folded. 0: never.
        threshold: Dead is a mean importance, over positions and the window's steps, of at most
            this.
        start: Fraction of training before which nothing is folded.
    """

    window: int = Field(default=0, ge=0)
    threshold: float = Field(default=1e-6, ge=0, lt=1)
    start: float = Field(default=0.0, ge=0, le=1)


class VPDConfig(_Frozen):
    """A training run. The defaults are the paper's (see `VPDConfig.paper`).

    Attributes:
        sites: Which matrices: `"all"`, a regular expression, or a list of site names.
        n_subcomponents: How many per site: an int, `"paper"` (the paper's ratios), `"faithful"`
            (those, but at least the matrix' rank), or a mapping from patterns to ints.
        initialisation: `"random"` (the paper), or `"aligned"`: subcomponents of attention and MLP
            matrices start along neurons and head dimensions, whose nonlinearities they have to
            respect.
        importance: The causal importance function.
        steps: Training steps.
        batch_size: Sequences per step, of all processes together.
        seq_len: Tokens per sequence; `None`: the model's context length.
        micro_batches: Parts into which a batch is cut to save memory. For given masks the result
            is that of the whole batch, frequency term included; the random draws differ.
        seed: Seed of initialisation, masks, sources and data order.
        stochastic: Stochastic reconstruction.
        adversary: Adversarial reconstruction.
        minimality: Importance and frequency minimality.
        faithfulness: Delta-L2 and its warm-up.
        optimiser: Optimiser and schedule.
        compaction: Folding dead subcomponents into the delta during training (not the paper's).
        autocast: bf16 autocast on CUDA (losses and parameters stay fp32).
        compile: Run masked forwards as compiled graphs: about 1.4 times as fast a step on a CPU,
            after one to three minutes of compilation, for the same numbers up to rounding. Needs
            a C++ compiler on CPU; where it cannot be done, a warning says so.
        recompute: Keep only each block's input of a masked forward and compute the rest again in
            the backward pass: a fraction of the memory for about a quarter more time. The same
            numbers. Not together with `compile`, which decides by itself what to keep.
        mask_dtype: Of sources, their moments, masks and their gradients. `"bfloat16"` halves what
            they take, which is most where the adversary has sources per position; importances,
            losses and parameters stay fp32.
        device: `"auto"` (where the model is), `"cpu"`, `"cuda"` or `"cuda:N"`.
        shard_importance: On many processes, keep only a part of the importance function's
            parameters, gradients and moments on each (FSDP2). The numbers are the same up to
            rounding; a single process ignores it.
        log_every: Steps between logged metrics.
        checkpoint_every: Steps between checkpoints; 0 writes only the last and on interruption,
            and on many processes, of which one may die, one every 15 minutes.
    """

    sites: str | tuple[str, ...] = "all"
    n_subcomponents: int | str | dict[str, int] = "paper"
    initialisation: Literal["random", "aligned"] = "random"
    importance: CausalImportanceConfig = CausalImportanceConfig()
    steps: int = Field(default=400_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    seq_len: int | None = Field(default=512, ge=1)
    micro_batches: int = Field(default=1, ge=1)
    seed: int = 0
    stochastic: StochasticConfig = StochasticConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    minimality: MinimalityConfig = MinimalityConfig()
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    compaction: CompactionConfig = CompactionConfig()
    autocast: bool = True
    compile: bool = False
    recompute: bool = False
    mask_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    shard_importance: bool = False
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> VPDConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"micro_batches={self.micro_batches}"
            )
        reconstruction = (
            self.stochastic.coefficient
            + self.stochastic.layerwise_coefficient
            + self.adversary.coefficient
        )
        if reconstruction == 0:
            raise ValueError(
                "no reconstruction loss is on: give stochastic.coefficient or "
                "adversary.coefficient a positive value"
            )
        if self.compile and self.recompute:
            raise ValueError("compile and recompute cannot both be on; choose one")
        if self.compaction.window and self.shard_importance:
            raise ValueError(
                "compaction cannot remove columns of a sharded importance function; set "
                "compaction.window=0 or shard_importance=False"
            )
        window, start = self.compaction.window, self.compaction.start
        if window and self.steps - self.steps % window < max(window, start * self.steps):
            raise ValueError(
                f"compaction.window={window} never ends between compaction.start={start:g} of "
                f"training and its last step, steps={self.steps}, so nothing could be folded; "
                "give a shorter window, an earlier start, or window=0 for no compaction"
            )
        if self.micro_batches > 1 and self.adversary.scope in ("batch", "single"):
            raise ValueError(
                f"adversary.scope={self.adversary.scope!r} shares sources across the batch, which "
                "cannot be split into micro_batches; use scope 'position' or 'sequence'"
            )
        return self

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    # ---------------------------------------------------------------- presets

    @classmethod
    def paper(cls, **changes: Any) -> VPDConfig:
        """The paper's run on its 67M-parameter model, every value stated.

        Args:
            **changes: Top-level fields to replace.
        """
        base: dict[str, Any] = {
            "importance": CausalImportanceConfig(d_model=2048, n_blocks=8, n_heads=16, d_ffn=8192)
        }
        return cls(**{**base, **changes})

    @classmethod
    def small(cls, **changes: Any) -> VPDConfig:
        """For models of up to a few million parameters on a CPU or one GPU.

        Not the paper's recipe with smaller numbers: the adversary starts over now and then and
        moves faster, Muon trains the matrices, subcomponents start along neurons and head
        dimensions. `docs/results` has what these are worth together.

        Args:
            **changes: Top-level fields to replace.
        """
        base: dict[str, Any] = {
            "n_subcomponents": "faithful",
            "steps": 2000,
            "batch_size": 16,
            "seq_len": None,
            "initialisation": "aligned",
            "stochastic": StochasticConfig(coefficient=1.0, routing="all"),
            "adversary": AdversaryConfig(lr=0.1, restart=0.05),
            "minimality": MinimalityConfig(coefficient=5e-4),
            "faithfulness": FaithfulnessConfig(coefficient=1e5),
            "optimiser": OptimiserConfig(kind="muon", lr=3e-3, clip_importance=1.0),
        }
        return cls(**{**base, **changes})

    @classmethod
    def spd(cls, **changes: Any) -> VPDConfig:
        """Stochastic Parameter Decomposition: `small` without adversary and frequency term.

        Args:
            **changes: Top-level fields to replace.
        """
        base = cls.small().model_dump() | {
            "stochastic": StochasticConfig(
                coefficient=1.0, routing="all", layerwise_coefficient=1.0
            ),
            "adversary": AdversaryConfig(coefficient=0.0),
            "minimality": MinimalityConfig(coefficient=5e-4, frequency=0.0),
        }
        return cls(**{**base, **changes})

    def without_adversary(self) -> VPDConfig:
        """The same run without the adversarial loss; everything else stays."""
        return self.replaced({"adversary.coefficient": 0.0})

    # ------------------------------------------------------- files, overrides

    def replaced(self, changes: dict[str, Any]) -> VPDConfig:
        """A copy with fields replaced by dotted path, e.g. `{"optimiser.lr": 1e-3}`.

        Raises:
            ConfigError: If a path does not exist or a value does not fit.
        """
        data = self.model_dump()
        for path, value in changes.items():
            *parents, last = path.split(".")
            node = data
            for part in parents:
                node = node.get(part) if isinstance(node, dict) else None
            if not isinstance(node, dict) or last not in node:
                raise ConfigError(f"{path}: there is no such field in VPDConfig.")
            node[last] = value
        return type(self)(**data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> VPDConfig:
        """Read a YAML (or JSON) file; a top-level `preset` names the starting point.

        Raises:
            ConfigError: If the file cannot be read, or has unknown or inconsistent fields.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        return cls.from_mapping(data or {}, where=str(path))

    @classmethod
    def from_mapping(cls, data: Any, where: str = "config") -> VPDConfig:
        """Like `from_yaml`, from a mapping already read."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a mapping of fields, got {type(data).__name__}.")
        data = dict(data)
        name = data.pop("preset", "paper")
        presets = {"paper": cls.paper, "small": cls.small, "spd": cls.spd}
        if name not in presets:
            raise ConfigError(f"{where}: preset {name!r} is not one of {', '.join(presets)}.")
        return cls(**_merged(presets[name]().model_dump(), data))

    def to_yaml(self, path: str | Path) -> None:
        """Write all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merged(merged[key], value) if nested and key != "n_subcomponents" else value
    return merged


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such field (got {problem['input']!r})")
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})"[:300])
    return "VPDConfig is not valid:\n  " + "\n  ".join(lines)
