"""Dataset attributions against sums over graphs of single prompts, and by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_saving import V01
from torch import Tensor, nn

import vpd_lens
from tests.conftest import tiny_bridge
from vpd_lens.analysis.circuits import Token
from vpd_lens.analysis.circuits.cut_forward import CutForward
from vpd_lens.analysis.dataset_attribution import (
    DatasetAttributions,
    Settings,
    dataset_attributions,
)
from vpd_lens.analysis.dataset_attribution.accumulate import Engine
from vpd_lens.analysis.dataset_attribution.batch import Observer
from vpd_lens.analysis.dataset_attribution.routes import choose_routes
from vpd_lens.data import Batch
from vpd_lens.errors import ArtefactError, ConfigError, DataError, InputError

BATCH = {"batch_size": 2, "progress": False}
TOKEN = 3


def decomposed(sites: Any = "all", seed: int = 0, **shape: Any) -> nn.Module:
    """A decomposed model, all of whose importances are between 0 and 1: everything is a node."""
    model = vpd_lens.decompose(tiny_bridge(**shape), sites=sites, n_subcomponents=4, seed=seed)
    model.vpd.trained_steps = 1
    with torch.no_grad():
        *_, weight, bias = model.vpd.importance.parameters()
        weight *= 0.03
        bias.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decomposed()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 29, (12, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(model: nn.Module, tokens: Tensor) -> DatasetAttributions:
    return dataset_attributions(model, tokens, n_batches=3, batch_size=4, progress=False)


def summed_graphs(
    model: nn.Module, tokens: Tensor, found: DatasetAttributions, frozen: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Tables of summed edges, the same with the signs of targets, and edges to one logit."""
    signed = {n: torch.zeros_like(t) for n, t in found.signed.items()}
    absolute = {n: torch.zeros_like(t) for n, t in found.signed.items()}
    logit = torch.zeros(found.signed["output"].shape[1])
    for prompt in tokens:
        g = model.vpd.causal_importance(prompt[None])
        assert bool(((g > 0) & (g < 1)).all())
        targets = [Token(TOKEN, position) for position in range(len(prompt))]
        graph = vpd_lens.attribute(model, prompt, targets, frozen=frozen, idle=0.0, progress=False)
        nodes = graph.nodes
        inner = nodes.of_kind("subcomponent", "embedding").tolist()
        places = [nodes.places[i] for i in nodes.place.tolist()]
        index, acts = nodes.index.tolist(), nodes.activation.tolist()
        columns = graph.edges.source, graph.edges.target, graph.edges.weight
        for source, target, weight in zip(*(c.tolist() for c in columns), strict=True):
            if not inner[source]:
                continue
            into = places[target]
            column = found._columns(into, places[source]).start + index[source]
            if into == "output":
                logit[column] += weight
            else:
                signed[into][index[target], column] += weight
                sign = (acts[target] > 0) - (acts[target] < 0)
                absolute[into][index[target], column] += weight * sign
    return signed, absolute, logit


