"""vpd_lens: adversarial Parameter Decomposition (VPD) for TransformerLens models.

```python
import vpd_lens

model = vpd_lens.decompose(hooked_model)  # attach: exact, untrained
model = vpd_lens.decompose(hooked_model, data=tokens, config=vpd_lens.VPDConfig.small())
```
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if os.environ.get("VPD_LENS_TYPECHECK") == "1":
    # Shape annotations become run-time checks of every call (jaxtyping + beartype).
    from jaxtyping import install_import_hook

    install_import_hook("vpd_lens", "beartype.beartype")

if TYPE_CHECKING:
    from vpd_lens.analysis.attention import Attention, attention
    from vpd_lens.analysis.cards import Card, Cards, card
    from vpd_lens.analysis.circuits.attribute import attribute
    from vpd_lens.analysis.circuits.behaviour import PruneConfig
    from vpd_lens.analysis.circuits.edits import Ablate, Patch, Scale, edited
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.intervene import intervene
    from vpd_lens.analysis.circuits.prune import prune
    from vpd_lens.analysis.circuits.weight_edits import Rescale, Rewrite, Swap
    from vpd_lens.analysis.dataset_attribution import DatasetAttributions, dataset_attributions
    from vpd_lens.analysis.explain import Explanation, explain
    from vpd_lens.analysis.harvest import Harvest, harvest
    from vpd_lens.config import CausalImportanceConfig, VPDConfig
    from vpd_lens.decomposing import decompose
    from vpd_lens.decomposition import Decomposition, Masks
    from vpd_lens.decomposition.attach import remove
    from vpd_lens.editing import bake, baked, find_subcomponents, fit_edit, side_effects
    from vpd_lens.evaluation import EvalReport, Redundancy, evaluate, redundancy
    from vpd_lens.example import load_example
    from vpd_lens.interop.param_decomp import import_param_decomp
    from vpd_lens.loading import load
    from vpd_lens.sites import Site
    from vpd_lens.training import train

__version__ = "0.1.0"

_MODULES = {
    "analysis.cards": "Card Cards card",
    "analysis.attention": "Attention attention",
    "analysis.circuits": "Ablate AttributionGraph Patch PruneConfig Rescale Rewrite Scale Swap "
    "attribute edited intervene prune",
    "analysis.dataset_attribution": "DatasetAttributions dataset_attributions",
    "analysis.explain": "Explanation explain",
    "analysis.harvest": "Harvest harvest",
    "config": "CausalImportanceConfig VPDConfig",
    "decomposing": "decompose",
    "decomposition": "Decomposition Masks",
    "decomposition.attach": "remove",
    "editing": "bake baked find_subcomponents fit_edit side_effects",
    "evaluation": "EvalReport Redundancy evaluate redundancy",
    "example": "load_example",
    "interop.param_decomp": "import_param_decomp",
    "loading": "load",
    "sites": "Site",
    "training": "train",
}
_WHERE = {name: f"vpd_lens.{where}" for where in _MODULES for name in _MODULES[where].split()}

# Written out for type checkers.
__all__ = ["Ablate", "Attention", "AttributionGraph", "Card", "Cards"]
__all__ += ["CausalImportanceConfig", "DatasetAttributions", "Decomposition", "EvalReport"]
__all__ += ["Explanation", "Harvest", "Masks", "Patch", "PruneConfig", "Redundancy"]
__all__ += ["Rescale", "Rewrite", "Scale", "Site", "Swap", "VPDConfig", "attention"]
__all__ += ["attribute", "bake", "baked", "card", "find_subcomponents", "fit_edit"]
__all__ += ["side_effects"]
__all__ += ["dataset_attributions", "decompose", "edited", "evaluate", "explain", "harvest"]
__all__ += ["import_param_decomp", "intervene", "load", "load_example", "prune"]
__all__ += ["redundancy", "remove", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing transformer_lens takes seconds.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vpd_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # for tab completion
