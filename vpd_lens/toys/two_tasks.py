"""A one-layer transformer with two behaviours, one of which is to be decomposed.

Rows are `(task, a, b)`: after the token `ADD` the answer is `(a + b) % p`, after `COPY` it is `b`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from vpd_lens.native import native_transformer
from vpd_lens.toys.models import fit

Task = Literal["add", "copy"]


@dataclass(frozen=True)
class TwoTasks:
    """Addition modulo `p` and copying; numbers are the tokens `0 .. p - 1`, then the two tasks."""

    p: int = 7

    def rows(self, task: Task) -> Int[Tensor, "rows 3"]:
        """All `p * p` rows of a task, `b` varying fastest."""
        n = torch.arange(self.p)
        return F.pad(torch.cartesian_prod(n, n), (1, 0), value=self._token(task))

    def data(self, task: Task) -> partial[Int[Tensor, "batch 3"]]:
        """Random rows of a task: a data source for `vpd_lens.train`."""
        return partial(self._drawn, task)

    def answers(self, rows: Int[Tensor, "rows 3"]) -> Int[Tensor, " rows"]:
        """What follows each row."""
        task, a, b = rows.unbind(-1)
        return torch.where(task == self._token("add"), (a + b) % self.p, b)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, task: Task) -> float:
        """Share of all rows of a task that a model answers correctly; obeys `masked`."""
        rows = self.rows(task)
        return float((model(rows)[:, -1].argmax(-1) == self.answers(rows)).float().mean())

    def transformer(self, seed: int = 0) -> nn.Module:
        """One layer, width 32, 4 heads, 64 relu neurons, no layer norm; its weights are random."""
        attention = {"n_heads": 4, "d_head": 8, "n_ctx": 3, "d_vocab": self.p + 2}
        mlp = {"d_mlp": 64, "act_fn": "relu", "normalization_type": None}
        return native_transformer(seed, n_layers=1, d_model=32, **attention, **mlp)

    def train_target(self, seed: int = 0, steps: int = 500, progress: bool = True) -> nn.Module:
        """Train the transformer on all rows of both tasks, with weight decay."""
        model = self.transformer(seed)
        rows = torch.cat([self.rows("add"), self.rows("copy")])
        answers = self.answers(rows)
        recipe = {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.98), "fused": True}
        optimiser = torch.optim.AdamW(model.parameters(), **recipe)
        schedule = OneCycleLR(optimiser, 3e-3, total_steps=steps)
        return fit(
            model, steps, lambda: F.cross_entropy(model(rows)[:, -1], answers), schedule, progress
        )

    def _token(self, task: Task) -> int:
        return self.p + ("add", "copy").index(task)

    def _drawn(
        self, task: Task, generator: torch.Generator, batch_size: int
    ) -> Int[Tensor, "batch 3"]:
        pairs = torch.randint(self.p, (batch_size, 2), generator=generator)
        return F.pad(pairs, (1, 0), value=self._token(task))