CASES = [
    ("all", {}, False),
    ("all", {}, True),
    ("all", {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}, False),
    ("mlp|unembed", {}, False),
    ("mlp", {}, True),
    ("attn", {"n_heads": 4, "d_head": 4, "n_key_value_heads": 2}, False),
    ("attn", {"n_heads": 2, "n_key_value_heads": 1}, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sites", "shape", "frozen"), CASES)
def test_tables_are_sums_of_the_edges_of_graphs(
    sites: str, shape: dict[str, Any], frozen: bool, tokens: Tensor
) -> None:
    model = decomposed(sites, **shape)
    rows = tokens[:2, :4]
    found = dataset_attributions(model, rows, n_batches=1, frozen=frozen, **BATCH)
    assert all(len(alive) == 4 for alive in found.alive.values())
    signed, absolute, logit = summed_graphs(model, rows, found, frozen)
    assert set(signed) == {*model.vpd.layout.names, "output"}
    for name in model.vpd.layout.names:
        for got, expected in ((found.signed, signed), (found.absolute, absolute)):
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5 * scale + 1e-7)
    got = found.readout[:, TOKEN] @ found.signed["output"]
    torch.testing.assert_close(got, logit, rtol=0, atol=1e-5 * float(logit.abs().max()))


def test_shortcuts_are_taken(model: nn.Module) -> None:
    vpd = model.vpd
    alive = {name: torch.arange(4) for name in vpd.layout.names}
    for frozen in (False, True):
        forward = CutForward(vpd, frozen, through_delta=False)
        routes = choose_routes(Observer(forward, alive), [*vpd.layout.names, "output"])
        kinds = {name.split(".", 2)[-1]: type(route).__name__ for name, route in routes.items()}
        norm = dict.fromkeys(("attn.q", "attn.k", "attn.v", "mlp.in", "output"), "ThroughNorm")
        assert kinds == {**norm, "attn.o": "Backward", "mlp.out": "ThroughNeurons"}
        assert getattr(routes["blocks.0.attn.o"], "n_heads", 0) == vpd.model.cfg.n_heads > 1


def test_progress_counts_every_pass(model: nn.Module, tokens: Tensor) -> None:
    """At any time, what is left takes about as long per pass as what is done."""
    alive = {name: torch.arange(4) for name in model.vpd.layout.names}
    names = (*model.vpd.layout.names, "output")
    settings = Settings(alive_threshold=0.0, absolute=True, frozen=False, targets=names)
    engine, passes = Engine(model.vpd, alive, settings), []
    engine.observer.count_pass = lambda: passes.append(1)
    engine.add(engine.empty(), Batch(tokens[:2]))
    assert len(passes) == engine.n_passes > 10


def test_pads_are_neither_sources_nor_targets(model: nn.Module, tokens: Tensor) -> None:
    lengths = (5, 2, 4)
    rows = [tokens[i, :n] for i, n in enumerate(lengths)]
    alive = {name: range(4) for name in model.vpd.layout.names}
    settings = {"alive": alive, "n_batches": 9, "progress": False}
    padded = dataset_attributions(model, [row.tolist() for row in rows], batch_size=3, **settings)
    alone = [dataset_attributions(model, row[None], batch_size=1, **settings) for row in rows]
    assert (padded.n_batches, padded.n_positions) == (1, sum(lengths))
    for name, tensor in tensors(padded).items():
        if name.startswith("alive") or name == "readout":
            continue
        expected = sum(tensors(one)[name] for one in alone)
        scale = float(expected.abs().max())
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5 * scale + 1e-7)


def test_a_dataset_is_read_once(model: nn.Module, tokens: Tensor) -> None:
    rows = datasets.Dataset.from_dict({"tokens": tokens[:5].tolist()})
    alive = {"blocks.0.mlp.out": [0], "blocks.1.mlp.in": [1]}
    settings = {"alive": alive, "absolute": False, "seq_len": 5, "n_batches": 99, **BATCH}
    found = dataset_attributions(model, rows, **settings)
    assert (found.n_batches, found.n_positions) == (3, 25)


def test_normalisation_by_hand(
    model: nn.Module, tokens: Tensor, found: DatasetAttributions
) -> None:
    vpd, source, target = model.vpd, "blocks.0.mlp.out", "blocks.1.mlp.in"
    logits, inputs = vpd.target(tokens)
    g = vpd.causal_importance(tokens)[..., vpd.layout.columns(source)]
    acts = inputs[vpd.layout.names.index(target)] @ vpd.v(target).detach()
    rms = acts.flatten(0, 1).square().mean(0).sqrt()
    start = found._columns(target, source).start
    raw = found.signed[target][:, start : start + 4]
    expected = raw / g.flatten(0, 1).sum(0) / rms[:, None]
    torch.testing.assert_close(found.matrix(target, source), expected)
    assert dict(found.sources(f"{target}:2", None))[f"{source}:1"] == pytest.approx(
        float(expected[2, 1])
    )
    assert dict(found.targets(f"{source}:1", None))[f"{target}:2"] == pytest.approx(
        float(expected[2, 1])
    )
    token = int(tokens[0, 0])
    count, size = (tokens == token).sum(), logits[..., TOKEN].square().mean().sqrt()
    embedded = found.readout[:, TOKEN] @ found.signed["output"][:, token] / count / size
    torch.testing.assert_close(found.matrix("output", "embed")[TOKEN, token], embedded)
    assert dict(found.sources(f"output:<{TOKEN}>", None))[f"embed:{token}"] == pytest.approx(
        float(embedded), rel=1e-4
    )


