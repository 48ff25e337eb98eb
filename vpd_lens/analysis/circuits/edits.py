"""Edits of subcomponents, as TransformerLens hooks on masks and activations.

The hooks act on `hook_mask` and `hook_acts` of the sites, so edits combine with `vpd.masked(...)`,
other hooks and generation like any hook does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.targets import explained_decomposition, prompt_tokens
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.call import cached_positions
from vpd_lens.errors import InputError

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True)
class Ablate:
    """Switch subcomponents off: their masks become 0.

    Attributes:
        subcomponents: Names, `"blocks.0.mlp.in:31"`, or with a position,
            `"blocks.0.mlp.in:31@5"`.
        positions: Where, for names without a position: one, several, or a slice, whose open end
            goes on into generated tokens. `None`: everywhere.
    """

    subcomponents: str | Sequence[str]
    positions: Positions = None


@dataclass(frozen=True)
class Scale:
    """Multiply the masks of subcomponents.

    Attributes:
        subcomponents: As in `Ablate`, like `positions`.
        factor: 0 ablates, 1 does nothing, 2 doubles, -1 reverses.
    """

    subcomponents: str | Sequence[str]
    factor: float = 1.0
    positions: Positions = None


@dataclass(frozen=True)
class Patch:
    """Give subcomponents the activations that they have on another prompt, and switch them on.

    Attributes:
        subcomponents: As in `Ablate`, like `positions`, which the other prompt must have too.
        source: The other prompt, text or token ids.
        shift: Position in the other prompt minus position here.
    """

    subcomponents: str | Sequence[str]
    source: Any = None
    positions: Positions = None
    shift: int = 0


Edit = Ablate | Scale | Patch


# From values `[batch, pos, n]` and their positions to what they become.
Change = Callable[[Tensor, Int[Tensor, " pos"]], Tensor | float]


@dataclass
class _SiteEdit:
    """One edit at one hook point of a site."""

    point: str
    columns: Int[Tensor, " n"]
    where: slice | list[int]
    change: Change

    def at(self, here: Int[Tensor, " pos"]) -> Bool[Tensor, " pos"]:
        """Which positions of a forward it changes."""
        if not isinstance(self.where, slice):
            return torch.isin(here, torch.tensor(self.where, device=here.device))
        start, step = self.where.start or 0, self.where.step or 1
        stop = torch.inf if self.where.stop is None else self.where.stop
        return (here >= start) & (here < stop) & ((here - start) % step == 0)

    def apply(self, clock: _Clock, value: Tensor, hook: Any) -> Tensor:
        """Change some columns of `[batch, pos, C]` at the positions that this forward holds."""
        here = clock.offset + torch.arange(value.shape[1], device=value.device)
        chosen = self.at(here).nonzero()
        if len(chosen) == 0:
            return value
        value = value.clone()
        index = slice(None), chosen, self.columns.to(value.device)
        value[index] = self.change(value[index], here[chosen[:, 0]])
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

    Without a `masked(...)` block around it, everything else is as in the target model; an empty
    list of edits leaves it bit-identical. Works in `generate`: edits hold at the positions they
    name, with and without a key-value cache.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        edits: What to do; later edits see the results of earlier ones.
        prepend_bos: Whether text of `Patch.source` gets a BOS token.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If a subcomponent or position does not exist.

    Examples:
        >>> with edited(model, Ablate("blocks.0.mlp.in:31", slice(5, None))):  # doctest: +SKIP
        ...     model.generate("def read(self", max_new_tokens=8)
    """
    vpd = explained_decomposition(model)
    with applied(vpd, resolved(vpd, edits, prepend_bos)):
        yield model


