"""What leaves an attribution graph: files, viewers' formats, networkx, the summary."""

import html
import json
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console

from tests.conftest import tiny_bridge
from vpd_lens import storage
from vpd_lens.analysis.circuits.attribute import attribute
from vpd_lens.analysis.circuits.graph import AttributionGraph, GraphRecord
from vpd_lens.analysis.circuits.summary import summary
from vpd_lens.analysis.circuits.tables import KINDS, AttentionPair, Edges, Nodes
from vpd_lens.analysis.circuits.targets import Direction, LogitDifference, Output, TopTokens
from vpd_lens.decomposition.attach import attach
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.interop import neuronpedia
from vpd_lens.interop.circuit_tracer import to_circuit_tracer
from vpd_lens.interop.graph_json import numbering
from vpd_lens.interop.networkx import to_networkx
from vpd_lens.interop.neuronpedia import to_neuronpedia

DATA = Path(__file__).parent / "data"
GRAPH_SCHEMA = json.loads((DATA / "neuronpedia_graph-schema.json").read_text())
FEATURE_SCHEMA = json.loads((DATA / "neuronpedia_feature-details-schema.json").read_text())

STRINGS = ("<b>", " fo\n", "[red]", ' "')
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.out")


def places(n_blocks):
    blocks = [
        f"blocks.{i}.{name}"
        for i in range(n_blocks)
        for name in ("ln1", *MATRICES[:4], "ln2", "mlp.in", "mlp.act", "mlp.out")
    ]
    return ("embed", *blocks, "ln_final", "unembed", "output")


def some_graph(n_blocks=2, seed=0):
    """A random graph with nodes of all kinds, in the order of the forward pass."""
    names, rows = places(n_blocks), []
    for position in range(len(STRINGS)):
        rows += [
            ("embedding", "embed", position, 7 * position),
            ("position", "embed", position, -1),
        ]
    for name in names[1:-1]:
        for position in range(len(STRINGS)):
            rows.append(("bias", name, position, -1))
            if name.rpartition("blocks.")[2][2:] in MATRICES:
                rows += [("subcomponent", name, position, index) for index in (0, 5)]
                rows += [("error", name, position, -1), ("delta", name, position, -1)]
    rows += [("output", "output", 3, index) for index in (11, 2, -1, -1)]
    kinds, where, positions, indices = zip(*rows, strict=True)
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    importance = torch.rand(n, generator=generator)
    importance[-4:] = torch.tensor([0.5, 0.25, 0.125, 1.0])
    nodes = Nodes(
        names,
        torch.tensor([KINDS.index(kind) for kind in kinds]),
        torch.tensor([names.index(name) for name in where]),
        torch.tensor(positions),
        torch.tensor(indices),
        torch.randn(n, generator=generator),
        importance,
    )
    chosen = torch.rand(n, n, generator=generator).triu(1) > 0.9
    chosen &= nodes.of_kind("subcomponent", "output")[None, :] & ~nodes.of_kind("output")[:, None]
    source, target = chosen.nonzero(as_tuple=True)
    weight = torch.randn(len(source), generator=generator)
    outputs = [
        Output("a", 3, torch.randn(8, generator=generator), 0.1, {11: 1.0}, None, 0.5),
        Output("\n", 3, torch.randn(8, generator=generator), 0.0, {2: 1.0}, None, 0.25),
        Output("a - b", 3, torch.randn(8, generator=generator), 0.3, {11: 1.0, 2: -1.0}, None, 0.1),
        Output("direction", 3, torch.randn(8, generator=generator), 0.0, {}, 0, 1.0),
    ]
    return AttributionGraph(
        tokens=(0, 7, 14, 21),
        strings=STRINGS,
        nodes=nodes,
        edges=Edges(source.int(), target.int(), weight),
        outputs=tuple(outputs),
        settings={"threshold": 0.1, "frozen": True, "decomposition": "abc"},
    )


