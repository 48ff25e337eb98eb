"""An attribution graph in the files that circuit-tracer's local viewer reads.

| file in the folder | content |
|---|---|
| `<slug>.json` | the graph |
| `graph-metadata.json` | the list of graphs in the folder |
| `features/<slug>/<feature>.json` | examples of each subcomponent, if a harvest is given |
| `<slug>.vpd.json` | what every node is in `vpd_lens`, by its id in the viewer |

`circuit-tracer start-server --graph_file_dir FOLDER` shows the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd_lens.errors import ArtefactError
from vpd_lens.interop.graph_json import Axis, graph_json, metadata, numbering
from vpd_lens.storage import atomic_folder, read_json, write_json, write_text

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.tables import AttentionPair
    from vpd_lens.analysis.clustering import Clusters
    from vpd_lens.analysis.harvest import Harvest

INDEX = "graph-metadata.json"


def to_circuit_tracer(
    graph: AttributionGraph,
    folder: str | Path,
    slug: str,
    harvest: Harvest | None = None,
    axis: Axis = "site",
    node_threshold: float | None = 0.8,
    pairs: Sequence[AttentionPair] | None = None,
    clusters: Clusters | None = None,
) -> Path:
    """Write a graph's file, and enter it into the folder's list of graphs.

    Args:
        graph: The graph; prune it first if it has many thousands of edges.
        folder: The viewer's folder of graphs, which may hold others.
        slug: Name of the graph; a graph of this name is replaced.
        harvest: Where examples of subcomponents come from.
        axis: What a layer of the viewer is: each matrix (`"site"`) or each block (`"block"`).
        node_threshold: Where the viewer's pruning slider begins; `None` for no slider.
        pairs: What subcomponents contribute to attention scores.
        clusters: Nodes of one position and cluster are pinned as a supernode.

    Raises:
        InputError: If an argument cannot be used, or the graph has values that are not finite.
        ArtefactError: If the folder's list of graphs is damaged, or the harvest is of another
            decomposition.
    """
    folder = Path(folder)
    # With a path that begins with ./data/ the viewer looks in this folder, not on the web.
    about = metadata(graph, slug, f"./data/features/{slug}", node_threshold)
    about["transcoder_list"] = []
    if harvest is not None:
        harvest.check(graph.settings.get("decomposition", ""))
    data = graph_json(graph, axis, pairs, clusters)
    index = _with_entry(folder / INDEX, about)
    if harvest is None:
        # Those of an earlier graph of this name may be numbered otherwise.
        shutil.rmtree(folder / "features" / slug, ignore_errors=True)
    else:
        _write_features(folder / "features" / slug, graph, axis, harvest)
    columns = graph.nodes.lists()
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    nodes = {node["node_id"]: row for node, row in zip(data["nodes"], rows, strict=True)}
    _write(folder / f"{slug}.vpd.json", {"settings": graph.settings, "nodes": nodes})
    _write(folder / f"{slug}.json", {"metadata": about, **data})
    _write(folder / INDEX, index)
    return folder / f"{slug}.json"


def _with_entry(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The folder's list of graphs with this one, which may be in it already."""
    index = read_json(path) if path.exists() else {"graphs": []}
    graphs = index.get("graphs")
    if not isinstance(graphs, list) or not all(isinstance(entry, dict) for entry in graphs):
        raise ArtefactError(f"{path}: it has no list of graphs. Remove it, or restore a copy.")
    others = [entry for entry in graphs if entry.get("slug") != about["slug"]]
    return {**index, "graphs": [*others, about]}


def _write(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, allow_nan=False) + "\n")


def _write_features(folder: Path, graph: AttributionGraph, axis: Axis, harvest: Harvest) -> None:
    """One file per subcomponent of the graph in a folder, which is replaced."""
    numbers = numbering(graph.nodes.places, axis)
    own = graph.nodes.where(graph.nodes.of_kind("subcomponent")).lists()
    with atomic_folder(folder) as new:
        for site, index in sorted(set(zip(own["site"], own["index"], strict=True))):
            # A file also for those that never fired, as the viewer fails on a missing one.
            card = harvest.card(site, index) or {"density": 0, "examples": [], "output_tokens": []}
            number = numbers.feature(site, index)
            write_json(new / f"{number}.json", _feature(number, f"{site}:{index}", card))


def _feature(number: int, name: str, card: dict[str, Any]) -> dict[str, Any]:
    """A feature in the viewers' format, without the histogram, which a harvest does not have."""
    examples = [
        {
            # The viewers colour from 0 up; what is unimportant at a token does nothing.
            "tokens_acts_list": [
                g * abs(a) for g, a in zip(e["importance"], e["activation"], strict=True)
            ],
            "train_token_ind": e["focus"],
            "is_repeated_datapoint": False,
            "tokens": list(e["tokens"]),
        }
        for e in card["examples"]
    ]
    return {
        "transcoder_id": name,
        "index": number,
        "examples_quantiles": [{"quantile_name": "Top examples", "examples": examples}],
        "top_logits": [found["token"] for found in card["output_tokens"]],
        "bottom_logits": [],
        "act_min": 0.0,
        "act_max": max((max(e["tokens_acts_list"]) for e in examples), default=1.0),
        "activation_frequency": card["density"],
    }
