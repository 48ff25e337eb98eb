"""Which frequencies of Z_p a function lives on: the ground truth of modular addition.

A transformer that adds modulo a prime `p` computes with a few *key frequencies* `k`: it maps its
inputs to `cos(2 pi k a / p)` and `sin(2 pi k a / p)`, multiplies them into those of `a + b`, and
reads the answer from `cos(2 pi k (a + b - c) / p)` (Nanda et al. 2023, arXiv:2301.05217). `k` and
`p - k` are the same frequency, so there are `(p - 1) / 2`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def spectrum(f: Float[Tensor, "p *functions"]) -> Float[Tensor, "frequencies *functions"]:
    """Share of frequencies `1 .. (p - 1) / 2` in the variance of functions of one number.

    `f` are their values at `0 .. p - 1`; `p` must be odd. The shares add up to 1; for a constant
    function they are 0.
    """
    energy = torch.fft.rfft(f.double(), dim=0).abs().square()
    return _shares(energy[1:], energy[1:].sum(0), energy[0]).to(f.dtype)


def pair_spectrum(f: Float[Tensor, "p p *functions"]) -> Float[Tensor, "frequencies *functions"]:
    """Share of frequencies `1 .. (p - 1) / 2` in the variance of functions of two numbers.

    `f` are their values at all pairs `(a, b)`; `p` must be odd. Frequency `k` holds the waves of
    `k a`, `k b`, `k (a + b)` and `k (a - b)`: all that a product of functions of frequency `k` of
    one number each can contain, apart from harmonics. Mixed waves, `k a + l b` with `l` different
    from `0` and `+-k`, belong to none, so the shares may add up to less than 1.
    """
    p = f.shape[0]
    energy = torch.fft.fft2(f.double(), dim=(0, 1)).abs().square()
    constant = energy[0, 0].clone()
    energy[0, 0] = 0
    k = torch.arange(1, (p + 1) // 2, device=f.device)
    multiples = [(1, 0), (0, 1), (1, 1), (1, -1)]
    own = sum(energy[sign * i * k % p, sign * j * k % p] for i, j in multiples for sign in (1, -1))
    return _shares(own, energy.sum(dim=(0, 1)), constant).to(f.dtype)


def logit_waves(logits: Float[Tensor, "p p p"]) -> Float[Tensor, " frequencies"]:
    """Amplitude of `cos(2 pi k (a + b - c) / p)` in the logits `[a, b, c]`, in nats.

    `k` are the frequencies `1 .. (p - 1) / 2`.
    """
    profile = _by_distance(logits)
    return 2 / len(profile) * torch.fft.rfft(profile.double()).real[1:].to(logits.dtype)


def wave_share(logits: Float[Tensor, "p p p"]) -> float:
    """Share of the variance over `c` of logits `[a, b, c]` that `a + b - c` alone determines."""
    centred = logits.double() - logits.double().mean(2, keepdim=True)
    return float(_by_distance(centred).square().mean() / centred.square().mean())


def _by_distance(logits: Float[Tensor, "p p p"]) -> Float[Tensor, " p"]:
    """The mean logit over all `(a, b, c)` with the same `a + b - c` modulo `p`."""
    p = logits.shape[0]
    n = torch.arange(p, device=logits.device)
    c = (n[:, None, None] + n[:, None] - n) % p  # [a, b, distance]
    return logits.gather(2, c).mean(dim=(0, 1))


def _shares(energy: Tensor, total: Tensor, constant: Tensor) -> Tensor:
    """`energy / total`, or 0 where the function varies by no more than rounding."""
    varies = total > 1e-12 * (total + constant)
    return torch.where(varies, energy / total, 0.0)
