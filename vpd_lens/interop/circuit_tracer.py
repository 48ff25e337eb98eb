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
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vpd_lens.analysis.circuits.tables import KINDS
from vpd_lens.errors import ArtefactError
from vpd_lens.interop.graph_json import (
    Axis,
    checked_slug,
    checked_threshold,
    graph_json,
    numbering,
)
from vpd_lens.storage import atomic_folder, read_json, write_json, write_text

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph
    from vpd_lens.analysis.circuits.tables import AttentionPair

INDEX = "graph-metadata.json"


@runtime_checkable
class Cards(Protocol):
    """What exports and pages need of a `vpd_lens.Harvest`."""

    def check(self, fingerprint: str) -> None:
        """Raise `ArtefactError` for another decomposition than the one harvested."""
        ...

    def card(self, site: str, index: int) -> dict[str, Any] | None:
        """Everything about a subcomponent, or `None` if it never fired."""
        ...


def to_circuit_tracer(
    graph: AttributionGraph,
    folder: str | Path,
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
        harvest: Where examples of subcomponents come from, a `vpd_lens.Harvest`.
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
        _write_features(folder / "features" / slug, graph, axis, harvest)
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
    plain = ("position", "index", "activation", "importance")
    columns = {
        "name": nodes.names(),
        "kind": [KINDS[kind] for kind in nodes.kind.tolist()],
        "site": [nodes.places[place] for place in nodes.place.tolist()],
        **{name: getattr(nodes, name).tolist() for name in plain},
    }
    rows = zip(*columns.values(), strict=True)
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"settings": graph.settings, "nodes": dict(zip(ids, records, strict=True))}


def _write(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, allow_nan=False) + "\n")


def _write_features(folder: Path, graph: AttributionGraph, axis: Axis, harvest: Cards) -> None:
    """One file per subcomponent of the graph in a folder, which is replaced."""
    numbers, nodes = numbering(graph.nodes.places, axis), graph.nodes
    own = nodes.of_kind("subcomponent")
    places = (nodes.places[place] for place in nodes.place[own].tolist())
    with atomic_folder(folder) as new:
        for site, index in sorted(set(zip(places, nodes.index[own].tolist(), strict=True))):
            # A file also for those that never fired, as the viewer fails on a missing one.
            card = harvest.card(site, index) or {"density": 0, "examples": [], "output_tokens": []}
            number = numbers.feature(site, index)
            write_json(new / f"{number}.json", _feature(number, f"{site}:{index}", card))


def _feature(number: int, name: str, card: dict[str, Any]) -> dict[str, Any]:
    """A feature in the viewers' format, without the histogram, which a harvest does not have."""
    examples = [_example(example) for example in card["examples"]]
    highest = max((max(example["tokens_acts_list"]) for example in examples), default=1.0)
    return {
        "transcoder_id": name,
        "index": number,
        "examples_quantiles": [{"quantile_name": "Top examples", "examples": examples}],
        "top_logits": [found["token"] for found in card["output_tokens"]],
        "bottom_logits": [],
        "act_min": 0.0,
        "act_max": highest,
        "activation_frequency": card["density"],
    }


def _example(example: dict[str, Any]) -> dict[str, Any]:
    # The viewers colour from 0 up; a subcomponent that is unimportant at a token does nothing.
    strengths = zip(example["importance"], example["activation"], strict=True)
    return {
        "tokens_acts_list": [importance * abs(activation) for importance, activation in strengths],
        "train_token_ind": example["focus"],
        "is_repeated_datapoint": False,
        "tokens": list(example["tokens"]),
    }
