"""A two-layer attention-only transformer that repeats what it has seen: the induction circuit.

A head of the first layer moves each token's identity to the next position (*previous-token head*);
a head of the second layer finds the position whose predecessor is the current token, and copies
what stands there (*induction head*). From Elhage et al. 2021 and Olsson et al. 2022
(arXiv:2209.11895).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vpd_lens.native import native_transformer
from vpd_lens.toys.models import fit


@dataclass(frozen=True)
class RepeatedTokens:
    """Rows of random tokens that repeat after a random period; a data source for `vpd_lens.train`.

    The period is between the two `periods`, so that attending to a fixed distance does not help.
    """

    d_vocab: int = 32
    length: int = 32
    periods: tuple[int, int] = (8, 16)

    def __call__(self, generator: torch.Generator, batch_size: int) -> Int[Tensor, "batch pos"]:
        """Random rows."""
        shortest, longest = self.periods
        period = torch.randint(shortest, longest + 1, (batch_size, 1), generator=generator)
        tokens = torch.randint(self.d_vocab, (batch_size, longest), generator=generator)
        return tokens.gather(1, torch.arange(self.length) % period)

    def matches(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
        """Where an induction head looks: positions whose predecessor is the query's token."""
        same = tokens[:, :, None] == F.pad(tokens, (1, 0), value=-1)[:, None, :-1]
        return same & torch.ones_like(same[0]).tril()

    def loss(
        self, logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy in nats, mean over positions whose token has a match before it."""
        known = self.matches(tokens).any(-1)[:, :-1]
        return F.cross_entropy(logits[:, :-1][known], tokens[:, 1:][known])

    def transformer(self, seed: int = 0, n_heads: int = 2) -> nn.Module:
        """Two layers of attention of width 64, without MLPs and layer norm; random weights."""
        sizes = {"n_layers": 2, "d_model": 64, "n_ctx": self.length, "d_vocab": self.d_vocab}
        attention = {"n_heads": n_heads, "d_head": 64 // n_heads, "attn_only": True}
        return native_transformer(seed, **sizes, **attention, normalization_type=None)

    def train_target(
        self, seed: int = 0, steps: int = 2000, n_heads: int = 2, progress: bool = True
    ) -> nn.Module:
        """Train the transformer by AdamW steps on 64 rows each; `seed` is that of the data, too."""
        model = self.transformer(seed, n_heads)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)

        def loss() -> Tensor:
            tokens = self(generator, 64)
            return self.loss(model(tokens), tokens)

        return fit(model, steps, loss, schedule, progress)


@dataclass(frozen=True)
class HeadScores:
    """Mean attention of every head, `[layer, head]`.

    `previous`: to the position before, over all queries but the first. `induction`: to positions
    whose predecessor is the query's token, over queries that have such positions.
    """

    previous: Float[Tensor, "layer head"]
    induction: Float[Tensor, "layer head"]


@torch.no_grad()
def head_scores(
    model: nn.Module, task: RepeatedTokens, tokens: Int[Tensor, "batch pos"]
) -> HeadScores:
    """How much each head does of what the circuit's two do, on rows of the task; obeys `masked`."""
    _, cache = model.run_with_cache(tokens)  # type: ignore[operator]
    matches = task.matches(tokens)
    known = matches.any(-1)
    previous, induction = [], []
    for layer in range(model.cfg.n_layers):  # type: ignore[union-attr]
        pattern = cache["pattern", layer]  # [batch, head, query, key]
        previous.append(pattern.diagonal(-1, 2, 3).mean(dim=(0, 2)))
        matched = (pattern * matches[:, None]).sum(-1)  # [batch, head, query]
        induction.append((matched * known[:, None]).sum(dim=(0, 2)) / known.sum())
    return HeadScores(torch.stack(previous), torch.stack(induction))
