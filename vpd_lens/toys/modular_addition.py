"""A one-layer transformer that adds modulo a prime: task, training, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vpd_lens.decomposition import Divergence
from vpd_lens.native import native_transformer
from vpd_lens.toys.models import fit


def last_position_kl(
    masked: Float[Tensor, "batch pos vocab"], target: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, ""]:
    """KL of the last position's predictions: nothing was trained to predict at the others."""
    return Divergence(target[:, -1], "kl")(masked[:, -1])


@dataclass(frozen=True)
class ModularAddition:
    """Rows `(a, b, p)`, where the last is the equals sign; the answer is `(a + b) % p`.

    A data source for `vpd_lens.train`. `p` is an odd prime, the vocabulary `0 .. p`.
    """

    p: int = 59

    def __call__(self, generator: torch.Generator, batch_size: int) -> Int[Tensor, "batch 3"]:
        """Random rows."""
        pairs = torch.randint(self.p, (batch_size, 2), generator=generator)
        return F.pad(pairs, (0, 1), value=self.p)

    def all_rows(self) -> Int[Tensor, "rows 3"]:
        """All `p * p` rows, `b` varying fastest."""
        n = torch.arange(self.p)
        return F.pad(torch.cartesian_prod(n, n), (0, 1), value=self.p)

    def answers(self, rows: Int[Tensor, "rows 3"]) -> Int[Tensor, " rows"]:
        """The sums."""
        return (rows[:, 0] + rows[:, 1]) % self.p

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Float[Tensor, "p p p"]:
        """The model's logits of the answers `c` at all pairs, `[a, b, c]`."""
        p = self.p
        return model(self.all_rows())[:, -1, :p].reshape(p, p, p)

    def accuracy(self, model: nn.Module) -> float:
        """Share of all pairs that the model adds correctly."""
        right = self.logits(model).argmax(-1).flatten() == self.answers(self.all_rows())
        return float(right.float().mean())

    def transformer(self, seed: int = 0, d_model: int = 64, d_mlp: int = 256) -> nn.Module:
        """One layer, 4 heads, `d_mlp` relu neurons, no layer norm; its weights are random."""
        attention = {"n_heads": 4, "d_head": d_model // 4, "n_ctx": 3, "d_vocab": self.p + 1}
        mlp = {"d_mlp": d_mlp, "act_fn": "relu", "normalization_type": None}
        return native_transformer(seed, n_layers=1, d_model=d_model, **attention, **mlp)

    def train_target(self, seed: int = 0, steps: int = 1500, progress: bool = True) -> nn.Module:
        """Train a transformer until it has understood addition, not just learnt it by heart.

        Full batches of 80 % of all pairs and strong weight decay make it generalise within a few
        hundred AdamW steps; the rest cleans up. `seed`: of the weights and of what is held out.
        """
        model = self.transformer(seed)
        rows = self.all_rows()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[: int(0.8 * len(rows))]]
        answers = self.answers(rows)
        recipe = {"lr": 3e-3, "weight_decay": 1.0, "betas": (0.9, 0.98), "fused": True}
        optimiser = torch.optim.AdamW(model.parameters(), **recipe)
        schedule = LambdaLR(optimiser, lambda i: min(1.0, (i + 1) / 20, 3 * (1 - i / steps)))
        return fit(
            model, steps, lambda: F.cross_entropy(model(rows)[:, -1], answers), schedule, progress
        )
