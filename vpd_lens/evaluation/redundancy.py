"""`redundancy`: does the model need what a targeted decomposition found, and nothing else of it?

1. What is important for a behaviour is read off its data.
2. It is ablated in the full model, deltas on, and left alone, deltas off or on; all on the
   behaviour's data (inside) and on everything else (outside).
3. With `each`, every important subcomponent is ablated by itself: in the full model, and among the
   important ones alone.

A behaviour that survives the ablation has a second mechanism, which the deltas hide. From
targeted parameter decomposition (arXiv 2607.13047).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition, Divergence, Masks
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.divergence import last_of_rows
from vpd_lens.decomposition.masks import NEEDED
from vpd_lens.errors import DataError, InputError
from vpd_lens.evaluation.metrics import Means
from vpd_lens.progress import Progress
from vpd_lens.rendering import Shown

# The paper's limits, in nats: an effect in the circuit, and none in the model.
IN_CIRCUIT, IN_MODEL = 0.2, 0.1

ON, ABLATED, ALONE, OFF, KEPT = (
    "everything on",
    "the important ablated, deltas on",
    "only the important, deltas off",
    "everything ablated",
    "only the important, deltas on",
)


# Which subcomponents are on, `[C_total]`, and the deltas' mask.
State = tuple[Tensor, float]


class Effect(NamedTuple):
    """What ablating one subcomponent costs inside, in nats, or the divergence's own unit."""

    in_model: float  # divergence of the full model without it
    in_circuit: float  # by how much that of the important ones alone grows

    @property
    def hidden(self) -> bool:
        """Whether it matters in the circuit and not in the model: something stands in for it."""
        return self.in_circuit > IN_CIRCUIT and self.in_model < IN_MODEL


