"""Edits written into the weights: in a copy that is a plain model, or in the model for a while.

With `U'_c` in the place of `U_c` the weight becomes `W + V_c (U'_c - U_c)`, exactly what the edit
does while the model runs. In the model itself `U_c` changes with it, so that
`Delta = W - V U` stays what it was: computed anew from an edited weight and an old `U`, it would
take the edit back.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from vpd_lens.analysis.circuits.edits import Ablate, Edit, Patch, Scale
from vpd_lens.analysis.circuits.weight_edits import Rescale, WeightEdit, Written, changes
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of, remove
from vpd_lens.errors import InputError, VPDError

Model = TypeVar("Model", bound=nn.Module)


def bake(model: Model, edits: Edit | Sequence[Edit]) -> Model:
    """A copy of the model, without decomposition, whose weights have the edits in them.

    It computes what the model computes inside `vpd_lens.edited(model, edits)`, to float error, and
    is an ordinary TransformerLens model: `vpd_lens.models.save_model` writes it to a directory.
    The model itself stays as it is.

    Args:
        model: A decomposed model.
        edits: `Rescale`, `Rewrite`, `Swap`, `Ablate` or `Scale`, or several, that hold everywhere.

    Raises:
        AttachError: If the model carries no decomposition, or keeps a weight where it cannot be
            written.
        InputError: If an edit has no weights (it holds at some positions only, or is a `Patch`),
            two edits contradict each other, or a matrix is shared with the embedding.
        VPDError: Inside a `masked` block, under whose masks the weights are others.

    Examples:
        >>> plain = vpd_lens.bake(model, vpd_lens.Ablate("blocks.0.mlp.in:3"))  # doctest: +SKIP
        >>> vpd_lens.models.save_model(plain, "edited")  # doctest: +SKIP
    """
    written = _written(decomposition_of(model), edits)
    baked = copy.deepcopy(model)
    with torch.no_grad():
        _write(decomposition_of(baked), written)
    return remove(baked)


@contextmanager
def baked(model: Model, edits: Edit | Sequence[Edit]) -> Iterator[Model]:
    """The model itself with the edits in its weights, inside a `with` block.

    Faster than `vpd_lens.edited`, whose hooks it has none of. Leaving the block, also by an
    exception, puts the weights back to the bit. `model.vpd` goes on meaning the edited weights:
    its write vectors change with them, and its deltas do not.

    Args:
        model: A decomposed model.
        edits: As for `bake`.

    Raises:
        AttachError: As `bake`.
        InputError: As `bake`.
        VPDError: As `bake`.
    """
    vpd = decomposition_of(model)
    written = _written(vpd, edits)
    sites = {change.site for change in written}
    weights = {site: vpd.site(site).weight.clone() for site in sites}
    writes = {site: vpd.u(site).detach().clone() for site in sites}
    try:
        with torch.no_grad():
            _write(vpd, written)
        yield model
    finally:
        with torch.no_grad():
            for site in sites:
                vpd.site(site).overwrite(weights[site])
                vpd.u(site).copy_(writes[site])


def _written(vpd: Decomposition, edits: Edit | Sequence[Edit]) -> list[Written]:
    """What edits change, or why that cannot be written into weights."""
    if vpd.forwards.state.context is not None:
        raise VPDError(
            "masks are active, and under them the weights are others at every position. Leave the "
            "masked(...) block before baking edits."
        )
    everywhere = [_everywhere(edit) for edit in ([edits] if isinstance(edits, Edit) else edits)]
    written = changes(vpd, everywhere)
    for change in written:
        if change.site == "unembed" and _tied(vpd):
            raise InputError(
                "unembed shares its matrix with the embedding, which would change with it. "
                "Edit it while the model runs (vpd_lens.edited), or choose another site."
            )
    return written


def _tied(vpd: Decomposition) -> bool:
    """Whether the unembedding is kept where the embedding is."""
    both = vpd.site("unembed").weight, getattr(vpd.model, "W_E", None)
    places = {t.untyped_storage().data_ptr() for t in both if isinstance(t, Tensor)}
    return len(places) == 1


def _everywhere(edit: Edit) -> WeightEdit:
    """The edit as one of weights."""
    named = "@" in str(getattr(edit, "subcomponents", ""))
    if isinstance(edit, Patch) or edit.positions is not None or named:
        raise InputError(
            f"{type(edit).__name__} depends on the position, and weights do not: bake edits "
            "without positions and patches, or run the model inside vpd_lens.edited."
        )
    if isinstance(edit, Ablate | Scale):
        return Rescale(edit.subcomponents, edit.factor if isinstance(edit, Scale) else 0.0)
    if edit.above is not None:
        raise InputError(
            f"{type(edit).__name__}(above={edit.above}) depends on the importance at a position, "
            "and weights do not: leave above= out, or run the model inside vpd_lens.edited."
        )
    return edit


def _write(vpd: Decomposition, written: Sequence[Written]) -> None:
    by_site: dict[str, list[Written]] = defaultdict(list)
    for change in written:
        by_site[change.site].append(change)
    for name, parts in by_site.items():
        site, v, u = vpd.site(name), vpd.v(name), vpd.u(name)
        columns = torch.cat([part.columns for part in parts])
        moved = torch.cat([part.moved for part in parts])
        dtype = torch.promote_types(site.weight.dtype, v.dtype)
        added = v[:, columns].to(dtype) @ moved.to(dtype)
        site.overwrite(site.weight.to(dtype) + added)
        u[columns] += moved
