"""What stands in best for a model's MLPs: its decomposition, or transcoders of every kind?

    python examples/comparison.py s --data FOLDER --decomposition FOLDER
    python examples/comparison.py example

Per-layer (PLT) and cross-layer (CLT) transcoders are trained for every objective and `--k`, each
for about `--seconds` of processor time; then they and the decomposition, masked at the MLPs alone,
are measured under three protocols against three accountings of sparsity. Every row is recorded in
`OUTPUT/TARGET/records` and not made twice; the table is printed, the figures are drawn into
`--figures`. A row that others add (`Row`) appears in the table with the rest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vpd_lens
from recorded.record import Machine, RunRecord, versions
from themed import save
from vpd_lens.analysis.comparison import compare, multiple_match_share
from vpd_lens.baselines.transcoders import (
    PROTOCOLS,
    MaskedMLPs,
    ReplacedReport,
    Transcoded,
    Transcoder,
    TranscoderConfig,
    alive_latents,
    measure_replaced,
    train_transcoder,
)
from vpd_lens.storage import write_text
from vpd_lens.viz.svg import MUTED, PALETTE

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = (0.0, 0.1, 0.5)
ACCOUNTINGS = {
    "per_module": "active per module",
    "per_output": "active per MLP output",
    "parameters": "active parameters",
}
# The processor time of a step, relative to a local one of a per-layer transcoder, was measured.
PLANS = [
    ("per_layer", "local"),
    ("per_layer", "cascading"),
    ("per_layer", "parallel"),
    ("cross_layer", "cascading"),
    ("cross_layer", "parallel"),
    ("per_layer", "single"),
    ("cross_layer", "local"),
]
SHORT = {"per_layer": "PLT", "cross_layer": "CLT"}
console = Console(width=150)


class Row(BaseModel):
    """One line of the table.

    Attributes:
        method: What stands in for the MLPs.
        trained_for: The objective of its training.
        setting: What tells it from the method's other rows.
        report: What was measured.
        thresholded: The same where a threshold selects latents, at each position by itself.
        cpu_seconds: Processor time of the training.
        config: How it was trained, if that is known here.
        extra: Other measures, by name.
        versions: Of vpd_lens, torch, transformer_lens and python.
        machine: Where it was measured.
        date: When, UTC, ISO 8601.
        command: The command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    method: str
    trained_for: str
    setting: str
    report: ReplacedReport
    thresholded: ReplacedReport | None = None
    cpu_seconds: float | None
    config: dict[str, Any] | None = None
    extra: dict[str, float] = {}
    versions: dict[str, str]
    machine: Machine
    date: str
    command: str

    @classmethod
    def now(cls, **fields: Any) -> Row:
        """A row made here and now."""
        return cls(
            **fields,
            versions=versions(),
            machine=Machine.this(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )


@dataclass(frozen=True)
class Bench:
    """A target with its decomposition, and the data."""

    model: nn.Module
    data: Tensor
    held_out: Tensor
    cpu_seconds: float | None  # of the decomposition's training
    output: Path

    def measured(self, replaced: Any) -> ReplacedReport:
        """A report on the held-out data."""
        return measure_replaced(replaced, self.held_out, batch_size=16, n_batches=4)

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """A recorded row, or a new one."""
        path = self.output / "records" / f"{name}.json"
        if not path.exists():
            write_text(path, make().model_dump_json(indent=1) + "\n")
        return Row.model_validate_json(path.read_text(encoding="utf-8"))


def bench(arguments: argparse.Namespace) -> Bench:
    """The target that was asked for."""
    if arguments.target == "s":
        from recipes import target_s

        target, _ = target_s(arguments.data, arguments.output)
        model = vpd_lens.load(arguments.decomposition, target.load())
        record = RunRecord.read(ROOT / "docs/results/recipes" / f"{arguments.vpd_record}.json")
        data, held_out, seconds = target.data, target.held_out[:64], record.training_seconds
    else:
        from quickstart_target import split, standard_library_text, tokenise
        from train_example import N_CHARACTERS, SIZE

        model = vpd_lens.load_example()
        text = standard_library_text(N_CHARACTERS)
        data, held_out = split(tokenise(model.tokenizer, text), SIZE.context)
        held_out, seconds = held_out[:64], None
    return Bench(model, data, held_out, seconds, arguments.output / arguments.target)


def decomposition_rows(on: Bench) -> Iterator[Row]:
    """The decomposition with what is above three thresholds."""
    for threshold in THRESHOLDS:

        def make(threshold: float = threshold) -> Row:
            report = on.measured(MaskedMLPs(on.model, threshold))
            return Row.now(
                method="VPD",
                trained_for="VPD",
                setting=f"importance > {threshold:g}",
                report=report,
                cpu_seconds=on.cpu_seconds,
            )

        yield on.row(f"vpd,threshold={threshold:g}", make)


def transcoder_row(on: Bench, config: TranscoderConfig) -> Row:
    """One transcoder, trained if it has not been."""
    name = f"{config.kind},{config.objective},latents={config.n_latents},k={config.k}"
    name = f"{name},seed={config.seed}"

    def make() -> Row:
        console.print(f"{name}: training", highlight=False)
        made = trained(on, name, config)
        return Row.now(
            method=SHORT[config.kind],
            trained_for=config.objective,
            setting=f"k = {config.k}",
            report=on.measured(Transcoded(on.model, made)),
            thresholded=on.measured(Transcoded(on.model, made, "threshold")),
            cpu_seconds=made.record.cpu_seconds,
            config=config.model_dump(mode="json"),
            extra={"tokens": float(made.record.trained_tokens)},
        )

    return on.row(name, make)


def trained(on: Bench, name: str, config: TranscoderConfig) -> Transcoder:
    """A transcoder that is read if it is there, or trained."""
    folder = on.output / "transcoders" / name
    if folder.exists():
        return Transcoder.load(folder)
    made = train_transcoder(on.model, on.data, config)
    made.save(folder)
    return made


def steps_for(on: Bench, config: TranscoderConfig, seconds: float) -> int:
    """How many steps take so much processor time: ten of them are tried."""
    tried = train_transcoder(
        on.model, on.data, config.replaced({"steps": 10}), progress=False
    ).record.cpu_seconds
    return max(20, round(seconds / tried * 10))
