"""Labels: what subcomponents, or groups of them, are called, by whom and how surely.

A decomposition has one set of labels, `model.vpd.labels`, which everything made from it shows:
cards, explanations, graphs, harvests, their pages and their exports. `vpd.save` writes them beside
V and U as `labels.json`, and `vpd_lens.load` reads them from there. That file has no checksum: it
may be edited by hand.

```json
{"kind": "labels", "format_version": 1, "fingerprint": "5f0c...", "sizes": {"blocks.0.mlp.out": 96},
 "labels": {"blocks.0.mlp.out:17": {"text": "self after (", "note": "", "source": "hand"}}}
```
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vpd_lens import storage
from vpd_lens.errors import ArtefactError, InputError, did_you_mean
from vpd_lens.rendering import Shown, titled

FILE, HAND = "labels.json", "hand"
_SHOWN = 30  # rows of a table that is printed


class Label(BaseModel):
    """What one subcomponent is called.

    Attributes:
        text: A few words, on one line.
        note: Anything else worth keeping, such as the reasoning behind the text.
        source: `"hand"`, or the name of the model that wrote it.
        score: How good it is, if that was measured; larger is better.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1, max_length=200)
    note: str = ""
    source: str = Field(HAND, min_length=1)
    score: float | None = Field(None, allow_inf_nan=False)

    @field_validator("text", mode="before")
    @classmethod
    def _one_line(cls, text: Any) -> Any:
        return " ".join(text.split()) if isinstance(text, str) else text


