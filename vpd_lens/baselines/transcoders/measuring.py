"""What it costs to let something else stand in for a model's MLPs: `measure_replaced`.

| protocol | every MLP reads | replaced |
|---|---|---|
| `cascading` | what earlier replacements have written | all at once |
| `parallel` | the model's own stream | all at once |
| `single` | the model's own stream | one at a time; the mean over MLPs |

What stands in is a `Transcoder` (`Transcoded`), or the MLPs themselves, of which only the
subcomponents with causal importance above a threshold are left (`MaskedMLPs`). Sparsity has three
accountings, because parts are unlike (`Part`); differences of cross-entropy are all to the model's.

Source: the transcoder comparison of VPD's paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.baselines.transcoders.mlps import Clean, MLPs, written
from vpd_lens.baselines.transcoders.transcoder import Transcoder
from vpd_lens.data import one_pass
from vpd_lens.decomposition import Divergence, Masks
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.modes import masks_of
from vpd_lens.errors import DataError, InputError, did_you_mean
from vpd_lens.evaluation.metrics import Means, next_token_cross_entropy, predicts_next_token
from vpd_lens.rendering import Shown
from vpd_lens.sites import find_sites

PROTOCOLS: tuple[str, ...] = ("cascading", "parallel", "single")


@dataclass(frozen=True)
class Part:
    """Where sparse things sit: the latents of one encoder, or the subcomponents of one matrix.

    Attributes:
        name: Of the layer or site.
        serves: Indices of the MLPs whose outputs they help to write.
        size: Parameters of one of them, without biases.
    """

    name: str
    serves: tuple[int, ...]
    size: int


@runtime_checkable
class Replaced(Protocol):
    """What stands in for the MLPs of a model."""

    mlps: MLPs
    parts: Sequence[Part]

    def on_clean(self, clean: Clean) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of all MLPs on the model's own stream; what is active, `[*batch, n]` by part."""
        ...

    def cascade(self, clean: Clean) -> Tensor:
        """The model's output with all replaced, each reading what earlier ones have written."""
        ...


class Transcoded:
    """A transcoder in the place of a model's MLPs.

    Args:
        model: The model that it was trained on.
        transcoder: The transcoder.
        selection: Which activations are left; `None`: those of training. BatchTopK looks at all
            positions of a batch together, also at later ones; `"threshold"` at each by itself.

    Raises:
        InputError: If the transcoder is of another model.
    """

    def __init__(
        self, model: nn.Module, transcoder: Transcoder, selection: str | None = None
    ) -> None:
        self.mlps = MLPs(model, transcoder.record.layers)
        transcoder.require_fit(self.mlps)
        self.transcoder, self.selection = transcoder.to(self.mlps.device), selection
        of = transcoder.record
        self.parts = [
            Part(f"blocks.{layer}.mlp", served, of.d_in + len(served) * of.d_out)
            for index, layer in enumerate(of.layers)
            if (served := tuple(transcoder.served(index)))
        ]

    @torch.no_grad()
    def on_clean(self, clean: Clean) -> tuple[list[Tensor], list[Tensor]]:
        """See `Replaced`."""
        acts: list[Tensor] = []
        pairs = zip(clean.inputs, clean.outputs, strict=True)
        outputs = [self._next(i, acts, x, y, clean) for i, (x, y) in enumerate(pairs)]
        return outputs, [a > 0 for a in acts]

    @torch.no_grad()
    def cascade(self, clean: Clean) -> Tensor:
        """See `Replaced`."""
        acts: list[Tensor] = []
        batch = clean.batch
        return self.mlps.run(
            lambda i, x, y: self._next(i, acts, x, y, clean), batch.tokens, **batch.mask_argument()
        )

    def _next(self, index: int, acts: list[Tensor], x: Tensor, y: Tensor, clean: Clean) -> Tensor:
        seen = x if self.transcoder.record.reads == "input" else y
        pre = self.transcoder.pre(index, seen)
        acts.append(self.transcoder.select(index, pre, clean.batch.real, self.selection))
        return self.transcoder.decode(index, acts)


