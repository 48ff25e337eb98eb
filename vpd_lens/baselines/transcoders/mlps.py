"""Where a model's MLPs are read and replaced: `MLPs`.

An MLP's input is what its first matrix multiplies, behind the norm; its output is what its last
matrix writes, with its bias. Both are those of the sites `blocks.N.mlp.in` and `blocks.N.mlp.out`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens.data import Batch
from vpd_lens.errors import InputError
from vpd_lens.sites import find_sites
from vpd_lens.storage import tensor_hash

# Called with an MLP's index, its input `[*batch, d_in]` and its own output `[*batch, d_out]`;
# returns the output that takes its place, or `None` to leave it.
Replace = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Clean:
    """One batch through the model itself, and what each of its MLPs read and wrote."""

    batch: Batch
    output: Tensor
    inputs: list[Tensor]  # of every MLP, `[*batch, d_in]`
    outputs: list[Tensor]  # of every MLP, `[*batch, d_out]`


class MLPs:
    """The MLPs of some blocks of a model, of either TransformerLens class.

    Nothing stays on the model: hooks are there while `run` or `clean` runs. The model is then in
    evaluation mode; hooks of its user are active in every forward alike.

    Args:
        model: A HookedTransformer or a TransformerBridge, decomposed or not.
        layers: Numbers of the blocks, ascending; `None`: all that have an MLP.

    Raises:
        AttachError: If no MLP has matrices that can be read.
        InputError: If a block that is asked for has none.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        found = {site.name: site for site in find_sites(model, r"^blocks\.\d+\.mlp\.(in|out)$")}
        blocks = [int(re.findall(r"\d+", name)[0]) for name in found if name.endswith("mlp.out")]
        if missing := set(layers or ()) - set(blocks):
            raise InputError(
                f"layers is {list(layers or ())}, but the blocks with an MLP are {blocks}; there "
                f"is none in {sorted(missing)}."
            )
        self.model = model
        self.layers = tuple(blocks if layers is None else layers)
        self.sites = [
            (found[f"blocks.{layer}.mlp.in"], found[f"blocks.{layer}.mlp.out"])
            for layer in self.layers
        ]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of every MLP."""
        return [(into.shape[0], out.shape[1]) for into, out in self.sites]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sites[0][0].weight.device

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of every first and last matrix, by site."""
        return {site.name: tensor_hash(site.weight) for pair in self.sites for site in pair}

    def run(self, replace: Replace, tokens: Tensor, **kwargs: Any) -> Tensor:
        """The model's output where `replace` decides what each MLP writes, in forward order."""
        inputs: dict[int, Tensor] = {}

        def edit(index: int, y: Tensor) -> Tensor | None:
            new = replace(index, inputs.pop(index), y)
            return None if new is None else new.to(y.dtype)

        with ExitStack() as hooks, _evaluating(self.model):
            for index, (into, out) in enumerate(self.sites):
                read = partial(inputs.__setitem__, index)
                for handle in into.attach(read, _leave) + out.attach(_leave, partial(edit, index)):
                    hooks.enter_context(handle)
            return self.model(tokens, **kwargs)

    @torch.no_grad()
    def clean(self, batch: Batch) -> Clean:
        """One forward of the model itself, without gradients."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def see(_index: int, x: Tensor, y: Tensor) -> None:
            inputs.append(x)
            outputs.append(y)

        output = self.run(see, batch.tokens, **batch.mask_argument())
        return Clean(batch, output, inputs, outputs)


def written(outputs: Sequence[Tensor], only: int | None = None) -> Replace:
    """What writes known outputs: of every MLP, or `only` of the one with that index."""
    return lambda index, _x, _y: outputs[index] if only in (None, index) else None


def _leave(_value: Tensor) -> None:
    """Neither looks nor edits."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A block without dropout; a bridge does not register all modules of the one it wraps."""
    wrapped = getattr(model, "original_model", None)
    inner = wrapped.modules() if isinstance(wrapped, nn.Module) else ()
    training = [module for module in {*model.modules(), *inner} if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
