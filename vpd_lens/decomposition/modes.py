"""What each masking mode does with the causal importances.

| mode | subcomponent masks | delta's mask |
|---|---|---|
| `target` | none: the model itself | - |
| `unmasked` | 1 | 0 |
| `stochastic` | `g + (1 - g) u`, `u ~ U(0, 1)` | `U(0, 1)` |
| `stochastic_subset` | the same at a random subset of a position's sites, else 1 | likewise |
| `adversarial` | `g + (1 - g) r`, `r` chosen to hurt | `r_delta` |
| `ci` | `g` | 0 |
| `rounded` | 1 where `g > threshold`, else 0 | 0 |
| `random` | `U(0, 1)` | 0 |
| `zero` | 0 | 0 |

`MaskContext` has two more: `given`, explicit masks, and `whole`, under which the model is itself,
but importances are known before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.decomposition.masks import Layout, Masks, uniform_k_subset, uniform_sources
from vpd_lens.errors import InputError

# Modes of `masked`: those that do not look at the input, and all.
BLIND = ("target", "unmasked", "zero")
MODES = (*BLIND, "stochastic", "stochastic_subset", "adversarial", "ci", "rounded", "random")


def masks_of(
    mode: str,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    generator: torch.Generator | None = None,
    threshold: float = 0.0,
    real: Bool[Tensor, "*batch"] | None = None,
) -> Masks:
    """The masks of any mode but `target` and `adversarial`, given the causal importances `g`.

    Of these only the shape counts for `unmasked` and `zero`. Numbers are drawn from the generator
    (`None`: torch's global one) for `real` positions only, those that are no padding.

    Raises:
        InputError: If the mode is another one.
    """
    g = importance
    if mode in ("stochastic", "stochastic_subset"):
        masks = uniform_sources(g, layout, generator, real).masks(g)
        if mode == "stochastic_subset":
            masks.routed = uniform_k_subset(masks.delta.shape, g.device, generator)
        return masks
    if mode == "unmasked":
        components = torch.ones_like(g)
    elif mode == "ci":
        components = g
    elif mode == "rounded":
        components = (g > threshold).to(g.dtype)
    elif mode == "random":
        components = torch.zeros_like(g)
        drawn = slice(None) if real is None else real
        components[drawn] = torch.empty_like(g[drawn]).uniform_(generator=generator)
    elif mode == "zero":
        components = torch.zeros_like(g)
    else:
        raise InputError(f"masking mode {mode!r} does not follow from importances alone")
    return Masks(components, g.new_zeros(*g.shape[:-1], layout.n_sites))


@dataclass
class MaskContext:
    """One `with vpd.masked(...)` block; its mode is `"given"` for explicit masks."""

    mode: str
    threshold: float = 0.0
    n_steps: int = 20
    step_size: float = 0.1
    generator: torch.Generator | None = None
    given: Masks | None = None

    @property
    def needs_importance(self) -> bool:
        """Whether the masks depend on the model's input."""
        return self.mode not in ("given", *BLIND)

    def masks(
        self, importance: Tensor, layout: Layout, real: Bool[Tensor, "*batch"] | None = None
    ) -> Masks:
        """The masks of the block: those given, or those of its mode."""
        if self.given is not None:
            return self.given
        if self.mode == "whole":
            ones = torch.ones_like(importance)
            return Masks(ones, ones.new_ones(*ones.shape[:-1], layout.n_sites))
        return masks_of(self.mode, importance, layout, self.generator, self.threshold, real)


def masks_from_tensors(
    tensors: Masks | Mapping[str, Tensor] | Tensor,
    delta: float | Mapping[str, float | Tensor],
    layout: Layout,
    device: torch.device,
) -> Masks:
    """Masks from what a user passes: a `Masks`, one concatenated tensor, or tensors by site name.

    Shapes are `[*batch, C_total]` or `{site: [*batch, C]}`; sites left out stay unmasked. The mask
    `delta` of the deltas is one number for all or a mapping by site; those left out are 1.

    Raises:
        InputError: If a site does not exist or a last dimension does not fit.
    """
    if isinstance(tensors, Masks):
        widths = (tensors.components.shape[-1], tensors.delta.shape[-1])
        if widths != (layout.total, layout.n_sites):
            raise InputError(
                f"Masks have widths {widths}; expected C_total and the number of sites, "
                f"{(layout.total, layout.n_sites)}."
            )
        return tensors
    names = layout.names
    for argument, given in (("delta", delta), ("masks", tensors)):
        if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(names))):
            raise InputError(f"{argument}: no site named {unknown}; sites: {list(names)}.")
    if isinstance(tensors, Mapping):
        sizes = dict(zip(names, layout.sizes, strict=True))
        for name, mask in tensors.items():
            if mask.shape[-1] != sizes[name]:
                raise InputError(
                    f"masks[{name!r}] has shape {tuple(mask.shape)}; its last dimension must be "
                    f"the site's {sizes[name]} subcomponents."
                )
        batch = torch.broadcast_shapes(*(m.shape[:-1] for m in tensors.values()))
        parts = ((tensors.get(name, torch.ones(1)), size) for name, size in sizes.items())
        tensors = torch.cat([part.to(device).float().expand(*batch, n) for part, n in parts], -1)
    if tensors.shape[-1] != layout.total:
        raise InputError(
            f"masks has shape {tuple(tensors.shape)}; its last dimension must be C_total = "
            f"{layout.total}."
        )
    components = tensors.to(device).float()
    values = delta if isinstance(delta, Mapping) else dict.fromkeys(names, delta)
    columns = (torch.as_tensor(values.get(name, 1.0), device=device).float() for name in names)
    deltas = [column.expand(components.shape[:-1]) for column in columns]
    return Masks(components, torch.stack(deltas, dim=-1))
