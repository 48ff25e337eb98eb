"""Sites of any `nn.Module` or `HookedRootModule`: the linear modules that the user names."""

from __future__ import annotations

from functools import partial

from torch import nn

from vpd_lens.sites.site import InputPoint, Site, weight_of


def module_sites(model: nn.Module) -> list[Site]:
    """Every `nn.Linear` and `Conv1D` of `model`, named by its module path, in module order."""
    sites = []
    for name, module in model.named_modules():
        try:
            read_weight = weight_of(module)
        except TypeError:
            continue
        sites.append(
            Site(
                name=name,
                read_weight=read_weight,
                read_bias=partial(getattr, module, "bias"),
                inputs=[InputPoint(module, "argument", 0)],
                output=module,
                output_kind="output",
            )
        )
    return sites
