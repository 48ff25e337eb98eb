"""Convert a decomposition by the authors' JAX code (`p-...` runs) to their torch layout.

Run it where their code runs, with JAX and Orbax; the result needs neither:

    python convert_jax_run.py runs/p-ed2347a8/ckpts/100000 sites.json converted.safetensors

There, components are stacked per kind of matrix over layers. `sites.json` has, by kind, their sites
in the order of the layers, with the numbers of subcomponents if C was padded to a common one:

    {"q_proj": ["h.0.attn.q_proj", "h.1.attn.q_proj"], "c_fc": {"h.0.mlp.c_fc": 3072}}

The file that is written has `_components.<site>.V` `[d_in, C]` and `_components.<site>.U`
`[C, d_out]`, with hyphens for the dots of a site, as a torch checkpoint. Both multiply from the
right, like ours, and can be copied onto a decomposition with these sites and sizes:

    vpd.v("blocks.0.attn.q").data.copy_(tensors["_components.h-0-attn-q_proj.V"])

Causal importance functions are not converted: those of JAX runs are of other kinds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Kinds = Mapping[str, Sequence[str] | Mapping[str, int]]


def unstack(components: Mapping[str, Mapping[str, Any]], kinds: Kinds) -> dict[str, np.ndarray]:
    """Arrays by site, `[d_in, C]` and `[C, d_out]`, from those stacked per kind over layers.

    `components` is `{kind: {"V": [layers, d_in, C], "U": [layers, C, d_out]}}`, `kinds` the sites
    of every kind in the order of its layers, with their numbers of subcomponents if C is padded.

    Raises:
        ValueError: If kinds, layers or shapes do not fit, or what is cut off as padding is not 0.
    """
    if components.keys() != kinds.keys():
        raise ValueError(f"the run has the kinds {sorted(components)}, not {sorted(kinds)}")
    arrays: dict[str, np.ndarray] = {}
    for kind, stacked in components.items():
        v, u = (np.asarray(stacked[side]) for side in "VU")
        sites = list(kinds[kind])
        if v.ndim != 3 or u.ndim != 3 or len(v) != len(u) or v.shape[2] != u.shape[1]:
            raise ValueError(
                f"{kind}: V {v.shape} and U {u.shape} are not [layers, d_in, C] and "
                "[layers, C, d_out]"
            )
        if len(v) != len(sites):
            raise ValueError(f"{kind}: {len(v)} layers, but {len(sites)} sites: {sites}")
        sizes = (
            kinds[kind] if isinstance(kinds[kind], Mapping) else dict.fromkeys(sites, v.shape[2])
        )
        for layer, site in enumerate(sites):
            c = sizes[site]  # type: ignore[call-overload, index]
            if v[layer, :, c:].any() or u[layer, c:].any():
                raise ValueError(f"{site}: not all of what lies beyond its C={c} is padding")
            name = f"_components.{site.replace('.', '-')}"
            arrays[f"{name}.V"] = np.ascontiguousarray(v[layer, :, :c], dtype=np.float32)
            arrays[f"{name}.U"] = np.ascontiguousarray(u[layer, :c], dtype=np.float32)
    return arrays


def restore(step: Path) -> Mapping[str, Mapping[str, Any]]:
    """The components of one step's folder, by Orbax: all else in it is left unread."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.restore(
            (step / "decomposition").absolute(), args=ocp.args.PyTreeRestore()
        )
    return tree["components"]


def main() -> None:
    """Convert one step of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", type=Path, help="ckpts/<step> of a run")
    parser.add_argument("sites", type=Path, help="JSON: the sites of every kind, by layer")
    parser.add_argument("output", type=Path, help="the .safetensors to write")
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    kinds = json.loads(arguments.sites.read_text())
    save_file(unstack(restore(arguments.step), kinds), arguments.output)


if __name__ == "__main__":
    main()
