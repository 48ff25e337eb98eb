"""`train_transcoder`: per-layer and cross-layer transcoders, locally or end to end.

1. The model runs on a batch; what its MLPs read and write is kept.
2. The transcoder replaces the MLPs as its objective says, and a loss compares.
3. Latents that have not fired for long learn what is left over (auxiliary loss).
4. Decoder rows keep norm 1: the gradient along them is removed, then they are rescaled.

| objective | loss | each encoder reads |
|---|---|---|
| `local` | squared error of every MLP's output, mean over layers | the model's own stream |
| `cascading` | KL of the logits, all MLPs replaced | what earlier replacements have written |
| `parallel` | KL of the logits, all MLPs replaced | the model's own stream |
| `single` | KL of the logits, one MLP replaced, mean over layers | the model's own stream |
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from vpd_lens.baselines.transcoders.mlps import Clean, MLPs, written
from vpd_lens.baselines.transcoders.transcoder import Transcoder, TranscoderRecord, top_k
from vpd_lens.config import OptimiserConfig
from vpd_lens.config.base import Config, Count, NonNegative, Positive
from vpd_lens.data import token_batches
from vpd_lens.decomposition import Divergence
from vpd_lens.errors import NonFiniteLossError
from vpd_lens.progress import Progress
from vpd_lens.training.optimiser import learning_rate

THRESHOLD_RATE = 0.01  # of the running mean of the smallest selected activation, as in SAELens


class TranscoderConfig(Config):
    """How a transcoder is built and trained."""

    kind: Literal["per_layer", "cross_layer"] = "per_layer"
    """Whether latents write to their own MLP only, or to every later one too."""
    objective: Literal["local", "cascading", "parallel", "single"] = "local"
    """What is made small: the error of each MLP's output, or the KL of the logits with all or
    single MLPs replaced."""
    layers: tuple[int, ...] | None = None
    """Blocks whose MLPs are replaced, ascending; none: all."""
    n_latents: Count = 4096
    """Latents of every encoder."""
    k: Count = 16
    """Latents of an encoder that are active at a position, on average over a batch."""
    steps: Count = 1000
    """Batches of training."""
    batch_size: Count = 16
    """Sequences per batch."""
    seq_len: Count | None = None
    """Tokens per sequence; none: the longest that model and data allow."""
    lr: Positive = 3e-4
    """Peak learning rate of Adam, which falls to 0 along a cosine."""
    beta1: NonNegative = 0.9
    """Adam's decay of the gradient's mean."""
    beta2: NonNegative = 0.99
    """Adam's decay of the gradient's square."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are scaled down to this norm."""
    aux_k: Count = 512
    """Dead latents of a position that learn what is left over."""
    aux_coefficient: NonNegative = 1 / 32
    """Weight of their loss."""
    dead_after: Count = 50
    """Batches without being active, after which a latent counts as dead."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""

    @model_validator(mode="after")
    def _check(self) -> TranscoderConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k is {self.k}, more than n_latents, {self.n_latents}")
        return self


def train_transcoder(
    model: nn.Module,
    data: Any,
    config: TranscoderConfig,
    *,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Transcoder:
    """Train a transcoder for the MLPs of a model, which stays as it is.

    Args:
        model: A HookedTransformer or a TransformerBridge, decomposed or not.
        data: As for `vpd_lens.train`.
        config: How.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show a progress bar.

    Raises:
        AttachError: If no MLP has matrices that can be read.
        DataError: If the data is empty or does not fit the model.
        InputError: If a block of `config.layers` has no MLP.
        NonFiniteLossError: If the loss becomes NaN or infinite.
    """
    mlps = MLPs(model, config.layers)
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    batches = token_batches(data, model=model, seed=config.seed, prepend_bos=prepend_bos, **sizes)
    began, tokens = time.process_time(), 0
    with torch.inference_mode(False), torch.enable_grad(), _without_gradients(model):
        training = _Training(mlps, config)
        with Progress("Training a transcoder", config.steps, show=progress) as bar:
            for step in bar.counting(range(config.steps)):
                batch = next(batches).to(mlps.device)
                tokens += batch.tokens.numel() if batch.real is None else int(batch.real.sum())
                training.step(step, mlps.clean(batch))
    done = {"trained_tokens": tokens, "cpu_seconds": time.process_time() - began}
    made = training.transcoder
    made.record = made.record.model_copy(update=done)
    return made


def initial(mlps: MLPs, config: TranscoderConfig) -> Transcoder:
    """A transcoder to begin with: Kaiming encoders, decoders along their transposes, no biases."""
    (d_in, d_out), n = mlps.shapes[0], len(mlps)
    record = TranscoderRecord(
        layers=mlps.layers,
        n_latents=(config.n_latents,) * n,
        d_in=d_in,
        d_out=d_out,
        cross_layer=config.kind == "cross_layer",
        k=config.k,
        weights=mlps.fingerprint(),
        training=config.model_dump(mode="json"),
    )
    made = Transcoder(record)
    generator = torch.Generator().manual_seed(config.seed)
    for w_enc, w_dec in zip(made.W_enc, made.W_dec, strict=True):
        with torch.no_grad():
            nn.init.kaiming_uniform_(w_enc.T, generator=generator)
            w_dec.copy_(w_enc.T)
    made.normalise()
    return made.to(mlps.device)


class _Training:
    """The state between steps."""

    def __init__(self, mlps: MLPs, config: TranscoderConfig) -> None:
        self.mlps, self.config = mlps, config
        self.transcoder = initial(mlps, config)
        self.silent = [torch.zeros_like(b) for b in self.transcoder.b_enc]  # batches without firing
        trained = [p for p in self.transcoder.parameters() if p.requires_grad]
        betas = (config.beta1, config.beta2)
        self.optimiser = torch.optim.Adam(trained, lr=config.lr, betas=betas, fused=True)
        self.schedule = OptimiserConfig(lr=config.lr, warmup=0.0, final_fraction=0.0)

    def step(self, step: int, clean: Clean) -> None:
        """One update."""
        transcoder, config = self.transcoder, self.config
        seen = _Seen(transcoder, clean)
        loss = objective_loss(self.mlps, seen, config.objective)
        dead = [silent >= config.dead_after for silent in self.silent]
        if any(bool(d.any()) for d in dead):
            loss = loss + config.aux_coefficient * auxiliary_loss(seen, dead, config.aux_k)
        if not bool(loss.isfinite()):
            raise NonFiniteLossError(
                f"the loss is {float(loss)} at step {step}. Lower lr, which is {config.lr:g}."
            )
        self.optimiser.zero_grad()
        loss.backward()
        remove_along_rows(transcoder)
        parameters = self.optimiser.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        rate = learning_rate(self.schedule, config.lr, step, config.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        transcoder.normalise()
        self._count(step, seen)

    @torch.no_grad()
    def _count(self, step: int, seen: _Seen) -> None:
        """Who has been silent for how long, and how small a selected activation is."""
        rate = 1.0 if step == 0 else THRESHOLD_RATE
        for index, acts in enumerate(seen.acts):
            fired = (acts > 0).flatten(0, -2).any(0)
            self.silent[index] = torch.where(fired, 0, self.silent[index] + 1)
            if bool(fired.any()):
                self.transcoder.thresholds[index].lerp_(acts[acts > 0].min(), rate)


class _Seen:
    """What a transcoder made of one batch, layer by layer as its encoders see their inputs."""

    def __init__(self, transcoder: Transcoder, clean: Clean) -> None:
        self.transcoder, self.clean = transcoder, clean
        self.pre: list[Tensor] = []
        self.acts: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []  # of the MLPs themselves, on the same inputs

    def replace(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """The next MLP's output, from its input; `y` is what the MLP itself makes of that."""
        self.pre.append(self.transcoder.pre(index, x))
        self.acts.append(self.transcoder.select(index, self.pre[-1], self.clean.batch.real))
        self.outputs.append(self.transcoder.decode(index, self.acts))
        self.targets.append(y.detach())
        return self.outputs[-1]

    def of_clean(self) -> list[Tensor]:
        """The outputs of all MLPs where each reads the model's own stream."""
        pairs = zip(self.clean.inputs, self.clean.outputs, strict=True)
        return [self.replace(index, x, y) for index, (x, y) in enumerate(pairs)]


