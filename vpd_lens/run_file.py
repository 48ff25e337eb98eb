"""The run file of `vpd-lens train`: what to decompose, on which data, how, and where it goes.

```yaml
model: {source: path/or/name}          # also model_class, processing: see load_model
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

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from vpd_lens.errors import ConfigError
from vpd_lens.models import ModelClass, Processing, load_model
from vpd_lens.training.config import VPDConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """The base model; see `vpd_lens.models.load_model`.

    Attributes:
        source: A directory or a name.
        model_class: `"auto"`, `"hooked_transformer"` or `"bridge"`.
        processing: `"default"`, `"none"` or `"full"`.
    """

    source: str
    model_class: ModelClass = "auto"
    processing: Processing = "default"


class EvaluationSection(_Section):
    """The evaluation after training; see `vpd_lens.evaluate`.

    Attributes:
        data: Held-out data.
        n_batches: Batches.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: as in training.
        pgd_steps: Step counts of the adversarial curve; empty skips it.
        pgd_restarts: Random starts of the adversary.
    """

    data: str
    n_batches: int = Field(default=8, ge=1)
    batch_size: int = Field(default=16, ge=1)
    seq_len: int | None = Field(default=None, ge=1)
    pgd_steps: tuple[int, ...] = (20, 40, 80, 160, 320)
    pgd_restarts: int = Field(default=3, ge=1)


class RunFile(_Section):
    """A whole run.

    Attributes:
        model: The base model.
        data: What to train on.
        output: Directory of the results.
        prepend_bos: BOS policy for text; `None` follows the model.
        training: The configuration.
        evaluation: What to measure at the end, if anything.
    """

    model: ModelSection
    data: str
    output: str
    prepend_bos: bool | None = None
    training: VPDConfig
    evaluation: EvaluationSection | None = None

    def load_model(self) -> nn.Module:
        """The base model, on the device of `training`."""
        model = self.model
        return load_model(model.source, model.model_class, self.training.device, model.processing)

    def evaluation_plan(self) -> dict[str, Any]:
        """Arguments of `vpd_lens.evaluate`, with sequences as long as in training by default.

        Raises:
            ConfigError: If the file has no `evaluation` section.
        """
        if self.evaluation is None:
            raise ConfigError("the run file has no evaluation section; add one with held-out data.")
        plan = self.evaluation.model_dump()
        plan["seq_len"] = plan["seq_len"] or self.training.seq_len
        return plan | {"prepend_bos": self.prepend_bos}


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file and apply overrides.

    Args:
        path: A YAML (or JSON) file. Relative paths in it start at the working directory.
        overrides: `PATH=VALUE`, each as on the command line: PATH is a dotted path in the run
            file; one that starts with none of the file's own keys is a field of `training`.
            VALUE is YAML.

    Raises:
        ConfigError: If the file cannot be read, or a field is unknown, missing or unusable.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(data).__name__}.")
    for override in overrides:
        apply_override(data, override)
    training = data.get("training")
    where = f"{path}: training"
    data["training"] = VPDConfig.from_mapping({} if training is None else training, where)
    try:
        return RunFile(**data)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid run file:\n  {_explain(error)}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Replace one value of a run file read into `data`, as `--set` does.

    Raises:
        ConfigError: If `override` is not PATH=VALUE, or PATH leads through a plain value.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {override!r}: expected PATH=VALUE, for example optimiser.lr=1e-3."
        )
    if keys[0] not in RunFile.model_fields:
        keys = ["training", *keys]
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {key} is {child!r}, which has no fields.")
        node[key] = dict(child or {})
        node = node[key]
    node[keys[-1]] = value


class Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as in YAML 1.2; PyYAML reads it as text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such field")
        elif problem["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})"[:300])
    return "\n  ".join(lines)
