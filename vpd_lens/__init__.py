"""vpd_lens: adversarial Parameter Decomposition (VPD) for TransformerLens models.

```python
import vpd_lens

model = vpd_lens.decompose(hooked_model)  # attach: exact, untrained
model = vpd_lens.decompose(hooked_model, data=tokens, config=vpd_lens.VPDConfig.small())
```
"""

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if os.environ.get("VPD_LENS_TYPECHECK") == "1":
    # Shape annotations become run-time checks of every call (jaxtyping + beartype).
    from jaxtyping import install_import_hook

    install_import_hook("vpd_lens", "beartype.beartype")

if "ipykernel" in sys.modules:
    # tqdm, which TransformerLens imports, warns of missing ipywidgets, and does without them.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        importlib.import_module("tqdm.auto")

if TYPE_CHECKING:
    from vpd_lens import plots
    from vpd_lens.analysis.attention import Attention, attention
    from vpd_lens.analysis.cards import Card, Cards, card
    from vpd_lens.analysis.circuits.attribute import attribute
    from vpd_lens.analysis.circuits.behaviour import PruneConfig
    from vpd_lens.analysis.circuits.edits import Ablate, Patch, Scale, edited
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.intervene import intervene
    from vpd_lens.analysis.circuits.prune import prune
    from vpd_lens.analysis.circuits.weight_edits import Rescale, Rewrite, Swap
    from vpd_lens.analysis.clustering import Cluster, Clusters, cluster
    from vpd_lens.analysis.dataset_attribution import DatasetAttributions, dataset_attributions
    from vpd_lens.analysis.explain import Explanation, explain
    from vpd_lens.analysis.harvest import Harvest, harvest
    from vpd_lens.analysis.interactions import interactions
    from vpd_lens.analysis.interpretation import Endpoint, IntruderReport, LabelRun, intruder, label
    from vpd_lens.config import CausalImportanceConfig, VPDConfig
    from vpd_lens.decomposing import decompose
    from vpd_lens.decomposition import Decomposition, Masks
    from vpd_lens.decomposition.attach import remove
    from vpd_lens.decomposition.labels import Label, Labels
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
    "analysis.clustering": "Cluster Clusters cluster",
    "analysis.dataset_attribution": "DatasetAttributions dataset_attributions",
    "analysis.explain": "Explanation explain",
    "analysis.harvest": "Harvest harvest",
    "analysis.interactions": "interactions",
    "analysis.interpretation": "Endpoint IntruderReport LabelRun intruder label",
    "config": "CausalImportanceConfig VPDConfig",
    "decomposing": "decompose",
    "decomposition": "Decomposition Masks",
    "decomposition.attach": "remove",
    "decomposition.labels": "Label Labels",
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
__all__ += ["CausalImportanceConfig", "Cluster", "Clusters", "DatasetAttributions"]
__all__ += ["Decomposition", "Endpoint", "EvalReport", "Explanation", "Harvest", "IntruderReport"]
__all__ += ["Label", "LabelRun", "Labels", "Masks", "Patch", "PruneConfig", "Redundancy"]
__all__ += ["Rescale", "Rewrite", "Scale", "Site", "Swap", "VPDConfig", "attention", "attribute"]
__all__ += ["bake", "baked", "card", "cluster", "dataset_attributions", "decompose", "edited"]
__all__ += ["evaluate", "explain", "find_subcomponents", "fit_edit", "harvest"]
__all__ += ["import_param_decomp", "interactions", "intervene", "intruder", "label", "load"]
__all__ += ["load_example", "plots", "prune", "redundancy", "remove", "side_effects", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing transformer_lens takes seconds.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "plots":
        return importlib.import_module("vpd_lens.plots")
    raise AttributeError(f"module 'vpd_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # for tab completion
