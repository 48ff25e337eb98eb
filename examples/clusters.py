"""Group the subcomponents of the example by where they are active, and look at their neurons.

    python examples/clusters.py     # of the example that ships with the library

On text that neither the model nor its decomposition was trained on: how the groups depend on alpha
and on chance; what the groups of one alpha respond to; how many nodes of a graph they leave; and
whether interactions in neurons predict the second differences that are measured. Writes
`clusters.json` and the figures of the page on clusters.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console

import vpd_lens
from attention import held_out
from themed import save
from vpd_lens import plots
from vpd_lens.analysis.clustering import Activity, Best, Clusters, activity, merge, sweep
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.interactions import NeuronInteractions, SecondDifferences, measure
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.example import example_harvest
from vpd_lens.storage import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = "class Queue:\n    def __init__("
ALPHAS, SEEDS, ALPHA = (1.0, 10.0), (0, 1), 10.0
PER_SEQUENCE, N_MEASURED = 4, 16
console = Console(width=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", type=Path, default=DOCS / "results" / "clusters")
    parser.add_argument("--figures", type=Path, default=DOCS / "assets")
    arguments = parser.parse_args()
    model = vpd_lens.load_example()
    rows = held_out(model)
    found = activity(model, rows, n_batches=-(-len(rows) // 16), per_sequence=PER_SEQUENCE)
    console.print(found)
    swept = sweep(found, ALPHAS, SEEDS)
    console.print(swept)
    runs = [merge(found, alpha, Best(), until_one=True) for alpha in ALPHAS]
    kept = runs[ALPHAS.index(ALPHA)]
    console.print(kept)
    tables = vpd_lens.interactions(model, rows, clusters=kept, n_batches=8)
    checks = {
        site: measure(table, model, rows, n=N_MEASURED, batch_size=4)
        for site, table in tables.items()
    }
    for site, table in tables.items():
        console.print(table, checks[site], table.inside())
    record = {
        "activity": of_activity(found),
        "sweep": of_sweep(swept),
        "best": [of_run(run) for run in runs],
        "clusters": described(kept, example_harvest(model.vpd)),
        "together": [pair._asdict() for pair in found.top(5)],
        "q_with_k": q_with_k(model, rows),
        "graph": of_graph(model, kept),
        "interactions": {site: of_table(tables[site], checks[site]) for site in tables},
        "decomposition": fingerprint(model.vpd),
        "vpd_lens": vpd_lens.__version__,
        "torch": torch.__version__,
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "date": date.today().isoformat(),
    }
    write_text(arguments.record / "clusters.json", json.dumps(record, indent=1) + "\n")
    draw_all(arguments.figures, runs, kept, tables, checks)


def of_activity(found: Activity) -> dict[str, Any]:
    """How much there was to cluster."""
    at_each = float(found.counts.sum()) / found.n_positions
    return {
        "subcomponents": len(found.names),
        "positions": found.n_positions,
        "threshold": found.threshold,
        "at_each_position": at_each,
    }


def of_sweep(swept: Any) -> list[dict[str, Any]]:
    """Groups by alpha, and how far runs of two seeds are from each other."""
    rows = []
    for alpha, runs in swept.runs.items():
        own, chance = swept.distance(alpha)
        rows.append({"alpha": alpha, "groups": [len(run) for run in runs],
                     "distance": own, "by_chance": chance})  # fmt: skip
    return rows


def of_run(run: Clusters) -> dict[str, Any]:
    """Sizes and lengths of one run."""
    larger = [cluster for cluster in run if len(cluster) > 1]
    return {
        "alpha": run.alpha,
        "groups": len(run),
        "larger_than_one": len(larger),
        "in_them": sum(map(len, larger)),
        "largest": max(map(len, larger), default=1),
        "bits_before": float(run.lengths[0]),
        "bits": run.length,
        "neurons_whole": whole_neurons(run),
    }


def whole_neurons(run: Clusters) -> list[int]:
    """Of the groups, how many hold the same number of an MLP's gate, in and out; of all triples."""
    triples = [
        [f"blocks.{layer}.mlp.{part}:{c}" for part in ("gate", "in", "out")]
        for layer in range(4)
        for c in range(256)
    ]
    numbers = [run.numbers(triple) for triple in triples]
    return [sum(len(set(n)) == 1 and n[0] >= 0 for n in numbers), len(numbers)]


def described(run: Clusters, harvest: Harvest) -> list[dict[str, Any]]:
    """What the groups that save most respond to."""
    found = []
    for cluster in run.top(12):
        tokens: dict[str, list[str]] = {}
        for name in cluster.members[:4]:
            site, _, index = name.rpartition(":")
            statistics = harvest.tokens(site, int(index), k=4)
            tokens[name] = [harvest.strings[t.token] for t in statistics]
        found.append({
            "number": cluster.number, "size": len(cluster), "density": cluster.density,
            "together": cluster.together, "saves": cluster.saves, "tokens": tokens,
        })  # fmt: skip
    return found


def q_with_k(model: torch.nn.Module, rows: torch.Tensor) -> list[dict[str, Any]]:
    """The q and k subcomponents of a layer that go together most, at the distance of one."""
    names = [f"blocks.{layer}.attn.{part}" for layer in range(4) for part in "qk"]
    found = activity(model, rows, n_batches=4, sites=names, progress=False)
    result = []
    for layer in range(4):
        q, k = names[2 * layer : 2 * layer + 2]
        for offset in (0, 1, 2):
            (pair,) = found.top(1, q, k, offset)
            result.append({"layer": layer, "offset": offset} | pair._asdict())
    return result


def of_graph(model: torch.nn.Module, run: Clusters) -> dict[str, Any]:
    """How many nodes a graph has, and in how many groups they are."""
    graph = vpd_lens.attribute(model, PROMPT, progress=False)
    names = graph.filtered(graph.nodes.of_kind("subcomponent")).nodes.names()
    nodes = [name for name in names if ":" in name and not name.startswith("output")]
    groups = run.grouped(nodes)
    inside = sum(map(len, groups.values()))
    return {"prompt": PROMPT, "nodes": len(nodes), "groups": len(groups), "in_groups": inside}


def of_table(table: NeuronInteractions, check: SecondDifferences) -> dict[str, Any]:
    """How much there is of interaction, and how well it predicts the second difference."""
    values, (inside, outside) = table.others(), table.inside()
    return {
        "subcomponents": len(table.indices),
        "median": float(values.median()),
        "above_a_tenth": float((values > 0.1).float().mean()),
        "within_clusters": inside,
        "between": outside,
        "top": [pair._asdict() for pair in table.top(3)],
        "pairs": len(check.pairs),
        "positions": check.n_positions,
        "rank_correlation": check.rank_correlation,
        "median_second_difference": float(check.measured.median()),
    }


def draw_all(
    folder: Path,
    runs: list[Clusters],
    kept: Clusters,
    tables: dict[str, NeuronInteractions],
    checks: dict[str, SecondDifferences],
) -> None:
    """The figures of the page, in light and dark."""
    site = "blocks.2.mlp.gate"
    save(folder, "cluster_lengths", plots.cluster_lengths(runs))
    save(folder, "cluster_sizes", plots.cluster_sizes(kept))
    save(folder, "interactions", plots.interactions(tables[site], checks[site]))


if __name__ == "__main__":
    main()