def objective_loss(mlps: MLPs, seen: _Seen, objective: str) -> Tensor:
    """The loss of an objective on one batch, by the table above; leaves in `seen` what it used."""
    batch = seen.clean.batch
    run = partial(mlps.run, tokens=batch.tokens, **batch.mask_argument())
    if objective == "local":
        seen.of_clean()
        return _mean_error(seen.outputs, seen.targets, batch.real)
    divergence = Divergence(seen.clean.output, "kl", batch.real)
    if objective == "cascading":
        return divergence(run(seen.replace))
    outputs = seen.of_clean()
    if objective == "parallel":
        return divergence(run(written(outputs)))
    return torch.stack([divergence(run(written(outputs, j))) for j in range(len(mlps))]).mean()


def auxiliary_loss(seen: _Seen, dead: list[Tensor], k: int) -> Tensor:
    """How badly dead latents write what is left over, mean over layers (Gao et al., 2406.04093).

    At every position the `k` of a layer's dead latents with the largest activations, or all, write
    without bias; what is left over, target less output, is a constant.
    """
    acts = [
        top_k(pre * alone, min(k, int(alone.sum()) or 1))
        for pre, alone in zip(seen.pre, dead, strict=True)
    ]
    rest = [seen.transcoder.decode(index, acts, bias=False) for index in range(len(acts))]
    pairs = zip(seen.targets, seen.outputs, strict=True)
    left = [(target - output).detach() for target, output in pairs]
    return _mean_error(rest, left, seen.clean.batch.real)


def _mean_error(got: list[Tensor], expected: list[Tensor], real: Tensor | None) -> Tensor:
    """Mean squared error over real positions and dimensions, then over layers."""
    errors = [(a - b).square().mean(-1) for a, b in zip(got, expected, strict=True)]
    return torch.stack([(e if real is None else e[real]).mean() for e in errors]).mean()


@torch.no_grad()
def remove_along_rows(transcoder: Transcoder) -> None:
    """Remove from the gradients of decoders what would only change the length of a latent's."""
    for w in transcoder.W_dec:
        if w.grad is not None:
            along = (w.grad * w).sum((0, 2), keepdim=True) / w.square().sum((0, 2), keepdim=True)
            w.grad.sub_(along * w)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """A block in which the model's own parameters get no gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
