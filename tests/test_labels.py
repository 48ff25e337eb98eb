"""Labels: a mapping bound to its decomposition, on disk, and on everything that names one."""

import json

import pytest
import torch

import vpd_lens
from tests.conftest import tiny_bridge
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.decomposition.labels import Label, Labels
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.interop.graph_json import graph_json
from vpd_lens.viz import explain_page, graph_page, harvest_page

NAME, OTHER, TEXT = "blocks.1.mlp.out:2", "blocks.0.attn.q:3", "reads </script> [bold]"
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model():
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6)
    model.vpd.trained_steps = 1  # or everything would warn
    return model


@pytest.fixture
def labelled(model):
    model.vpd.labels.clear()
    model.vpd.labels[NAME] = TEXT
    model.vpd.labels.set(OTHER, "second", "a note", "gpt", 0.5)
    yield model
    model.vpd.labels.clear()


@pytest.fixture(scope="module")
def harvested(model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(29, (8, 12), generator=generator)
    return vpd_lens.harvest(model, tokens, n_batches=2, batch_size=4, threshold=0.0, progress=False)


def test_a_mapping_in_the_order_of_the_sites(labelled):
    labels = labelled.vpd.labels
    labels["blocks.0.attn.q:1"] = "  two\n lines "
    assert list(labels) == ["blocks.0.attn.q:1", OTHER, NAME]
    assert labels["blocks.0.attn.q:1"] == Label(text="two lines")
    assert labels.find("NOTE") == [OTHER]
    assert labels.named(f"{OTHER}@5") == f'{OTHER}@5 "second"'
    assert labels.named("blocks.0.attn.q:5") == "blocks.0.attn.q:5"
    assert "3 of " in str(labels)
    assert TEXT in str(labels)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("blocks.0.attn.k:99", "x", "has 6, numbered from 0"),
        ("blocks.0.attn.kk:1", "x", "did you mean blocks.0.attn.k?"),
        ("blocks.0.attn.k:01", "x", "nothing to label"),
        ("blocks.0.attn.k", "x", "nothing to label"),
        ("blocks.0.attn.k:1", " ", "at least 1 character"),
    ],
)
def test_unknown_names_and_no_texts_are_refused(labelled, name, text, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        labelled.vpd.labels[name] = text
    assert len(labelled.vpd.labels) == 2


def test_they_are_saved_beside_the_decomposition_and_follow_a_rounding(labelled, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        labelled.vpd.save(tmp_path / "saved", dtype=dtype)
        again = vpd_lens.load(tmp_path / "saved", tiny_bridge()).vpd
        assert dict(again.labels) == dict(labelled.vpd.labels)
    again.labels[NAME] = "edited"
    again.labels.save()
    file = tmp_path / "saved" / "labels.json"
    assert vpd_lens.load(tmp_path / "saved", tiny_bridge()).vpd.labels.text(NAME) == "edited"
    file.write_text(file.read_text().replace("edited", "by an editor"))  # no checksum
    assert vpd_lens.load(tmp_path / "saved", tiny_bridge()).vpd.labels.text(NAME) == "by an editor"
    with pytest.raises(ArtefactError, match="of another decomposition"):
        labelled.vpd.labels.save(tmp_path / "saved")  # rounded, so another one


def test_an_interrupted_write_leaves_the_file(labelled, tmp_path, monkeypatch):
    path = labelled.vpd.labels.save(tmp_path / "labels.json")
    before = path.read_bytes()
    monkeypatch.setattr("vpd_lens.storage._flush", lambda _: 1 / 0)
    labelled.vpd.labels[NAME] = "lost"
    with pytest.raises(ZeroDivisionError):
        labelled.vpd.labels.save()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_those_of_another_decomposition_are_refused(labelled, tmp_path):
    path = labelled.vpd.labels.save(tmp_path / "labels.json")
    other = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6, seed=1).vpd
    for attempt in (
        lambda: other.labels.read(path),
        lambda: setattr(other, "labels", Labels.load(path)),
    ):
        with pytest.raises(ArtefactError, match="another decomposition"):
            attempt()
    assert not other.labels


def test_after_a_change_of_the_decomposition_they_are_gone():
    vpd = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6).vpd
    vpd.labels[NAME] = "was"
    with torch.no_grad():
        vpd.subcomponents.u[0].mul_(2)
    with pytest.warns(UserWarning, match="has changed since 1 of its"):
        assert not vpd.labels
    vpd.labels[NAME] = "is"
    assert vpd.labels.text(NAME) == "is"


