"""`fit_edit`: an edit trained on a few examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.analysis.circuits.edits import applied
from vpd_lens.analysis.circuits.targets import explained_decomposition
from vpd_lens.analysis.circuits.weight_edits import (
    Rescale,
    Rewrite,
    changes,
    write_vector,
)
from vpd_lens.editing.goal import goal_of, train
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown

What = Literal["write", "scale"]
RATES = {"write": 1e-3, "scale": 5e-2}


@dataclass(frozen=True, repr=False)
class Fit(Shown):
    """An edit that was trained.

    Attributes:
        edit: A `Rewrite`, or a `Rescale` with a factor for each subcomponent.
        losses: Before every step.
    """

    edit: Rewrite | Rescale
    losses: list[float]

    def __rich__(self) -> Table:
        table = Table(
            "", "first", "last", title=f"{type(self.edit).__name__}", title_justify="left"
        )
        table.add_row("loss", *(f"{loss:.3f}" for loss in (self.losses[0], self.losses[-1])))
        if isinstance(self.edit, Rescale):
            names, factors = self.edit.subcomponents, self.edit.factor
            for name, factor in zip(names, factors, strict=True):  # type: ignore[arg-type]
                table.add_row(name, "1.000", f"{factor:.3f}")
        return table


def fit_edit(
    model: nn.Module,
    subcomponents: str | Sequence[str],
    examples: Tensor | Sequence[Any],
    token: str | int | None = None,
    *,
    what: What = "write",
    where: str | Bool[Tensor, "n pos"] = "last",
    retain: Any = None,
    weight: float = 1.0,
    steps: int = 100,
    lr: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Fit:
    """Train the write vector of one subcomponent, or the scales of some, on a few examples.

    The loss is the cross-entropy of `token` at `where`, plus `weight` times the KL from the
    unedited model at all other positions of the examples, and on `retain`. One example is enough
    to begin with. The model is not changed; use `fit.edit` with `edited` or `bake`.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        subcomponents: Names, as `blocks.0.mlp.in:31`; of `"write"` exactly one.
        examples: Texts or rows of tokens.
        token: What is wanted next, text or id; `None`: to forget, so that every token is as likely
            as any other.
        what: `"write"`: a new write vector; `"scale"`: a factor for each subcomponent.
        where: `"last"`: after the last token of each example; or a mask `[examples, pos]`.
        retain: Data on which nothing may change, as for `vpd_lens.train`.
        weight: Of the KL.
        steps: Of AdamW.
        lr: Its rate; `None`: 1e-3 for a write vector (the paper's), 5e-2 for scales.
        batch_size: Examples, and rows to retain, per step.
        seed: Of their order.
        prepend_bos: BOS policy for text; `None` follows the model.

    Raises:
        AttachError: If the model carries no decomposition.
        DataError: If there are no examples, or data cannot be read.
        InputError: If there is no subcomponent of a name, or an argument does not fit.

    Examples:
        >>> fit = vpd_lens.fit_edit(model, name, ["def read(self"], ",")  # doctest: +SKIP
        >>> plain = vpd_lens.bake(model, fit.edit)  # doctest: +SKIP

    Source: VPD, editing; its scales, "German removal" (2026).
    """
    vpd = explained_decomposition(model)
    names = [subcomponents] if isinstance(subcomponents, str) else list(subcomponents)
    if what not in get_args(What) or not names or (what == "write" and len(names) > 1):
        raise InputError(
            f"what={what!r} with {len(names)} subcomponents; expected 'write' with one, or 'scale' "
            "with any."
        )
    if steps < 1:
        raise InputError(f"steps={steps}; expected at least 1.")
    goal = goal_of(model, examples, token, where, retain, weight, prepend_bos)
    rate = RATES[what] if lr is None else lr
    start = write_vector(vpd, names[0]).clone() if what == "write" else torch.ones(len(names))
    trained = start.to(vpd.device).requires_grad_()
    made = Rewrite(names[0], trained) if what == "write" else Rescale(names, trained)

    def changed() -> Any:
        return applied(vpd, [], changes(vpd, [made]))

    losses = train(vpd, goal, changed, [trained], steps, rate, batch_size, seed)
    found = trained.detach()
    edit = Rewrite(names[0], found) if what == "write" else Rescale(names, found.tolist())
    return Fit(edit, losses)
