"""`train`: the loop around the step. Checkpoints, interruption, resuming, logging."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.config import VPDConfig
from vpd_lens.data import token_batches
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.saving import base_model_record, save
from vpd_lens.errors import ConfigError, DataError, TrainingInterrupted
from vpd_lens.training.checkpoints import load_checkpoint, save_checkpoint
from vpd_lens.training.compaction import compact_when_due, sizes
from vpd_lens.training.cost.guard import explained_out_of_memory, require_memory
from vpd_lens.training.cost.workload import Workload
from vpd_lens.training.diagnostics import Diagnostics
from vpd_lens.training.initialisation import align
from vpd_lens.training.interruption import stop_requests
from vpd_lens.training.joining import join
from vpd_lens.training.logging import MetricsLog, SilentLog, last_metrics
from vpd_lens.training.sharding import shard_importance
from vpd_lens.training.step import Losses, Stepper, require_finite, warm_up_faithfulness

# Between the checkpoints of many processes where `checkpoint_every` asks for none: what is lost
# when one of them dies.
CHECKPOINT_SECONDS = 900.0


@dataclass
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        folder: Directory with `metrics.jsonl`, `config.yaml`, `checkpoint/` and `decomposition/`.
        steps: Finished steps.
        seconds: Wall-clock time of this call.
        metrics: The last logged metrics.
        history: All metrics logged by this call.
    """

    folder: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(repr=False, default_factory=list)


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
    example: Tensor | None = None,
) -> TrainingResult:
    """Train the decomposition of a model (attaching one if it has none).

    Resuming continues bit-identically on CPU: parameters, optimiser, sources, random generator
    and data position are restored. On CUDA the same holds as far as its kernels are
    deterministic.

    In a script that `torchrun` or `accelerate` has started on many processes, all of them call
    this with the same arguments, and train together; see `docs/processes.md`.

    Args:
        model: A HookedTransformer, TransformerBridge or module; decomposed or not.
        data: Tokens: a tensor, an `.npy` or `.safetensors` file, a directory or glob of text
            files, a Hugging Face dataset or `"hf:NAME"`, or an iterable of token batches.
        config: The run; `None` is `VPDConfig.small()`.
        output: Directory for metrics, checkpoints and the result; `None`: `runs/vpd-<time>`.
        resume: Continue from the checkpoint in `output`.
        progress: Show a progress bar (or lines where there is no terminal).
        wandb: Arguments of `wandb.init`, to log there too.
        prepend_bos: BOS policy for text; `None` follows the model.
        example: One input batch, for models that are not TransformerLens transformers.

    Returns:
        Where the results lie and the last metrics. The trained decomposition is `model.vpd`.

    Raises:
        ConfigError: If CUDA is asked for and absent, or `output` already holds another run.
        DataError: If the data cannot be read or does not fit the model.
        NonFiniteLossError: If a loss becomes NaN or infinite; the last checkpoint is kept.
        OutOfMemoryError: If the run clearly needs more memory than there is, or runs out of it.
        ProcessError: If another process died, or has other arguments.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    config = config or VPDConfig.small()
    processes = join(config.device, model)
    rows = processes.rows(config.batch_size, config.micro_batches)
    folder = processes.from_first(Path(output) if output is not None else _default_folder())
    _move(model, processes.device)
    if "vpd" not in model.__dict__:
        sites = config.sites if isinstance(config.sites, str) else list(config.sites)
        attach(model, sites, config.n_subcomponents, config.importance, example, seed=config.seed)
    vpd: Decomposition = model.__dict__["vpd"]
    vpd.follow_device()
    batches = token_batches(
        data,
        model=model,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        prepend_bos=prepend_bos,
        rows=rows,
    )
    work = Workload.of(vpd, config, batches.seq_len, processes.world)
    estimate = require_memory(work, vpd.device)
    if processes.world > 1:
        processes.require_same(
            model=json.dumps(base_model_record(vpd)["weights"]),
            data=json.dumps(batches.state_dict(), sort_keys=True),
            configuration=f"{config} resume={resume}",
        )
        processes.first_(list(vpd.parameters()))
    unshard = shard_importance(vpd, processes) if config.shard_importance else None
    stepper = Stepper(vpd, config, processes)
    checkpoint = folder / "checkpoint"
    start, extra = 0, {}
    if resume:
        start, position, extra = load_checkpoint(checkpoint, stepper)
        batches.load_state_dict(position)
    elif processes.from_first((folder / "metrics.jsonl").exists()):
        raise ConfigError(
            f"output={str(folder)!r} already holds a run. Pass resume=True to continue it, or "
            "another directory."
        )
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        config.to_yaml(folder / "config.yaml")
    if wandb is not None and "wandb_id" in extra:
        wandb = {"id": extra["wandb_id"], "resume": "allow", **wandb}
    with (
        MetricsLog(folder, config.steps, start, progress, wandb, config.model_dump())
        if processes.first
        else SilentLog() as log,
        _evaluation_mode(model),
        explained_out_of_memory(work, vpd.device),
    ):
        log.say(estimate)
        if log.run is not None:
            extra["wandb_id"] = log.run.id
        if not resume:
            if config.initialisation == "aligned" and vpd.trained_steps == 0:
                align(vpd.subcomponents, vpd.sites)
            warm_up_faithfulness(stepper)
            processes.first_(stepper.parameters["subcomponents"])
        run = _Run(stepper, batches, log, checkpoint, extra)
        history, seconds = run.loop(start)
    vpd.trained_steps = config.steps
    vpd.training_config = config.model_dump(mode="json")
    if unshard is not None:
        unshard()
    metrics = history[-1] if history else last_metrics(folder)
    if processes.first:
        save(vpd, folder / "decomposition", metrics)
    processes.leave()
    return TrainingResult(folder, config.steps, seconds, metrics, history)


class _Run:
    """The loop of one call of `train`."""

    def __init__(
        self,
        stepper: Stepper,
        batches: Any,
        log: MetricsLog | SilentLog,
        checkpoint: Path,
        extra: dict,
    ) -> None:
        self.stepper = stepper
        self.processes = stepper.processes
        self.config = stepper.config
        self.batches = batches
        self.log = log
        self.checkpoint = checkpoint
        self.extra = extra
        self.saved_at = time.monotonic()

    def loop(self, start: int) -> tuple[list[dict[str, float]], float]:
        config, stepper = self.config, self.stepper
        c_total = sum(stepper.vpd.subcomponents.original_sizes)
        window = _Window(c_total, config.steps, warn=self.processes.first)
        history: list[dict[str, float]] = []
        begun = time.perf_counter()
        with stop_requests() as requests, self.processes.contact(self.checkpoint):
            for step in range(start, config.steps):
                batch = next(self.batches)  # this process's rows
                if batch.real is not None:
                    raise DataError("data has padding; training on padded rows is not supported.")
                if step == start and self.processes.world > 1:
                    self._data_state()
                losses, importance = stepper.step(batch.tokens, step)
                window.add(losses)
                done = step + 1
                self.log.advance(done)
                if folded := compact_when_due(stepper, importance, done):
                    self.log.say(
                        f"step {done}: {folded} dead subcomponents folded into the deltas, "
                        f"{stepper.vpd.layout.total} left"
                    )
                if done % config.log_every == 0 or done == config.steps:
                    history.append(window.summary(done, importance, stepper))
                    self.log.write(done, history[-1])
                stop, due = self._agree(requests, done)
                if due or done == config.steps or stop:
                    window.require_finite()
                    self._save(done)
                if stop and done < config.steps:
                    raise TrainingInterrupted(
                        f"stopped by {stop} after step {done} of {config.steps}; a checkpoint "
                        f"is in {self.checkpoint}. To go on: train(..., output="
                        f"{str(self.checkpoint.parent)!r}, resume=True), or vpd-lens train with "
                        "--resume."
                    )
        return history, time.perf_counter() - begun

    def _agree(self, requests: list[signal.Signals], done: int) -> tuple[str, bool]:
        """The signal that any process has received, and whether a checkpoint is due."""
        every = self.config.checkpoint_every
        due = bool(every) and done % every == 0
        if self.processes.world > 1 and not every:
            due = self.processes.first and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        number, due = self.processes.largest([requests[0] if requests else 0, due])
        return (signal.Signals(number).name if number else ""), bool(due)

    def _data_state(self) -> dict[str, Any]:
        state = self.batches.state_dict()
        self.processes.require_same(data=json.dumps(state, sort_keys=True))
        return state

    def _save(self, done: int) -> None:
        save_checkpoint(self.checkpoint, self.stepper, done, self._data_state(), self.extra)
        self.processes.wait()
        self.saved_at = time.monotonic()


class _Window:
    """Losses since the last log line, summed on the device: no host sync between log steps."""

    def __init__(self, c_total: int, steps: int, warn: bool = True) -> None:
        self.diagnostics = Diagnostics(c_total, steps)
        self.warn = warn
        self._reset()

    def _reset(self) -> None:
        self.sums: Losses = {}
        self.count = 0
        self.since = time.perf_counter()

    def add(self, losses: Losses) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.count += 1

    def require_finite(self) -> None:
        require_finite(self.sums)

    def summary(self, done: int, importance: Tensor, stepper: Stepper) -> dict[str, float]:
        """Means of the losses over the window, sparsity of the last batch, and timing."""
        self.require_finite()
        active = importance > 0
        metrics = {name: float(total) / self.count for name, total in self.sums.items()}
        own = {
            "l0": float(active.sum(-1).float().mean()),
            "ci_max": float(importance.amax(-1).mean()),
            "lr": stepper.optimisers[0].param_groups[0]["lr"],
            "seconds_per_step": (time.perf_counter() - self.since) / self.count,
        }
        metrics |= dict(zip(own, stepper.processes.mean(list(own.values())), strict=True))
        metrics |= sizes(stepper)
        if self.warn:
            self.diagnostics.look(done, metrics)
        self._reset()
        return metrics


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The target must not drop out units while it is being decomposed."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _move(model: nn.Module, device: str) -> None:
    if device == "auto":
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, but this PyTorch sees no CUDA device. Use device='cpu', or "
            "install a CUDA build of PyTorch."
        )
    try:
        model.to(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {error}") from None


def _default_folder() -> Path:
    return Path("runs") / f"vpd-{datetime.now():%Y%m%d-%H%M%S}"
