"""`toward`: a new write vector that raises a token's logit, without any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vpd_lens.analysis.circuits.places import located
from vpd_lens.analysis.circuits.targets import explained_decomposition, token_id
from vpd_lens.analysis.circuits.weight_edits import Rewrite, write_vector
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.reads_writes import WRITERS, Directions
from vpd_lens.errors import InputError


@torch.no_grad()
def toward(
    model: nn.Module,
    subcomponent: str,
    token: str | int,
    harvest: Harvest,
    strength: float = 1.0,
    *,
    keep: bool = True,
    clear_of: int = 0,
    above: float | None = None,
) -> Rewrite:
    """A `Rewrite` that makes a subcomponent raise a token's logit where it fires.

    The new write vector is `U_c + s strength ||U_c|| u / ||u||`. Here u is the token's direction
    in the residual stream, through the final norm and against the mean of all tokens, and s the
    sign of the activations where the subcomponent fires: the sign of `U_c` alone means nothing.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        subcomponent: Its name; of a matrix that writes to the stream (`attn.o`, `mlp.out`).
        token: Text or id.
        harvest: What says with which sign it fires.
        strength: Length of what is added, in lengths of the old write vector.
        keep: Whether the old one stays beneath.
        clear_of: Make the direction orthogonal to so many directions that later matrices read most
            (leading right singular vectors of their reads), so that it acts on the logits directly.
        above: As in `Rewrite`.

    Raises:
        AttachError: If the model carries no decomposition.
        ArtefactError: If the harvest is of another one.
        InputError: If the subcomponent does not exist, never fires, or does not write to the
            stream; or if later matrices read everything that is left of the direction.

    Examples:
        >>> edit = toward(model, "blocks.3.mlp.out:50", ")", harvest, 2.0)  # doctest: +SKIP

    Source: VPD, editing.
    """
    vpd = explained_decomposition(model)
    ((site, index, _),) = located(vpd, subcomponent)
    if not site.endswith(WRITERS):
        raise InputError(
            f"{subcomponent} does not write to the residual stream, where tokens have directions. "
            f"Choose one of {' or '.join(WRITERS)}, or give Rewrite a vector of your own."
        )
    harvest.check(vpd)
    column = vpd.layout.columns(site).start + index
    activation = float(harvest.usage.signed[column])
    if not activation:
        raise InputError(
            f"{subcomponent} never fired in the harvest, so it has no sign there. Choose one that "
            "fires (find_subcomponents), or harvest more data."
        )
    directions = Directions(vpd)
    u = F.normalize(directions.towards(token_id(model, token, int(model.cfg.d_vocab))), dim=0)  # type: ignore[arg-type, union-attr]
    reads = directions.read_after(site)
    if clear_of and len(reads):
        basis = torch.linalg.svd(reads, full_matrices=False).Vh[:clear_of]
        u = u - basis.T @ (basis @ u)
    if float(u.norm()) < 1e-3:
        raise InputError(
            f"clear_of={clear_of}: later matrices read all of the direction of {token!r}; ask for "
            "fewer."
        )
    old = write_vector(vpd, subcomponent)
    sign = 1.0 if activation > 0 else -1.0
    added = sign * strength * old.norm() * F.normalize(u, dim=0)
    return Rewrite(subcomponent, old + added if keep else added, above=above)
