"""The artefact format: what is written comes back, and whatever is wrong is said."""

import json
import os
import stat
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from vpd_lens import storage
from vpd_lens.errors import ArtefactError, InputError


class Note(storage.Record):
    kind: ClassVar[str] = "note"

    text: str
    numbers: tuple[float, ...] = ()
    settings: dict = Field(default_factory=dict)


class Other(storage.Record):
    kind: ClassVar[str] = "other"


TENSORS = {"one": {"a": torch.arange(6.0).view(2, 3)}, "two": {"b": torch.ones(2).bfloat16()}}
NOTE = Note(text="höhe", numbers=(0.1, float("nan"), float("inf")), settings={"x": [1, None]})


@pytest.fixture
def folder(tmp_path):
    return storage.write(tmp_path / "note", NOTE, TENSORS, beside)


def beside(folder):
    (folder / "README.md").write_text("for people")
    (folder / "sub").mkdir()
    (folder / "sub" / "vocabulary.txt").write_text("a b c")


def contents(folder):
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_is_written_comes_back(folder):
    artefact = storage.read(folder, Note)
    assert repr(artefact.record) == repr(NOTE)  # NaN is not equal to itself
    for name, part in TENSORS.items():
        back = artefact.tensors(name)
        assert back.keys() == part.keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in part.items())
    assert artefact.file("sub/vocabulary.txt").read_text() == "a b c"
    assert set(artefact.files) == {"one.safetensors", "two.safetensors", "sub/vocabulary.txt"}
    modes = {stat.S_IMODE(f.stat().st_mode) for f in folder.rglob("*") if f.is_file()}
    assert len(modes) == 1  # who may read the record may read the tensors


def test_the_card_may_be_edited_and_other_files_put_beside(folder):
    (folder / "README.md").write_text("edited")
    (folder / ".gitattributes").write_text("")
    storage.read(folder, Note).tensors("one")


def test_shared_memory_is_written_once_for_each_name(tmp_path):
    base = torch.arange(8.0)
    parts = {"whole": base, "half": base[:4], "again": base}
    back = storage.read(storage.write(tmp_path / "x", NOTE, {"t": parts}), Note).tensors("t")
    assert all(torch.equal(back[name], tensor) for name, tensor in parts.items())


@pytest.mark.parametrize("name", ["one.safetensors", "two.safetensors", "sub/vocabulary.txt"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damage_to_any_file_is_noticed_and_named(folder, name, damage):
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content) if damage == "changed" else bytes(content[:-1]))
    with pytest.raises(ArtefactError, match=name):
        storage.read(folder, Note).file(name)


def rewritten(folder, digest=True, **changes):
    """The record's file with other fields, as a careful hand would change them."""
    content = json.loads((folder / storage.RECORD).read_text())
    content.update(changes)
    content.pop("sha256")
    content["sha256"] = storage._digest(content) if digest else "0" * 64
    (folder / storage.RECORD).write_text(json.dumps(content))


def test_a_list_of_checksums_must_be_complete(folder):
    """B12's whole kind: an empty list of checksums checks nothing."""
    tensors = load_file(folder / "one.safetensors")
    tensors["a"][0, 0] += 1
    save_file(tensors, folder / "one.safetensors")
    rewritten(folder, files={})
    with pytest.raises(ArtefactError, match=r"one\.safetensors: record\.json lists no checksum"):
        storage.read(folder, Note)
    (folder / "one.safetensors").unlink()
    (folder / "two.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"one\.safetensors: record\.json lists no checksum"):
        storage.read(folder, Note).tensors("one")
    rewritten(folder, files={"three.safetensors": "0" * 64})
    with pytest.raises(ArtefactError, match=r"three\.safetensors: missing"):
        storage.read(folder, Note)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99, which is newer"),
        ({"format_version": None}, "format version None"),
        ({"kind": "other"}, "there is no note in it. It holds a other"),
        ({"record": {"text": "a", "shiny": 1}}, "shiny: there is no such field"),
        ({"record": {}}, "text: the field is missing"),
        ({"record": {"text": 3}}, "text: Input should be a valid string"),
        ({"record": [3]}, "record: Input should be"),
        ({"digest": False}, "does not match its own checksum"),
    ],
)
def test_a_changed_record_is_noticed(folder, changes, message):
    rewritten(folder, **changes)
    with pytest.raises(ArtefactError, match=message):
        storage.read(folder, Note)


@pytest.mark.parametrize("name", ["sha256", "files", "record", "vpd_lens_version"])
def test_a_missing_part_of_the_record_is_noticed(folder, name):
    content = json.loads((folder / storage.RECORD).read_text())
    del content[name]
    (folder / storage.RECORD).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"record\.json"):
        storage.read(folder, Note)