@pytest.fixture
def graph():
    return some_graph()


@pytest.fixture(scope="module")
def real_graph():
    """A graph of a tiny model with biases and position embeddings, all matrices decomposed."""
    model = tiny_bridge()
    attach(model, sites="all", n_subcomponents=4)
    targets = [TopTokens(), LogitDifference(3, 4), Direction(torch.ones(16), "d", layer=0)]
    with pytest.warns(UserWarning, match="untrained"):
        return attribute(model, [3, 1, 4, 1, 5], targets, progress=False)


def read(path):
    return json.loads(Path(path).read_text())


def parts(value):
    """A graph as nested plain values and tensors, every field of every dataclass in it."""
    if is_dataclass(value):
        return {f.name: parts(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return dict(enumerate(map(parts, value)))
    return value


def same(a, b):
    a, b = (parts(value) if is_dataclass(value) else value for value in (a, b))
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        assert a == b


# ------------------------------------------------------------------------- saving


def test_a_saved_graph_comes_back_bit_for_bit(graph, real_graph, tmp_path):
    for number, original in enumerate((graph, real_graph, graph.pruned(0.5))):
        path = original.save(tmp_path / str(number))
        same(AttributionGraph.load(path), original)


def test_a_graph_without_edges_is_saved(graph, tmp_path):
    empty = graph.filtered(torch.zeros(graph.n_nodes, dtype=torch.bool))
    same(AttributionGraph.load(empty.save(tmp_path / "g")), empty)


def test_the_circuit_is_saved(graph, tmp_path):
    from vpd_lens.analysis.circuits import CircuitReport

    p = {"ci": (0.1, 0.7)}
    graph.circuit = CircuitReport(
        targets=("a", "b"),
        method="ci",
        nodes=3,
        nodes_before=5.5,
        nodes_by_site={"blocks.0.mlp.in": 3},
        probability=p,
        probability_before=p,
    )
    path = graph.save(tmp_path / "g")
    assert AttributionGraph.load(path).circuit == graph.circuit


def test_saving_again_replaces(graph, real_graph, tmp_path):
    graph.save(tmp_path / "g")
    real_graph.save(tmp_path / "g")
    same(AttributionGraph.load(tmp_path / "g"), real_graph)


def test_what_json_cannot_hold_is_refused_and_leaves_nothing(graph, tmp_path):
    graph.settings["tensor"] = torch.zeros(2)
    with pytest.raises(InputError, match="cannot be written as JSON"):
        graph.save(tmp_path / "g")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["nodes.kind", "edges.weight", "outputs.1"])
def test_tensors_that_do_not_fit_the_record_are_refused(graph, tmp_path, monkeypatch, missing):
    path = graph.save(tmp_path / "g")
    tensors = storage.read(path, GraphRecord).tensors("graph")
    del tensors[missing]
    monkeypatch.setattr(storage.Artefact, "tensors", lambda artefact, name: tensors)
    with pytest.raises(ArtefactError, match="do not fit its record"):
        AttributionGraph.load(path)


def test_graphs_of_version_0_1_load():
    graph = AttributionGraph.load(DATA / "v01" / "graph")
    assert [output.token_id for output in graph.outputs][:2] == [2, 12]
    assert graph.nodes.names()[-13].startswith("output:2@3")
    assert {output.weight for output in graph.outputs} == {1.0}  # which that version lost
    pruned = AttributionGraph.load(DATA / "v01" / "circuit_graph")
    assert pruned.circuit.nodes == pruned.nodes.of_kind("subcomponent").sum() == 31
    assert pruned.to_networkx().number_of_edges() == pruned.n_edges


# ----------------------------------------------------------------------- networkx


def test_networkx_has_all_columns(graph, real_graph):
    for g in (graph, real_graph):
        result = to_networkx(g)
        assert list(result.nodes) == g.nodes.names()
        assert result.number_of_edges() == g.n_edges
        influence = g.influence().nodes
        for node, name in enumerate(g.nodes.names()):
            position = int(g.nodes.position[node])
            assert result.nodes[name] == {
                "kind": KINDS[int(g.nodes.kind[node])],
                "site": g.nodes.places[int(g.nodes.place[node])],
                "position": position,
                "token": g.strings[position],
                "index": int(g.nodes.index[node]),
                "activation": float(g.nodes.activation[node]),
                "importance": float(g.nodes.importance[node]),
                "influence": float(influence[node]),
            }
        columns = (g.edges.source, g.edges.target, g.edges.weight)
        for source, target, weight in zip(*(c.tolist() for c in columns), strict=True):
            assert result.edges[g.nodes.name(source), g.nodes.name(target)]["weight"] == weight


# ------------------------------------------------------------------ viewers' JSON

NODE_TYPES = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
    "influence": float,
    "activation": float,
}
METADATA_TYPES = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"


