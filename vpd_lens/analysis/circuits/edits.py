"""Edits of subcomponents, as TransformerLens hooks on masks and activations.

The hooks act on `hook_mask` and `hook_acts` of the sites, so edits combine with `vpd.masked(...)`,
other hooks and generation like any hook does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
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
        subcomponents: As in `Ablate`.
        factor: 0 ablates, 1 does nothing, 2 doubles, -1 reverses.
        positions: As in `Ablate`.
    """

    subcomponents: str | Sequence[str]
    factor: float = 1.0
    positions: Positions = None


@dataclass(frozen=True)
class Patch:
    """Give subcomponents the activations that they have on another prompt, and switch them on.

    Attributes:
        subcomponents: As in `Ablate`.
        source: The other prompt, text or token ids.
        positions: As in `Ablate`; must lie in the other prompt too.
        shift: Position in the other prompt minus position here.
    """

    subcomponents: str | Sequence[str]
    source: Any = None
    positions: Positions = None
    shift: int = 0


Edit = Ablate | Scale | Patch


@dataclass
class _SiteEdit:
    """One edit at one site: columns, positions, and what happens there.

    With `acts` these become the activations; without, masks are multiplied by `factor`, or set to
    1 if there is none.
    """

    site: str
    columns: Int[Tensor, " n"]
    positions: Positions
    factor: float | None = None
    acts: Float[Tensor, "pos n"] | None = None
    shift: int = 0


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
        generation = self.vpd.generation
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
    resolved = [part for edit in _several(edits) for part in _resolve(vpd, edit, prepend_bos)]
    clock = _Clock(vpd)
    hooks: list[tuple[str, Any]] = []
    if resolved:
        hooks.append(("blocks.0.hook_resid_pre", clock.tick))
    for part in resolved:
        point = "hook_mask" if part.acts is None else "hook_acts"
        hooks.append((f"{part.site}.vpd.{point}", partial(_apply, part, clock)))
    entries = [model, getattr(model, "original_model", None)]
    handles = [
        entry.register_forward_pre_hook(clock.see_cache, with_kwargs=True)
        for entry in entries
        if resolved and isinstance(entry, nn.Module)
    ]
    try:
        with model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            yield model
    finally:
        for handle in handles:
            handle.remove()


def _apply(edit: _SiteEdit, clock: _Clock, value: Tensor, hook: Any) -> Tensor:
    """Change some columns of `[batch, pos, C]` at the positions that this forward holds."""
    here = clock.offset + torch.arange(value.shape[1], device=value.device)
    chosen = (_contains(edit.positions, here)).nonzero()[:, 0]
    if len(chosen) == 0:
        return value
    value = value.clone()
    index = chosen[:, None], edit.columns.to(value.device)[None]
    if edit.acts is None:
        kept = 1.0 if edit.factor is None else edit.factor * value[:, index[0], index[1]]
        value[:, index[0], index[1]] = kept
    else:
        source = here[chosen] + edit.shift
        if int(source.min()) < 0 or int(source.max()) >= len(edit.acts):
            raise InputError(
                f"Patch of {edit.site}: position {int(source.max())} is not in the source prompt, "
                f"which has {len(edit.acts)} tokens. Name positions that both prompts have."
            )
        value[:, index[0], index[1]] = edit.acts[source].to(value.dtype)
    return value


def _contains(positions: Positions, here: Int[Tensor, " pos"]) -> Tensor:
    if positions is None:
        return torch.ones_like(here, dtype=torch.bool)
    if isinstance(positions, slice):
        start, stop, step = positions.start or 0, positions.stop, positions.step or 1
        inside = (here >= start) & ((here - start) % step == 0)
        return inside if stop is None else inside & (here < stop)
    return torch.isin(here, torch.tensor(_listed(positions), device=here.device))


