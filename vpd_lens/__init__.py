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
    # Shape annotations become run-time checks (jaxtyping + beartype). Off by default, because
    # every call is checked.
    from jaxtyping import install_import_hook

    install_import_hook("vpd_lens", "beartype.beartype")

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits import (
        Ablate,
        AttributionGraph,
        Patch,
        PruneConfig,
        Scale,
        attribute,
        edited,
        intervene,
        prune,
    )
    from vpd_lens.analysis.dataset_attribution import DatasetAttributions, dataset_attributions
    from vpd_lens.analysis.harvest import Harvest, harvest
    from vpd_lens.config import CausalImportanceConfig, VPDConfig
    from vpd_lens.decomposing import decompose
    from vpd_lens.decomposition import Decomposition, Masks
    from vpd_lens.decomposition.attach import remove
    from vpd_lens.decomposition.saving import load
    from vpd_lens.evaluation import EvalReport, evaluate
    from vpd_lens.sites import Site
    from vpd_lens.training import train

__version__ = "0.1.0"

_WHERE = {
    "Ablate": "vpd_lens.analysis.circuits",
    "AttributionGraph": "vpd_lens.analysis.circuits",
    "CausalImportanceConfig": "vpd_lens.config",
    "DatasetAttributions": "vpd_lens.analysis.dataset_attribution",
    "Decomposition": "vpd_lens.decomposition",
    "EvalReport": "vpd_lens.evaluation",
    "Harvest": "vpd_lens.analysis.harvest",
    "Masks": "vpd_lens.decomposition",
    "Patch": "vpd_lens.analysis.circuits",
    "PruneConfig": "vpd_lens.analysis.circuits",
    "Scale": "vpd_lens.analysis.circuits",
    "Site": "vpd_lens.sites",
    "VPDConfig": "vpd_lens.config",
    "attribute": "vpd_lens.analysis.circuits",
    "dataset_attributions": "vpd_lens.analysis.dataset_attribution",
    "decompose": "vpd_lens.decomposing",
    "edited": "vpd_lens.analysis.circuits",
    "evaluate": "vpd_lens.evaluation",
    "harvest": "vpd_lens.analysis.harvest",
    "intervene": "vpd_lens.analysis.circuits",
    "load": "vpd_lens.decomposition.saving",
    "prune": "vpd_lens.analysis.circuits",
    "remove": "vpd_lens.decomposition.attach",
    "train": "vpd_lens.training",
}

__all__ = [
    "Ablate",
    "AttributionGraph",
    "CausalImportanceConfig",
    "DatasetAttributions",
    "Decomposition",
    "EvalReport",
    "Harvest",
    "Masks",
    "Patch",
    "PruneConfig",
    "Scale",
    "Site",
    "VPDConfig",
    "attribute",
    "dataset_attributions",
    "decompose",
    "edited",
    "evaluate",
    "harvest",
    "intervene",
    "load",
    "prune",
    "remove",
    "train",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing transformer_lens takes seconds.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'vpd_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    # For tab completion, which asks a module for its names.
    return [*__all__, "__version__"]
