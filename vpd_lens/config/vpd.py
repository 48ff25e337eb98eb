"""`VPDConfig`: everything that decides a training run, with the paper's defaults, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from vpd_lens.config.base import Config, Count, InvalidConfig, Natural, read_yaml
from vpd_lens.config.sections import (
    AdversaryConfig,
    CausalImportanceConfig,
    CompactionConfig,
    ElsewhereConfig,
    FaithfulnessConfig,
    LocalityConfig,
    MinimalityConfig,
    OptimiserConfig,
    StochasticConfig,
)
from vpd_lens.errors import ConfigError, did_you_mean

PRESETS = ("paper", "recent", "small", "spd", "targeted")


class VPDConfig(Config):
    """A training run. The defaults are the paper's (see `VPDConfig.paper`)."""

    sites: str | tuple[str, ...] = "all"
    """Which matrices: `"all"`, a regular expression, or a list of site names."""
    n_subcomponents: int | str | dict[str, int] = "paper"
    """How many per site: an int, `"paper"` (the paper's ratios), `"faithful"` (those, but at least
    the matrix' rank), `"2x-rank"` (twice the singular values that hold 99 % of its energy), or a
    mapping from patterns to ints."""
    initialisation: Literal["random", "aligned", "svd"] = "random"
    """`"random"` (the paper), `"aligned"`: subcomponents of attention and MLP matrices start along
    neurons and head dimensions, whose nonlinearities they have to respect, or `"svd"`: as the
    largest singular components of what is decomposed."""
    importance: CausalImportanceConfig = CausalImportanceConfig()
    """The causal importance function."""
    steps: Count = 400_000
    """Training steps."""
    batch_size: Count = 64
    """Sequences per step, of all processes together."""
    seq_len: Count | None = 512
    """Tokens per sequence; `None`: the model's context length."""
    positions: Literal["all", "last"] = "all"
    """Where the output on the data has to stay as it is: at `"all"` positions (the paper), or at
    the `"last"` of every sequence, where the data are sequences that lead up to one prediction."""
    micro_batches: Count = 1
    """Parts into which a batch is cut to save memory. For given masks the result is that of the
    whole batch, frequency term included; the random draws differ."""
    seed: int = 0
    """Seed of initialisation, masks, sources and data order."""
    stochastic: StochasticConfig = StochasticConfig()
    """Stochastic reconstruction."""
    adversary: AdversaryConfig = AdversaryConfig()
    """Adversarial reconstruction."""
    minimality: MinimalityConfig = MinimalityConfig()
    """Importance and frequency minimality."""
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    """Delta-L2 and its warm-up."""
    elsewhere: ElsewhereConfig = ElsewhereConfig()
    """The second stream of a targeted decomposition (not the paper's)."""
    locality: LocalityConfig = LocalityConfig()
    """Nonlinearity locality (not the paper's)."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser and schedule."""
    compaction: CompactionConfig = CompactionConfig()
    """Folding dead subcomponents into the delta during training (not the paper's)."""
    autocast: bool = True
    """bf16 autocast on CUDA (losses and parameters stay fp32)."""
    compile: bool = False
    """Run masked forwards as compiled graphs: faster steps after some minutes of compilation, the
    same numbers up to rounding. Needs a C++ compiler on CPU; it warns where that cannot be done."""
    recompute: bool = False
    """Keep only each block's input of a masked forward and compute the rest again in the backward
    pass: less memory, more time, the same numbers. Not together with `compile`, which decides by
    itself what to keep."""
    mask_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of sources, their moments, masks and their gradients. `"bfloat16"` halves what they
    take, which is most where the adversary has sources per position; importances, losses and
    parameters stay fp32."""
    stop_on_collapse: bool = False
    """Stop with a `CollapseError` when the importance function collapses, and write no checkpoint
    from the first sign of it on, so that the last one is from before."""
    device: str = "auto"
    """`"auto"` (where the model is), `"cpu"`, `"cuda"` or `"cuda:N"`."""
    shard_importance: bool = False
    """On many processes, keep only a part of the importance function's parameters, gradients and
    moments on each (FSDP2): the same numbers up to rounding. A single process ignores it."""
    log_every: Count = 50
    """Steps between logged metrics."""
    checkpoint_every: Natural = 0
    """Steps between checkpoints; 0: one every five minutes. The last step and an interruption
    write one, too."""

    @model_validator(mode="after")
    def _consistent(self) -> VPDConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"micro_batches={self.micro_batches}"
            )
        random, adversary = self.stochastic, self.adversary
        if not random.coefficient + random.layerwise_coefficient + adversary.coefficient:
            raise ValueError(
                "no reconstruction loss is on: give stochastic.coefficient or "
                "adversary.coefficient a positive value"
            )
        merged = adversary.merge > 0 and adversary.coefficient > 0
        if random.donors and not (random.coefficient or merged):
            raise ValueError(
                f"stochastic.donors={random.donors:g} is a share of the positions of the "
                "stochastic or merged pass, and there is neither; give stochastic.coefficient a "
                "positive value, or set stochastic.donors=0"
            )
        if self.elsewhere.coefficient and self.minimality.half_life:
            raise ValueError(
                f"minimality.half_life={self.minimality.half_life:g} averages frequencies over the "
                "steps of one stream of data, and elsewhere.coefficient asks for a second; set "
                "minimality.half_life=0 or elsewhere.coefficient=0"
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
        if self.micro_batches > 1 and adversary.scope in ("batch", "single"):
            raise ValueError(
                f"adversary.scope={adversary.scope!r} shares sources across the batch, which "
                "cannot be split into micro_batches; use scope 'position' or 'sequence'"
            )
        return self

    @classmethod
    def paper(cls, **changes: Any) -> VPDConfig:
        """The paper's run on its 67M-parameter model, every value stated; `changes` replace them.

        Every preset takes fields of `VPDConfig` to replace by name.
        """
        size = CausalImportanceConfig(d_model=2048, n_blocks=8, n_heads=16, d_ffn=8192)
        return cls(**{"importance": size, **changes})

    @classmethod
    def recent(cls, **changes: Any) -> VPDConfig:
        """The authors' later recipe for the paper's model, every value stated; `changes` replace.

        An exact start along neurons and head dimensions, Muon, a smooth penalty with a frequency
        term of its own, one merged masked pass with pooled sources, relative faithfulness, locality
        in neurons and heads, and a causal importance function that reads the stream before every
        block.
        """
        base: dict[str, Any] = {
            "n_subcomponents": "faithful",
            "initialisation": "aligned",
            "importance": CausalImportanceConfig(
                d_model=1088, n_blocks=8, n_heads=32, d_ffn=4352, causal=True, reads="blocks"
            ),
            "steps": 100_000,
            "batch_size": 2048,
            "adversary": AdversaryConfig(
                lr=0.02, beta1=0.01, scope="pool", pool=4, merge=0.9, coefficient=0.9
            ),
            "stochastic": StochasticConfig(coefficient=0.1),
            "minimality": MinimalityConfig(
                penalty="smooth_l0",
                anneal=0.9,
                coefficient=1.275e-4,
                frequency=4.2e-5 / 1.275e-4,
                reference=6_553_600,
                half_life=200,
            ),
            "faithfulness": FaithfulnessConfig(coefficient=1e3, relative=True, warmup_steps=0),
            "locality": LocalityConfig(coefficient=3e-5),
            "optimiser": OptimiserConfig(
                kind="muon", lr=2.8e-4, clip_subcomponents=1.0, clip_importance=1.0
            ),
        }
        return cls(**{**base, **changes})

    @classmethod
    def small(cls, **changes: Any) -> VPDConfig:
        """For models of up to a few million parameters on a CPU or one GPU.

        Not the paper's recipe with smaller numbers: the adversary starts over now and then and
        moves faster, Muon trains the matrices, subcomponents start along neurons and head
        dimensions. `docs/results` has what these are worth together.
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
        """Stochastic Parameter Decomposition: `small` without adversary and frequency term."""
        small = cls.small()
        base = dict(small) | {
            "stochastic": small.stochastic.replaced({"layerwise_coefficient": 1.0}),
            "adversary": AdversaryConfig(coefficient=0.0),
            "minimality": small.minimality.replaced({"frequency": 0.0}),
        }
        return cls(**{**base, **changes})

    @classmethod
    def targeted(cls, **changes: Any) -> VPDConfig:
        """Decompose one behaviour, and leave the rest of the model to the deltas (tPD).

        Few subcomponents, no faithfulness loss, and a second stream of data on which they have to
        do no harm: `vpd_lens.train(model, data, config, elsewhere=...)`. From arXiv 2607.13047.
        """
        small = cls.small()
        base = dict(small) | {
            "n_subcomponents": 64,
            "initialisation": "svd",
            "importance": CausalImportanceConfig(kind="global_mlp", hidden=(512,)),
            "elsewhere": ElsewhereConfig(coefficient=1.0),
            "minimality": MinimalityConfig(coefficient=3e-3),
            "faithfulness": FaithfulnessConfig(coefficient=0.0, warmup_steps=0),
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
        losses = {name: getattr(paper, name) for name in ("stochastic", "adversary")}
        start = {"initialisation": paper.initialisation, "optimiser.kind": paper.optimiser.kind}
        return self.replaced(losses | start)

    @classmethod
    def from_yaml(cls, path: str | Path) -> VPDConfig:
        """Read a YAML (or JSON) file; a top-level `preset` names the starting point.

        Raises:
            ConfigError: If the file cannot be read, or has unknown or inconsistent fields.
        """
        data = read_yaml(path)
        try:
            return cls.from_mapping(data)
        except InvalidConfig as error:
            raise InvalidConfig(str(path), error.troubles) from None

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> VPDConfig:
        """Like `from_yaml`, from a mapping already read."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a mapping of fields, got {type(data).__name__}.")
        name = data.get("preset", "paper")
        if name not in PRESETS:
            known = f"{name!r} is not one of {', '.join(PRESETS)}"
            raise InvalidConfig(cls.__name__, {"preset": known + did_you_mean(name, PRESETS)})
        preset: VPDConfig = getattr(cls, name)()
        return preset.merged({key: value for key, value in data.items() if key != "preset"})
