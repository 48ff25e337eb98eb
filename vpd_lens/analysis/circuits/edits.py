"""Edits of subcomponents, as TransformerLens hooks on masks, activations and outputs.

The hooks act on `hook_mask`, `hook_acts` and `hook_out` of the sites, so edits combine with
`vpd.masked(...)`, other hooks and generation like any hook does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.places import Positions, located, where_of
from vpd_lens.analysis.circuits.targets import explained_decomposition, prompt_tokens
from vpd_lens.analysis.circuits.weight_edits import (
    Importances,
    Rewriting,
    WeightEdit,
    Written,
    changes,
)
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.call import cached_positions
from vpd_lens.errors import InputError


@dataclass(frozen=True)
class Ablate:
    """Switch subcomponents off: their masks become 0.

    Names of subcomponents are `"blocks.0.mlp.in:31"`, or with a position `"blocks.0.mlp.in:31@5"`.
    Those without one are meant at `positions`: one, several, or a slice, whose open end goes on
    into generated tokens; `None`: everywhere.
    """

    subcomponents: str | Sequence[str]
    positions: Positions = None


@dataclass(frozen=True)
class Scale:
    """Multiply the masks of subcomponents, which are named and placed as in `Ablate`.

    A factor of 0 ablates, 1 does nothing, 2 doubles, -1 reverses.
    """

    subcomponents: str | Sequence[str]
    factor: float = 1.0
    positions: Positions = None


@dataclass(frozen=True)
class Patch:
    """Give subcomponents the activations that they have on another prompt, and switch them on.

    Subcomponents and positions are as in `Ablate`. `source` is the other prompt, text or token ids,
    and must have the positions here plus `shift`.
    """

    subcomponents: str | Sequence[str]
    source: Any = None
    positions: Positions = None
    shift: int = 0


MaskEdit = Ablate | Scale | Patch
Edit = MaskEdit | WeightEdit

# From values `[batch, pos, n]` and their positions to what they become.
Change = Callable[[Tensor, Int[Tensor, " pos"]], Tensor | float]


@dataclass
class _SiteEdit:
    """One edit at one hook point of a site."""

    point: str
    columns: Int[Tensor, " n"]
    where: range | list[int]
    change: Change

    def apply(self, clock: _Clock, value: Tensor, hook: Any) -> Tensor:
        """Change some columns of `[batch, pos, C]` at the positions that this forward holds."""
        chosen = [i for i in range(value.shape[1]) if clock.offset + i in self.where]
        if not chosen:
            return value
        value, here = value.clone(), torch.tensor(chosen)
        index = slice(None), here[:, None], self.columns
        value[index] = self.change(value[index], clock.offset + here)
        return value


@dataclass
class _Clock:
    """The position of a forward's first token: not 0 when it goes on from a cache."""

    vpd: Decomposition
    cached: int | None = None
    generation: object = None
    seen: int = 0
    offset: int = 0

    def see_cache(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """The length of a key-value cache that a call was given."""
        self.cached = cached_positions(kwargs) or self.cached

    def tick(self, residual: Tensor, hook: Any) -> None:
        n = residual.shape[1]
        generation = self.vpd.forwards.state.generation
        goes_on = generation is not None and generation is self.generation
        # HookedTransformer.generate calls forward past the hooks that would see its cache.
        follows = goes_on and n == 1 and self.seen > 0
        self.offset = self.cached if self.cached is not None else self.seen if follows else 0
        self.seen, self.cached = self.offset + n, None
        self.generation = generation


@contextmanager
def edited(
    model: nn.Module, edits: Edit | Sequence[Edit], *, prepend_bos: bool | None = None
) -> Iterator[nn.Module]:
    """Run the model with edited subcomponents inside a `with` block.

    Without a `masked(...)` block around it, everything else is as in the target model, bit for bit
    with no edits. Works in `generate`, with and without a key-value cache.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        edits: What to do. Of those of masks and activations later ones see the results of earlier
            ones; new write vectors are applied to what comes out of them.
        prepend_bos: Whether text of `Patch.source` gets a BOS token.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If a subcomponent or position does not exist, a vector does not fit, or two
            edits give one subcomponent two write vectors.

    Examples:
        >>> with edited(model, Ablate("blocks.0.mlp.in:31", slice(5, None))):  # doctest: +SKIP
        ...     model.generate("def read(self", max_new_tokens=8)
    """
    vpd = explained_decomposition(model)
    with applied(vpd, *both(vpd, edits, prepend_bos)):
        yield model


def both(
    vpd: Decomposition,
    edits: Edit | Sequence[Edit],
    prepend_bos: bool | None,
    n_positions: int | None = None,
) -> tuple[list[_SiteEdit], list[Written]]:
    """What edits do to masks and activations, by hook point, and to write vectors, by site."""
    given = [edits] if isinstance(edits, Edit) else list(edits)
    masks = [edit for edit in given if isinstance(edit, MaskEdit)]
    weights = [edit for edit in given if isinstance(edit, WeightEdit)]
    return resolved(vpd, masks, prepend_bos, n_positions), changes(vpd, weights, n_positions)


@contextmanager
def applied(
    vpd: Decomposition,
    parts: Sequence[_SiteEdit],
    writes: Sequence[Written] = (),
    importance: Float[Tensor, "batch pos C_total"] | None = None,
) -> Iterator[None]:
    """The hooks of edits, with the importances of what will run where they are known already."""
    model, clock, importances = vpd.model, _Clock(vpd), Importances(vpd, importance)
    if not parts and not writes:
        yield
        return
    rewritings = [Rewriting(change, importances, clock) for change in writes]
    hooks: list[tuple[str, Any]] = [("blocks.0.hook_resid_pre", clock.tick)]
    hooks += [(part.point, partial(part.apply, clock)) for part in parts]
    hooks += [rewriting.hook for rewriting in rewritings]
    with ExitStack() as stack:
        for entry in (model, getattr(model, "original_model", None)):
            if isinstance(entry, nn.Module):
                see = entry.register_forward_pre_hook(clock.see_cache, with_kwargs=True)
                stack.callback(see.remove)
        watched = {change.site for change in writes if change.above is not None}
        stack.enter_context(importances.watched(watched))
        for rewriting in rewritings:
            stack.enter_context(rewriting.watching(vpd))
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield


def resolved(
    vpd: Decomposition,
    edits: MaskEdit | Sequence[MaskEdit],
    prepend_bos: bool | None,
    n_positions: int | None = None,
) -> list[_SiteEdit]:
    """Edits by hook point; of a prompt of `n_positions`, only at positions that it has."""
    parts = []
    for edit in [edits] if isinstance(edits, MaskEdit) else edits:
        acts = _source_activations(vpd, edit, prepend_bos) if isinstance(edit, Patch) else {}
        for (site, _), (indices, positions) in _grouped(vpd, edit).items():
            columns = torch.tensor(sorted(indices))
            where = where_of(type(edit).__name__, positions, n_positions)
            factor = edit.factor if isinstance(edit, Scale) else 0.0
            done: dict[str, Change] = {"mask": lambda masks, _, factor=factor: factor * masks}
            if isinstance(edit, Patch):
                taken = partial(_taken, site, acts[site][:, columns], edit.shift)
                done = {"mask": lambda masks, here: 1.0, "acts": taken}
            for name, change in done.items():
                parts.append(_SiteEdit(f"{site}.vpd.hook_{name}", columns, where, change))
    return parts


def _grouped(
    vpd: Decomposition, edit: MaskEdit
) -> dict[tuple[str, str], tuple[set[int], Positions]]:
    """Subcomponents with their positions, by site and by what these look like."""
    groups: dict[tuple[str, str], tuple[set[int], Positions]] = {}
    for site, index, positions in located(vpd, edit.subcomponents, edit.positions):
        groups.setdefault((site, repr(positions)), (set(), positions))[0].add(index)
    return groups


def _taken(
    site: str, acts: Float[Tensor, "source n"], shift: int, old: Tensor, here: Int[Tensor, " pos"]
) -> Float[Tensor, "pos n"]:
    """Activations of another prompt."""
    source = here + shift
    if outside := [p for p in source.tolist() if not 0 <= p < len(acts)]:
        raise InputError(
            f"Patch of {site}: position {outside[0]} is not in the source prompt, "
            f"which has {len(acts)} tokens. Name positions that both prompts have."
        )
    return acts[source].to(old.dtype)


@torch.no_grad()
def _source_activations(
    vpd: Decomposition, edit: Patch, prepend_bos: bool | None
) -> dict[str, Float[Tensor, "pos C"]]:
    if edit.source is None:
        raise InputError("Patch needs source=..., the prompt whose activations to take.")
    inputs = vpd.inputs(prompt_tokens(vpd.model, edit.source, prepend_bos)[None])
    pairs = zip(vpd.layout.names, inputs, vpd.subcomponents.v, strict=True)
    return {name: x[0].float() @ v.float() for name, x, v in pairs}