def cantor_unpair(z):
    """As the viewers do, in floating point."""
    w = math.floor((math.sqrt(8 * z + 1) - 1) / 2)
    y = z - (w * w + w) // 2
    return w - y, y


def check_viewer_rules(data, graph):
    """What circuit-tracer's models and both viewers' scripts require beyond the schema."""
    for key, kind in METADATA_TYPES.items():
        assert type(data["metadata"][key]) is kind
    assert re.fullmatch(r"[a-zA-Z0-9_.-]+", data["metadata"]["slug"])
    assert data["metadata"]["prompt_tokens"] == list(graph.strings)
    assert data["metadata"]["schema_version"] == 1
    assert data["qParams"]["supernodes"] == data["qParams"]["pinnedIds"] == []
    assert data["qParams"]["linkType"] == "both"
    nodes = data["nodes"]
    for node in nodes:
        for key, kind in NODE_TYPES.items():
            assert type(node[key]) is kind, (key, node)
        assert node["layer"] == "E" or re.fullmatch(r"\d+", node["layer"])
        assert 0 <= node["ctx_idx"] < len(graph.tokens)
        assert 0 <= node["influence"] <= 1 + 1e-6
        if node["feature_type"] == "logit":
            assert 0 <= float(node["clerp"].split("(p=")[1].split(")")[0]) <= 1
        if node["feature_type"] == FEATURE:
            layer, number = cantor_unpair(node["feature"])
            assert node["layer"] == str(layer)
            assert node["node_id"] == f"{layer}_{number}_{node['ctx_idx']}"
        if node["feature_type"] == "embedding":
            assert node["layer"] == "E"
            assert node["feature"] == node["ctx_idx"]
    for key in ("node_id", "jsNodeId"):
        assert len({node[key] for node in nodes}) == len(nodes)
    # The viewers take nodes with the same three as one, and may drop them.
    assert len({(n["layer"], n["feature"], n["ctx_idx"]) for n in nodes}) == len(nodes)
    assert sum(node["is_target_logit"] for node in nodes) == 1
    ids = {node["node_id"] for node in nodes}
    assert data["qParams"]["clickedId"] in ids
    inner = {int(n["layer"]) for n in nodes if n["layer"] != "E" and n["feature_type"] != "logit"}
    top = {int(n["layer"]) for n in nodes if n["feature_type"] == "logit"}
    assert len(top) == 1
    assert min(inner) >= 0
    assert max(inner) < min(top)
    for link in data["links"]:
        assert set(link) == {"source", "target", "weight"}
        assert type(link["weight"]) is float
        assert link["source"] in ids
        assert link["target"] in ids