@dataclass(frozen=True, repr=False)
class Redundancy(Shown):
    """What `redundancy` measured.

    Attributes:
        important: Names of the important subcomponents, as `blocks.0.attn.q:3`.
        inside: Divergence from the target on the behaviour's data, by what is on; in nats if it is
            KL, mean over positions (or over the last ones).
        outside: The same on everything else.
        effects: What ablating each important subcomponent costs, by its name; empty without `each`.
    """

    important: list[str]
    inside: dict[str, float]
    outside: dict[str, float]
    effects: dict[str, Effect]

    @property
    def hidden(self) -> list[str]:
        """Subcomponents that matter in the circuit and not in the model."""
        return [name for name, effect in self.effects.items() if effect.hidden]

    @property
    def verdict(self) -> str:
        """What follows, in a sentence."""
        lost, harm = self.inside[ABLATED], self.outside[ABLATED]
        if not self.important:
            return "Nothing is important: the behaviour was not found."
        if self.inside[OFF] > IN_CIRCUIT and lost < IN_MODEL:
            return f"The model does not need what was found ({lost:.2g}): the deltas do it, too."
        return f"Ablating what was found costs the behaviour {lost:.2g} and the rest {harm:.2g}."

    def table(self) -> Table:
        """The measurements, and what follows."""
        table = Table(
            title=f"{len(self.important)} important subcomponents",
            title_justify="left",
            caption=self.verdict,
            caption_justify="left",
        )
        for heading in ("", "inside", "outside"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, inside in self.inside.items():
            table.add_row(name, f"{inside:.4f}", f"{self.outside[name]:.4f}")
        if self.effects:
            table.add_section()
            table.add_row("matter in the circuit, not in the model", str(len(self.hidden)), "")
        return table

    def __rich__(self) -> Table:
        return self.table()


@torch.no_grad()
def redundancy(
    model: nn.Module,
    data: Any,
    elsewhere: Any,
    *,
    threshold: float = NEEDED,
    often: float = 1e-3,
    important: Sequence[str] | None = None,
    each: bool = False,
    positions: Literal["all", "last"] | None = None,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Redundancy:
    """Ablate what a decomposition found for a behaviour, in the full model and by itself.

    A good targeted decomposition loses the behaviour, and nothing else, when what is important is
    ablated and the deltas stay on; and has the behaviour without the deltas.

    Args:
        model: A decomposed model.
        data: What shows the behaviour, as for `vpd_lens.train`; held-out data, please.
        elsewhere: What does not.
        threshold: Importance above which a position needs a subcomponent.
        often: A subcomponent is important if more than this share of positions inside need it.
        important: Names of what is to be ablated instead, as `blocks.0.attn.q:3`.
        each: Also ablate every important one by itself: two forwards each and batch.
        positions: Where the behaviour is measured on its data: at all positions, or at the last of
            every sequence; `None`: where the training looked. Elsewhere it is always all.
        batch_size: Sequences per batch.
        n_batches: Batches of either; fewer if the data ends before.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        prepend_bos: BOS policy for text; `None` follows the model.
        seed: Seed of data that are a function.
        progress: Show a progress bar.

    Raises:
        AttachError: If the model carries no decomposition.
        DataError: If data cannot be read, do not fit the model, or are empty.
        InputError: If only the last positions are to count and the divergence is the user's own,
            or there is no subcomponent of a name.
    """
    vpd = decomposition_of(model)
    last = (positions or (vpd.training_config or {}).get("positions")) == "last"
    if last and not isinstance(vpd.divergence, str):
        raise InputError(
            "positions='last' and a divergence of your own, which takes the mean over positions "
            "itself. Let it look at the last position only, with positions='all'."
        )
    sizes = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
    reading = {"model": model, "prepend_bos": prepend_bos, "seed": seed, **sizes}
    inside = _read(vpd, "data", data, reading)
    outside = _read(vpd, "elsewhere", elsewhere, reading)
    with vpd.kept_below():
        if important is None:
            chosen = _important(vpd, inside, threshold, often)
        else:
            chosen = _named(vpd, important)
        nothing = torch.zeros_like(chosen)
        states: dict[Any, State] = {ON: (~nothing, 1.0), ABLATED: (~chosen, 1.0)}
        states |= {ALONE: (chosen, 0.0), OFF: (nothing, 0.0), KEPT: (chosen, 1.0)}
        singles: dict[Any, State] = {}
        names = _names(vpd, chosen)
        for column, name in names.items() if each else ():
            others = torch.arange(len(chosen), device=vpd.device) != column
            singles[name, "model"] = others, 1.0
            singles[name, "circuit"] = chosen & others, 0.0
        n_forwards = len(inside) * (len(states) + len(singles)) + len(outside) * len(states)
        with Progress("Ablating", n_forwards, show=progress) as bar:
            kl = _divergences(vpd, inside, states | singles, last, bar.advance)
            kl_outside = _divergences(vpd, outside, states, False, bar.advance)
    return Redundancy(
        important=list(names.values()),
        inside={name: kl[name] for name in states},
        outside=kl_outside,
        effects={
            name: Effect(kl[name, "model"], kl[name, "circuit"] - kl[ALONE])
            for name, kind in singles
            if kind == "model"
        },
    )


def _read(vpd: Decomposition, name: str, source: Any, reading: dict[str, Any]) -> list[Batch]:
    """The batches of one argument, whose errors name it."""
    try:
        batches = [batch.to(vpd.device) for batch in one_pass(source, **reading)]
    except (DataError, InputError) as error:
        raise type(error)(f"{name}: {error}") from error
    if not batches:
        raise DataError(f"{name} has no rows; nothing could be measured on it.")
    return batches


def _important(
    vpd: Decomposition, batches: list[Batch], threshold: float, often: float
) -> Bool[Tensor, " C_total"]:
    """Subcomponents that more than a share of the positions need."""
    needed, n_positions = torch.zeros(vpd.layout.total, device=vpd.device), 0
    for batch in batches:
        importance = vpd.causal_importance(batch.tokens, **batch.mask_argument())
        g = importance.flatten(0, -2) if batch.real is None else importance[batch.real]
        needed += (g > threshold).sum(0)
        n_positions += len(g)
    return needed > often * n_positions


def _named(vpd: Decomposition, names: Sequence[str]) -> Bool[Tensor, " C_total"]:
    """The inverse of `_names`."""
    chosen = torch.zeros(vpd.layout.total, dtype=torch.bool, device=vpd.device)
    column = {name: i for i, name in _names(vpd, ~chosen).items()}
    if unknown := [name for name in names if name not in column]:
        raise InputError(
            f"important: there is no subcomponent {unknown[0]!r}; expected names as "
            f"{next(iter(column))!r}."
        )
    chosen[[column[name] for name in names]] = True
    return chosen


def _names(vpd: Decomposition, chosen: Bool[Tensor, " C_total"]) -> dict[int, str]:
    """`site:index` of some subcomponents, by column."""
    names = [f"{n}:{i}" for n in vpd.layout.names for i in vpd.original_indices(n)]
    return {column: names[column] for column in chosen.nonzero().flatten().tolist()}


def _divergences(
    vpd: Decomposition,
    batches: list[Batch],
    states: dict[Any, State],
    last: bool,
    tick: Callable[[], Any],
) -> dict[Any, float]:
    """How far the output is from the target's where some subcomponents are on, by state.

    At all positions, or only at the `last` of every row.
    """
    means = Means()
    for tokens, real in batches:
        arguments = Batch(tokens, real).mask_argument()
        output, inputs = vpd.target(tokens, **arguments)
        counted = last_of_rows(output, real) if last else real
        divergence = Divergence(output, vpd.divergence, counted)
        batch = inputs[0].shape[:-1]
        n_positions = math.prod(batch) if counted is None else int(counted.sum())
        for name, (on, delta) in states.items():
            components = on.float().expand(*[1] * len(batch), -1)
            deltas = components.new_full((*[1] * len(batch), len(vpd.sites)), delta)
            masked = vpd.run(Masks(components, deltas), tokens, **arguments)
            means.add(name, float(divergence(masked)), n_positions)
            tick()
    return means.means()
