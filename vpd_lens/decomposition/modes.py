"""What each masking mode does with the causal importances (METHOD 4, masking modes).

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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vpd_lens.decomposition.masks import Layout, Masks, uniform_k_subset, uniform_sources
from vpd_lens.errors import InputError

# Modes of `masked`, and whether they look at the input.
MODES = {
    "target": False,
    "unmasked": False,
    "stochastic": True,
    "stochastic_subset": True,
    "adversarial": True,
    "ci": True,
    "rounded": True,
    "random": True,
    "zero": False,
}


def masks_of(
    mode: str,
    importance: Float[Tensor, "*batch C_total"],
    layout: Layout,
    generator: torch.Generator | None = None,
    threshold: float = 0.0,
    real: Bool[Tensor, "*batch"] | None = None,
) -> Masks:
    """The masks of a mode that needs no search, given the causal importances.

    Args:
        mode: Any row of the table above but `target` and `adversarial`.
        importance: Causal importances `g`; only their shape counts for `unmasked` and `zero`.
        layout: The columns of each site.
        generator: Random generator; `None` uses torch's global one.
        threshold: For `rounded`.
        real: Positions that are no padding; numbers are drawn for these only.

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
    elif mode == "random" and real is None:
        components = torch.empty_like(g).uniform_(generator=generator)
    elif mode == "random":
        drawn = torch.empty_like(g[real]).uniform_(generator=generator)
        components = torch.zeros_like(g).index_put_((real,), drawn)
    elif mode == "zero":
        components = torch.zeros_like(g)
    else:
        raise InputError(f"masking mode {mode!r} does not follow from importances alone")
    return Masks(components, g.new_zeros(*g.shape[:-1], layout.n_sites))


@dataclass
class MaskContext:
    """One `with vpd.masked(...)` block.

    Attributes:
        mode: One of `MODES`, or `"given"` for explicit tensors.
        threshold: For `rounded`.
        n_steps: Ascent steps, for `adversarial`.
        step_size: Size of a sign step, for `adversarial`.
        generator: Source of randomness; `None` uses torch's global one.
        given: Explicit masks.
    """

    mode: str
    threshold: float = 0.0
    n_steps: int = 20
    step_size: float = 0.1
    generator: torch.Generator | None = None
    given: Masks | None = None

    @property
    def needs_importance(self) -> bool:
        """Whether the masks depend on the model's input."""
        return self.given is None and MODES[self.mode]

    def masks(
        self, importance: Tensor, layout: Layout, real: Bool[Tensor, "*batch"] | None = None
    ) -> Masks:
        """The masks of the block: those given, or those of its mode.

        Args:
            importance: Causal importances `[*batch, C_total]`.
            layout: The columns of each site.
            real: Positions that are no padding.
        """
        if self.given is not None:
            return self.given
        return masks_of(self.mode, importance, layout, self.generator, self.threshold, real)


def masks_from_tensors(
    tensors: Masks | Mapping[str, Tensor] | Tensor,
    delta: float | Mapping[str, float | Tensor],
    layout: Layout,
    device: torch.device,
) -> Masks:
    """Masks from what a user passes: a `Masks`, one concatenated tensor, or tensors by site name.

    Args:
        tensors: `[*batch, C_total]`, or `{site: [*batch, C]}`; sites left out stay unmasked.
        delta: The deltas' mask, one number for all or a mapping by site; those left out are 1.
        layout: The columns of each site.
        device: Where the masks live.

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
    if isinstance(delta, Mapping) and (strange := sorted(set(delta) - set(layout.names))):
        raise InputError(f"delta: no site named {strange}; sites: {list(layout.names)}.")
    if isinstance(tensors, Mapping):
        unknown = sorted(set(tensors) - set(layout.names))
        if unknown:
            raise InputError(f"masks: no site named {unknown}; sites: {list(layout.names)}.")
        for name, mask in tensors.items():
            expected = layout.sizes[layout.names.index(name)]
            if mask.shape[-1] != expected:
                raise InputError(
                    f"masks[{name!r}] has shape {tuple(mask.shape)}; its last dimension must be "
                    f"the site's {expected} subcomponents."
                )
        batch = torch.broadcast_shapes(*(m.shape[:-1] for m in tensors.values()))
        parts = [
            tensors[name].to(device).float().expand(*batch, size)
            if name in tensors
            else torch.ones(*batch, size, device=device)
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        components = torch.cat(parts, dim=-1)
    else:
        if tensors.shape[-1] != layout.total:
            raise InputError(
                f"masks has shape {tuple(tensors.shape)}; its last dimension must be C_total = "
                f"{layout.total}."
            )
        components = tensors.to(device).float()
    batch = components.shape[:-1]
    values = delta if isinstance(delta, Mapping) else dict.fromkeys(layout.names, delta)
    columns = [
        torch.as_tensor(values.get(name, 1.0), device=device).float().expand(batch)
        for name in layout.names
    ]
    return Masks(components, torch.stack(columns, dim=-1))
