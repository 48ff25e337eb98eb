"""`side_effects`: what an edit does where it is meant to act, after that, around it and elsewhere.

1. An edit is meant to act where its subcomponents are important, in the unedited model.
2. There the probability of the intended token counts; everywhere else, how far predictions move:
   at the next positions, at those on either side, and at all others.
3. The perplexity says what that costs, by data set.

Positions of one sequence are not independent: standard errors are those of ratios of sums over
sequences. Source: VPD, editing (post-fire, surrounding and global).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.analysis.circuits.behaviour import kl_divergence
from vpd_lens.analysis.circuits.edits import Edit, edited
from vpd_lens.analysis.circuits.places import located
from vpd_lens.analysis.circuits.targets import explained_decomposition, token_id, token_text
from vpd_lens.analysis.circuits.weight_edits import WeightEdit
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.masks import NEEDED
from vpd_lens.editing.goal import Changed
from vpd_lens.errors import DataError, InputError
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown

AT, AFTER, AROUND, ELSEWHERE = "where it acts", "after it", "around it", "everywhere else"
Where = Callable[[Tensor], Tensor]  # from tokens [batch, pos] to a mask [batch, pos]


class Measured(NamedTuple):
    """A mean over positions, its standard error, and the number of positions; NaN of none."""

    mean: float
    error: float
    n: int


class Cost(NamedTuple):
    """Perplexity of a data set before and after, and the rise of the cross-entropy in nats."""

    before: float
    after: float
    rise: Measured


@dataclass(frozen=True, repr=False)
class SideEffects(Shown):
    """What `side_effects` measured.

    Attributes:
        token: The intended token as text, if one was named.
        target: Its probability where the edit acts, `"before"` and `"after"`.
        kl: KL from the unedited model's predictions in nats, by regime: where the edit acts, at the
            next positions after that, at those on either side, and everywhere else (which contains
            the two before). The last three without the positions where it acts.
        cost: Perplexity by data set.
    """

    token: str | None
    target: dict[str, Measured]
    kl: dict[str, Measured]
    cost: dict[str, Cost]

    def table(self) -> Table:
        """The measurements, with standard errors."""
        table = Table("", "mean", "± s.e.", "positions")
        for name, measured in self.target.items():
            table.add_row(f"P({self.token!r}) {name}", *_cells(measured))
        for name, measured in self.kl.items():
            table.add_row(f"KL {name}, nats", *_cells(measured))
        for name, cost in self.cost.items():
            label = f"{name}: perplexity {cost.before:.3f} -> {cost.after:.3f}, rise in nats"
            table.add_row(label, *_cells(cost.rise))
        return table

    def __rich__(self) -> Table:
        return self.table()


def _cells(measured: Measured) -> tuple[str, str, str]:
    return f"{measured.mean:.4g}", f"{measured.error:.1g}", f"{measured.n:,}"


@torch.no_grad()
def side_effects(
    model: nn.Module,
    edits: Edit | Sequence[Edit] | Changed,
    data: Any,
    token: str | int | None = None,
    *,
    where: str | Sequence[str] | Where | None = None,
    threshold: float = NEEDED,
    after: int = 5,
    around: int = 20,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SideEffects:
    """Measure what an edit does where it is meant to act, and everywhere else.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        edits: What is done; or any function that returns a `with` block in which the model is
            changed, as `LoRA.on` does: then `where` is needed.
        data: As for `vpd_lens.train`, or several by name, `{"code": ..., "comments": ...}`; not
            what the edit was fitted on, please.
        token: What is intended where the edit acts, text or id.
        where: Where it is meant to act: where one of these subcomponents is important, or a
            function from tokens `[batch, pos]` to a mask; `None`: the subcomponents of the edits.
        threshold: Importance above which a subcomponent is important.
        after: Positions after one where the edit acts.
        around: Positions on either side.
        batch_size: Sequences per batch.
        n_batches: Batches of each data set; fewer if it ends before.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        prepend_bos: BOS policy for text; `None` follows the model.
        seed: Seed of data that are a function.
        progress: Show a progress bar.

    Raises:
        AttachError: If the model carries no decomposition.
        DataError: If data cannot be read, do not fit the model, or are empty.
        InputError: If a subcomponent does not exist, or it is not said where the edit acts.

    Examples:
        >>> vpd_lens.side_effects(model, edit, held_out, ",").table()  # doctest: +SKIP
    """
    vpd = explained_decomposition(model)
    changed: Changed = edits if callable(edits) else partial(edited, model, edits)
    acts = _acts(vpd, where if where is not None else _subcomponents(vpd, edits), threshold)
    number = None if token is None else token_id(model, token, int(model.cfg.d_vocab))  # type: ignore[arg-type, union-attr]
    sums, sets = _Sums(), data if isinstance(data, dict) else {"data": data}
    reading = {"seq_len": seq_len, "prepend_bos": prepend_bos, "seed": seed}
    batches = {}
    for name, source in sets.items():
        batches[name] = list(
            one_pass(source, model=model, batch_size=batch_size, n_batches=n_batches, **reading)
        )
        if not batches[name]:
            raise DataError(f"{name} has no rows; nothing could be measured on it.")
    with Progress("Measuring", sum(map(len, batches.values())), show=progress) as bar:
        for name, of_set in batches.items():
            for batch in of_set:
                _add(vpd, sums, name, batch.to(vpd.device), changed, acts, number, (after, around))
                bar.advance()
    return SideEffects(
        token=None if number is None else token_text(model, number),
        target={w: sums.mean(w) for w in ("before", "after") if number is not None},
        kl={regime: sums.mean(regime) for regime in (AT, AFTER, AROUND, ELSEWHERE)},
        cost={
            name: Cost(
                math.exp(sums.mean((name, "before")).mean),
                math.exp(sums.mean((name, "after")).mean),
                sums.mean((name, "rise")),
            )
            for name in sets
        },
    )


def _subcomponents(vpd: Decomposition, edits: Any) -> list[str]:
    """Names of all that edits touch."""
    if callable(edits):
        raise InputError(
            "where is None, and nothing says where this change is meant to act; name "
            "subcomponents, or give a function from tokens to a mask."
        )
    names: list[str] = []
    for edit in [edits] if isinstance(edits, Edit) else edits:
        if isinstance(edit, WeightEdit):
            names += [name for name, _ in edit.writes(vpd)]
        else:
            given = edit.subcomponents
            names += [given] if isinstance(given, str) else given
    return names


def _acts(
    vpd: Decomposition, where: str | Sequence[str] | Where, threshold: float
) -> Callable[[Batch], Tensor]:
    """From a batch to where the edit is meant to act."""
    if callable(where):
        return lambda batch: where(batch.tokens)
    starts = {site: vpd.layout.columns(site).start for site in vpd.layout.names}
    columns = [starts[site] + index for site, index, _ in located(vpd, where)]
    if not columns:
        raise InputError("where is empty: name at least one subcomponent, or give a function.")

    def important(batch: Batch) -> Tensor:
        g = vpd.causal_importance(batch.tokens, **batch.mask_argument())
        return (g[..., columns] > threshold).any(-1)

    return important


def regimes(
    acts: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], after: int, around: int
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Where the edit acts, the next `after` positions, `around` on either side, and all others."""
    acts = acts & real
    before = F.pad(acts.float(), (after, 0))[:, : acts.shape[1] + after - 1]
    follows = F.max_pool1d(before[:, None], after, stride=1)[:, 0] > 0
    near = F.max_pool1d(acts.float()[:, None], 2 * around + 1, stride=1, padding=around)[:, 0] > 0
    others = real & ~acts
    return {AT: acts, AFTER: follows & others, AROUND: near & others, ELSEWHERE: others}


