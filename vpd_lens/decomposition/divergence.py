"""How far a masked output is from the target's: KL for logits, MSE for anything else.

The target's share is computed once per step; many masked outputs are compared with it.
"""

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
        self.kind = kind
        self.target = target.detach()
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
            flat = self.target.reshape(-1, target.shape[-1])
            self._of_target = _TargetDistribution(flat, self.weight)

    def __call__(self, masked: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
        """The divergence of `masked` from the target, a mean over positions."""
        if self.kind == "kl":
            flat = masked.reshape(-1, masked.shape[-1])
            return _KLFromTarget.apply(flat, self._of_target)  # type: ignore[no-any-return]
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
            kl, _ = self._of_target.kl(masked.reshape(-1, masked.shape[-1]))
            return kl.view(masked.shape[:-1])
        return (masked.float() - self.target.float()).square().mean(-1)


class _TargetDistribution:
    """The target's probabilities `[n, vocab]`, and what every comparison with them needs.

    fp32 logits are kept as probabilities. Narrower ones stay as they are, so that nothing of
    fp32 and the size of the logits exists; probabilities are made again chunk by chunk.
    """

    def __init__(self, logits: Float[Tensor, "n vocab"], weight: Tensor | None) -> None:
        n, vocab = logits.shape
        self.weight = weight
        self.rows = max(1, _CHUNK_ELEMENTS // vocab)
        self.kept = torch.empty_like(logits) if logits.dtype == torch.float32 else logits
        self.log_norm = torch.empty(n, device=logits.device)
        self.negative_entropy = torch.empty(n, device=logits.device)
        for chunk in self.chunks():
            z = logits[chunk].float()
            self.log_norm[chunk] = z.logsumexp(-1)
            p = (z - self.log_norm[chunk, None]).exp_()
            self.negative_entropy[chunk] = torch.linalg.vecdot(p, z) - self.log_norm[chunk]
            if self.kept is not logits:
                self.kept[chunk] = p

    def chunks(self) -> list[slice]:
        starts = range(0, len(self.log_norm), self.rows)
        return [slice(start, start + self.rows) for start in starts]

    def p(self, chunk: slice) -> Float[Tensor, "rows vocab"]:
        if self.kept.dtype == torch.float32:
            return self.kept[chunk]
        return (self.kept[chunk].float() - self.log_norm[chunk, None]).exp_()

    def kl(self, logits: Float[Tensor, "n vocab"]) -> tuple[Tensor, Tensor]:
        """`sum_v p log p - sum_v p z + logsumexp(z)` per row, and `logsumexp(z)`."""
        kl, log_norm = torch.empty_like(self.log_norm), torch.empty_like(self.log_norm)
        for chunk in self.chunks():
            z = logits[chunk].float()
            log_norm[chunk] = z.logsumexp(-1)
            cross = log_norm[chunk] - torch.linalg.vecdot(self.p(chunk), z)
            kl[chunk] = self.negative_entropy[chunk] + cross
        return kl, log_norm


class _KLFromTarget(torch.autograd.Function):
    """Mean KL over rows, with gradient `(softmax(z) - p) / n`; weights `w_i` replace `1 / n`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: _TargetDistribution) -> Tensor:
        kl, log_norm = target.kl(logits)
        ctx.save_for_backward(logits, log_norm)
        ctx.target = target
        return kl.mean() if target.weight is None else kl @ target.weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        logits, log_norm = ctx.saved_tensors
        out = torch.empty_like(logits)
        weight = ctx.target.weight
        for chunk in ctx.target.chunks():
            q = (logits[chunk].float() - log_norm[chunk, None]).exp_()
            slope = grad / len(logits) if weight is None else grad * weight[chunk, None]
            out[chunk] = q.sub_(ctx.target.p(chunk)).mul_(slope)
        return out, None
