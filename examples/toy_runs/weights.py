"""Weights of small transformers in a file of their own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a state dict; the file is there only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clones: buffers such as attention masks share memory, which safetensors refuses.
    weights = {name: x.detach().contiguous().clone() for name, x in model.state_dict().items()}
    unfinished = path.with_suffix(".new")
    save_file(weights, unfinished)
    unfinished.replace(path)
