"""An attribution graph in the JSON that Neuronpedia takes uploads in.

A layer is a block here, because Neuronpedia draws as many layers as its own record of the model
has. It replaces the labels of embeddings and errors by its own.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vpd_lens.errors import InputError
from vpd_lens.interop.graph_json import checked_slug, graph_json, metadata
from vpd_lens.storage import write_text

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.tables import AttentionPair
    from vpd_lens.analysis.clustering import Clusters

# Of an upload, after compression.
LIMIT_BYTES = 100 * 2**20


def to_neuronpedia(
    graph: AttributionGraph,
    path: str | Path,
    model_id: str,
    slug: str,
    pairs: Sequence[AttentionPair] | None = None,
    node_threshold: float | None = 0.8,
    feature_json_base_url: str | None = None,
    clusters: Clusters | None = None,
) -> Path:
    """Write a graph's file for upload to Neuronpedia.

    Args:
        graph: The graph; prune it first if it has many thousands of edges.
        path: The file to write.
        model_id: Neuronpedia's id of the model, which must exist there.
        slug: Name of the graph in its address.
        pairs: What subcomponents contribute to attention scores; shown at the attention's nodes.
        node_threshold: Where the viewer's pruning slider begins; `None` for no slider.
        feature_json_base_url: Where you host the files of `features/<slug>` that
            `to_circuit_tracer(..., axis="block")` wrote.
        clusters: Nodes of one position and cluster are pinned as a supernode.

    Raises:
        InputError: If an argument cannot be used, the graph has values that are not finite, or
            all its nodes are in the first block.
    """
    about = metadata(graph, slug, checked_slug(model_id, "model_id"), node_threshold)
    about["info"] = {"generator": {"name": "vpd-lens", "version": version("vpd-lens")}}
    about["generation_settings"] = graph.settings
    if node_threshold is None:
        del about["node_threshold"]
    if feature_json_base_url is not None:
        about["feature_details"] = {"feature_json_base_url": feature_json_base_url}
    data = graph_json(graph, "block", pairs, clusters)
    layers = [node["layer"] for node in data["nodes"] if node["feature_type"] != "logit"]
    if not any(layer.isdigit() and int(layer) > 0 for layer in layers):
        raise InputError(
            "no node of this graph is in a block after the first, and Neuronpedia fails on such "
            "graphs ('No layer found'). Use to_circuit_tracer, prune less, or a deeper model."
        )
    text = json.dumps({"metadata": about, **data}, allow_nan=False)
    size = len(gzip.compress(text.encode())) if len(text) > LIMIT_BYTES else 0
    if size > LIMIT_BYTES:
        warnings.warn(
            f"the graph has {size / 2**20:.0f} MiB after compression, and Neuronpedia takes "
            f"{LIMIT_BYTES / 2**20:.0f} MiB at most. Write graph.pruned() instead.",
            stacklevel=2,
        )
    write_text(Path(path), text + "\n")
    return Path(path)