class MaskedMLPs:
    """A decomposition of which only the subcomponents in use are left, in the MLPs alone.

    At the matrices of MLPs the mask is 1 where the causal importance, that of the model's own
    stream, is above the threshold, else 0, and the delta's is 0; attention is the model's own.

    Args:
        model: A decomposed model.
        threshold: In [0, 1).

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If no block has all matrices of its MLP decomposed.
    """

    def __init__(self, model: nn.Module, threshold: float = 0.0) -> None:
        self.vpd, self.threshold = decomposition_of(model), threshold
        names = self.vpd.layout.names
        every = MLPs(model)
        missing = {site.name for site in find_sites(model, r"^blocks\.\d+\.mlp\.")} - {*names}
        layers = [
            layer
            for layer in every.layers
            if not any(name.startswith(f"blocks.{layer}.mlp.") for name in missing)
        ]
        if not layers:
            raise InputError(
                f"the decomposition has none of the MLPs whole; its sites are {list(names)}. "
                "Decompose mlp.in and mlp.out (and mlp.gate) of a block."
            )
        self.mlps = MLPs(model, layers)
        self.sites = [  # indices of the sites of each MLP
            [i for i, name in enumerate(names) if name.startswith(f"blocks.{layer}.mlp.")]
            for layer in layers
        ]
        self.parts = [
            Part(names[i], (mlp,), sum(self.vpd.sites[i].shape))
            for mlp, sites in enumerate(self.sites)
            for i in sites
        ]

    @torch.no_grad()
    def on_clean(self, clean: Clean) -> tuple[list[Tensor], list[Tensor]]:
        """See `Replaced`."""
        masks, batch = self._masks(clean), clean.batch
        outputs = []
        for sites in self.sites:
            _, of_sites = self.vpd.run_recording(
                self._routed(masks, sites), batch.tokens, **batch.mask_argument()
            )
            outputs.append(of_sites[sites[-1]])
        split = self.vpd.layout.split(masks.components)
        return outputs, [split[i] > 0 for sites in self.sites for i in sites]

    @torch.no_grad()
    def cascade(self, clean: Clean) -> Tensor:
        """See `Replaced`."""
        masks, every = self._masks(clean), [i for sites in self.sites for i in sites]
        batch = clean.batch
        return self.vpd.run(self._routed(masks, every), batch.tokens, **batch.mask_argument())

    def _masks(self, clean: Clean) -> Masks:
        batch = clean.batch
        g = self.vpd.causal_importance(batch.tokens, **batch.mask_argument())
        return masks_of("rounded", g, self.vpd.layout, threshold=self.threshold)

    def _routed(self, masks: Masks, sites: Sequence[int]) -> Masks:
        """The same masks at some sites, and the original weights at the others."""
        routed = torch.zeros_like(masks.delta, dtype=torch.bool)
        routed[..., list(sites)] = True
        return Masks(masks.components, masks.delta, routed)


class ReplacedReport(Shown, BaseModel):
    """What was measured of one thing that stands in for MLPs.

    Attributes:
        baseline: Cross-entropy of the model itself, nats per token.
        cross_entropy: By protocol, nats per token.
        kl: Divergence from the model's own predictions, by protocol, nats per token.
        unexplained: Squared error of every MLP's output on the model's own stream, relative to
            the output's variance, by block.
        per_module: Active at a position, mean over encoders, or over matrices of MLPs.
        per_output: Active at a position of all that write an MLP's output, mean over MLPs: those
            of its matrices, or of its own encoder and, cross-layer, those of earlier ones.
        parameters: Parameters of all that is active at a position.
        n_positions: Positions that were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    baseline: float
    cross_entropy: dict[str, float]
    kl: dict[str, float]
    unexplained: dict[str, float]
    per_module: float
    per_output: float
    parameters: float
    n_positions: int

    @property
    def difference(self) -> dict[str, float]:
        """Cross-entropy less the model's own, by protocol, nats per token."""
        return {name: value - self.baseline for name, value in self.cross_entropy.items()}

    def __rich__(self) -> Table:
        title = (
            f"MLPs replaced: {self.per_module:.1f} active per module, {self.per_output:.1f} per "
            f"MLP output, {self.parameters:,.0f} parameters; the model alone: {self.baseline:.4f}"
        )
        table = Table("protocol", "cross-entropy", "difference", "KL", title=title)
        for name, value in self.cross_entropy.items():
            figures = (value, self.difference[name], self.kl[name])
            table.add_row(name, *(f"{figure:.4f}" for figure in figures))
        return table