def test_queries_select_and_order(found: DatasetAttributions) -> None:
    node = "blocks.1.mlp.in:3"
    both = found.sources(node, None)
    sizes = [abs(value) for _, value in both]
    assert sizes == sorted(sizes, reverse=True)
    positive, negative = (found.sources(node, None, sign=s) for s in ("positive", "negative"))
    assert all(value > 0 for _, value in positive)
    assert all(value < 0 for _, value in negative)
    assert sorted(both) == sorted(positive + negative)
    assert len(found.sources(node, 3)) == 3
    assert {n.split(":")[0] for n, _ in found.sources(node, None, place="embed")} == {"embed"}
    assert not torch.equal(found.absolute["blocks.1.mlp.in"], found.signed["blocks.1.mlp.in"])
    reached = {n.split(":")[0] for n, _ in found.targets("blocks.1.mlp.in:0", None)}
    assert reached == {"blocks.1.mlp.out"}
    assert "output" in {n.split(":")[0] for n, _ in found.targets("embed:5", None)}
    console = Console(width=120, record=True)
    console.print(found.table(node, 4))
    assert "embed:" in console.export_text()
    assert "48 alive" in repr(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.sources("blocks.1.mlp.in:9"), "not among the 4 alive"),
        (lambda f: f.sources("blocks.1.mlp:9"), "no node named"),
        (lambda f: f.sources("embed:3"), "was no target"),
        (lambda f: f.sources("output:400"), "not in the vocabulary"),
        (lambda f: f.sources("output:nothing"), "0 tokens are written"),
        (lambda f: f.sources("output:3", absolute=True), "signed attributions only"),
        (lambda f: f.sources("output:3", place="blocks"), "place='blocks'"),
        (lambda f: f.targets("output:3"), "acts on nothing"),
        (lambda f: f.matrix("blocks.0.mlp.in", "blocks.1.mlp.in"), "no attributions from"),
    ],
)
def test_bad_questions_are_refused(found: DatasetAttributions, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(found)


def tensors(found: DatasetAttributions) -> dict[str, Tensor]:
    grouped = {f"{g}/{n}": t for g, n, t in tables(found)}
    single = {name: value for name, value in vars(found).items() if isinstance(value, Tensor)}
    return grouped | single


def tables(found: DatasetAttributions) -> Iterator[tuple[str, str, Tensor]]:
    for group, value in vars(found).items():
        if isinstance(value, dict):
            yield from ((group, n, t) for n, t in value.items() if isinstance(t, Tensor))


def assert_same(one: DatasetAttributions, other: DatasetAttributions) -> None:
    others = tensors(other)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors(one).items())
    assert rest(one) == rest(other)


def rest(found: DatasetAttributions) -> dict[str, Any]:
    """Everything but tensors."""
    groups = {group for group, _, _ in tables(found)}
    return {
        name: value
        for name, value in vars(found).items()
        if name not in groups and not isinstance(value, Tensor)
    }


def test_batch_size_does_not_matter(
    model: nn.Module, tokens: Tensor, found: DatasetAttributions
) -> None:
    other = dataset_attributions(model, tokens, n_batches=99, batch_size=3, progress=False)
    assert (other.n_batches, other.n_positions) == (4, 60)
    expected = tensors(found)
    for name, tensor in tensors(other).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6 * scale + 1e-7)


