"""How far a masked output is from the target's: KL for logits, MSE for anything else.

The target's share is computed once per step; many masked outputs are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

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
    """

    def __init__(
        self, target: Float[Tensor, "*batch d"], kind: DivergenceKind | CustomDivergence = "kl"
    ) -> None:
        self.kind = kind
        self.target = target.detach()
        if kind == "kl":
            flat = self.target.reshape(-1, target.shape[-1]).float()
            log_p = torch.log_softmax(flat, dim=-1)
            self.p = log_p.exp()
            self.negative_entropy = (self.p * log_p).sum(-1)

    def __call__(self, masked: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
        """The divergence of `masked` from the target."""
        if self.kind == "kl":
            flat = masked.reshape(-1, masked.shape[-1])
            return _KLFromTarget.apply(flat, self.p, self.negative_entropy)  # type: ignore[no-any-return]
        if self.kind == "mse":
            return (masked.float() - self.target.float()).square().mean()
        return self.kind(masked, self.target)

    @torch.no_grad()
    def per_position(self, masked: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """KL (or mean squared error) of every position."""
        if self.kind == "kl":
            log_q = torch.log_softmax(masked.float(), -1).reshape(self.p.shape)
            kl = self.negative_entropy - (self.p * log_q).sum(-1)
            return kl.view(masked.shape[:-1])
        return (masked.float() - self.target.float()).square().mean(-1)


class _KLFromTarget(torch.autograd.Function):
    """`mean_n [ sum_v p log p - sum_v p z + logsumexp(z) ]`; the gradient is softmax(z) - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, negative_entropy: Tensor) -> Tensor:
        n, vocab = logits.shape
        rows = max(1, _CHUNK_ELEMENTS // vocab)
        total = logits.new_zeros((), dtype=torch.float32)
        log_norm = torch.empty(n, device=logits.device)
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            z = logits[chunk].float()
            log_norm[chunk] = z.logsumexp(-1)
            cross = log_norm[chunk] - torch.linalg.vecdot(p[chunk], z)
            total += (negative_entropy[chunk] + cross).sum()
        ctx.save_for_backward(logits, p, log_norm)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        logits, p, log_norm = ctx.saved_tensors
        n, vocab = logits.shape
        rows = max(1, _CHUNK_ELEMENTS // vocab)
        out = torch.empty_like(logits)
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            q = (logits[chunk].float() - log_norm[chunk, None]).exp_()
            out[chunk] = q.sub_(p[chunk]).mul_(grad / n)
        return out, None, None
