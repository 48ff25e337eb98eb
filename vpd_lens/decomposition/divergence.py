"""How far a masked output is from the target's: KL for logits, MSE for anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.errors import InputError

DivergenceKind = Literal["kl", "mse"]
CustomDivergence = Callable[[Tensor, Tensor], Tensor]

# Rows of logits handled at once: bounds the temporaries to about 256 MiB in fp32.
_CHUNK_ELEMENTS = 2**26


class Divergence:
    """Distance of masked outputs from a fixed target output, mean over positions.

    Args:
        target: The target's output, `[*batch, vocab]` for KL.
        kind: `"kl"`: `KL(softmax(target) || softmax(masked))`, summed over the vocabulary, in
            nats, mean over all leading positions. `"mse"`: mean squared error over all entries.
            Or a callable `(masked, target) -> scalar`, a mean over positions.
        real: Positions to take the mean over, `[*batch]`; `None`: all (nothing is padding).

    Raises:
        InputError: If only some positions are real and the divergence is a callable.
    """

    def __init__(
        self,
        target: Float[Tensor, "*batch d"],
        kind: DivergenceKind | CustomDivergence = "kl",
        real: Bool[Tensor, "*batch"] | None = None,
    ) -> None:
        self.kind, self.target = kind, target.detach()
        self.weight: Tensor | None = None
        if real is not None:
            if kind not in ("kl", "mse"):
                raise InputError(
                    "a divergence of your own takes the mean over positions itself, so it cannot "
                    "leave padding out; use sequences without padding."
                )
            real = real.to(target.device).reshape(-1).float()
            self.weight = real / real.sum().clamp(min=1)
        if kind == "kl":
            self._prepare(self.target.reshape(-1, target.shape[-1]))

    def __call__(self, masked: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
        """The divergence of `masked` from the target, a mean over positions."""
        if self.kind == "kl":
            return _MeanKL.apply(masked.reshape(-1, masked.shape[-1]), self)  # type: ignore[no-any-return]
        if self.kind == "mse":
            squares = (masked.float() - self.target.float()).square()
            if self.weight is None:
                return squares.mean()
            return squares.mean(-1).reshape(-1) @ self.weight
        assert not isinstance(self.kind, str)
        return self.kind(masked, self.target)

    @torch.no_grad()
    def per_position(self, masked: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """KL (or mean squared error) of every position."""
        if self.kind == "kl":
            return self._kl(masked.reshape(-1, masked.shape[-1]))[0].view(masked.shape[:-1])
        return (masked.float() - self.target.float()).square().mean(-1)

    @torch.no_grad()
    def blind(self) -> Float[Tensor, ""]:
        """The divergence of an output that is the target's mean at every position.

        For KL it is the mutual information of input and prediction, on these positions; infinite
        for a divergence of your own.
        """
        rows = self.target.reshape(-1, self.target.shape[-1])
        n = len(rows)
        weight = rows.new_full((n,), 1 / n).float() if self.weight is None else self.weight
        if self.kind == "kl":
            mean = torch.stack([weight[chunk] @ self._p(chunk) for chunk in self._chunks]).sum(0)
            return weight @ self._negative_entropy - torch.special.xlogy(mean, mean).sum()
        if self.kind == "mse":
            return weight @ (rows.float() - weight @ rows.float()).square().mean(-1)
        return weight.new_full((), torch.inf)

    def _prepare(self, logits: Float[Tensor, "n vocab"]) -> None:
        """Compute what every comparison with the target needs of it."""
        n, vocab = logits.shape
        step = max(1, _CHUNK_ELEMENTS // vocab)
        self._chunks = [slice(start, start + step) for start in range(0, n, step)]
        # fp32 logits are kept as probabilities; narrower ones, whose probabilities would take more
        # memory, as they are.
        self._kept = torch.empty_like(logits) if logits.dtype == torch.float32 else logits
        self._log_norm, self._negative_entropy = logits.new_empty(2, n, dtype=torch.float32)
        for chunk in self._chunks:
            z = logits[chunk].float()
            self._log_norm[chunk] = z.logsumexp(-1)
            p = (z - self._log_norm[chunk, None]).exp_()
            self._negative_entropy[chunk] = torch.linalg.vecdot(p, z) - self._log_norm[chunk]
            if self._kept is not logits:
                self._kept[chunk] = p

    def _p(self, chunk: slice) -> Float[Tensor, "rows vocab"]:
        if self._kept.dtype == torch.float32:
            return self._kept[chunk]
        return (self._kept[chunk].float() - self._log_norm[chunk, None]).exp_()

    def _kl(self, logits: Float[Tensor, "n vocab"]) -> tuple[Tensor, Tensor]:
        """`sum_v p log p - sum_v p z + logsumexp(z)` per row, and `logsumexp(z)`."""
        kl, log_norm = torch.empty_like(self._log_norm), torch.empty_like(self._log_norm)
        for chunk in self._chunks:
            z = logits[chunk].float()
            log_norm[chunk] = z.logsumexp(-1)
            cross = log_norm[chunk] - torch.linalg.vecdot(self._p(chunk), z)
            kl[chunk] = self._negative_entropy[chunk] + cross
        return kl, log_norm


def last_of_rows(
    output: Float[Tensor, "batch pos d"], real: Bool[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch pos"]:
    """Where the rows of an output end: at their last position that is `real`."""
    batch, pos = output.shape[:-1]
    places = torch.arange(pos, device=output.device).expand(batch, -1)
    return places == (pos if real is None else real.sum(-1, keepdim=True)) - 1


class _MeanKL(torch.autograd.Function):
    """Mean KL over rows, with gradient `(softmax(z) - p) / n`; weights `w_i` replace `1 / n`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, of: Divergence) -> Tensor:
        kl, log_norm = of._kl(logits)
        ctx.save_for_backward(logits, log_norm)
        ctx.of = of
        return kl.mean() if of.weight is None else kl @ of.weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (logits, log_norm), weight = grads, ctx.saved_tensors, ctx.of.weight
        out = torch.empty_like(logits)
        for chunk in ctx.of._chunks:
            q = (logits[chunk].float() - log_norm[chunk, None]).exp_()
            slope = grad / len(logits) if weight is None else grad * weight[chunk, None]
            out[chunk] = q.sub_(ctx.of._p(chunk)).mul_(slope)
        return out, None
