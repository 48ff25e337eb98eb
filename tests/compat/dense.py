"""The reference of every mask test: the same model with dense weights written in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


@torch.no_grad()
def masked_weights(
    vpd: Any, masks: Mapping[str, Tensor], deltas: Mapping[str, float]
) -> dict[str, Tensor]:
    """`V diag(m) U + m_delta (W - V U)` of every site in `masks`."""
    return {
        name: (vpd.v(name) * mask) @ vpd.u(name) + deltas[name] * vpd.delta(name)
        for name, mask in masks.items()
    }


def random_masks(vpd: Any, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One random mask in [0, 1] per subcomponent and delta, the same at all positions."""
    generator = torch.Generator().manual_seed(seed)
    layout = vpd.layout
    masks = {
        name: torch.rand(size, generator=generator)
        for name, size in zip(layout.names, layout.sizes, strict=True)
    }
    deltas = {name: float(torch.rand(1, generator=generator)) for name in layout.names}
    return masks, deltas


@contextmanager
def dense_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the named sites of an undecomposed model multiply by `weights`.

    Leaving it puts the original weights back. That the forward really uses what was written is
    checked by comparing every site's output with its input times the new weight.
    """
    from vpd_lens.decomposition.attach import _tiny_forward
    from vpd_lens.sites import find_sites, self_check

    sites = find_sites(model, list(weights))
    before = {}
    with torch.no_grad():
        for site in sites:
            stored = _stored(model, site)
            before[site.name] = stored.clone()
            stored.copy_(weights[site.name])
    try:
        for site in sites:
            assert torch.equal(site.weight, weights[site.name]), f"{site.name} was not swapped"
        self_check(model, sites, _tiny_forward(model, None), tolerance=1e-4)
        yield
    finally:
        with torch.no_grad():
            for site in sites:
                _stored(model, site).copy_(before[site.name])


def _stored(model: nn.Module, site: Any) -> Any:
    """What a site multiplies by, writable as `[d_in, d_out]`."""
    from vpd_lens.sites import model_kind

    if model_kind(model) != "hooked_transformer":
        return site.weight
    _, index, kind, part = site.name.split(".")
    block = model.blocks[int(index)]
    if kind == "mlp":
        return getattr(block.mlp, f"W_{part}").data
    if part == "o":
        return rearrange(block.attn.W_O.data, "h d_head d_out -> (h d_head) d_out")
    grouped = f"_W_{part.upper()}"
    return _HeadsView(getattr(block.attn, grouped if hasattr(block.attn, grouped) else grouped[1:]))


class _HeadsView:
    """Per-head weights `[head, d_in, d_head]` written and read as `[d_in, head * d_head]`.

    No single view of such a tensor has the flat shape.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.data

    def clone(self) -> Tensor:
        return rearrange(self.weight.clone(), "h d_in d_head -> d_in (h d_head)")

    def copy_(self, flat: Tensor) -> None:
        heads = self.weight.shape[0]
        self.weight.copy_(rearrange(flat, "d_in (h d_head) -> h d_in d_head", h=heads))


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of the expected tensor."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())