class LabelsRecord(BaseModel):
    """Labels as JSON; see `Labels`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["labels"] = "labels"
    format_version: Literal[1] = 1
    fingerprint: str = ""
    sizes: dict[str, int] = {}
    labels: dict[str, Label] = {}


class Labels(Shown, MutableMapping[str, Label]):
    """Labels by name, of one decomposition: `labels["blocks.0.mlp.out:17"] = "self after ("`.

    A mapping, in the order of the sites, that knows which names there are. What is set may be a
    text or a `Label`.

    Args:
        fingerprint: Of what is labelled (`vpd_lens.decomposition.saving.fingerprint`).
        sizes: How many members each site, or other group, has: names are `group:number`.

    Attributes:
        path: The file they were last read from or written to, or `None`.

    Examples:
        >>> labels = Labels("5f0c", {"blocks.0.mlp.out": 96})
        >>> labels["blocks.0.mlp.out:17"] = "self after ("
        >>> labels["blocks.0.mlp.out:17"].source
        'hand'
        >>> labels.named("blocks.0.mlp.out:17@5")
        'blocks.0.mlp.out:17@5 "self after ("'
    """

    def __init__(self, fingerprint: str = "", sizes: Mapping[str, int] | None = None) -> None:
        self.fingerprint, self.sizes = fingerprint, dict(sizes or {})
        self.path: Path | None = None
        self._labels: dict[str, Label] = {}

    # -------------------------------------------------------------- a mapping

    def __getitem__(self, name: str) -> Label:
        return self._labels[name]

    def __setitem__(self, name: str, label: str | Label) -> None:
        self.check(name)
        self._labels[name] = label if isinstance(label, Label) else _label({"text": label}, name)

    def __delitem__(self, name: str) -> None:
        del self._labels[name]

    def __iter__(self) -> Iterator[str]:
        order = {group: number for number, group in enumerate(self.sizes)}
        parts = (name.rpartition(":") for name in self._labels)
        for _, number, group in sorted((order[g], int(number), g) for g, _, number in parts):
            yield f"{group}:{number}"

    def __len__(self) -> int:
        return len(self._labels)

    def set(
        self,
        name: str,
        text: str,
        note: str = "",
        source: str = HAND,
        score: float | None = None,
    ) -> None:
        """Set a label and what is known of it.

        Raises:
            InputError: If there is no such name, or the label cannot be one.
        """
        given = {"text": text, "note": note, "source": source, "score": score}
        self[name] = _label(given, name)

    def check(self, name: str) -> None:
        """Refuse a name that nothing has; an `InputError`."""
        group, _, number = name.rpartition(":")
        if group not in self.sizes or not number.isdecimal() or number != str(int(number)):
            first = next(iter(self.sizes), "blocks.0.mlp.out")
            raise InputError(
                f"nothing to label is called {name!r}{did_you_mean(group, self.sizes)} Names are "
                f"like '{first}:17', of {list(self.sizes)}."
            )
        if int(number) >= self.sizes[group]:
            raise InputError(f"{name!r}: {group} has {self.sizes[group]}, numbered from 0.")

    # ---------------------------------------------------------------- looking

    def text(self, name: str) -> str:
        """The text of a subcomponent's label, or of a node of a graph; empty if it has none."""
        found = self._labels.get(name.partition("@")[0])
        return "" if found is None else found.text

    def named(self, name: str) -> str:
        """The name and, if there is one, the label, for people to read."""
        text = self.text(name)
        return f'{name} "{text}"' if text else name

    def texts(self) -> dict[str, str]:
        """All texts by name, as pages have them."""
        return {name: label.text for name, label in self.items()}

    def find(self, words: str) -> list[str]:
        """Names whose label or note has these words in it, in upper or lower case."""
        words = words.casefold()
        found = ((name, f"{label.text}\n{label.note}".casefold()) for name, label in self.items())
        return [name for name, text in found if words in text]

    def __rich__(self) -> Group:
        total = sum(self.sizes.values())
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("label", overflow="fold")
        table.add_column("source", overflow="fold")
        table.add_column("score", justify="right")
        for name, label in list(self.items())[:_SHOWN]:
            score = "" if label.score is None else f"{label.score:.2f}"
            table.add_row(*map(Text, (name, label.text, label.source, score)))
        more = f"The first {_SHOWN} of them." if len(self) > _SHOWN else ""
        parts = [table] * bool(self) + [Text(more)] * bool(more)
        return titled(f"{len(self):,} of {total:,} are labelled", *parts)

    # ------------------------------------------------------------------ files

    @property
    def record(self) -> LabelsRecord:
        """As JSON-serialisable values."""
        return LabelsRecord(fingerprint=self.fingerprint, sizes=self.sizes, labels=dict(self))

    @classmethod
    def of(cls, record: LabelsRecord) -> Labels:
        """The labels of a `record`; an `InputError` if it names what there is not."""
        labels = cls(record.fingerprint, record.sizes)
        labels.update(record.labels)
        return labels

    def require(self, fingerprint: str) -> None:
        """Refuse another decomposition than that of the labels, by its `fingerprint`.

        Raises:
            ArtefactError: If they differ.
        """
        if fingerprint != self.fingerprint:
            where = "" if self.path is None else f"{self.path}: "
            raise ArtefactError(
                f"{where}these labels are of another decomposition: their fingerprint is "
                f"{self.fingerprint[:12]}..., this decomposition's is {fingerprint[:12]}... "
                "Subcomponents of one number are other ones there. Move them away, or label anew."
            )

    def save(self, path: str | Path | None = None) -> Path:
        """Write a JSON file, whole or not at all.

        Args:
            path: A file, or the folder of the saved decomposition, beside which they then are.
                `None`: where they came from.

        Raises:
            ArtefactError: If it cannot be written, or what is there is of another decomposition.
            InputError: If they came from nowhere and no path is given.
        """
        if path is None and self.path is None:
            raise InputError(
                "these labels came from no file; give the path of one, or of the folder of the "
                "saved decomposition."
            )
        path = _file(path or self.path or "")
        if path != self.path and path.is_file():
            Labels.load(path).require(self.fingerprint)
        storage.write_json(path, self.record.model_dump(mode="json", exclude_defaults=True) | _KIND)
        self.path = path
        return path

    @classmethod
    def load(cls, path: str | Path) -> Labels:
        """Read what `save` wrote, or somebody edited.

        Raises:
            ArtefactError: If it is missing or damaged; the message says where.
        """
        path = _file(path)
        try:
            labels = cls.of(LabelsRecord.model_validate(storage.read_json(path)))
        except (ValidationError, InputError) as error:
            raise ArtefactError(f"{path}: these are no labels: {_problem(error)}") from None
        labels.path = path
        return labels

    def join(self, path: str | Path) -> Path:
        """Keep these labels in a file, or beside a decomposition, from now on; see `save`.

        If there are labels already, those of names that have none here are added to these.

        Raises:
            ArtefactError: If what is there is damaged, or of another decomposition.
        """
        path = _file(path)
        if path.is_file():
            other = Labels.load(path)
            other.require(self.fingerprint)
            self.sizes = other.sizes | self.sizes
            self._labels = other._labels | self._labels
        return self.save(path)

    def to_csv(self, path: str | Path) -> Path:
        """Write a table with the columns `name`, `text`, `note`, `source`, `score`."""
        columns = ("name", *Label.model_fields)
        rows = [{"name": name} | label.model_dump() for name, label in self.items()]
        writer = csv.DictWriter(made := io.StringIO(), columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        storage.write_text(Path(path), made.getvalue())
        return Path(path)

    def read(self, path: str | Path) -> int:
        """Add the labels of a file, all of them or, with an error, none; returns how many.

        Args:
            path: `.csv` with a column `name` and those of `Label`, of which only `text` must be
                there; or JSON: labels of this decomposition, or just a text by name.

        Raises:
            ArtefactError: If it is missing, damaged, or of another decomposition.
            InputError: If it names what there is not, or a label cannot be one.
        """
        path = Path(path)
        if path.suffix.lower() == ".csv":
            found = _from_csv(path)
        elif (content := storage.read_json(path)).get("kind") == "labels":
            other = Labels.load(path)
            other.require(self.fingerprint)
            found = dict(other)
        else:
            found = {name: _label({"text": text}, name) for name, text in content.items()}
        for name in found:
            self.check(name)
        self._labels.update(found)
        return len(found)


_KIND = LabelsRecord().model_dump(include={"kind", "format_version"})


def _file(path: str | Path) -> Path:
    """The file that is meant: that beside a decomposition, if its folder is."""
    path = Path(path)
    return storage.folder_of(path, "decomposition") / FILE if path.is_dir() else path


def _label(given: Mapping[str, Any], name: str) -> Label:
    try:
        return Label.model_validate(given)
    except ValidationError as error:
        raise InputError(f"the label of {name!r}: {_problem(error)}") from None


def _problem(error: ValidationError | InputError) -> str:
    if isinstance(error, InputError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg'].lower()}."


def _from_csv(path: Path) -> dict[str, Label]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # as spreadsheets write it
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error}).") from None
    rows = csv.DictReader(io.StringIO(text))
    if not {"name", "text"} <= {*(rows.fieldnames or ())}:
        raise InputError(
            f"{path}: its columns are {rows.fieldnames}; expected 'name', 'text' and, if you "
            "like, 'note', 'source' and 'score', in the first line."
        )
    known = Label.model_fields
    return {
        row["name"]: _label({key: row[key] for key in known if row.get(key)}, row["name"])
        for row in rows
    }
