"""`train`: the loop around the step. Checkpoints, interruption, resuming, logging."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.saving import save
from vpd_lens.errors import ConfigError, TrainingInterrupted
from vpd_lens.training.checkpoints import load_checkpoint, save_checkpoint
from vpd_lens.training.config import VPDConfig
from vpd_lens.training.cost.guard import explained_out_of_memory, require_memory
from vpd_lens.training.cost.workload import Workload
from vpd_lens.training.data import token_batches
from vpd_lens.training.diagnostics import Diagnostics
from vpd_lens.training.initialisation import align
from vpd_lens.training.logging import MetricsLog, last_metrics
from vpd_lens.training.step import Losses, Stepper, require_finite, warm_up_faithfulness


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
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    config = config or VPDConfig.small()
    folder = Path(output) if output is not None else _default_folder()
    _move(model, config.device)
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
    )
    work = Workload.of(vpd, config, batches.seq_len)
    estimate = require_memory(work, vpd.device)
    stepper = Stepper(vpd, config)
    checkpoint = folder / "checkpoint"
    start, extra = 0, {}
    if resume:
        start, position, extra = load_checkpoint(checkpoint, stepper)
        batches.load_state_dict(position)
    elif (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"output={str(folder)!r} already holds a run. Pass resume=True to continue it, or "
            "another directory."
        )
    folder.mkdir(parents=True, exist_ok=True)
    config.to_yaml(folder / "config.yaml")
    if wandb is not None and "wandb_id" in extra:
        wandb = {"id": extra["wandb_id"], "resume": "allow", **wandb}
    with (
        MetricsLog(folder, config.steps, start, progress, wandb, config.model_dump()) as log,
        _evaluation_mode(model),
        explained_out_of_memory(work, vpd.device),
    ):
        log.console.print(estimate, highlight=False)
        if log.run is not None:
            extra["wandb_id"] = log.run.id
        if not resume:
            if config.initialisation == "aligned" and vpd.trained_steps == 0:
                align(vpd.subcomponents, vpd.sites)
            warm_up_faithfulness(stepper)
        run = _Run(stepper, batches, log, checkpoint, extra)
        history, seconds = run.loop(start)
    vpd.trained_steps = config.steps
    vpd.training_config = config.model_dump(mode="json")
    metrics = history[-1] if history else last_metrics(folder)
    save(vpd, folder / "decomposition", metrics)
    return TrainingResult(folder, config.steps, seconds, metrics, history)


class _Run:
    """The loop of one call of `train`."""

    def __init__(
        self, stepper: Stepper, batches: Any, log: MetricsLog, checkpoint: Path, extra: dict
    ) -> None:
        self.stepper = stepper
        self.config = stepper.config
        self.batches = batches
        self.log = log
        self.checkpoint = checkpoint
        self.extra = extra

    def loop(self, start: int) -> tuple[list[dict[str, float]], float]:
        config, stepper = self.config, self.stepper
        window = _Window(stepper.vpd.layout.total, config.steps)
        history: list[dict[str, float]] = []
        begun = time.perf_counter()
        with _stop_requests() as stop:
            for step in range(start, config.steps):
                batch = next(self.batches)  # [batch, pos]
                losses, importance = stepper.step(batch, step)
                window.add(losses)
                done = step + 1
                self.log.advance(done)
                if done % config.log_every == 0 or done == config.steps:
                    history.append(window.summary(done, importance, stepper))
                    self.log.write(done, history[-1])
                due = config.checkpoint_every and done % config.checkpoint_every == 0
                if due or done == config.steps or stop:
                    window.require_finite()
                    self._save(done)
                if stop and done < config.steps:
                    raise TrainingInterrupted(
                        f"stopped by {stop[0]} after step {done} of {config.steps}; a checkpoint "
                        f"is in {self.checkpoint}. To go on: train(..., output="
                        f"{str(self.checkpoint.parent)!r}, resume=True), or vpd-lens train with "
                        "--resume."
                    )
        return history, time.perf_counter() - begun

    def _save(self, done: int) -> None:
        save_checkpoint(self.checkpoint, self.stepper, done, self.batches.state_dict(), self.extra)


class _Window:
    """Losses since the last log line, summed on the device: no host sync between log steps."""

    def __init__(self, c_total: int, steps: int) -> None:
        self.diagnostics = Diagnostics(c_total, steps)
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
        metrics["l0"] = float(active.sum(-1).float().mean())
        metrics["ci_max"] = float(importance.amax(-1).mean())
        metrics["lr"] = stepper.optimisers[0].param_groups[0]["lr"]
        metrics["seconds_per_step"] = (time.perf_counter() - self.since) / self.count
        self.diagnostics.look(done, metrics)
        self._reset()
        return metrics


@contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """Collects Ctrl-C and SIGTERM instead of dying; a second signal acts at once."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals can only be handled in the main thread
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, note)
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


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
