"""What an edit is trained for: a token at some positions of examples, and nothing else changed.

    loss = cross-entropy of the token at the goal's positions
           + weight * KL(unedited || edited) at all others, and on what is to be retained

The same for write vectors, scales and the low-rank adapters that they are compared with.
Source: VPD, editing (the baselines' loss); without a token the goal is the uniform distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.behaviour import kl_divergence
from vpd_lens.analysis.circuits.targets import prompt_tokens, token_id
from vpd_lens.data import one_pass
from vpd_lens.data.batches import PAD
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.errors import DataError, InputError

Changed = Callable[[], AbstractContextManager[Any]]  # a block in which the model is edited


@dataclass
class Goal:
    """Examples, where something is wanted on them, and what must stay.

    Attributes:
        tokens: Examples, padded on the right.
        at: Where the token is wanted.
        real: Which positions are no padding.
        token: The token wanted next; `None`: any token as likely as any other.
        retain: Rows on which nothing may change, padded with -1.
        weight: Of the KL where nothing may change.
    """

    tokens: Int[Tensor, "n pos"]
    at: Bool[Tensor, "n pos"]
    real: Bool[Tensor, "n pos"]
    token: int | None
    retain: Int[Tensor, "m other"] | None = None
    weight: float = 1.0

    def loss(
        self, vpd: Decomposition, changed: Changed, batch_size: int, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """The loss on some of the examples, and as many rows to retain, drawn anew."""
        rows = _some(len(self.tokens), batch_size, generator)
        tokens, at, real = self.tokens[rows], self.at[rows], self.real[rows]
        clean, logits = _both(vpd, changed, tokens)
        log_p = logits[at].float().log_softmax(-1)
        wanted = log_p.mean(-1) if self.token is None else log_p[:, self.token]
        kept = [kl_divergence(logits[real & ~at], clean[real & ~at])]
        if self.retain is not None:
            other = self.retain[_some(len(self.retain), batch_size, generator)]
            clean, logits = _both(vpd, changed, other.clamp(min=0))
            kept.append(kl_divergence(logits[other != PAD], clean[other != PAD]))
        nothing = torch.cat(kept)
        loss = -wanted.mean()
        return loss + self.weight * nothing.mean() if len(nothing) else loss


def goal_of(
    model: nn.Module,
    examples: Tensor | Sequence[Any],
    token: str | int | None,
    where: str | Bool[Tensor, "n pos"] = "last",
    retain: Any = None,
    weight: float = 1.0,
    prepend_bos: bool | None = None,
) -> Goal:
    """A `Goal` from what a user gives; see `vpd_lens.fit_edit`."""
    vpd, listed = decomposition_of(model), list(examples)
    if not listed:
        raise DataError("examples are empty; give at least one text or row of tokens.")
    rows = [prompt_tokens(model, row, prepend_bos) for row in listed]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    real = places < lengths[:, None]
    if isinstance(where, str):
        if where != "last":
            raise InputError(f"where={where!r}; expected 'last' or a mask [examples, pos].")
        at = places == lengths[:, None] - 1
    else:
        at = torch.as_tensor(where, device=tokens.device).bool()
    if at.shape != real.shape or not bool(at.any()) or bool((at & ~real).any()):
        raise InputError(
            f"where has shape {tuple(at.shape)} and {int(at.sum())} positions; expected a mask of "
            f"shape {tuple(real.shape)} that is True somewhere, and only where there is a token."
        )
    n_vocab = int(model.cfg.d_vocab)  # type: ignore[arg-type, union-attr]
    number = None if token is None else token_id(model, token, n_vocab)
    kept = None
    if retain is not None:
        batches = one_pass(
            retain, model=model, batch_size=256, seq_len=None, prepend_bos=prepend_bos, n_batches=8
        )
        found = [
            t if real is None else torch.where(real, t, PAD)
            for t, real in (batch.to(vpd.device) for batch in batches)
        ]
        if not found:
            raise DataError("retain has no rows; leave it out, or give some.")
        kept = torch.cat(found)
    return Goal(tokens.to(vpd.device), at.to(vpd.device), real.to(vpd.device), number, kept, weight)


def train(
    vpd: Decomposition,
    goal: Goal,
    changed: Changed,
    parameters: Sequence[Tensor],
    steps: int,
    lr: float,
    batch_size: int = 64,
    seed: int = 0,
) -> list[float]:
    """Train parameters inside `changed` with AdamW, without weight decay; the loss of every step.

    The model, `V` and `U` get no gradient.
    """
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), []
    frozen, own = vpd.frozen_subcomponents(), vpd.forwards.during(context=None)
    with torch.inference_mode(False), torch.enable_grad(), vpd.undisturbed(), frozen, own:
        for _ in range(steps):
            loss = goal.loss(vpd, changed, batch_size, generator)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []


def _both(vpd: Decomposition, changed: Changed, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the model as it is, without gradients, and edited."""
    with torch.no_grad():
        clean = vpd.model(tokens)
    with changed():
        return clean, vpd.model(tokens)


def _some(n: int, at_most: int, generator: torch.Generator) -> Int[Tensor, " rows"]:
    return torch.randperm(n, generator=generator)[:at_most]
