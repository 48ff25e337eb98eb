"""`RunRecord`: everything about one run that is needed to trust and to repeat its figures.

Every figure in the documentation comes from a stored record that a command regenerates.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from vpd_lens.config import VPDConfig
from vpd_lens.errors import ArtefactError
from vpd_lens.evaluation import EvalReport
from vpd_lens.files import write_text_atomically


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
    """One finished run.

    Attributes:
        format_version: Of this file.
        name: Name of the run.
        target: What was decomposed, and on which data.
        weights: SHA-256 over the hashes of all decomposed weights of the target.
        config: The training configuration.
        evaluation: Arguments of the evaluation.
        seed: Seed of the training.
        training_seconds: Wall-clock time of all training steps, over interruptions.
        report: What was measured.
        versions: Of vpd_lens, torch, transformer_lens and python.
        machine: Where the run was finished.
        date: When, UTC, ISO 8601.
        command: The command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    name: str
    target: dict[str, Any]
    weights: str
    config: VPDConfig
    evaluation: dict[str, Any]
    seed: int
    training_seconds: float
    report: EvalReport
    versions: dict[str, str]
    machine: Machine
    date: str
    command: str

    @classmethod
    def now(
        cls,
        name: str,
        target: dict[str, Any],
        weights: str,
        config: VPDConfig,
        evaluation: dict[str, Any],
        training_seconds: float,
        report: EvalReport,
    ) -> RunRecord:
        """A record made here and now; see the attributes."""
        return cls(
            name=name,
            target=target,
            weights=weights,
            config=config,
            evaluation=evaluation,
            seed=config.seed,
            training_seconds=training_seconds,
            report=report,
            versions=versions(),
            machine=Machine.this(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read what `write` wrote.

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