def _add(
    vpd: Decomposition,
    sums: _Sums,
    name: str,
    batch: Batch,
    changed: Changed,
    acts: Callable[[Batch], Tensor],
    token: int | None,
    spans: tuple[int, int],
) -> None:
    tokens, mask = batch.tokens, batch.mask_argument()
    real = torch.ones_like(tokens, dtype=torch.bool) if batch.real is None else batch.real
    parts = regimes(acts(batch), real, *spans)
    with vpd.undisturbed(), vpd.forwards.during(context=None):
        clean = vpd.model(tokens, **mask)
        with changed():
            new = vpd.model(tokens, **mask)
    kl = kl_divergence(new, clean)
    for regime, at in parts.items():
        sums.add(regime, kl, at)
    if token is not None:
        for label, logits in (("before", clean), ("after", new)):
            sums.add(label, logits.float().softmax(-1)[..., token], parts[AT])
    losses = [_next_token_losses(logits, tokens) for logits in (clean, new)]
    kinds = {"before": losses[0], "after": losses[1], "rise": losses[1] - losses[0]}
    for label, loss in kinds.items():
        sums.add((name, label), loss, real[:, 1:])


def _next_token_losses(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    flat = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(tokens), -1)


class _Sums:
    """Sums over the positions of every sequence, by name."""

    def __init__(self) -> None:
        self.rows: dict[Any, list[Tensor]] = defaultdict(list)

    def add(
        self, name: Any, values: Float[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
    ) -> None:
        """Add a batch: of each row, the sum of its values at some positions, and their number."""
        pair = ((values * at).sum(-1, dtype=torch.float64), at.sum(-1, dtype=torch.float64))
        self.rows[name].append(torch.stack(pair))

    def mean(self, name: Any) -> Measured:
        """The mean over all positions, and its standard error over sequences."""
        sums, counts = torch.cat(self.rows[name], dim=1)
        n, rows = float(counts.sum()), int((counts > 0).sum())
        if not n:
            return Measured(math.nan, math.nan, 0)
        mean = float(sums.sum()) / n
        spread = (sums - mean * counts).square().sum() * rows / max(rows - 1, 1)
        return Measured(mean, float(spread.sqrt()) / n if rows > 1 else math.nan, int(n))