def check_content(data, graph):
    """The numbers are those of the graph."""
    nodes, ids = data["nodes"], [node["node_id"] for node in data["nodes"]]
    assert len(nodes) == graph.n_nodes
    assert [n["influence"] for n in nodes] == graph.influence().cumulative.tolist()
    assert [n["activation"] for n in nodes] == graph.nodes.activation.tolist()
    assert [n["ctx_idx"] for n in nodes] == graph.nodes.position.tolist()
    number = {name: i for i, name in enumerate(ids)}
    assert [number[link["source"]] for link in data["links"]] == graph.edges.source.tolist()
    assert [number[link["target"]] for link in data["links"]] == graph.edges.target.tolist()
    assert [link["weight"] for link in data["links"]] == graph.edges.weight.tolist()
    types = {
        "embedding": "embedding",
        "position": "bias",
        "bias": "bias",
        "subcomponent": FEATURE,
        "error": ERROR,
        "delta": ERROR,
        "output": "logit",
    }
    for i, node in enumerate(nodes):
        kind, place = KINDS[int(graph.nodes.kind[i])], graph.nodes.places[int(graph.nodes.place[i])]
        assert node["feature_type"] == types[kind]
        if kind == "subcomponent":
            sign = "-" if graph.nodes.activation[i] < 0 else "+"
            assert node["clerp"] == f"{place}:{int(graph.nodes.index[i])} ({sign})"
        elif kind in ("error", "delta", "bias", "position"):
            assert node["clerp"] == f"{place} {kind}"


@pytest.mark.parametrize("axis", ["site", "block"])
def test_circuit_tracer_files_are_valid(graph, real_graph, tmp_path, axis):
    for slug, g in (("a", graph), ("b.1", real_graph), ("c", real_graph.pruned(0.6, 0.9))):
        data = read(to_circuit_tracer(g, tmp_path, slug, axis=axis))
        jsonschema.validate(data, GRAPH_SCHEMA)
        check_viewer_rules(data, g)
        check_content(data, g)
        assert data["metadata"]["transcoder_list"] == []
        assert data["metadata"]["node_threshold"] == 0.8
        side = read(tmp_path / f"{slug}.vpd.json")
        assert list(side["nodes"]) == [node["node_id"] for node in data["nodes"]]
        assert [r["name"] for r in side["nodes"].values()] == g.nodes.names()
        assert [r["activation"] for r in side["nodes"].values()] == g.nodes.activation.tolist()
        assert side["settings"] == g.settings
    index = read(tmp_path / "graph-metadata.json")
    assert [entry["slug"] for entry in index["graphs"]] == ["a", "b.1", "c"]


def test_neuronpedia_files_are_valid(graph, real_graph, tmp_path):
    for g in (graph, real_graph):
        path = to_neuronpedia(
            g, tmp_path / "g.json", "gpt2-small", "my-graph", feature_json_base_url="https://x.y/z"
        )
        data = read(path)
        jsonschema.validate(data, GRAPH_SCHEMA)
        check_viewer_rules(data, g)
        check_content(data, g)
        assert data["metadata"]["scan"] == "gpt2-small"
        assert data["metadata"]["generation_settings"] == g.settings
        layers = {n["layer"] for n in data["nodes"] if n["feature_type"] != "logit"}
        assert layers == {"E", "0", "1"}


def test_layers_are_matrices_or_blocks():
    by_site, by_block = numbering(places(2), "site"), numbering(places(2), "block")
    matrices = [f"blocks.{i}.{name}" for i in range(2) for name in MATRICES] + ["unembed"]
    assert [by_site.layer[name] for name in matrices] == list(range(13))
    assert [by_site.number("subcomponent", name, 5) for name in matrices] == [5] * 13
    assert by_site.layer["blocks.1.ln1"] == by_site.layer["blocks.1.attn.q"]
    assert by_site.layer["blocks.1.mlp.act"] == by_site.layer["blocks.1.mlp.out"]
    assert by_site.layer["ln_final"] == by_site.layer["unembed"]
    assert {by_block.layer[name] for name in matrices[:6]} == {0}
    assert by_block.layer["unembed"] == by_block.layer["ln_final"] == 1
    numbers = [by_block.feature(name, index) for name in matrices for index in range(50)]
    assert len(set(numbers)) == len(numbers)
    far = [by_site.feature(matrices[layer], 10**6) for layer in (0, 12)]
    assert [cantor_unpair(number) for number in far] == [(0, 10**6), (12, 10**6)]


