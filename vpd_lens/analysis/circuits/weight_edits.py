"""Edits of the weights of subcomponents: other write vectors along the same read directions.

With `U'_c` in the place of `U_c` a matrix becomes `W + V_c (U'_c - U_c)`. While the model runs this
is `m_c a_c (U'_c - U_c)` on top of the site's output, with mask and activation as they are after
all hooks; `vpd_lens.editing.bake` writes it into the weights. The delta stays what it was.

Source: VPD, editing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.places import Positions, located, meet, where_of
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.modes import MaskContext
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites.site import move_last

Write = Float[Tensor, " d_out"]


@dataclass(frozen=True, kw_only=True)
class WeightEdit:
    """What edits of weights have in common.

    Attributes:
        positions: Where it holds, as in `Ablate`; `None`: everywhere.
        above: Only where the causal importance of the unedited model exceeds this; `None`:
            whatever it is.
    """

    positions: Positions = None
    above: float | None = None

    def writes(self, vpd: Decomposition) -> list[tuple[str, Write]]:
        """Names of subcomponents, and their new write vectors."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rescale(WeightEdit):
    """Multiply write vectors: `W + (factor - 1) V_c U_c`.

    A factor of 0 takes a subcomponent out, 1 does nothing, -1 reverses it. One for all, or one for
    each. `Scale` does the same to masks; this can also be baked, and held to where it is important.

    Examples:
        >>> vpd_lens.Rescale("blocks.3.attn.v:513", -1.0, above=0.1)  # doctest: +SKIP
    """

    subcomponents: str | Sequence[str]
    factor: float | Sequence[float] | Float[Tensor, " n"] = 0.0

    def writes(self, vpd: Decomposition) -> list[tuple[str, Write]]:
        """See `WeightEdit`."""
        names = [self.subcomponents] if isinstance(self.subcomponents, str) else self.subcomponents
        factors = torch.as_tensor(self.factor, dtype=torch.float32, device=vpd.device)
        factors = factors.expand(len(names)) if factors.ndim == 0 else factors
        if len(factors) != len(names):
            raise InputError(
                f"Rescale: {len(factors)} factors for {len(names)} subcomponents; give one for "
                "all, or one for each."
            )
        pairs = zip(names, factors, strict=True)
        return [(name, factor * write_vector(vpd, name)) for name, factor in pairs]


@dataclass(frozen=True, eq=False)
class Rewrite(WeightEdit):
    """Give a subcomponent another write vector, `[d_out]`.

    `vpd_lens.editing.toward` makes one that raises a token's logit.
    """

    subcomponent: str
    write: Any

    def writes(self, vpd: Decomposition) -> list[tuple[str, Write]]:
        """See `WeightEdit`."""
        before = write_vector(vpd, self.subcomponent)
        write = torch.as_tensor(self.write, dtype=before.dtype, device=before.device)
        if write.shape != before.shape or not bool(write.isfinite().all()):
            raise InputError(
                f"Rewrite of {self.subcomponent}: write has shape {tuple(write.shape)}; expected "
                f"{len(before)} finite numbers, the width of what the matrix writes."
            )
        return [(self.subcomponent, write)]


@dataclass(frozen=True)
class Swap(WeightEdit):
    """Exchange the write vectors of two subcomponents, of one matrix or of two of equal width.

    Their signs are those of `U`; a sign means something only together with that of the activation.
    """

    first: str
    second: str

    def writes(self, vpd: Decomposition) -> list[tuple[str, Write]]:
        """See `WeightEdit`."""
        names = (self.first, self.second)
        one, other = (write_vector(vpd, name) for name in names)
        if one.shape != other.shape:
            raise InputError(
                f"Swap: {self.first} writes {len(one)} numbers and {self.second} {len(other)}; "
                "choose two that write to the same space."
            )
        return [(self.first, other), (self.second, one)]


def write_vector(vpd: Decomposition, name: str) -> Write:
    """`U_c` of a subcomponent by name, without its graph."""
    ((site, index, _),) = located(vpd, name)
    return vpd.u(site)[index].detach()


@dataclass
class Written:
    """What edits make of the write vectors of one site, at some positions.

    Attributes:
        site: Its name.
        columns: Of the subcomponents.
        moved: `U'_c - U_c` of each.
        where: Positions.
        above: Importance above which it holds.
    """

    site: str
    columns: Int[Tensor, " n"]
    moved: Float[Tensor, "n d_out"]
    where: range | list[int] = field(default_factory=lambda: where_of("", None))
    above: float | None = None