def test_tables_go_out_and_come_in_whole(labelled, tmp_path):
    labels = labelled.vpd.labels
    table = labels.to_csv(tmp_path / "labels.csv")
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({NAME: "from json"}))
    bad = tmp_path / "bad.csv"
    bad.write_text(f"name,text\n{OTHER},fine\nblocks.9.mlp.in:1,unknown\n")
    before = dict(labels)
    labels.clear()
    assert labels.read(table) == 2
    assert dict(labels) == before
    with pytest.raises(InputError, match=r"blocks\.9"):
        labels.read(bad)
    assert dict(labels) == before
    assert labels.read(plain) == 1
    assert labels.text(NAME) == "from json"
    bad.write_text("subcomponent,label\n")
    with pytest.raises(InputError, match="expected 'name', 'text'"):
        labels.read(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "missing or damaged"), ('{"kind": "labels", "labels": 3}', "no labels: labels is 3"),
     ('{"sizes": {"a": 1}, "labels": {"a:1": {"text": "x"}}}', "numbered from 0")],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(ArtefactError, match=message) as error:
        Labels.load(path)
    assert str(path) in str(error.value)


def test_all_that_is_printed_and_written_of_a_subcomponent_has_its_label(
    labelled, harvested, tmp_path
):
    found = vpd_lens.explain(labelled, TOKENS, harvest=harvested, threshold=0.0)
    assert found.cards[NAME].label == TEXT
    assert TEXT in str(found.cards[NAME])
    like = next(other.name for other in found.cards[NAME].alike)
    labelled.vpd.labels[like] = "neighbour"
    assert f'{like} "neighbour"' in " ".join(str(found.cards[NAME]).split())
    assert explain_page.payload(found)["labels"][NAME] == TEXT
    assert "3 subcomponents are labelled" in str(labelled.vpd.__rich__().renderables[2])

    graph = vpd_lens.attribute(labelled, TOKENS, 5, progress=False)
    graph.save(tmp_path / "graph")
    for one in (graph, AttributionGraph.load(tmp_path / "graph")):
        assert graph_page.payload(one)["labels"][NAME] == TEXT
        clerps = [node["clerp"] for node in graph_json(one, "site", None)["nodes"]]
        assert any(clerp.startswith(f"{TEXT} [{NAME} (") for clerp in clerps)
        labels = one.to_networkx().nodes(data="label")
        assert {text for node, text in labels if node.startswith(f"{NAME}@")} == {TEXT}
        assert not labels["embed@0"]

    assert harvested.labels is labelled.vpd.labels
    assert repr(harvested).endswith(", 3 labelled)")
    harvest_page.write(harvested, tmp_path / "pages")
    page = (tmp_path / "pages" / "blocks.1.mlp.out.html").read_text()
    assert "reads \\u003c/script\\u003e [bold]" in page
    harvested.save(tmp_path / "harvest")
    assert Harvest.load(tmp_path / "harvest", labelled.vpd).labels is labelled.vpd.labels
    alone = Harvest.load(tmp_path / "harvest").labels
    assert alone.fingerprint == labelled.vpd.labels.fingerprint
    assert alone.sizes == labelled.vpd.labels.sizes


def test_tables_of_attention_have_labels(labelled):
    heads = vpd_lens.attention(labelled)
    static = heads.static(0)
    name = static.top(1)[0].first
    labelled.vpd.labels[name] = "looks back"
    on = heads.on(torch.tensor(TOKENS))
    for table in (static, on.contributions(0, 0, 5, 3)):
        assert ('"looks back"' in " ".join(str(table).split())) == (name in str(table))
    assert "looks back" in str(static)
