"""Shapes of well-known models, so that a run can be planned without a network."""

from __future__ import annotations

from typing import Any

from vpd_lens.training.cost.target import TargetShape


def _gpt2(n_layers: int, d_model: int, n_heads: int) -> TargetShape:
    return TargetShape(
        n_layers,
        d_model,
        n_heads,
        d_model // n_heads,
        4 * d_model,
        d_vocab=50257,
        n_ctx=1024,
        tied=True,
        learned_positions=True,
        activation="gelu_new",
    )


def _pythia(n_layers: int, d_model: int, n_heads: int, d_vocab: int = 50304) -> TargetShape:
    head = d_model // n_heads
    shape: dict[str, Any] = {"d_vocab": d_vocab, "n_ctx": 2048, "parallel": True}
    return TargetShape(n_layers, d_model, n_heads, head, 4 * d_model, **shape)


# From the models' published configurations; `vpd-67m` is the target of the VPD paper.
NAMED: dict[str, TargetShape] = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "llama-3-8b": TargetShape(
        32, 4096, 32, 128, 14336, 128256, 8192, n_kv_heads=8, gated=True,
        activation="silu", dtype="bfloat16",
    ),
    "vpd-67m": TargetShape(4, 768, 6, 128, 3072, 50277, 512, tied=True),
}  # fmt: skip