def _resolve(vpd: Decomposition, edit: Edit, prepend_bos: bool | None) -> list[_SiteEdit]:
    """The edit by site and position."""
    _require_positions(edit.positions)
    groups: dict[tuple[str, int | None], list[int]] = {}
    for name in _names(edit):
        site, index, position = parse_name(vpd, name)
        if position is not None and edit.positions is not None:
            raise InputError(f"{name!r} names a position, and positions={edit.positions!r} too.")
        groups.setdefault((site, position), []).append(index)
    factor = {Ablate: 0.0, Patch: None}.get(type(edit), getattr(edit, "factor", None))
    acts = _source_activations(vpd, edit, prepend_bos) if isinstance(edit, Patch) else {}
    parts = []
    for (site, position), indices in groups.items():
        columns = torch.tensor(sorted(set(indices)))
        part = _SiteEdit(site, columns, edit.positions if position is None else position, factor)
        parts.append(part)
        if isinstance(edit, Patch):
            taken = acts[site][:, columns.to(acts[site].device)]
            parts.append(replace(part, acts=taken, shift=edit.shift))
    return parts


@torch.no_grad()
def _source_activations(
    vpd: Decomposition, edit: Patch, prepend_bos: bool | None
) -> dict[str, Float[Tensor, "pos C"]]:
    if edit.source is None:
        raise InputError("Patch needs source=..., the prompt whose activations to take.")
    tokens = prompt_tokens(vpd.model, edit.source, prepend_bos)
    _, inputs = vpd.target(tokens[None])
    pairs = zip(vpd.layout.names, inputs, vpd.subcomponents.v, strict=True)
    return {name: x[0].float() @ v.float() for name, x, v in pairs}


def parse_name(vpd: Decomposition, name: str) -> tuple[str, int, int | None]:
    """Site, index and position of `"blocks.0.mlp.in:31@5"`; the position may be left out.

    Raises:
        InputError: If there is no such subcomponent.
    """
    match = re.fullmatch(r"(.+):(\d+)(?:@(\d+))?", name)
    if match is None:
        raise InputError(
            f"{name!r} is no subcomponent; names are like 'blocks.0.mlp.in:31' (site:index) or "
            "'blocks.0.mlp.in:31@5' (at a position)."
        )
    site, index = match[1], int(match[2])
    if site not in vpd.layout.names:
        raise InputError(f"{name!r}: no site {site!r}; sites: {list(vpd.layout.names)}.")
    size = vpd.layout.sizes[vpd.layout.names.index(site)]
    if index >= size:
        raise InputError(f"{name!r}: {site} has {size} subcomponents, 0 to {size - 1}.")
    return site, index, None if match[3] is None else int(match[3])


def require_in_prompt(vpd: Decomposition, edits: Edit | Sequence[Edit], n_positions: int) -> None:
    """Edits of a prompt must name positions that it has.

    Raises:
        InputError: If one does not.
    """
    for edit in _several(edits):
        given, named = edit.positions, [parse_name(vpd, name)[2] for name in _names(edit)]
        named += [given.start] if isinstance(given, slice) else _listed(given)
        beyond = [at for at in named if at is not None and at >= n_positions]
        if beyond:
            raise InputError(
                f"{type(edit).__name__}: position {beyond[0]} is not in the prompt, which has "
                f"{n_positions} tokens (0 to {n_positions - 1})."
            )


def _require_positions(positions: Positions) -> None:
    if isinstance(positions, slice):
        backwards = positions.step is not None and positions.step < 1
        values = [v for v in (positions.start, positions.stop) if v is not None]
    else:
        backwards, values = isinstance(positions, bool), _listed(positions)
    if backwards:
        raise InputError(f"positions={positions!r}; expected numbers, or a slice going forwards.")
    if any(value < 0 for value in values):
        raise InputError(
            f"positions={positions!r}: count from the beginning, because a sequence that is being "
            "generated has no fixed end."
        )


def _several(edits: Edit | Sequence[Edit]) -> list[Edit]:
    return [edits] if isinstance(edits, Edit) else list(edits)


def _names(edit: Edit) -> list[str]:
    names = edit.subcomponents
    return [names] if isinstance(names, str) else list(names)


def _listed(positions: int | Sequence[int] | None) -> list[int]:
    return [positions] if isinstance(positions, int) else list(positions or ())
