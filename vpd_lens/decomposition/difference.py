"""The difference between two models as what is decomposed: `W = W_base + V U`.

Masks of 0 leave the base model's matrix, masks of 1 the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vpd_lens.errors import AttachError
from vpd_lens.sites import Site, find_sites


def differing_sites(sites: Sequence[Site], base: nn.Module) -> list[Site]:
    """Those sites whose weight is another in the `base` model, with that as their origin.

    Raises:
        AttachError: If `base` lacks a site, has it in another shape, or differs in none.
    """
    try:
        others = find_sites(base, [site.name for site in sites])
    except AttachError as error:
        raise AttachError(f"base: {error}") from None
    different = []
    for site, other in zip(sites, others, strict=True):
        if site.shape != other.shape:
            raise AttachError(
                f"base has {site.name} in the shape {other.shape}, and the model in {site.shape}. "
                "Pass a model of the same architecture, such as the one it was fine-tuned from."
            )
        origin = other.weight.to(site.weight).clone()
        if not torch.equal(origin, site.weight):
            different.append(replace(site, origin=origin))
    if not different:
        raise AttachError(
            f"base has the same weights at all {len(sites)} sites, so that there is no difference "
            "to decompose. Pass the model from before the fine-tune, loaded with the same "
            "processing, or choose other sites."
        )
    return different