def test_a_feature_has_one_number_in_all_graphs_of_a_model(graph, tmp_path):
    whole = read(to_circuit_tracer(graph, tmp_path, "a"))["nodes"]
    pruned = read(to_circuit_tracer(graph.pruned(0.5), tmp_path, "b"))["nodes"]
    assert len(pruned) < len(whole)
    features = {n["clerp"]: n["feature"] for n in whole if n["feature_type"] == FEATURE}
    for node in pruned:
        if node["feature_type"] == FEATURE:
            assert features[node["clerp"]] == node["feature"]


def test_a_slug_is_replaced_and_others_stay(graph, tmp_path):
    other = {"slug": "foreign", "scan": "gemma", "prompt": "x", "extra": 1}
    (tmp_path / "graph-metadata.json").write_text(json.dumps({"graphs": [other]}))
    to_circuit_tracer(graph, tmp_path, "a")
    to_circuit_tracer(graph, tmp_path, "a", node_threshold=None)
    first, second = read(tmp_path / "graph-metadata.json")["graphs"]
    assert first == other
    assert second == read(tmp_path / "a.json")["metadata"]
    assert second["node_threshold"] is None


class Cards:
    """A harvest that knows every second subcomponent."""

    def check(self, fingerprint):
        if fingerprint != "abc":
            raise ArtefactError("another decomposition")

    def card(self, site, index):
        if index % 2:
            return None
        example = {
            "tokens": [" a", "b\n", "<c>"],
            "importance": [0.0, 1.0, 0.5],
            "activation": [3.0, -2.0, 1.0],
            "focus": 1,
        }
        tokens = [{"token": " x", "recall": 0.5, "pmi": 1.0}]
        return {"density": 0.25, "examples": [example], "output_tokens": tokens}


@pytest.mark.parametrize("axis", ["site", "block"])
def test_feature_files(graph, tmp_path, axis):
    data = read(to_circuit_tracer(graph, tmp_path, "a", harvest=Cards(), axis=axis))
    # The viewer asks its server for ./data/..., which is this folder.
    assert data["metadata"]["scan"] == "./data/features/a"
    features = [n for n in data["nodes"] if n["feature_type"] == FEATURE]
    files = {int(path.stem): read(path) for path in (tmp_path / "features" / "a").iterdir()}
    assert set(files) == {node["feature"] for node in features}
    for node in features:
        file = files[node["feature"]]
        jsonschema.validate(file, FEATURE_SCHEMA)
        assert file["transcoder_id"] == node["clerp"].split(" ")[0]
        assert file["index"] == node["feature"]
        (quantile,) = file["examples_quantiles"]
        if int(file["transcoder_id"].split(":")[1]) % 2:
            assert quantile["examples"] == []
            continue
        assert quantile["examples"] == [
            {
                "tokens_acts_list": [0.0, 2.0, 0.5],
                "train_token_ind": 1,
                "is_repeated_datapoint": False,
                "tokens": [" a", "b\n", "<c>"],
            }
        ]
        assert (file["act_min"], file["act_max"], file["activation_frequency"]) == (0.0, 2.0, 0.25)
        assert file["top_logits"] == [" x"]
    to_circuit_tracer(graph, tmp_path, "a")
    assert not (tmp_path / "features" / "a").exists()


def test_a_harvest_of_another_decomposition_is_refused(graph, tmp_path):
    graph.settings["decomposition"] = "other"
    with pytest.raises(ArtefactError, match="another decomposition"):
        to_circuit_tracer(graph, tmp_path, "a", harvest=Cards())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slug", ["", "a b", "../x", ".hidden", "ä", "graph-metadata", "a.vpd"])
