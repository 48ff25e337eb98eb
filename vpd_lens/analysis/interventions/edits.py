"""Edits of subcomponents, as TransformerLens hooks on masks and activations.

The hooks act on `hook_mask` and `hook_acts` of the sites, so edits combine with `vpd.masked(...)`,
other hooks and generation like any hook does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.prompts import decomposition_of, prompt_tokens
from vpd_lens.decomposition import Decomposition
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
    """Give subcomponents the activations that they have on another prompt.

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
    """One edit at one site: columns, positions, and what happens there."""

    site: str
    columns: Int[Tensor, " n"]
    positions: Positions
    factor: float | None = None
    acts: Float[Tensor, "pos n"] | None = None
    shift: int = 0


@dataclass
class _Clock:
    """The position of a forward's first token: not 0 when generation goes on from a cache."""

    vpd: Decomposition
    generation: object = None
    seen: int = 0
    offset: int = 0

    def tick(self, residual: Tensor, hook: Any) -> None:
        n = residual.shape[1]
        generation = self.vpd._generation
        goes_on = generation is not None and generation is self.generation
        # One token after others, unless it is the next uncached pass over all of them.
        cached = goes_on and n == 1 and self.seen > 0
        self.offset = self.seen if cached else 0
        self.seen = self.offset + n
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

    Example:
        >>> with edited(model, Ablate("blocks.0.mlp.in:31", slice(5, None))):  # doctest: +SKIP
        ...     model.generate("def read(self", max_new_tokens=8)
    """
    vpd = decomposition_of(model)
    several = list(edits) if isinstance(edits, list | tuple) else [edits]
    resolved = [part for edit in several for part in _resolve(vpd, edit, prepend_bos)]
    clock = _Clock(vpd)
    hooks: list[tuple[str, Any]] = []
    if resolved:
        hooks.append(("blocks.0.hook_resid_pre", clock.tick))
    for part in resolved:
        point = "hook_mask" if part.acts is None else "hook_acts"
        hooks.append((f"{part.site}.vpd.{point}", partial(_apply, part, clock)))
    with model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
        yield model


def _apply(edit: _SiteEdit, clock: _Clock, value: Tensor, hook: Any) -> Tensor:
    """Change some columns of `[batch, pos, C]` at the positions that this forward holds."""
    here = clock.offset + torch.arange(value.shape[1], device=value.device)
    chosen = (_contains(edit.positions, here)).nonzero()[:, 0]
    if len(chosen) == 0:
        return value
    value = value.clone()
    index = chosen[:, None], edit.columns.to(value.device)[None]
    if edit.acts is None:
        value[:, index[0], index[1]] *= edit.factor  # type: ignore[operator]
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
    wanted = [positions] if isinstance(positions, int) else list(positions)
    return torch.isin(here, torch.tensor(wanted, device=here.device))


def _resolve(vpd: Decomposition, edit: Edit, prepend_bos: bool | None) -> list[_SiteEdit]:
    """The edit by site and position."""
    _require_positions(edit.positions)
    names = [edit.subcomponents] if isinstance(edit.subcomponents, str) else edit.subcomponents
    groups: dict[tuple[str, int | None], list[int]] = {}
    for name in names:
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
        if isinstance(edit, Patch):
            part.acts, part.shift = acts[site][:, columns.to(acts[site].device)], edit.shift
        parts.append(part)
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


def _require_positions(positions: Positions) -> None:
    if isinstance(positions, slice):
        values = [v for v in (positions.start, positions.stop) if v is not None]
    else:
        values = (
            [] if positions is None else [positions] if isinstance(positions, int) else positions
        )
    if any(value < 0 for value in values):
        raise InputError(
            f"positions={positions!r}: count from the beginning, because a sequence that is being "
            "generated has no fixed end."
        )
