"""One named run: trained, evaluated and recorded; or found finished, or continued.

A directory of runs holds, for each of them,

| path | content |
|---|---|
| `records/<name>.json` | the `RunRecord`, written when everything else is done |
| `runs/<name>/` | what `vpd_lens.train` writes, and the evaluation's `report.html` |
| `runs/<name>.previous/` | an earlier run of that name with another configuration |
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recorded.record import RunRecord
from toy_runs.measure import ToyReport
from vpd_lens.config import RunFile, VPDConfig
from vpd_lens.decomposition.saving import load
from vpd_lens.errors import ArtefactError, ConfigError, TrainingInterrupted
from vpd_lens.evaluation import EvalReport, evaluate
from vpd_lens.models import load_model
from vpd_lens.storage import read, tensor_hash
from vpd_lens.training import train
from vpd_lens.training.checkpoint import CheckpointRecord


@dataclass(frozen=True)
class Target:
    """What is decomposed, and the data for it.

    Attributes:
        description: Names model and training data in a record, as JSON values; a run is the same
            only if this is.
        load: Makes the base model, the same each time.
        data: Training data, as for `vpd_lens.train`.
        held_out: Data of evaluations that do not name their own.
        prepend_bos: BOS policy for text.
        example: One input, for models that are not transformers.
        measure: Takes the place of `vpd_lens.evaluate`.
    """

    description: Mapping[str, Any]
    load: Callable[[], nn.Module]
    data: Any
    held_out: Any = None
    prepend_bos: bool | None = None
    example: Tensor | None = None
    measure: Callable[[nn.Module], EvalReport | ToyReport] | None = None


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: Unique among the runs of a directory.
        target: What is decomposed.
        config: How it is trained.
        evaluation: Arguments of `vpd_lens.evaluate`, as JSON values.
    """

    name: str
    target: Target
    config: VPDConfig
    evaluation: Mapping[str, Any]

    @classmethod
    def of_run_file(cls, name: str, file: RunFile) -> Run:
        """The run that `vpd-lens train` would make of a run file with an evaluation.

        Raises:
            ConfigError: If the file has no evaluation section, or a model.base.
        """
        if file.model.base is not None:
            raise ConfigError(
                f"model.base is {file.model.base!r}, and experiments are of whole models; leave it "
                "out, or decompose the difference with vpd-lens train."
            )
        described = {"model": file.model.loading, "data": file.data}
        load_base = partial(load_model, **file.model.loading, device=file.training.device)
        target = Target(described, load_base, file.data, prepend_bos=file.prepend_bos)
        return cls(name, target, file.training, file.evaluation_plan())

    def is_trained_in(self, record: RunRecord) -> bool:
        """Whether a record's training is this run's: the same target and configuration."""
        return record.config == self.config and record.target == _as_json(self.target.description)

    def is_recorded_in(self, record: RunRecord) -> bool:
        """Whether a record is of exactly this run, the evaluation included."""
        return self.is_trained_in(record) and record.evaluation == _as_json(self.evaluation)


def perform(
    run: Run, output: Path, progress: bool = True, say: Callable[[str], None] = print
) -> RunRecord:
    """Train, evaluate and record a run, as far as that is not done yet.

    A record of exactly this run is returned as it is. A run that was interrupted, in training or
    before its record was written, goes on from its checkpoint; one that differs only in its
    evaluation is evaluated again. Results of the same name with another target or configuration
    are moved aside to `<name>.previous`.

    Args:
        run: The run.
        output: The directory of runs.
        progress: Show progress bars.
        say: Receives one line on what is being done.

    Raises:
        ArtefactError: If the record cannot be read, or the checkpoint is of another model.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    path = output / "records" / f"{run.name}.json"
    record = RunRecord.read(path) if path.exists() else None
    if record is not None and run.is_recorded_in(record):
        say(f"{run.name}: already recorded")
        return record
    folder = output / "runs" / run.name
    resume = record is None or run.is_trained_in(record)
    resume = resume and _has_checkpoint(folder, run.config)
    if not resume:
        _move_aside(folder)
    say(f"{run.name}: {'going on from its checkpoint' if resume else 'training'}")
    model = run.target.load()
    try:
        train(
            model,
            run.target.data,
            run.config,
            output=folder,
            resume=resume,
            progress=progress,
            prepend_bos=run.target.prepend_bos,
            example=run.target.example,
        )
    except TrainingInterrupted:
        raise TrainingInterrupted(
            f"stopped during {run.name}; a checkpoint is in {folder / 'checkpoint'}. Repeat the "
            "command to go on from it."
        ) from None
    record = RunRecord.now(
        name=run.name,
        target=_as_json(run.target.description),
        weights=_weights_hash(model),
        config=run.config,
        evaluation=_as_json(run.evaluation),
        training_seconds=_training_seconds(folder),
        report=_measured(run, model, folder, progress),
    )
    record.write(path)
    return record


def _measured(run: Run, model: nn.Module, folder: Path, progress: bool) -> EvalReport | ToyReport:
    """What a run is measured by; an evaluation leaves its page in the run's folder."""
    if run.target.measure is not None:
        return run.target.measure(model)
    report = evaluate(model, progress=progress, **{"data": run.target.held_out, **run.evaluation})
    report.to_html(folder / "report.html", f"VPD evaluation of {run.name}")
    return report


def load_decomposed(run: Run, output: Path) -> nn.Module:
    """The model of a finished run, with its trained decomposition."""
    return load(output / "runs" / run.name / "decomposition", run.target.load())


def _has_checkpoint(folder: Path, config: VPDConfig) -> bool:
    """Whether `folder` has a checkpoint of this configuration."""
    try:
        return read(folder / "checkpoint", CheckpointRecord).record.config == config
    except ArtefactError:
        return False


def _move_aside(folder: Path) -> None:
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as they come back from a file: tuples are lists there."""
    return json.loads(json.dumps(dict(values)))


def _weights_hash(model: nn.Module) -> str:
    hashes = [tensor_hash(site.weight) for site in model.__dict__["vpd"].sites]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _training_seconds(folder: Path) -> float:
    """From the log, which keeps the time per step of all attempts."""
    seconds, before = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        seconds += (entry["step"] - before) * entry["seconds_per_step"]
        before = entry["step"]
    return seconds