def changes(
    vpd: Decomposition, edits: Iterable[WeightEdit], n_positions: int | None = None
) -> list[Written]:
    """What edits change, by site; of a prompt of `n_positions`, only at positions that it has.

    Raises:
        InputError: If there is no subcomponent of a name, a vector does not fit, or two edits give
            one subcomponent two write vectors at one position.
    """
    found: list[Written] = []
    owners: dict[tuple[str, int], list[tuple[WeightEdit, range | list[int]]]] = {}
    for edit in edits:
        groups: dict[tuple[str, str], list[tuple[int, Write, range | list[int]]]] = {}
        for name, write in edit.writes(vpd):
            ((site, index, positions),) = located(vpd, name, edit.positions)
            where = where_of(type(edit).__name__, positions, n_positions)
            known = owners.setdefault((site, index), [])
            if other := next((e for e, w in known if meet(w, where)), None):
                raise InputError(
                    f"{site}:{index} has two new write vectors at the same positions, by "
                    f"{_called(other)} and by {_called(edit)}; leave one out, or place them apart."
                )
            known.append((edit, where))
            groups.setdefault((site, repr(positions)), []).append((index, write, where))
        for (site, _), rows in groups.items():
            indices, writes, wheres = zip(*rows, strict=True)
            columns = torch.tensor(indices, device=vpd.device)
            moved = torch.stack(writes) - vpd.u(site)[columns].detach()
            found.append(Written(site, columns, moved, wheres[0], edit.above))
    return found


def _called(edit: WeightEdit) -> str:
    names = [name for name in vars(edit).values() if isinstance(name, str)]
    return f"{type(edit).__name__}({', '.join(names) or '...'})"


# ------------------------------------------------------------------- at run time


class Importances:
    """Causal importances of the positions that a forward passes: known, or as `hook_ci` shows."""

    def __init__(self, vpd: Decomposition, known: Tensor | None = None) -> None:
        self.vpd, self.known, self.generation = vpd, known, None
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watched(self, sites: set[str]) -> Iterator[None]:
        """A block in which they are known before every forward; nothing happens without sites."""
        if not sites or self.known is not None:
            yield
            return
        state = self.vpd.forwards.state
        context = state.context or MaskContext("whole")
        hooks: Any = [(f"{site}.vpd.hook_ci", partial(self._see, site)) for site in sorted(sites)]
        with self.vpd.forwards.during(context=context), self.vpd.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            yield

    def _see(self, site: str, importance: Tensor, hook: Any) -> None:
        generation = self.vpd.forwards.state.generation
        if generation is not self.generation:
            self.seen.clear()
            self.generation = generation
        before = self.seen.get(site) if generation is not None else None
        parts = [importance.detach()] if before is None else [before, importance.detach()]
        self.seen[site] = torch.cat(parts, dim=1)

    def of(self, site: str, n_new: int, n_so_far: int) -> Float[Tensor, "batch pos C"]:
        """Those of a site at the `n_new` last of the `n_so_far` positions of this forward."""
        if self.known is not None:
            return self.known[..., self.vpd.layout.columns(site)]
        known = self.seen.get(site)
        expected = n_new if self.generation is None else n_so_far
        if known is None or known.shape[1] != expected:
            raise VPDError(
                f"an edit of {site} holds only where it is important (above=...), and importances "
                "of these positions are not known: under explicit masks they are not when text "
                "goes on from a cache, and in a masked('target') block they come too late. Leave "
                "above= out, or use no masks or those of a named mode."
            )
        if self.generation is None:  # the next forward must see its own
            del self.seen[site]
        return known[:, -n_new:]


class Rewriting:
    """The hooks of one `Written`: look at activations and masks, and add to the site's output."""

    def __init__(self, change: Written, importances: Importances, clock: Any) -> None:
        self.change, self.importances, self.clock = change, importances, clock
        self.seen: dict[str, Tensor] = {}

    @property
    def hook(self) -> tuple[str, Any]:
        """The TransformerLens hook on the output."""
        return f"{self.change.site}.vpd.hook_out", self._add

    @contextmanager
    def watching(self, vpd: Decomposition) -> Iterator[None]:
        """A block in which activations and masks are seen as they are after every other hook."""
        hooks = vpd.site(self.change.site).hooks
        handles = []
        for point, name in ((hooks.hook_acts, "acts"), (hooks.hook_mask, "mask")):
            see = point.register_forward_hook(partial(self._see, name))
            handles += [see, point.register_forward_pre_hook(partial(move_last, see.id))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, _module: nn.Module, _args: tuple, value: Tensor) -> None:
        self.seen[name] = value[..., self.change.columns]

    def _add(self, y: Tensor, hook: Any) -> Tensor:
        change, n = self.change, y.shape[1]
        on = torch.tensor([self.clock.offset + i in change.where for i in range(n)])
        if not on.any():
            return y
        strength = self.seen["acts"] * self.seen["mask"] * on.to(y.device)[:, None]
        if change.above is not None:
            known = self.importances.of(change.site, n, self.clock.offset + n)
            strength = strength * (known[..., change.columns] > change.above)
        return y + strength.to(y.dtype) @ change.moved.to(y.dtype)