def test_slugs_are_checked(graph, tmp_path, slug):
    with pytest.raises(InputError, match="slug="):
        to_circuit_tracer(graph, tmp_path, slug)
    with pytest.raises(InputError, match="slug="):
        to_neuronpedia(graph, tmp_path / "g.json", "gpt2-small", slug)
    assert not list(tmp_path.iterdir())


def test_refusals(graph, tmp_path):
    with pytest.raises(InputError, match="model_id='a/b'"):
        to_neuronpedia(graph, tmp_path / "g.json", "a/b", "s")
    with pytest.raises(InputError, match="node_threshold=0"):
        to_circuit_tracer(graph, tmp_path, "s", node_threshold=0.0)
    with pytest.raises(InputError, match="No layer found"):
        to_neuronpedia(some_graph(n_blocks=1), tmp_path / "g.json", "m", "s")
    graph.edges.weight[3] = torch.nan
    with pytest.raises(InputError, match="1 edges"):
        to_circuit_tracer(graph, tmp_path, "s")
    assert not list(tmp_path.iterdir())
    (tmp_path / "graph-metadata.json").write_text('{"graphs": 3}')
    with pytest.raises(ArtefactError, match="no list of graphs"):
        to_circuit_tracer(some_graph(), tmp_path, "s")


def test_one_block_is_fine_for_circuit_tracer(tmp_path):
    graph = some_graph(n_blocks=1)
    for axis in ("site", "block"):
        data = read(to_circuit_tracer(graph, tmp_path, axis, axis=axis))
        check_viewer_rules(data, graph)
        check_content(data, graph)


def test_large_files_are_warned_of(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "LIMIT_BYTES", 1000)
    with pytest.warns(UserWarning, match="after compression"):
        to_neuronpedia(graph, tmp_path / "g.json", "m", "s")


# ---------------------------------------------------------------------- qk tracing


def test_pairs_go_to_the_nodes_whose_scores_they_form(graph, tmp_path):
    q, k = "blocks.1.attn.q:0@3", "blocks.1.attn.k:5@2"
    absent = "blocks.1.attn.k:77@1"
    pairs = [
        AttentionPair(1, 0, 3, 2, q, k, 0.5),
        AttentionPair(1, 1, 3, 2, q, k, 0.25),
        AttentionPair(1, 0, 3, 1, q, absent, -2.0),
        AttentionPair(1, 0, 3, 2, "blocks.1.attn.q.bias@3", k, 0.125),
    ]
    data = read(to_neuronpedia(graph, tmp_path / "g.json", "m", "s", pairs))
    jsonschema.validate(data, GRAPH_SCHEMA)
    check_viewer_rules(data, graph)
    check_content(data, graph)
    names = dict(zip(graph.nodes.names(), data["nodes"], strict=True))
    traced = {
        name: n["qk_tracing_results"] for name, n in names.items() if "qk_tracing_results" in n
    }
    assert set(traced) == {"blocks.1.attn.o:0@3", "blocks.1.attn.o:5@3"}
    qi, ki, bi = (names[n]["node_id"] for n in (q, k, "blocks.1.attn.q.bias@3"))
    (other,) = data["qk_only_nodes"]
    assert data["qk_only_nodes"][other]["node_id"] == other
    assert data["qk_only_nodes"][other]["clerp"] == "blocks.1.attn.k:77"
    assert other not in {node["node_id"] for node in data["nodes"]}
    for result in traced.values():
        assert result["pair_wise_contributors"] == [
            [qi, other, -2.0],
            [qi, ki, 0.75],
            [bi, ki, 0.125],
        ]
        assert result["top_q_marginal_contributors"] == [[qi, -1.25], [bi, 0.125]]
        assert result["top_k_marginal_contributors"] == [[other, -2.0], [ki, 0.875]]


