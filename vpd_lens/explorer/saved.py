"""Graphs and their groups, those of this session and those in a folder.

| in the folder | |
|---|---|
| `graphs/<name>/` | an `AttributionGraph`, for `AttributionGraph.load` |
| `graphs/<name>.json` | the question that it answers, and the reader's groups |
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ValidationError

from vpd_lens import storage
from vpd_lens.analysis.attention import HeadLoadings
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.explorer.orders import Group, Question

MOST = 12  # of this session in memory: a graph may have millions of edges


class GraphNotes(BaseModel):
    """What is kept beside a saved graph."""

    question: Question
    groups: list[Group] = []


@dataclass
class KeptGraph:
    """A graph that the explorer can show."""

    graph: AttributionGraph
    notes: GraphNotes
    loadings: HeadLoadings | None = None
    name: str = ""  # on disk


@dataclass
class Graphs:
    """Graphs by key: a number in this session, a name on disk."""

    folder: Path
    session: OrderedDict[str, KeptGraph] = field(default_factory=OrderedDict)
    saved: dict[str, KeptGraph] = field(default_factory=dict)  # those that were opened

    FOLDER: ClassVar[str] = "graphs"

    def add(self, key: str, kept: KeptGraph) -> None:
        """Remember a graph, and forget the oldest of too many."""
        self.session[key] = kept
        while len(self.session) > MOST:
            self.session.popitem(last=False)

    def __getitem__(self, key: str) -> KeptGraph:
        """The graph of a key; an `InputError` if there is none."""
        if key in self.session:
            return self.session[key]
        if key in self.names():
            if key not in self.saved:
                place = self._place(key)
                notes = _read_notes(place.with_suffix(".json"))
                self.saved[key] = KeptGraph(AttributionGraph.load(place), notes, name=key)
            return self.saved[key]
        raise InputError(
            f"there is no graph {key!r}; those of an earlier session are there if they were saved."
        )

    def listed(self) -> list[tuple[str, str]]:
        """Keys and what they are of: what is new in this session, then what is on disk."""
        fresh = [
            (key, repr(kept.notes.question.text)[1:-1])
            for key, kept in self.session.items()
            if not kept.name
        ]
        return fresh + [(name, "saved") for name in self.names()]

    def names(self) -> list[str]:
        """Of the graphs on disk."""
        found = (self.folder / self.FOLDER).glob("*.json")
        return sorted(path.stem for path in found if path.with_suffix("").is_dir())

    def save(self, key: str, name: str) -> KeptGraph:
        """Write a graph of this session; an `InputError` if the name is another one's."""
        kept = self[key]
        if name.isdecimal():
            raise InputError(f"name={name!r}: graphs of this session have numbers; use a word.")
        if name in self.names() and kept.name != name:
            raise InputError(f"there is a graph called {name!r} already; choose another name.")
        self._place(name).parent.mkdir(parents=True, exist_ok=True)
        kept.graph.save(self._place(name))
        kept.name, self.saved[name] = name, kept
        self._write_notes(kept)
        return kept

    def group(self, key: str, groups: list[Group]) -> None:
        """Keep the groups of a graph, on disk too if the graph is."""
        kept = self[key]
        kept.notes.groups = groups
        if kept.name:
            self._write_notes(kept)

    def _write_notes(self, kept: KeptGraph) -> None:
        notes = kept.notes.model_dump()
        storage.write_json(self._place(kept.name).with_suffix(".json"), notes)

    def _place(self, name: str) -> Path:
        return self.folder / self.FOLDER / name


def _read_notes(path: Path) -> GraphNotes:
    try:
        return GraphNotes.model_validate(storage.read_json(path))
    except ValidationError as error:
        raise ArtefactError(f"{path} is not what the explorer writes beside a graph.") from error
