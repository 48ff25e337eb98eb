"""Find the circuits of three behaviours, with and without an adversary, and see which hold.

    python examples/circuits.py      # of the example that ships with the library

For each behaviour and each way of pruning, `--output` receives a record (JSON: configuration,
probabilities under every kind of mask, nodes by site, versions) and, for adversarial pruning, the
attribution graph of the first prompt as a page and to load again. What has a record is not
repeated.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import vpd_lens
from vpd_lens.analysis.attention import head_loadings
from vpd_lens.analysis.circuits import CircuitReport
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.example import example_harvest
from vpd_lens.storage import write_text

# Behaviours that the example's language model really has.
BEHAVIOURS = {
    "self": ("self", ["    def __len__(", "    def __repr__(", "class Queue:\n    def __init__("]),
    "bracket": ("]\n", ["    return self._names[name", "    value = items[key"]),
    "colon": (":\n", ["    if name is None", "    except ValueError", "    while True"]),
}
# Ways of pruning, and what a node costs: without an adversary, and against one at three prices.
RUNS = {
    "ci": ("ci", 5e-3),
    "stochastic": ("stochastic", 5e-3),
    "adversarial-5e-3": ("adversarial", 5e-3),
    "adversarial-1e-3": ("adversarial", 1e-3),
    "adversarial-2e-4": ("adversarial", 2e-4),
}
SHOWN = (
    "target",
    "ci",
    "stochastic",
    "adversarial-4",
    "adversarial-20",
    "adversarial-80",
    "ablated",
)
console = Console()


def main() -> None:
    """Prune, write records, draw graphs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--behaviour", nargs="*", choices=BEHAVIOURS, default=list(BEHAVIOURS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("runs/circuits"))
    arguments = parser.parse_args()
    output, model = arguments.output, vpd_lens.load_example()
    table = Table("behaviour", "pruned", "nodes", *SHOWN)
    for name in arguments.behaviour:
        for run, (method, coefficient) in RUNS.items():
            config = vpd_lens.PruneConfig(
                method=method, steps=arguments.steps, coefficient=coefficient
            )
            path = output / f"{name}-{run}.json"
            if not path.exists():
                find(model, name, config, path)
            report = CircuitReport.model_validate(json.loads(path.read_text())["report"])
            if run == "ci":
                before = (f"{report.mean_before[key]:.2f}" for key in SHOWN)
                table.add_row(name, "not", f"{report.nodes_before:.0f}", *before)
            means = (f"{report.mean[key]:.2f}" for key in SHOWN)
            table.add_row(name, run, f"{report.nodes:.0f}", *means)
    console.print(table)
    console.print(f"Records and pages: {output}")


def find(model: nn.Module, name: str, config: vpd_lens.PruneConfig, path: Path) -> None:
    """Prune to one behaviour, and record it; draw its graph if an adversary was withstood."""
    target, prompts = BEHAVIOURS[name]
    begun = time.perf_counter()
    circuit = vpd_lens.prune(model, prompts, target, config)
    record = {
        "behaviour": name,
        "prompts": prompts,
        "target": target,
        "config": config.model_dump(mode="json"),
        "report": circuit.report.model_dump(mode="json"),
        "seconds": round(time.perf_counter() - begun, 1),
        "decomposition": fingerprint(model.vpd),
        "trained_steps": model.vpd.trained_steps,
        "vpd_lens": vpd_lens.__version__,
        "torch": torch.__version__,
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "date": date.today().isoformat(),
    }
    if config.method == "adversarial":
        cards = vpd_lens.Cards(model, example_harvest(model.vpd))
        graph = vpd_lens.attribute(model, prompts[0], target, prune=circuit)
        graph.to_html(path.with_suffix(".html"), cards=cards, loadings=head_loadings(model, graph))
        graph.save(path.with_suffix(""))
    write_text(path, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
