"""`train`: the loop around the step. Checkpoints, interruption, resuming, logging."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.config import VPDConfig
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import attach, removed_if_untrained
from vpd_lens.decomposition.saving import base_model_record, save
from vpd_lens.decomposition.subcomponents import align, singular
from vpd_lens.errors import ArtefactError, CollapseError, ConfigError, TrainingInterrupted
from vpd_lens.models import usable_device
from vpd_lens.rendering import Shown, titled
from vpd_lens.storage import disk_errors, existing_folder
from vpd_lens.training.budget import budget, explained_out_of_memory, warn_if_short
from vpd_lens.training.checkpoint import Checkpoint, save_checkpoint
from vpd_lens.training.compaction import compact_when_due, sizes
from vpd_lens.training.distributed import Processes, join, stop_requests
from vpd_lens.training.log import Diagnostics, MetricsLog, SilentLog
from vpd_lens.training.losses import StepImportance
from vpd_lens.training.sharding import sharded_importance
from vpd_lens.training.step import Losses, Stepper, require_finite, warm_up_faithfulness
from vpd_lens.training.streams import Streams

# Between checkpoints where `checkpoint_every` asks for none: what is lost when a process dies. A
# state that takes long to write is written less often.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 300.0, 0.05


@dataclass(repr=False)
class TrainingResult(Shown):
    """What a finished run leaves, in a folder and in numbers.

    The folder has `metrics.jsonl`, `config.yaml`, `checkpoint/` and `decomposition/`. `steps` are
    those of the run; `seconds` is the time of this call; `metrics` are the last ones logged, and
    `history` all that this call logged.
    """

    folder: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)

    def __rich__(self) -> Group:
        table = Table(title="Last metrics", title_justify="left", show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right")
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.4g}")
        return titled(repr(self), table)

    def __repr__(self) -> str:
        return f"TrainingResult({str(self.folder)!r}, {self.steps} steps, {self.seconds:.0f} s)"


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: nn.Module,
    data: Any,
    config: VPDConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    wandb: dict[str, Any] | None = None,
    prepend_bos: bool | None = None,
    elsewhere: Any = None,
    example: Tensor | None = None,
) -> TrainingResult:
    """Train the decomposition of a model (attaching one if it has none).

    A decomposition that has been trained before goes on from where it is, with the schedules of
    the new run; it is not aligned or warmed up again. Should a run fail before its first step, a
    decomposition that it has attached is taken off again.

    Resuming continues bit-identically on CPU, and on CUDA as far as its kernels are deterministic;
    on another kind of device, or with another number of processes, random masks are drawn anew.
    A run that was stopped before its first checkpoint starts over, with or without `resume`.

    In a script that `torchrun` or `accelerate` has started on many processes, all of them call
    this with the same arguments, and train together; see `docs/processes.md`.

    Args:
        model: A HookedTransformer, TransformerBridge or module; decomposed or not.
        data: Tokens: a tensor, an `.npy` or `.safetensors` file, a directory or glob of text
            files, a Hugging Face dataset or `"hf:NAME"`, or an iterable of token batches. An
            `attention_mask` that comes with them says what is padding.
        config: The run; `None` is `VPDConfig.small()`.
        output: Directory for metrics, checkpoints and the result; `None`: `runs/vpd-<time>`.
        resume: Continue from the checkpoint in `output`.
        progress: Show a progress bar (or lines where there is no terminal).
        wandb: Arguments of `wandb.init`, to log there too.
        prepend_bos: BOS policy for text; `None` follows the model.
        elsewhere: Data of everything else, on which the subcomponents have to do no harm, where one
            behaviour is decomposed (`VPDConfig.targeted()`); as `data`, which then shows the
            behaviour.
        example: One input batch, for models that are not TransformerLens transformers.

    Returns:
        Where the results lie and the last metrics. The trained decomposition is `model.vpd`.

    Raises:
        ConfigError: If CUDA is asked for and absent, the model is in float16, `output` already
            holds another run, or holds none that could be resumed.
        ArtefactError: If the checkpoint is damaged or of another run, or `output` cannot be
            written.
        DataError: If data cannot be read or does not fit the model, or `data` is `elsewhere`.
        CollapseError: If the importance function collapses and `stop_on_collapse` is set.
        NonFiniteLossError: If a loss becomes NaN or infinite; the last checkpoint is kept.
        OutOfMemoryError: If the run runs out of memory; `MemoryWarning` comes before that.
        ProcessError: If another process died, or has other arguments.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    config = config or (VPDConfig.small() if elsewhere is None else VPDConfig.targeted())
    if output is None:
        output = Path("runs") / f"vpd-{datetime.now():%Y%m%d-%H%M%S}"
    with ExitStack() as stack:
        processes = join(config.device, model)
        stack.callback(processes.close)
        rows = processes.rows(config.batch_size, config.micro_batches)
        folder = processes.all(Path(output))[0]
        _move(model, processes.device)
        if "vpd" not in model.__dict__:
            counts, importance = config.n_subcomponents, config.importance
            attach(model, config.sites, counts, importance, example, seed=config.seed)
            stack.enter_context(removed_if_untrained(model))
        vpd: Decomposition = model.__dict__["vpd"]
        reading = {"model": model, "prepend_bos": prepend_bos, "rows": rows}
        streams = Streams(config, data, elsewhere, **reading)
        needed = budget(vpd, config, config.batch_size // processes.world, streams.longest)
        warn_if_short(needed, vpd)
        found = _left_by_another_run(folder, processes, resume)
        if processes.world > 1:
            base = base_model_record(vpd)
            processes.require_same(
                model=json.dumps([base.weights, base.origin]),
                data=json.dumps(streams.state_dict(), sort_keys=True),
                configuration=f"{config} resume={resume}",
            )
            processes.first_(list(vpd.parameters()))
        memory = explained_out_of_memory(needed, vpd.device)
        with sharded_importance(vpd, processes, config.shard_importance), memory:
            run = _Run(Stepper(vpd, config, processes), streams, folder)
            if found == "checkpoint":
                run.resume()
            with run.open_log(progress, wandb) as log:
                if found == "started":
                    log.say(f"{folder} holds a run without a checkpoint; it starts over.")
                if not run.start:
                    run.prepare()
                begun = time.perf_counter()
                run.loop(log)
                seconds = time.perf_counter() - begun
        vpd.trained_steps = run.trained_before + config.steps
        vpd.training_config = config.model_dump(mode="json")
        metrics = run.history[-1] if run.history else processes.all(log.last)[0]
        if processes.first:
            save(vpd, folder / "decomposition", metrics)
        processes.wait()
    return TrainingResult(folder, config.steps, seconds, metrics, run.history)


class _Run:
    """One call of `train`: what it begins from, the loop, and its checkpoints."""

    def __init__(self, stepper: Stepper, streams: Streams, folder: Path) -> None:
        self.stepper, self.streams, self.folder = stepper, streams, folder
        self.vpd, self.config, self.processes = stepper.vpd, stepper.config, stepper.processes
        self.checkpoint = folder / "checkpoint"
        self.start, self.trained_before = 0, stepper.vpd.trained_steps  # steps of this run, before
        self.extra: dict[str, Any] = {}  # what else a checkpoint keeps: the wandb run
        self.history: list[dict[str, float]] = []
        self.saved: int | None = None  # the step of the last checkpoint
        self.next_save = time.monotonic() + CHECKPOINT_SECONDS

    def resume(self) -> None:
        """Take up the checkpoint; nothing is changed unless all of it fits."""
        found = Checkpoint.open(self.checkpoint, self.stepper)
        self.streams.load_state_dict(found.record.data)
        found.restore(self.stepper)
        self.start = self.saved = found.record.step
        self.trained_before, self.extra = found.record.trained_before, dict(found.record.extra)

    def prepare(self) -> None:
        """Before the first step of all: align the subcomponents, and fit `V U` to the weights."""
        if self.trained_before == 0:
            if self.config.initialisation == "aligned":
                align(self.vpd.subcomponents, self.vpd.sites)
            if self.config.initialisation == "svd":
                singular(self.vpd.subcomponents, self.stepper.weights)
            warm_up_faithfulness(self.stepper)
        self.processes.first_(self.stepper.parameters["subcomponents"])

    def open_log(self, progress: bool, wandb: dict[str, Any] | None) -> MetricsLog | SilentLog:
        """Where metrics go: to `folder` on the first process, nowhere on the others."""
        if not self.processes.first:
            return SilentLog()
        if wandb is not None:
            wandb = {"config": self.config.model_dump(), **wandb}
            if "wandb_id" in self.extra:
                wandb = {"id": self.extra["wandb_id"], "resume": "allow", **wandb}
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.config.to_yaml(self.folder / "config.yaml")
            log = MetricsLog(self.folder, self.config.steps, self.start, progress, wandb)
        if log.run is not None:
            self.extra["wandb_id"] = log.run.id
        return log

    def loop(self, log: MetricsLog | SilentLog) -> None:
        """Train up to the last step."""
        config, stepper, window = self.config, self.stepper, _Window()
        c_total = sum(self.vpd.subcomponents.original_sizes)
        diagnostics = Diagnostics(c_total, config.steps, config.minimality)
        with stop_requests() as requests, self.processes.contact(self._what_is_left):
            for step in range(self.start, config.steps):
                batch, other = next(self.streams)  # this process's rows
                if step == self.start:
                    self._data_state()  # before any step: do all processes read the same data?
                losses, importance = stepper.step(batch.tokens, step, batch.real, other)
                window.add(losses)
                done = step + 1
                self.vpd.trained_steps = self.trained_before + done
                log.advance(done)
                if folded := compact_when_due(stepper, importance, done):
                    left = f"into the deltas, {self.vpd.layout.total} left"
                    log.say(f"step {done}: {folded} dead subcomponents folded {left}")
                if done % config.log_every == 0 or done == config.steps:
                    self.history.append(window.summary(importance, stepper))
                    if self.processes.first:
                        diagnostics.look(done, self.history[-1])
                    log.write(done, self.history[-1])
                    window = _Window()
                stop, due = self._agree(requests, done, diagnostics)
                if due or done == config.steps or stop:
                    require_finite(window.sums)
                    self._save(done)
                if stop and done < config.steps:
                    raise TrainingInterrupted(
                        f"stopped by {stop} after step {done} of {config.steps}; a checkpoint is "
                        f"in {self.checkpoint}. To go on: train(..., output={str(self.folder)!r}, "
                        "resume=True), or vpd-lens train with --resume."
                    )

    def _collapsed(self, done: int) -> str:
        kept = f"the one after step {self.saved} is" if self.saved else "there is none"
        return (
            f"stopped after step {done}: the importance function is collapsing (see the warning). "
            f"No checkpoint was written since the first sign; {kept} in {self.checkpoint}. Start "
            "anew with a lower minimality.coefficient or minimality.penalty='smooth_l0'."
        )

    def _agree(
        self, requests: list[signal.Signals], done: int, seen: Diagnostics
    ) -> tuple[str, bool]:
        """The signal that any process has received, and whether a checkpoint is due.

        What the first process has `seen` stops all of them, or keeps them from writing one.
        """
        every = self.config.checkpoint_every
        due = done % every == 0 if every else time.monotonic() > self.next_save
        signs = [self.config.stop_on_collapse and s for s in (seen.collapsed, seen.suspicious)]
        agreed = self.processes.largest([requests[0] if requests else 0, due, *signs])
        number, due, collapsed, suspicious = agreed
        if collapsed:
            raise CollapseError(self._collapsed(done))
        return (signal.Signals(number).name if number else ""), bool(due and not suspicious)

    def _data_state(self) -> dict[str, Any]:
        state = self.streams.state_dict()
        self.processes.require_same(data=json.dumps(state, sort_keys=True))
        return state

    def _save(self, done: int) -> None:
        begun = time.monotonic()
        own = {"trained_before": self.trained_before, "extra": self.extra}
        save_checkpoint(self.checkpoint, self.stepper, step=done, data=self._data_state(), **own)
        self.processes.wait()
        now, self.saved = time.monotonic(), done
        self.next_save = now + max(CHECKPOINT_SECONDS, (now - begun) / CHECKPOINT_SHARE)

    def _what_is_left(self) -> str:
        if self.saved is None:
            return "The run has no checkpoint yet: start it again."
        return (
            f"The last checkpoint, after step {self.saved}, is in {self.checkpoint}: start the "
            "job again with resume=True, or vpd-lens train with --resume."
        )


class _Window:
    """Losses since the last log line, summed on the device: no host sync between log steps."""

    def __init__(self) -> None:
        self.sums: Losses = {}
        self.count = 0
        self.since = time.perf_counter()

    def add(self, losses: Losses) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.count += 1

    def summary(self, importance: StepImportance, stepper: Stepper) -> dict[str, float]:
        """Means of the losses over the window, sparsity of the last batch, and timing."""
        require_finite(self.sums)
        g = importance.whole()
        metrics = {name: float(total) / self.count for name, total in self.sums.items()}
        figures = {
            "l0": importance.l0(),
            "ci_max": float(importance.mean(g.amax(-1))),
            "lr": stepper.optimisers[0].param_groups[0]["lr"],
            "coefficient": float(stepper.price.coefficient),
            "worst": float(stepper.price.worst),
            "seconds_per_step": (time.perf_counter() - self.since) / self.count,
        }
        if importance.elsewhere is not None:
            figures["l0_elsewhere"] = importance.elsewhere.l0()
        if stepper.price.unmasked is not None:
            figures["unmasked"] = float(stepper.price.unmasked)
        every = stepper.processes.all(figures)
        means = {name: sum(own[name] for own in every) / len(every) for name in figures}
        return metrics | means | sizes(stepper)


def _move(model: nn.Module, device: str) -> None:
    try:
        if device != "auto":
            model.to(usable_device(device))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {error}") from None


def _left_by_another_run(folder: Path, processes: Processes, resume: bool) -> str:
    """`"checkpoint"`, `"started"` or nothing; refuses to overwrite a run, or continue none."""
    names = ("metrics.jsonl", "config.yaml")
    found = "started" if any(os.path.exists(folder / name) for name in names) else ""
    for name in ("decomposition", "checkpoint"):
        with suppress(ArtefactError):
            existing_folder(folder / name)
            found = name
    found = processes.all(found)[0]
    if found == "checkpoint" and not resume:
        raise ConfigError(
            f"output={str(folder)!r} already holds a run. Pass resume=True to continue it, or "
            "another directory."
        )
    if found == "decomposition":
        raise ConfigError(
            f"output={str(folder)!r} holds the result of a run whose checkpoint is gone. Name "
            "another directory; vpd_lens.load reads the result."
        )
    if not found and resume:
        raise ConfigError(
            f"resume=True, but output={str(folder)!r} holds no run and no checkpoint. Leave resume "
            "out, or check the path."
        )
    return found
