"""`VPDConfig`: everything that decides a training run, validated, with the paper's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from vpd_lens.decomposition.causal_importance import CausalImportanceConfig
from vpd_lens.errors import ConfigError
from vpd_lens.training.sections import (
    AdversaryConfig,
    CompactionConfig,
    FaithfulnessConfig,
    Frozen,
    MinimalityConfig,
    OptimiserConfig,
    StochasticConfig,
)


class VPDConfig(Frozen):
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

    def with_paper_losses(self) -> VPDConfig:
        """The same run with the paper's start, reconstruction losses and kind of optimiser.

        Learning rates, coefficients of minimality and faithfulness and all sizes stay.
        """
        paper = type(self).paper()
        return self.replaced(
            {
                "initialisation": paper.initialisation,
                "stochastic": paper.stochastic.model_dump(),
                "adversary": paper.adversary.model_dump(),
                "optimiser.kind": paper.optimiser.kind,
            }
        )

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
