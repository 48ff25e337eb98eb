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

from vpd_lens.analysis.attribution.feature_files import Cards, write_feature_files
from vpd_lens.analysis.attribution.graph_json import (
    checked_slug,
    checked_threshold,
    feature_indices,
    graph_json,
)
from vpd_lens.analysis.attribution.graph_numbering import Axis, numbering
from vpd_lens.analysis.attribution.nodes import KINDS
from vpd_lens.analysis.attribution.pairs_record import AttentionPair
from vpd_lens.errors import ArtefactError
from vpd_lens.files import read_json, write_text_atomically

if TYPE_CHECKING:
    from vpd_lens.analysis.attribution.graph import AttributionGraph

INDEX = "graph-metadata.json"


def to_circuit_tracer(
    graph: AttributionGraph,
    folder: Path,
    slug: str,
    harvest: Cards | None = None,
    axis: Axis = "site",
    node_threshold: float | None = 0.8,
    pairs: Sequence[AttentionPair] | None = None,
) -> Path:
    """Write a graph, and enter it into the folder's list of graphs.

    Args:
        graph: The graph; prune it first if it has many thousands of edges.
        folder: The viewer's folder of graphs, which may hold others.
        slug: Name of the graph; a graph of this name is replaced.
        harvest: Where examples of subcomponents come from, a `vpd_lens.analysis.harvest.Harvest`.
        axis: What a layer of the viewer is: each matrix (`"site"`) or each block (`"block"`).
        node_threshold: Where the viewer's pruning slider begins; `None` for no slider.
        pairs: What subcomponents contribute to attention scores.

    Returns:
        The graph's file.

    Raises:
        InputError: If an argument cannot be used, or the graph has values that are not finite.
        ArtefactError: If the folder's list of graphs is damaged, or the harvest is of another
            decomposition.
    """
    folder, slug = Path(folder), checked_slug(slug)
    metadata = {
        "slug": slug,
        # With a path that begins with ./data/ the viewer looks in this folder, not on the web.
        "scan": f"./data/features/{slug}",
        "transcoder_list": [],
        "prompt_tokens": list(graph.strings),
        "prompt": "".join(graph.strings),
        "node_threshold": checked_threshold(node_threshold),
        "schema_version": 1,
    }
    if harvest is not None:
        harvest.check(graph.settings.get("decomposition", ""))
    data = graph_json(graph, axis, pairs)
    index = _with_entry(folder, metadata)
    if harvest is None:
        # Those of an earlier graph of this name may be numbered otherwise.
        shutil.rmtree(folder / "features" / slug, ignore_errors=True)
    else:
        features = feature_indices(graph, numbering(graph.nodes.places, axis))
        write_feature_files(folder / "features" / slug, features, harvest)
    ids = [node["node_id"] for node in data["nodes"]]
    _write(folder / f"{slug}.vpd.json", _side_file(graph, ids))
    _write(folder / f"{slug}.json", {"metadata": metadata, **data})
    _write(folder / INDEX, index)
    return folder / f"{slug}.json"


def _with_entry(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The folder's list of graphs with this one, which may be in it already."""
    path = folder / INDEX
    index = read_json(path) if path.exists() else {"graphs": []}
    graphs = index.get("graphs")
    if not isinstance(graphs, list) or not all(isinstance(entry, dict) for entry in graphs):
        raise ArtefactError(f"{path}: it has no list of graphs. Remove it, or restore a copy.")
    others = [entry for entry in graphs if entry.get("slug") != metadata["slug"]]
    return {**index, "graphs": [*others, metadata]}


def _side_file(graph: AttributionGraph, ids: list[str]) -> dict[str, Any]:
    nodes = graph.nodes
    columns = (nodes.kind, nodes.place, nodes.position, nodes.index)
    values = (nodes.activation, nodes.importance)
    rows = zip(*(column.tolist() for column in (*columns, *values)), strict=True)
    records = [
        {
            "name": name,
            "kind": KINDS[kind],
            "site": nodes.places[place],
            "position": position,
            "index": index,
            "activation": activation,
            "importance": importance,
        }
        for name, (kind, place, position, index, activation, importance) in zip(
            nodes.names(), rows, strict=True
        )
    ]
    return {"settings": graph.settings, "nodes": dict(zip(ids, records, strict=True))}


def _write(path: Path, data: Any) -> None:
    write_text_atomically(path, json.dumps(data, allow_nan=False) + "\n")