def measure_replaced(
    replaced: Replaced,
    data: Any,
    *,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    prepend_bos: bool | None = None,
) -> ReplacedReport:
    """Cross-entropy, KL and sparsity with something else in the place of a model's MLPs.

    Args:
        replaced: A `Transcoded` or `MaskedMLPs`, or what has their methods.
        data: As for `vpd_lens.evaluate`; held-out data, please.
        batch_size: Sequences per batch; BatchTopK selects in a batch as a whole.
        n_batches: Batches; fewer if the data ends before.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        protocols: Some of `PROTOCOLS`.
        prepend_bos: BOS policy for text; `None` follows the model.

    Raises:
        DataError: If the data is empty or does not fit the model.
        InputError: If a protocol is unknown, or the model does not predict next tokens.
    """
    for name in protocols:
        if name not in PROTOCOLS:
            raise InputError(
                f"protocols has {name!r}, which is not one of {', '.join(PROTOCOLS)}"
                f"{did_you_mean(name, PROTOCOLS)}."
            )
    mlps, sums = replaced.mlps, Means()
    active = torch.zeros(len(replaced.parts), dtype=torch.float64)
    sizes = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
    n = 0
    for batch in one_pass(data, model=mlps.model, prepend_bos=prepend_bos, **sizes):
        clean = mlps.clean(batch.to(mlps.device))
        n_real, found = _measure_batch(replaced, clean, protocols, sums)
        n, active = n + n_real, active + found
    if n == 0:
        raise DataError("data is empty; pass at least one row.")
    means = sums.means()
    per_module, per_output, parameters = accountings(replaced.parts, (active / n).tolist())
    return ReplacedReport(
        baseline=means["baseline"],
        cross_entropy={name: means["ce", name] for name in protocols},
        kl={name: means["kl", name] for name in protocols},
        unexplained={
            f"blocks.{layer}": means["error", layer] / means["size", layer] for layer in mlps.layers
        },
        per_module=per_module,
        per_output=per_output,
        parameters=parameters,
        n_positions=n,
    )


def accountings(parts: Sequence[Part], active: Sequence[float]) -> tuple[float, float, float]:
    """Active per module, per MLP output, and in parameters; `active` is of every part.

    Examples:
        >>> clt = [Part("0", (0, 1), 30), Part("1", (1,), 20)]
        >>> accountings(clt, [4.0, 2.0])  # the second output is written by 4 + 2
        (3.0, 5.0, 160.0)
    """
    outputs = {mlp: 0.0 for part in parts for mlp in part.serves}
    for part, n in zip(parts, active, strict=True):
        for mlp in part.serves:
            outputs[mlp] += n
    parameters = sum(part.size * n for part, n in zip(parts, active, strict=True))
    return sum(active) / len(parts), sum(outputs.values()) / len(outputs), parameters


@torch.no_grad()
def _measure_batch(
    replaced: Replaced, clean: Clean, protocols: Sequence[str], sums: Means
) -> tuple[int, Tensor]:
    """Add one batch to the sums; returns its positions and how many of each part are active."""
    mlps, (tokens, real) = replaced.mlps, clean.batch
    if not predicts_next_token(mlps.model, tokens, clean.output):
        raise InputError("the model does not predict next tokens, so there is no cross-entropy.")
    everywhere = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    where = everywhere if real is None else real
    n, divergence = int(where.sum()), Divergence(clean.output, "kl", real)
    sums.add("baseline", *next_token_cross_entropy(clean.output, tokens, real))
    outputs, active = replaced.on_clean(clean)

    def add(protocol: str, logits: Tensor) -> None:
        sums.add(("ce", protocol), *next_token_cross_entropy(logits, tokens, real))
        sums.add(("kl", protocol), float(divergence(logits)), n)

    def run(only: int | None = None) -> Tensor:
        return mlps.run(written(outputs, only), tokens, **clean.batch.mask_argument())

    for protocol in protocols:
        if protocol == "cascading":
            add(protocol, replaced.cascade(clean))
        elif protocol == "parallel":
            add(protocol, run())
        else:
            for index in range(len(mlps)):
                add(protocol, run(index))
    for layer, got, y in zip(mlps.layers, outputs, clean.outputs, strict=True):
        sums.add(("error", layer), float((got[where] - y[where]).square().sum(-1).mean()), n)
        sums.add(("size", layer), float((y[where] - y[where].mean(0)).square().sum(-1).mean()), n)
    return n, torch.stack([a[where].sum().double().cpu() for a in active])
