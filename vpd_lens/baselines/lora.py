"""Low-rank adapters, what an edit of a subcomponent is compared with.

An adapter adds `x A B` to the output of a matrix: `A [d_in, r]` starts at 0.01 times a normal, `B
[r, d_out]` at 0, as in the paper's baseline, trained on the same loss as an edit.

Source: VPD, editing; LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.editing.goal import goal_of, train
from vpd_lens.errors import InputError


class LoRA:
    """Adapters at some sites of a decomposed model.

    Args:
        model: A decomposed model, which is not changed outside of `on`.
        sites: Names of sites; `None`: all.
        rank: Of every adapter.
        seed: Of `A`.

    Attributes:
        a: `A` of every site, by name.
        b: `B` of every site, by name.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If there is no such site, or the rank is below 1.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[str] | None = None, rank: int = 1, seed: int = 0
    ) -> None:
        if rank < 1:
            raise InputError(f"rank={rank}; expected at least 1.")
        self.vpd = decomposition_of(model)
        names = self.vpd.layout.names if sites is None else sites
        self.sites = {name: self.vpd.site(name) for name in names}
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b, self._inputs = {}, {}, {}
        for name, site in self.sites.items():
            d_in, d_out = site.shape
            a = 0.01 * torch.randn(d_in, rank, generator=generator)
            self.a[name] = a.to(self.vpd.device).requires_grad_()
            self.b[name] = torch.zeros(rank, d_out, device=self.vpd.device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that trains."""
        return [*self.a.values(), *self.b.values()]

    @contextmanager
    def on(self) -> Iterator[None]:
        """A block in which the model runs with the adapters."""
        with ExitStack() as stack:
            for name, site in self.sites.items():
                read = partial(self._inputs.__setitem__, name)
                for handle in site.attach(read, partial(self._add, name)):
                    stack.callback(handle.remove)
            yield

    def _add(self, name: str, y: Tensor) -> Tensor:
        x = self._inputs.pop(name)
        return y + ((x.float() @ self.a[name]) @ self.b[name]).to(y.dtype)

    def fit(
        self,
        examples: Tensor | Sequence[Any],
        token: str | int | None = None,
        *,
        where: str | Bool[Tensor, "n pos"] = "last",
        retain: Any = None,
        weight: float = 1.0,
        steps: int = 300,
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int = 0,
        prepend_bos: bool | None = None,
    ) -> list[float]:
        """Train the adapters for a token; arguments as of `vpd_lens.fit_edit`.

        Returns:
            The loss before every step.

        Raises:
            DataError: If there are no examples, or data cannot be read.
            InputError: If an argument does not fit.
        """
        goal = goal_of(self.vpd.model, examples, token, where, retain, weight, prepend_bos)
        return train(self.vpd, goal, self.on, self.parameters, steps, lr, batch_size, seed)