def test_what_is_not_there_or_something_else_is_said(folder, tmp_path):
    with pytest.raises(ArtefactError, match="there is no such directory"):
        storage.read(tmp_path / "nowhere", Note)
    with pytest.raises(ArtefactError, match=r"there is no note in it\.$"):
        storage.read(tmp_path, Note)
    with pytest.raises(ArtefactError, match=r"there is no other in it\. It holds a note"):
        storage.read(folder, Other)
    (folder / storage.RECORD).write_text("{")
    with pytest.raises(ArtefactError, match=r"record\.json: missing or damaged"):
        storage.read(folder, Note)
    (folder / storage.RECORD).write_bytes(b"\xff\xfe")
    with pytest.raises(ArtefactError, match=r"record\.json: missing or damaged"):
        storage.read(folder, Note)


def test_tensors_of_other_names_or_shapes_are_noticed(folder):
    artefact = storage.read(folder, Note)
    assert artefact.tensors("one", {"a": (2, 3)})
    for shapes, message in (
        ({"a": (3, 2)}, r"'a' is \[2, 3\], expected \[3, 2\]"),
        ({"a": (2, 3), "b": ()}, r"'b' is missing, expected \[\]"),
        ({}, r"'a' is \[2, 3\], expected no such tensor"),
    ):
        with pytest.raises(ArtefactError, match=message):
            artefact.tensors("one", shapes)


def test_replacing_is_atomic_and_only_of_the_same_kind(folder, tmp_path):
    before = contents(folder)

    def fail(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtefactError, match=r"note: cannot be written \(No space left"):
        storage.write(folder, NOTE, TENSORS, fail)
    with pytest.raises(InputError, match="cannot be written as JSON"):
        storage.write(folder, Note(text="x", settings={"f": fail}), TENSORS)
    with pytest.raises(ArtefactError, match="something else is there"):
        storage.write(folder, Other(), TENSORS)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(ArtefactError, match="something else is there"):
        storage.write(tmp_path / "thesis", NOTE, TENSORS)
    with pytest.raises(ArtefactError, match="something else is there"):
        storage.write(tmp_path / "thesis" / "chapter1.tex", NOTE, TENSORS)
    assert contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note", "thesis"]
    storage.write(folder, Note(text="new"), {})
    assert storage.read(folder, Note).record.text == "new"
    (folder / storage.RECORD).write_text("{")  # a damaged one may be replaced
    storage.write(folder, Note(text="newer"), {})
    assert storage.read(folder, Note).record.text == "newer"


def test_a_crash_between_the_two_renames_loses_nothing(folder):
    folder.rename(folder.with_name(".note.old"))
    assert storage.read(folder, Note).record.text == NOTE.text
    storage.write(folder, NOTE, TENSORS)
    assert [p.name for p in folder.parent.iterdir()] == ["note"]


def test_a_full_or_read_only_disk_leaves_everything_as_it_was(small_disk):
    kept = storage.write(small_disk / "kept", NOTE, TENSORS)
    before = contents(small_disk)
    large = {"large": {"x": torch.zeros(40_000)}}
    for path in (kept, small_disk / "new" / "deeper"):
        with pytest.raises(ArtefactError, match="cannot be written"):
            storage.write(path, NOTE, large)
    with pytest.raises(ArtefactError, match="cannot be written"):
        storage.write_text(small_disk / "page.html", "x" * 200_000)
    assert contents(small_disk) == before
    os.system(f"mount -o remount,ro {small_disk}")
    for path in (kept, small_disk / "new2"):
        with pytest.raises(ArtefactError, match="Read-only file system"):
            storage.write(path, NOTE, TENSORS)
    with pytest.raises(ArtefactError, match="Read-only file system"):
        storage.write_text(small_disk / "page.html", "x")
    assert contents(small_disk) == before


def test_failed_writes_are_errors_of_the_library(tmp_path, monkeypatch):
    """The same without the right to mount: what the operating system says, said with a remedy."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        storage.write(tmp_path / "x", NOTE, TENSORS)
    with pytest.raises(ArtefactError, match="No space left on device"):
        storage.write_text(tmp_path / "x.txt", "x")
    monkeypatch.undo()
    long = tmp_path / ("x" * 300)
    with pytest.raises(ArtefactError, match="File name too long"):
        storage.write(long, NOTE, TENSORS)
    with pytest.raises(ArtefactError, match="File name too long"):
        storage.write_text(long, "x")
    with pytest.raises(ArtefactError, match="no such directory"):
        storage.read(long, Note)
    assert list(tmp_path.iterdir()) == []


def test_hashing_reads_block_by_block(tmp_path, monkeypatch):
    import hashlib

    file = tmp_path / "x"
    file.write_bytes(os.urandom(3 * 64 + 5))
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "read_bytes", None)
    assert storage.file_hash(file, block_size=64) == expected
