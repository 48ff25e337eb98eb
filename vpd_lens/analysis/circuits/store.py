"""Save an attribution graph to a directory, and load it.

| file | content |
|---|---|
| `graph.safetensors` | `nodes.<column>`, `edges.<column>`, `outputs.<number>` (their vectors) |
| `graph.json` | format version, prompt, places, outputs, settings, circuit, tensors' checksum |
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from vpd_lens.analysis.circuits.report import CircuitReport
from vpd_lens.analysis.circuits.tables import Edges, Nodes
from vpd_lens.analysis.circuits.targets import Output
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.files import (
    atomic_directory,
    existing_directory,
    file_hash,
    read_json,
    read_tensors,
    write_json,
)

if TYPE_CHECKING:
    from vpd_lens.analysis.circuits.graph import AttributionGraph

FORMAT_VERSION = 1

_TENSORS, _RECORD = "graph.safetensors", "graph.json"
_EDGE_COLUMNS = tuple(Edges.__annotations__)


def save(graph: AttributionGraph, path: Path) -> Path:
    """Write a graph to a directory, whole or not at all.

    Args:
        graph: The graph.
        path: The directory; an earlier one there is replaced only once the new one is complete.

    Returns:
        The directory.

    Raises:
        InputError: If `graph.settings` or `graph.circuit` has values that JSON has not.
    """
    with atomic_directory(path) as folder:
        save_file(_tensors(graph), folder / _TENSORS)
        record = {
            "format_version": FORMAT_VERSION,
            "vpd_lens_version": importlib.metadata.version("vpd-lens"),
            "sha256": file_hash(folder / _TENSORS),
            "tokens": graph.tokens,
            "strings": graph.strings,
            "places": graph.nodes.places,
            "outputs": [_output_record(output) for output in graph.outputs],
            "settings": graph.settings,
            "circuit": None if graph.circuit is None else graph.circuit.model_dump(mode="json"),
        }
        try:
            write_json(folder / _RECORD, record)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the graph's settings or circuit cannot be written as JSON ({error}). Put plain "
                "numbers, text, lists and dictionaries there."
            ) from None
    return path


def load(path: Path) -> AttributionGraph:
    """Read what `save` wrote.

    Args:
        path: The directory.

    Raises:
        ArtefactError: If a file is missing, damaged or newer than this library.
    """
    from vpd_lens.analysis.circuits.graph import AttributionGraph

    folder = existing_directory(path)
    record = _read_record(folder / _RECORD)
    if file_hash(folder / _TENSORS) != record.get("sha256"):
        raise ArtefactError(
            f"{folder / _TENSORS}: its content does not match the checksum in {_RECORD}; the file "
            "is truncated or was changed. Restore it from a copy."
        )
    tensors = read_tensors(folder / _TENSORS)
    try:
        circuit = record["circuit"]
        return AttributionGraph(
            tokens=tuple(record["tokens"]),
            strings=tuple(record["strings"]),
            nodes=Nodes(tuple(record["places"]), **_columns(tensors, "nodes", Nodes.columns())),
            edges=Edges(**_columns(tensors, "edges", _EDGE_COLUMNS)),
            outputs=tuple(
                _output(output, tensors[f"outputs.{number}"])
                for number, output in enumerate(record["outputs"])
            ),
            settings=record["settings"],
            circuit=None if circuit is None else CircuitReport.model_validate(circuit),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{folder}: {_RECORD} and {_TENSORS} do not fit each other ({error!r}). They were "
            "changed, or written by another version."
        ) from None


def _tensors(graph: AttributionGraph) -> dict[str, Tensor]:
    tensors = {f"nodes.{name}": getattr(graph.nodes, name) for name in Nodes.columns()}
    tensors |= {f"edges.{name}": getattr(graph.edges, name) for name in _EDGE_COLUMNS}
    tensors |= {f"outputs.{i}": output.vector for i, output in enumerate(graph.outputs)}
    # Clones, as safetensors refuses tensors that share memory.
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _columns(
    tensors: Mapping[str, Tensor], table: str, columns: list[str] | tuple[str, ...]
) -> dict[str, Tensor]:
    return {name: tensors[f"{table}.{name}"] for name in columns}


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    version = record.get("format_version")
    if not isinstance(version, int):
        raise ArtefactError(f"{path}: it has no format_version, so it is not of a graph.")
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"{path}: format version {version} is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    return record


def _output_record(output: Output) -> dict[str, Any]:
    record = {f.name: getattr(output, f.name) for f in fields(output) if f.name != "vector"}
    # As pairs: keys of JSON objects are text.
    return {**record, "tokens": list(output.tokens.items())}


def _output(record: dict[str, Any], vector: Tensor) -> Output:
    return Output(**{**record, "tokens": dict(record["tokens"])}, vector=vector)