@contextmanager
def applied(vpd: Decomposition, parts: Sequence[_SiteEdit]) -> Iterator[None]:
    """Hooks for edits by site and position."""
    model, clock = vpd.model, _Clock(vpd)
    hooks: list[tuple[str, Any]] = [("blocks.0.hook_resid_pre", clock.tick)] if parts else []
    hooks += [(part.point, partial(part.apply, clock)) for part in parts]
    with ExitStack() as stack:
        for entry in (model, getattr(model, "original_model", None)):
            if parts and isinstance(entry, nn.Module):
                see = entry.register_forward_pre_hook(clock.see_cache, with_kwargs=True)
                stack.callback(see.remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        yield


def resolved(
    vpd: Decomposition,
    edits: Edit | Sequence[Edit],
    prepend_bos: bool | None,
    n_positions: int | None = None,
) -> list[_SiteEdit]:
    """Edits by site and position; of a prompt of `n_positions`, only at positions that it has.

    Raises:
        InputError: If a subcomponent or position does not exist.
    """
    parts = []
    for edit in [edits] if isinstance(edits, Edit) else edits:
        acts = _source_activations(vpd, edit, prepend_bos) if isinstance(edit, Patch) else {}
        for (site, position), indices in _grouped(vpd, edit).items():
            columns = torch.tensor(sorted(indices))
            where = _where(edit, edit.positions if position is None else position, n_positions)
            factor = edit.factor if isinstance(edit, Scale) else 0.0
            changes: dict[str, Change] = {"mask": partial(_scaled, factor)}
            if isinstance(edit, Patch):
                taken = partial(_taken, site, acts[site][:, columns], edit.shift)
                changes = {"mask": lambda masks, here: 1.0, "acts": taken}
            for name, change in changes.items():
                parts.append(_SiteEdit(f"{site}.vpd.hook_{name}", columns, where, change))
    return parts


def _scaled(factor: float, masks: Tensor, _here: Tensor) -> Tensor:
    return factor * masks


def _taken(
    site: str, acts: Float[Tensor, "source n"], shift: int, old: Tensor, here: Int[Tensor, " pos"]
) -> Float[Tensor, "pos n"]:
    """Activations of another prompt."""
    source = here + shift
    if int(source.min()) < 0 or int(source.max()) >= len(acts):
        raise InputError(
            f"Patch of {site}: position {int(source.max())} is not in the source prompt, "
            f"which has {len(acts)} tokens. Name positions that both prompts have."
        )
    return acts[source].to(old.dtype)


def _grouped(vpd: Decomposition, edit: Edit) -> dict[tuple[str, int | None], set[int]]:
    """Subcomponents by site and by the position in their names, if there is one."""
    names = edit.subcomponents
    groups: dict[tuple[str, int | None], set[int]] = defaultdict(set)
    for name in [names] if isinstance(names, str) else names:
        site, index, position = _parsed(vpd, name)
        if position is not None and edit.positions is not None:
            raise InputError(f"{name!r} names a position, and positions={edit.positions!r} too.")
        groups[site, position].add(index)
    return groups


@torch.no_grad()
def _source_activations(
    vpd: Decomposition, edit: Patch, prepend_bos: bool | None
) -> dict[str, Float[Tensor, "pos C"]]:
    if edit.source is None:
        raise InputError("Patch needs source=..., the prompt whose activations to take.")
    _, inputs = vpd.target(prompt_tokens(vpd.model, edit.source, prepend_bos)[None])
    pairs = zip(vpd.layout.names, inputs, vpd.subcomponents.v, strict=True)
    return {name: x[0].float() @ v.float() for name, x, v in pairs}


def _parsed(vpd: Decomposition, name: str) -> tuple[str, int, int | None]:
    """Site, index and position of `"blocks.0.mlp.in:31@5"`; the position may be left out."""
    match = re.fullmatch(r"(.+):(\d+)(?:@(\d+))?", name)
    if match is None:
        raise InputError(
            f"{name!r} is no subcomponent; names are like 'blocks.0.mlp.in:31' (site:index) or "
            "'blocks.0.mlp.in:31@5' (at a position)."
        )
    site, index = match[1], int(match[2])
    sizes = dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    if site not in sizes:
        raise InputError(f"{name!r}: no site {site!r}; sites: {list(sizes)}.")
    if index >= sizes[site]:
        raise InputError(
            f"{name!r}: {site} has {sizes[site]} subcomponents, 0 to {sizes[site] - 1}."
        )
    return site, index, None if match[3] is None else int(match[3])


def _where(edit: Edit, positions: Positions, n_positions: int | None) -> slice | list[int]:
    """Positions as a slice or list, if they are counted from 0 up and in the prompt."""
    where = slice(None) if positions is None else positions
    if isinstance(where, slice):
        begins = [where.start or 0]
        ends = [] if where.stop is None else [where.stop]
        backwards = where.step is not None and where.step < 1
    else:
        where = [where] if isinstance(where, int) else list(where)
        begins, ends, backwards = where, [], isinstance(positions, bool)
    if backwards:
        raise InputError(f"positions={positions!r}; expected numbers, or a slice going forwards.")
    if any(position < 0 for position in begins + ends):
        raise InputError(
            f"positions={positions!r}: count from the beginning, because a sequence that is being "
            "generated has no fixed end."
        )
    if n_positions is not None and max(begins, default=0) >= n_positions:
        raise InputError(
            f"{type(edit).__name__}: position {max(begins)} is not in the prompt, which has "
            f"{n_positions} tokens (0 to {n_positions - 1})."
        )
    return where
