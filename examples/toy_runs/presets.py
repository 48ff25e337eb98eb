"""Settings that decompose each toy, for both methods; the numbers were found on the toys."""

from __future__ import annotations

from typing import Any

from vpd_lens.errors import ConfigError
from vpd_lens.toys import TOYS
from vpd_lens.training import VPDConfig

METHODS = {
    "vpd": "stochastic, layer-wise and adversarial reconstruction, frequency minimality",
    "spd": "stochastic and layer-wise reconstruction",
}

# Why these hold over seeds, where the first settings that we tried failed on every second one:
# - The relu of TMS lets one rank-1 matrix serve two opposite features (it reads their difference)
#   at no higher importance than two matrices. Its gate must open on both signs of its activation
#   and close at 0. A gate with one hidden gelu unit can, because gelu dips; an affine gate cannot.
#   With the former one seed of five had such a pair, and seed 0 of tms-40-10 two to five of them.
# What follows was searched for, not ablated one by one:
# - Many more subcomponents than features, so that some start near each feature.
# - The exponent falls from 2 to 1: minimality chooses once the directions have formed. U and V
#   learn faster than the gates for the same reason.
# - A little weight decay, and Delta-L2: what is never important decays, and the live
#   subcomponents take over its part of the weights.
_COMMON: dict[str, Any] = {
    "seq_len": None,
    "batch_size": 128,
    "faithfulness": {
        "coefficient": 1.0,
        "warmup_steps": 200,
        "warmup_lr": 1e-2,
        "warmup_weight_decay": 0.1,
    },
    "optimiser": {
        "lr": 1e-2,
        "importance_lr": 3e-3,
        "final_fraction": 0.0,
        "weight_decay": 0.1,
        "clip_subcomponents": None,
    },
    "log_every": 500,
}

# One set of sources for the whole batch: inputs are drawn afresh at every step, so there is
# no input to which sources of its own could belong. When all three reconstruction losses
# weighed 0.5, the MMCS of the first matrix stayed at 0.998.
_METHODS: dict[str, dict[str, Any]] = {
    "spd": {
        "stochastic": {"coefficient": 1.0, "routing": "all", "layerwise_coefficient": 1.0},
        "adversary": {"coefficient": 0.0},
    },
    "vpd": {
        "stochastic": {"coefficient": 1.0, "routing": "subset", "layerwise_coefficient": 1.0},
        "adversary": {"coefficient": 0.2, "inner_steps": 1, "scope": "single"},
    },
}

_MINIMALITY = {
    "spd": {"frequency": 0.0, "p_start": 2.0, "p_end": 1.0},
    "vpd": {"frequency": 0.5, "p_start": 2.0, "p_end": 1.0},
}

# Those of tms-5-2 were tuned, the others are scaled from them. An identity layer has to be on for
# activations of either sign, and so has a residual MLP whose features have both: their gates are
# not affine. All m subcomponents of an identity layer are on for every input, where the frequency
# term is dearest: at 2e-3 tms-5-2-id had three that were on for some.
# A coefficient at which tms-40-10-id has its ten made the first matrix worse.
# Subcomponents per site, hidden units of a gate, steps, and the importance coefficient of each
# method: the divergence is a mean over features, so it falls with their number.
_SIZES: dict[str, tuple[int, int, int, float, float]] = {
    "tms-5-2": (100, 0, 2000, 6e-3, 2e-3),
    "tms-5-2-id": (100, 1, 2000, 6e-3, 1e-3),
    "tms-40-10": (400, 0, 3000, 7.5e-4, 2.5e-4),
    "tms-40-10-id": (400, 1, 3000, 7.5e-4, 2.5e-4),
    "resid-mlp-1": (200, 4, 2000, 1e-4, 2e-5),
    "resid-mlp-2": (200, 4, 3000, 1e-4, 2e-5),
    "resid-mlp-3": (200, 4, 4000, 1e-4, 2e-5),
}


def preset(toy: str, method: str) -> VPDConfig:
    """The settings that decompose a toy.

    Args:
        toy: One of `TOYS`.
        method: `"vpd"` (with the adversary and the frequency term) or `"spd"` (without).

    Raises:
        ConfigError: If there is no such toy or method.
    """
    if toy not in TOYS:
        raise ConfigError(f"toy={toy!r} is not one of {', '.join(TOYS)}.")
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    count, hidden, steps, spd_coefficient, vpd_coefficient = _SIZES[toy]
    coefficient = spd_coefficient if method == "spd" else vpd_coefficient
    return VPDConfig(
        **_COMMON,
        **_METHODS[method],
        importance={"kind": "mlp", "hidden": hidden},
        minimality={**_MINIMALITY[method], "coefficient": coefficient},
        n_subcomponents=count,
        steps=steps,
    )


def method_of(config: VPDConfig) -> str:
    """Which of `METHODS` a configuration is of."""
    return "vpd" if config.adversary.coefficient > 0 else "spd"
