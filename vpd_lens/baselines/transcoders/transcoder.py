"""`Transcoder`: sparse latents that read what MLPs read and write what they write.

A **per-layer** transcoder (PLT) has an encoder and a decoder for every MLP,

    a_i = select(ReLU(x_i W_enc[i] + b_enc[i])),    y_i' = a_i W_dec[i] + b_dec[i]

A **cross-layer** one (CLT) has decoders from each encoder to its own and every later MLP,
`y_j' = sum_{i <= j} a_i W_dec[i][j - i] + b_dec[j]`. Which activations are left by `select`:

| selection | kept |
|---|---|
| `batch_topk` | the `k * n` largest of the `n` positions of a batch together (BatchTopK) |
| `topk` | the `k` largest of every position |
| `threshold` | those above the latent's threshold, as JumpReLU; it depends on no other position |

Source: the transcoders that VPD is compared with; BatchTopK: Bussmann et al., arXiv:2412.06410.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from rich.table import Table
from torch import Tensor, nn

from vpd_lens import storage
from vpd_lens.analysis.comparison import Directions
from vpd_lens.baselines.transcoders.mlps import MLPs
from vpd_lens.errors import InputError, did_you_mean
from vpd_lens.rendering import Shown, titled

Selection = Literal["batch_topk", "topk", "threshold"]
SELECTIONS: tuple[str, ...] = ("batch_topk", "topk", "threshold")


class TranscoderRecord(storage.Record):
    """What a transcoder is, apart from its tensors."""

    kind: ClassVar[str] = "transcoder"
    layers: tuple[int, ...]  # the blocks whose MLPs it stands in for
    n_latents: tuple[int, ...]  # of every encoder
    d_in: int
    d_out: int
    cross_layer: bool = False
    selection: Selection = "batch_topk"
    k: int | None = None  # `None` where a threshold alone selects
    reads: Literal["input", "output"] = "input"  # of an MLP: a transcoder, or an autoencoder
    weights: dict[str, str] = Field(default_factory=dict)  # SHA-256 of the MLPs' matrices, if known
    training: dict[str, Any] | None = None  # the `TranscoderConfig`
    trained_tokens: int = 0
    cpu_seconds: float = 0.0  # processor time of the training
    source: str | None = None  # of one that was trained elsewhere


class Transcoder(Shown, nn.Module):
    """Encoders and decoders of some MLPs of a model.

    Attributes:
        record: What it is.
        W_enc: `[d_in, n_latents]` of every layer.
        b_enc: `[n_latents]` of every layer.
        W_dec: `[n_targets, n_latents, d_out]` of every layer; `n_targets` is 1 in a per-layer
            transcoder, and the number of layers from there on in a cross-layer one.
        b_dec: `[d_out]` of every layer.
        thresholds: `[n_latents]` of every layer: where `threshold` cuts.

    Examples:
        >>> record = TranscoderRecord(layers=(0, 1), n_latents=(8, 8), d_in=4, d_out=4, k=2)
        >>> [list(w.shape) for w in Transcoder(record).W_dec]
        [[1, 8, 4], [1, 8, 4]]
    """

    def __init__(self, record: TranscoderRecord) -> None:
        super().__init__()
        self.record, n = record, len(record.layers)
        if record.k is not None and record.k > min(record.n_latents):
            raise InputError(
                f"k is {record.k}, but there are {min(record.n_latents)} latents; it is how many "
                "of them are active at a position, so pass fewer."
            )
        targets = [n - i if record.cross_layer else 1 for i in range(n)]
        pairs = list(zip(targets, record.n_latents, strict=True))
        self.W_enc = nn.ParameterList(torch.zeros(record.d_in, c) for _, c in pairs)
        self.b_enc = nn.ParameterList(torch.zeros(c) for _, c in pairs)
        self.W_dec = nn.ParameterList(torch.zeros(t, c, record.d_out) for t, c in pairs)
        self.b_dec = nn.ParameterList(torch.zeros(record.d_out) for _ in pairs)
        self.thresholds = nn.ParameterList(
            nn.Parameter(torch.zeros(c), requires_grad=False) for _, c in pairs
        )

    def __len__(self) -> int:
        return len(self.record.layers)

    def served(self, index: int) -> range:
        """Indices of the MLPs that the latents of one layer write to."""
        return range(index, index + len(self.W_dec[index]))

    def pre(self, index: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latents"]:
        """`ReLU(x W_enc + b_enc)` of a layer, before any are selected."""
        return torch.relu(x.float() @ self.W_enc[index] + self.b_enc[index])

    def select(
        self,
        index: int,
        pre: Float[Tensor, "*batch latents"],
        real: Bool[Tensor, "*batch"] | None = None,
        selection: str | None = None,
    ) -> Float[Tensor, "*batch latents"]:
        """The activations that are left of a layer's; `selection` is its own by default.

        At positions that are not `real` none are.

        Raises:
            InputError: If the selection is unknown, or needs a `k` that the transcoder has not.
        """
        name = selection or self.record.selection
        if name not in SELECTIONS:
            raise InputError(
                f"selection={name!r} is not one of {', '.join(SELECTIONS)}"
                f"{did_you_mean(name, SELECTIONS)}."
            )
        pre = pre if real is None else pre * real.unsqueeze(-1)
        if name == "threshold":
            return pre * (pre > self.thresholds[index])
        if self.record.k is None:
            raise InputError(f"selection={name!r} needs k, and this transcoder has a threshold.")
        if name == "topk":
            return top_k(pre, self.record.k)
        return batch_top_k(pre, self.record.k, real)

    def decode(
        self, index: int, acts: Sequence[Tensor], bias: bool = True
    ) -> Float[Tensor, "*batch d_out"]:
        """The output of one MLP, from activations `[*batch, n_latents]` of it and those before."""
        first = 0 if self.record.cross_layer else index
        y = sum(acts[i] @ self.W_dec[i][index - i] for i in range(first, index + 1))
        return y + self.b_dec[index] if bias else y  # type: ignore[return-value]

    def directions(self) -> Directions:
        """Encoder columns and decoder rows of every layer, for `vpd_lens.analysis.comparison`.

        `{"blocks.N.mlp": (W_enc [d_in, n_latents], W_dec [n_latents, n_targets * d_out])}`: with
        `compare` two seeds, with `multiple_match_share` two sizes.
        """
        names = [f"blocks.{layer}.mlp" for layer in self.record.layers]
        rows = [w.detach().cpu().transpose(0, 1).flatten(1) for w in self.W_dec]
        return {
            name: (w.detach().cpu(), row)
            for name, w, row in zip(names, self.W_enc, rows, strict=True)
        }

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every latent a decoder of norm 1, over all MLPs that it writes to together."""
        for w in self.W_dec:
            w.div_(w.norm(dim=(0, 2), keepdim=True).clamp(min=1e-8))

    def require_fit(self, mlps: MLPs) -> None:
        """Refuse MLPs that this transcoder was not made for.

        Raises:
            InputError: If blocks, widths or weights differ.
        """
        of, need = self.record, (self.record.d_in, self.record.d_out)
        if mlps.layers != of.layers or set(mlps.shapes) != {need}:
            raise InputError(
                f"the transcoder stands in for the MLPs of blocks {list(of.layers)}, which map "
                f"{of.d_in} to {of.d_out} dimensions; these are of blocks {list(mlps.layers)} and "
                f"map {mlps.shapes}. Use it on the model that it was trained on."
            )
        now = mlps.fingerprint() if of.weights else {}
        if changed := [name for name, weight in of.weights.items() if now[name] != weight]:
            raise InputError(
                f"{len(changed)} of {len(now)} MLP matrices differ from those of the transcoder's "
                f"model: {', '.join(changed[:4])}. Use it on the model that it was trained on, "
                "with its weights processed in the same way."
            )

    def save(self, path: str | Path) -> Path:
        """Write it to a folder, whole or not at all, and return the folder.

        Raises:
            ArtefactError: If something else is there, or it cannot be written.
        """
        return storage.write(path, self.record, {"transcoder": self.state_dict()})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Transcoder:
        """Read what `save` wrote; whether it fits a model is checked where it is used on one.

        Raises:
            ArtefactError: If a file is missing, damaged or newer than this library.
        """
        artefact = storage.read(path, TranscoderRecord)
        made = cls(artefact.record)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        made.load_state_dict(artefact.tensors("transcoder", shapes))
        return made.to(device)

    def __rich__(self) -> Any:
        of, table = self.record, Table("block", "latents", "writes to blocks", "parameters")
        for index, (layer, size) in enumerate(zip(of.layers, of.n_latents, strict=True)):
            served = ", ".join(str(of.layers[j]) for j in self.served(index))
            parts = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
            n_parameters = sum(part[index].numel() for part in parts)
            table.add_row(str(layer), str(size), served, f"{n_parameters:,}")
        kind = "cross-layer" if of.cross_layer else "per-layer"
        what = "transcoder" if of.reads == "input" else "autoencoder of MLP outputs"
        chosen = of.selection if of.k is None else f"{of.selection}, k = {of.k}"
        state = f"trained on {of.trained_tokens:,} tokens" if of.trained_tokens else "untrained"
        return titled(f"A {kind} {what} ({chosen}), {of.source or state}", table)


def top_k(acts: Float[Tensor, "*batch latents"], k: int) -> Float[Tensor, "*batch latents"]:
    """The `k` largest activations of every position; the others become 0."""
    values, indices = acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(acts).scatter(-1, indices, values)


def batch_top_k(
    acts: Float[Tensor, "*batch latents"], k: int, real: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch latents"]:
    """The `k * n` largest activations of all `n` positions together; the others become 0.

    A position may have more than `k` or none. Positions that are not `real` do not count, and
    their activations should be 0.

    Examples:
        >>> batch_top_k(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), k=1)
        tensor([[4., 3.],
                [0., 0.]])
    """
    n = acts[..., 0].numel() if real is None else int(real.sum())
    values, indices = acts.flatten().topk(k * n, sorted=False)
    return torch.zeros_like(acts).flatten().scatter(0, indices, values).view(acts.shape)