def test_without_o_nodes_the_values_get_the_pairs_of_their_key(graph, tmp_path):
    o = graph.nodes.places.index("blocks.1.attn.o")
    graph = graph.filtered(graph.nodes.place != o)
    pair = AttentionPair(1, 0, 3, 2, "blocks.1.attn.q:0@3", "blocks.1.attn.k:5@2", 0.5)
    data = read(to_circuit_tracer(graph, tmp_path, "s", pairs=[pair]))
    traced = [n for n in data["nodes"] if "qk_tracing_results" in n]
    assert {n["clerp"].split(" ")[0] for n in traced} == {"blocks.1.attn.v:0", "blocks.1.attn.v:5"}
    assert {n["ctx_idx"] for n in traced} == {2}


def test_pairs_of_unknown_nodes_are_refused(graph, tmp_path):
    pair = AttentionPair(1, 0, 3, 2, "blocks.9.attn.q:0@3", "blocks.1.attn.k:5@2", 0.5)
    with pytest.raises(InputError, match=r"blocks\.9\.attn\.q:0@3"):
        to_circuit_tracer(graph, tmp_path, "s", pairs=[pair])


# ------------------------------------------------------------------------- summary


def printed(graph):
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(summary(graph))
    return capture.get()


def test_the_summary_says_what_is_in_the_graph(graph, real_graph):
    for g in (graph, real_graph):
        text = printed(g)
        assert f"{g.n_edges:,}" in text
        assert f"{g.replacement_score():.4f}" in text
        assert f"{g.completeness_score():.4f}" in text
        inner = g.influence().nodes.masked_fill(g.nodes.of_kind("output"), -1)
        best = int(inner.argmax())
        assert g.nodes.name(best) in text
        if g.incoming(best):
            assert g.incoming(best, top=1)[0][0] in text
        count = int(g.nodes.of_kind("subcomponent").sum()) / len(g.tokens) / 2
        assert text.count(f"{count:.1f}") >= 2 or g is real_graph
    assert "[red]" in printed(graph)  # no markup
    assert repr("a - b") in printed(graph)


def test_an_empty_graph_has_a_summary(graph):
    empty = graph.filtered(torch.zeros(graph.n_nodes, dtype=torch.bool))
    assert "Outputs" in printed(empty)
    assert "Outputs" in empty._repr_html_()


def test_html_is_escaped_and_takes_the_page_s_colours(graph):
    text, frame = graph._repr_html_().split("<iframe ")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "http" not in text
    assert not re.search(r"#[0-9a-f]{3}|:(white|black)\b", text)
    assert f"{graph.n_edges:,}" in text
    assert frame.count("<") == 1  # that closes it: the page is text of an attribute
    page = html.unescape(re.search('srcdoc="([^"]*)"', frame)[1])
    assert "<b>" not in page
    assert f'"n_edges":{graph.n_edges}' in page


def test_a_large_graph_has_no_page_in_a_notebook(graph, monkeypatch):
    monkeypatch.setattr("vpd_lens.viz.graph_page.INLINE_EDGES", graph.n_edges - 1)
    assert "<iframe" not in graph._repr_html_()
    assert f"explore its {graph.n_edges:,} edges" in graph._repr_html_()


def test_names_are_whole_at_80_columns(graph):
    for name in ("blocks.11.mlp.gate", "blocks.11.attn.o"):
        graph.nodes.places = tuple(
            place.replace("blocks.1.mlp.out", name) for place in graph.nodes.places
        )
    text = printed(graph)
    assert max(map(len, text.splitlines())) <= 80
    inner = graph.influence().nodes.masked_fill(graph.nodes.of_kind("output"), -1)
    for node in inner.argsort(descending=True)[:10].tolist():
        assert graph.nodes.name(node) in text
        for source, _ in graph.incoming(node, top=1):
            assert f"<- {source} " in text
