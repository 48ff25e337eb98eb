"""The run file of `vpd-lens train`: what to decompose, on which data, how, and where it goes.

```yaml
model: {source: path/or/name}          # also base, model_class, processing
data: path/or/name                     # see vpd_lens.train
output: runs/first
training:                              # VPDConfig
  preset: small
  steps: 2000
  optimiser: {lr: 1e-3}
evaluation: {data: held/out/data}      # optional: measured at the end
```
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from vpd_lens.config import base
from vpd_lens.config.base import Config, Count, InvalidConfig, Natural
from vpd_lens.config.vpd import VPDConfig
from vpd_lens.errors import ConfigError, did_you_mean

ModelClass = Literal["auto", "hooked_transformer", "bridge"]
Processing = Literal["default", "none", "full"]


class ModelSection(Config):
    """The base model; see `vpd_lens.models.load_model`."""

    source: str
    """A directory, or a name that TransformerLens knows."""
    model_class: ModelClass = "auto"
    """`auto`, `hooked_transformer` or `bridge`."""
    processing: Processing = "default"
    """How TransformerLens rewrites the weights: `default`, `none` or `full`."""
    base: str | None = None
    """Another model of the same shape, usually what this one was fine-tuned from: the difference
    from it is decomposed. A directory or a name; loaded in the same class and processing."""

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `load_model`."""
        return self.model_dump(exclude={"base"})

    @property
    def loading_base(self) -> dict[str, Any]:
        """Those for the other model."""
        return self.loading | {"source": self.base}


class EvaluationSection(Config):
    """The evaluation after training; see `vpd_lens.evaluate`."""

    data: str
    """Held-out data."""
    n_batches: Count = 8
    """Batches."""
    batch_size: Count = 16
    """Sequences per batch."""
    seq_len: Count | None = None
    """Tokens per sequence; `null`: as in training."""
    pgd_steps: tuple[Natural, ...] = (20, 40, 80, 160, 320)
    """Step counts of the adversarial curve; empty skips it."""
    pgd_restarts: Count = 3
    """Random starts of the adversary."""
    audit: bool = False
    """Whether to try what needs no gradient, too."""
    seed: int = 0
    """Seed of masks and adversary."""


class RunFile(Config):
    """A run file, validated."""

    model: ModelSection
    """The base model."""
    data: str
    """Training data: a path (.npy, .safetensors, text, a saved dataset) or `hf:NAME`."""
    elsewhere: str | None = None
    """Data of everything else, where one behaviour is decomposed (preset targeted); as `data`."""
    output: str
    """Directory of the results."""
    prepend_bos: bool | None = None
    """Whether sequences of text begin with BOS; `null` follows the model."""
    training: VPDConfig
    """How to train; `preset` (paper, recent, small, spd or targeted) gives what is not named."""
    evaluation: EvaluationSection | None = None
    """What to measure at the end, if anything."""

    @field_validator("training", mode="before")
    @classmethod
    def _from_preset(cls, training: Any) -> Any:
        return training if isinstance(training, VPDConfig) else VPDConfig.from_mapping(training)

    def evaluation_plan(self) -> dict[str, Any]:
        """Arguments of `vpd_lens.evaluate`, with sequences as long as in training by default."""
        if self.evaluation is None:
            raise ConfigError("the run file has no evaluation section; add one with held-out data.")
        plan = self.evaluation.model_dump()
        plan["seq_len"] = plan["seq_len"] or self.training.seq_len
        return plan | {"prepend_bos": self.prepend_bos}


def read_run_file(path: Path | None, overrides: Sequence[str] = ()) -> RunFile:
    """Read a YAML (or JSON) run file, or an empty one, and replace what `PATH=VALUE`s say.

    PATH is a dotted path in the run file; one that starts with none of the file's own keys is a
    field of `training`. VALUE is YAML. Relative paths start at the working directory.

    Raises:
        ConfigError: If the file cannot be read, or a field is unknown, missing or unusable.
    """
    data = {} if path is None else base.read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    data["training"] = data.get("training") or {}
    try:
        return RunFile(**data)
    except InvalidConfig as error:
        raise InvalidConfig(str(path or "--set"), error.troubles) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    path, where = path.strip(), f"--set {override!r}"
    first = path.partition(".")[0]
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{where}: expected PATH=VALUE, for example optimiser.lr=1e-3.")
    known = [*RunFile.model_fields, "preset", *VPDConfig.model_fields]
    if first not in known:
        deeper = [deep for deep in base.field_paths(VPDConfig) if deep.endswith(f".{first}")]
        hint = did_you_mean(first, known, likely=deeper)
        raise ConfigError(f"{where}: {first}: there is no such field{hint}")
    try:
        inside = "" if first in RunFile.model_fields else "training."
        base.set_path(data, inside + path, base.parse_yaml(text, where))
    except ConfigError as error:
        raise error if where in str(error) else ConfigError(f"{where}: {error}") from None


_HEAD = """\
# A run file of `vpd-lens train`. Relative paths start at the working directory.
# "# " begins help; "#" without a space a field at its default: remove it to change one.
"""


def template(preset: str = "small") -> str:
    """A run file in which every field is explained, those of `training` at a preset's values."""
    config = VPDConfig.from_mapping({"preset": preset})
    example = RunFile(
        model=ModelSection(source="gpt2"),
        data="path/to/text",
        elsewhere="path/to/other/text" if config.elsewhere.coefficient else None,
        output="runs/first",
        training=config,
        evaluation=EvaluationSection(data="path/to/held/out/text"),
    )
    active = ("model", "source", "data", "output", "training")
    active += ("elsewhere",) if example.elsewhere else ()
    lines = _template(example, active=active)
    lines.insert(lines.index("training:") + 1, f"  preset: {preset}")
    return _HEAD + "\n".join(lines) + "\n"


def _template(config: Config, active: Sequence[str], indent: str = "") -> list[str]:
    lines, values = [], config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        off = "" if name in active else "#"
        words = (field.description or "").replace("`None`", "`null`")
        lines += textwrap.indent(textwrap.fill(words, 94), f"{indent}# ").splitlines()
        if isinstance(value, Config):
            lines.append(f"{indent}{off}{name}:")
            inner = () if off else [name for name in active if name not in values]
            lines += _template(value, inner, indent + "  ")
        else:
            lines.append(f"{indent}{off}{name}: {json.dumps(values[name])}")
    return lines