@pytest.mark.slow
def test_resuming_is_exact(
    model: nn.Module, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"n_batches": 4, "batch_size": 3, "progress": False, "save_every": 0.0}
    whole = dataset_attributions(model, tokens, output=tmp_path / "whole", **settings)
    add = Engine.add

    def failing(self: Engine, result: DatasetAttributions, *batch: Any) -> None:
        if result.n_batches == 2:
            raise KeyboardInterrupt
        add(self, result, *batch)

    monkeypatch.setattr(Engine, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        dataset_attributions(model, tokens, output=tmp_path / "cut", **settings)
    monkeypatch.undo()
    assert DatasetAttributions.load(tmp_path / "cut").n_batches == 2
    dataset_attributions(model, tokens, output=tmp_path / "cut", resume=True, **settings)
    again = DatasetAttributions.load(tmp_path / "cut", model.vpd)
    assert list(again.signed) == list(whole.signed)
    assert_same(again, whole)

    with pytest.raises(ConfigError, match="already holds"):
        dataset_attributions(model, tokens, output=tmp_path / "cut", **settings)
    with pytest.raises(ArtefactError, match="frozen was False and is True"):
        dataset_attributions(
            model, tokens, output=tmp_path / "cut", resume=True, frozen=True, **settings
        )
    settings["batch_size"] = 2
    with pytest.raises(DataError, match="other batches"):
        dataset_attributions(model, tokens, output=tmp_path / "cut", resume=True, **settings)


def test_foreign_and_damaged_files_are_refused(found: DatasetAttributions, tmp_path: Path) -> None:
    path = found.save(tmp_path / "a")
    with pytest.raises(ArtefactError, match="another decomposition"):
        DatasetAttributions.load(path, decomposed(seed=1).vpd)
    file = path / "attributions.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtefactError, match="checksum"):
        DatasetAttributions.load(path)
    some = dataclasses.replace(found, signed={n: t[:, 1:] for n, t in found.signed.items()})
    with pytest.raises(ArtefactError, match="do not fit"):
        DatasetAttributions.load(some.save(tmp_path / "b"))
    nowhere = {name: ("blocks.9.mlp.in", *places) for name, places in found.places.items()}
    with pytest.raises(ArtefactError, match="do not fit"):
        DatasetAttributions.load(dataclasses.replace(found, places=nowhere).save(tmp_path / "c"))


def test_what_version_0_1_saved_still_loads(tmp_path: Path) -> None:
    old = DatasetAttributions.load(V01 / "attributions")
    assert tensors(old).keys() == load_file(V01 / "attributions/attributions.safetensors").keys()
    assert old.sources(f"{next(iter(old.places))}:0", None) is not None
    assert_same(DatasetAttributions.load(old.save(tmp_path / "new")), old)


def test_a_choice_of_subcomponents_and_targets(
    model: nn.Module, tokens: Tensor, found: DatasetAttributions
) -> None:
    source, target = "blocks.0.mlp.out", "blocks.1.mlp.in"
    some = dataset_attributions(
        model,
        tokens,
        alive={source: [3, 1], target: [2]},
        targets=[target, "output"],
        absolute=False,
        n_batches=3,
        batch_size=4,
        progress=False,
    )
    assert some.places == {target: ("embed", source), "output": ("embed", source, target)[:2]}
    expected = found.matrix(target, source)[2:3, [1, 3]]
    torch.testing.assert_close(some.matrix(target, source), expected)
    assert some.sources(f"{target}:2", 1, place=source)[0][0] in (f"{source}:1", f"{source}:3")
    with pytest.raises(InputError, match="absolute=False"):
        some.sources(f"{target}:2", absolute=True)
    with pytest.raises(InputError, match="not among the 2 alive"):
        some.targets(f"{source}:0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_limit": 1e-6}, "more than memory_limit=1e-06"),
        ({"n_batches": 0}, "n_batches is 0"),
        ({"alive_threshold": 0.99}, "no subcomponent's mean importance"),
        ({"alive_threshold": 1.0}, "expected a number in"),
        ({"alive": {"blocks.9": [0]}}, "no sites"),
        ({"alive": {"blocks.0.mlp.in": [4]}}, "expected 0 to 3"),
        ({"targets": ["blocks.9"]}, "expected 'all' or a list"),
        ({"resume": True}, "resume=True needs output"),
        ({"data": iter([torch.zeros(2, 4, dtype=torch.long)])}, "read only once"),
    ],
)
def test_bad_arguments_are_refused(
    model: nn.Module, tokens: Tensor, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"data": tokens, "n_batches": 1, **BATCH, **arguments}
    with pytest.raises(InputError, match=message):
        dataset_attributions(model, **arguments)
