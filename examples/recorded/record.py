"""`RunRecord`: everything about one run that is needed to trust and to repeat its figures.

Every figure in the documentation comes from a stored record that a command regenerates.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from toy_runs.measure import ToyReport
from vpd_lens.config import VPDConfig
from vpd_lens.errors import ArtefactError
from vpd_lens.evaluation import EvalReport
from vpd_lens.storage import write_text


class Machine(BaseModel):
    """Where a run was made.

    Attributes:
        cpu: Its processor.
        n_cpus: Logical processors.
        gpu: Its first GPU, if PyTorch sees one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    n_cpus: int
    gpu: str | None

    @classmethod
    def this(cls) -> Machine:
        """The machine this runs on."""
        return cls(
            cpu=_cpu_model(),
            n_cpus=os.cpu_count() or 1,
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )


class RunRecord(BaseModel):
    """One finished run, of a transformer or of a toy.

    Attributes:
        format_version: Of this file.
        name: Name of the run.
        target: What was decomposed, and on which data.
        weights: SHA-256 over the hashes of all decomposed weights of the target.
        config: The training configuration.
        evaluation: Arguments of the evaluation.
        seed: Seed of the training.
        training_seconds: Wall-clock time of all training steps, over interruptions.
        report: What was measured: by `vpd_lens.evaluate`, or against the truth of a toy.
        versions: Of vpd_lens, torch, transformer_lens and python.
        machine: Where the run was finished.
        date: When, UTC, ISO 8601.
        command: The command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    name: str
    target: dict[str, Any]
    weights: str | None
    config: VPDConfig
    evaluation: dict[str, Any]
    seed: int
    training_seconds: float
    report: EvalReport | ToyReport
    versions: dict[str, str]
    machine: Machine | None
    date: str
    command: str | None

    @classmethod
    def now(cls, **fields: Any) -> RunRecord:
        """A record made here and now; `fields` are the others."""
        return cls(
            **fields,
            seed=fields["config"].seed,
            versions=versions(),
            machine=Machine.this(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json_in_rows(self.model_dump(mode="json")) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read what `write` wrote, by this version or an earlier one.

        Raises:
            ArtefactError: If the file is missing, damaged or of another format.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{path}: not a readable run record ({_first_problem(error)}). Restore it from a "
                "copy, or delete it to have the run measured again."
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        """Version 0.1 recorded toys in a form of their own."""
        if not isinstance(data, dict) or "toy" not in data:
            return data
        toy, method, seed = (data[key] for key in ("toy", "method", "seed"))
        return {
            "name": f"{toy},{method},seed={seed}",
            "target": {"toy": toy, "seed": seed, "seconds": data["target_seconds"]},
            "training_seconds": data["seconds"],
            "report": {key: data[key] for key in ("represented", "sites")},
            "evaluation": {},
            **{key: data[key] for key in ("config", "seed", "versions", "date")},
            **dict.fromkeys(("weights", "machine", "command")),
        }


def json_in_rows(data: Any, indent: str = "") -> str:
    """Indented JSON in which a list of numbers or strings takes one line: a matrix, one per row.

    Args:
        data: What `json.dumps` takes.
        indent: Indentation of the line that it begins on.
    """
    deeper = indent + " "
    if isinstance(data, dict) and data:
        parts = [f"{json.dumps(key)}: {json_in_rows(data[key], deeper)}" for key in data]
        brackets = "{}"
    elif isinstance(data, list) and any(isinstance(part, (dict, list)) for part in data):
        parts, brackets = [json_in_rows(part, deeper) for part in data], "[]"
    else:
        return json.dumps(data, separators=(",", ":"))
    lines = ",\n".join(deeper + part for part in parts)
    return f"{brackets[0]}\n{lines}\n{indent}{brackets[1]}"


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}".lstrip(": ")


def versions() -> dict[str, str]:
    """Versions of vpd_lens, torch, transformer_lens and python."""
    packages = ("vpd-lens", "torch", "transformer-lens")
    found = {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}
    return {**found, "python": platform.python_version()}


def _cpu_model() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
