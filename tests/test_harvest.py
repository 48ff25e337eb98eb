"""The harvest against brute force: counts, examples, resuming, storing, and the pages."""

import dataclasses
import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny, tiny_bridge
from safetensors.torch import load_file
from test_saving import V01

import vpd_lens
from vpd_lens import storage
from vpd_lens.analysis.gathering import token_strings
from vpd_lens.analysis.harvest import Harvest, Settings, harvest
from vpd_lens.analysis.harvest.examples import Examples, Firings, random_keys
from vpd_lens.analysis.harvest.result import HarvestRecord
from vpd_lens.analysis.harvest.statistics import TokenTable
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import (
    ArtefactError,
    AttachError,
    ConfigError,
    DataError,
    InputError,
)
from vpd_lens.viz.harvest_page import page_name, write

SETTINGS = {
    "batch_size": 4,
    "n_batches": 5,
    "n_top": 3,
    "n_random": 4,
    "context": 2,
    "progress": False,
}
THRESHOLD = 0.1
PARTS = ("usage", "inputs", "outputs", "top", "random")


def decomposed(seed=2):
    """A decomposed model whose importances cover 0, 1 and everything between."""
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=6, seed=seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        *_, last = model.vpd.importance.parameters()
        last += torch.randn(last.shape, generator=generator) - 0.5
    return model


@pytest.fixture(scope="module")
def model():
    return decomposed()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 29, (20, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(model, tokens):
    return harvest(model, tokens, **SETTINGS)


@pytest.fixture(scope="module")
def dense(model, tokens):
    """Importances, activations and probabilities of all tokens, `[sequence, pos, ...]`."""
    vpd = model.vpd
    directions = [
        (vpd.v(name) * vpd.u(name).norm(dim=1)).detach()  # [d_in, C]
        for name in vpd.layout.names
    ]
    parts = []
    for batch in tokens.split(4):  # as in the harvest, for the same rounding
        output, inputs = vpd.target(batch)
        acts = torch.cat([x @ v for x, v in zip(inputs, directions, strict=True)], -1)
        parts.append((vpd.causal_importance(batch), acts, output.softmax(-1)))
    g, acts, probabilities = map(torch.cat, zip(*parts, strict=True))
    fires = g > THRESHOLD
    assert fires.any()
    assert (~fires.flatten(0, 1)).all(0).any()  # some never fire
    return g, acts, probabilities


def tensors_of(result):
    return {
        (part, name): tensor
        for part in PARTS
        for name, tensor in vars(getattr(result, part)).items()
    }


def assert_same(one, other):
    others = tensors_of(other)
    for key, tensor in tensors_of(one).items():
        assert torch.equal(tensor, others[key]), key
    assert one.n_batches == other.n_batches


def places(g, c):
    return [(s, p) for s in range(20) for p in range(8) if g[s, p, c] > THRESHOLD]


# --------------------------------------------------------------------------- counting


def test_usage_is_a_mean_over_positions(found, dense, model):
    g, acts, _ = dense
    n = 20 * 8
    assert found.n_positions == n
    for name in model.vpd.layout.names:
        columns = model.vpd.layout.columns(name)
        rows = found.table(name)
        assert sorted(row.index for row in rows) == list(range(6))
        means = [row.mean_importance for row in rows]
        assert means == sorted(means, reverse=True)
        for row in rows:
            c = columns.start + row.index
            where = places(g, c)
            values = [float(acts[s, p, c]) for s, p in where]
            assert row.density == pytest.approx(len(where) / n)
            assert row.mean_importance == pytest.approx(float(g[..., c].mean()), abs=1e-6)
            assert row.mean_activation == pytest.approx(float(acts[..., c].abs().mean()), rel=1e-4)
            if where:
                assert row.firing_activation == pytest.approx(sum(values) / len(where), abs=1e-5)
            else:
                assert math.isnan(row.firing_activation)


def test_token_tables_against_a_loop(found, dense, tokens):
    g, _, probabilities = dense
    counts = torch.zeros_like(found.inputs.at_firings)
    masses = torch.zeros_like(found.outputs.at_firings)
    for c in range(g.shape[-1]):
        for s, p in places(g, c):
            counts[c, tokens[s, p]] += 1
            masses[c] += probabilities[s, p]
    assert torch.equal(found.inputs.at_firings, counts)
    torch.testing.assert_close(found.outputs.at_firings, masses)
    assert found.inputs.everywhere.tolist() == tokens.flatten().bincount(minlength=29).tolist()
    torch.testing.assert_close(
        found.outputs.everywhere, probabilities.double().sum((0, 1)), rtol=1e-5, atol=1e-5
    )


def test_masses_are_added_in_blocks(found, dense, tokens, monkeypatch):
    from vpd_lens.analysis.harvest import statistics

    monkeypatch.setattr(statistics, "_BLOCK", 10)
    g, acts, probabilities = dense
    table = TokenTable.empty(g.shape[-1], 29, torch.float32)
    table.add_mass(Firings(tokens, g, acts, THRESHOLD), probabilities)
    torch.testing.assert_close(table.at_firings, found.outputs.at_firings)


def test_recall_precision_and_pmi_by_hand():
    # 10 positions; the subcomponent fires at 4 of them: 3 times token 0, once token 1.
    table = TokenTable(torch.tensor([[3, 1, 0]]).int(), torch.tensor([5.0, 1.0, 4.0]).double())
    first, second = table.largest(0, n_firings=4)
    assert first == pytest.approx((0, 3, 3 / 4, 3 / 5, math.log(3 * 10 / (4 * 5))))
    assert second == pytest.approx((1, 1, 1 / 4, 1 / 1, math.log(1 * 10 / (4 * 1))))
    # Information: 0.75 * log 1.5 = 0.304 is more than 0.25 * log 2.5 = 0.229.
    assert [t.token for t in table.largest(0, 4, by="pmi")] == [1, 0]
    assert [t.token for t in table.largest(0, 4, by="precision")] == [1, 0]
    assert [t.token for t in table.largest(0, 4, by="recall", k=1)] == [0]
    assert [t.token for t in table.largest(0, 4, by="pmi", min_count=2.0)] == [0]
    information = sum(t.recall * t.pmi for t in table.largest(0, 4))
    shares = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.1])
    assert information == pytest.approx(float((shares[0] * (shares[0] / shares[1]).log()).sum()))


# --------------------------------------------------------------------------- examples


def window(values, s, p, c=None):
    row = values[s] if c is None else values[s, :, c]
    return row[max(0, p - 2) : p + 3].tolist()


def test_top_examples_equal_brute_force(found, dense, tokens, model):
    g, acts, _ = dense
    for name in model.vpd.layout.names:
        for index in range(6):
            c = model.vpd.layout.columns(name).start + index
            best = {}  # one per sequence
            windows = {}
            for s, p in places(g, c):
                score = (float(g[s, p, c]), abs(float(acts[s, p, c])))
                best[s] = max(best.get(s, score), score)
                text = window(tokens, s, p), window(g, s, p, c), window(acts, s, p, c), min(p, 2)
                windows.setdefault(score, []).append(text)
            examples = found.examples(name, index)
            scores = [(e.importance[e.focus], abs(e.activation[e.focus])) for e in examples]
            assert scores == sorted(best.values(), reverse=True)[:3]
            # Any of the windows with that score: there are ties.
            assert all(
                tuple(e) in windows[score] for e, score in zip(examples, scores, strict=True)
            )


def test_random_examples_are_firings(found, dense, tokens, model):
    g, _, _ = dense
    layout = model.vpd.layout
    for name in layout.names:
        for index in range(6):
            c = layout.columns(name).start + index
            where = places(g, c)
            windows = [(window(tokens, s, p), min(p, 2)) for s, p in where]
            examples = found.examples(name, index, "random")
            assert len(examples) == min(4, len(where))
            for example in examples:
                assert (example.tokens, example.focus) in windows
                assert example.importance[example.focus] > THRESHOLD


def test_random_examples_are_uniform_over_firings():
    rows, n, length, n_batches = 300, 5, 10, 4
    buffer = Examples.empty(rows, n, 0)
    for batch in range(n_batches):
        tokens = torch.arange(batch * length, (batch + 1) * length)[None]  # the token is the place
        ones = torch.ones(1, length, rows)
        firings = Firings(tokens, ones, ones, 0.5)
        buffer.offer(firings, random_keys(firings, seed=7, batch=batch))
    chosen = buffer.tokens[..., 0]  # [rows, n]
    assert all(len(set(row)) == n for row in chosen.tolist())
    counts = chosen.flatten().bincount(minlength=n_batches * length).double()
    expected = rows * n / (n_batches * length)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 39 degrees of freedom: mean 39, standard deviation 9.
    assert 15 < chi_square < 75


def test_the_same_seed_gives_the_same_harvest(model, tokens, found):
    assert_same(harvest(model, tokens, **SETTINGS), found)
    other = harvest(model, tokens, **SETTINGS, seed=1)
    assert torch.equal(other.top.tokens, found.top.tokens)
    assert not torch.equal(other.random.keys, found.random.keys)


def test_a_stream_of_batches_is_the_same_as_one_batch(model, tokens, found):
    whole = harvest(model, tokens, **{**SETTINGS, "batch_size": 20, "n_batches": 1})
    assert torch.equal(whole.inputs.at_firings, found.inputs.at_firings)
    assert torch.equal(whole.usage.firings, found.usage.firings)
    assert torch.equal(whole.top.keys.sort().values, found.top.keys.sort().values)


@pytest.mark.parametrize(
    "source",
    [
        lambda rows: rows,
        lambda rows: rows.flatten().numpy(),
        lambda rows: datasets.Dataset.from_dict({"tokens": rows.tolist()}),
        lambda rows: list(rows.split(4)),
    ],
    ids=["rows", "stream", "Dataset", "batches"],
)
def test_every_row_is_counted_once_and_the_short_last_batch_too(model, tokens, found, source):
    short = {**SETTINGS, "n_batches": 99, "seq_len": 8}
    part = harvest(model, source(tokens[:18]), **short)
    assert (part.n_batches, part.n_positions) == (5, 18 * 8)
    counts = torch.zeros(29).index_add_(0, tokens[:18].flatten(), torch.ones(18 * 8))
    assert part.inputs.everywhere.tolist() == counts.tolist()
    assert_same(harvest(model, source(tokens), **short), found)


def test_pads_count_nowhere(model, tokens):
    lengths = (8, 3, 5, 1)
    rows = [tokens[i, :n] for i, n in enumerate(lengths)]
    found = harvest(model, [row.tolist() for row in rows], **SETTINGS)
    importance = [model.vpd.causal_importance(row[None])[0] for row in rows]
    firings = sum((g > THRESHOLD).sum(0) for g in importance)
    assert found.n_positions == sum(lengths)
    assert torch.equal(found.usage.firings, firings)
    total = sum(g.sum(0).double() for g in importance)
    torch.testing.assert_close(found.usage.importance, total, rtol=1e-4, atol=1e-4)
    counts = torch.cat(rows).bincount(minlength=29).double()
    assert torch.equal(found.inputs.everywhere, counts)
    assert float(found.outputs.everywhere.sum()) == pytest.approx(sum(lengths))
    texts = [tuple(row.tolist()) for row in rows]
    for name in found.layout.names:
        for index in range(6):
            for example in found.examples(name, index, "random"):
                assert any(
                    tuple(example.tokens) == text[i : i + len(example.tokens)]
                    for text in texts
                    for i in range(len(text))
                )


def test_some_sites(model, tokens, found):
    names = model.vpd.layout.names
    part = harvest(model, tokens, **SETTINGS, sites=[names[4], names[1]])
    assert part.layout.names == (names[1], names[4])
    for name in part.layout.names:
        for row, other in zip(part.table(name), found.table(name), strict=True):
            assert row == pytest.approx(other, nan_ok=True)
        assert [part.tokens(name, i) for i in range(6)] == [found.tokens(name, i) for i in range(6)]
        assert part.card(name, 0) == found.card(name, 0)


# ------------------------------------------------------------------ storing and resuming


def test_interrupted_and_resumed_is_the_same(model, tokens, found, tmp_path, monkeypatch):
    folder = tmp_path / "harvest"
    add = Harvest.add

    def interrupted(self, *batch):
        if self.n_batches == 3:
            raise KeyboardInterrupt
        add(self, *batch)

    monkeypatch.setattr(Harvest, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tokens, **SETTINGS, output=folder, save_every=0.0)
    monkeypatch.undo()
    assert Harvest.load(folder).n_batches == 3
    with pytest.raises(ConfigError, match="resume=True"):
        harvest(model, tokens, **SETTINGS, output=folder)
    assert_same(harvest(model, tokens, **SETTINGS, output=folder, resume=True), found)
    assert_same(Harvest.load(folder, model.vpd), found)
    again = harvest(model, tokens, **SETTINGS, output=folder, resume=True)  # nothing left to do
    assert_same(again, found)


def test_resuming_needs_the_same_arguments_and_data(model, tokens, tmp_path):
    folder = tmp_path / "harvest"
    harvest(model, tokens, **{**SETTINGS, "n_batches": 2}, output=folder)
    with pytest.raises(ArtefactError, match=r"threshold was 0\.1 and is 0\.3"):
        harvest(model, tokens, **SETTINGS, threshold=0.3, output=folder, resume=True)
    site = [model.vpd.layout.names[0]]
    with pytest.raises(ArtefactError, match="sites"):
        harvest(model, tokens, **SETTINGS, sites=site, output=folder, resume=True)
    with pytest.raises(DataError):
        harvest(model, tokens.flip(0), **SETTINGS, output=folder, resume=True)
    with pytest.raises(ArtefactError, match="another decomposition"):
        harvest(decomposed(seed=5), tokens, **SETTINGS, output=folder, resume=True)
    with pytest.raises(InputError, match="output"):
        harvest(model, tokens, **SETTINGS, resume=True)


def test_round_trip_and_foreign_decompositions(model, found, tmp_path):
    again = Harvest.load(found.save(tmp_path / "harvest"), model.vpd)
    assert_same(again, found)
    assert again.settings == found.settings
    assert again.layout == found.layout
    assert again.card("blocks.0.mlp.in", 1) == found.card("blocks.0.mlp.in", 1)
    assert repr(again) == repr(found)
    assert "160 tokens" in repr(found)
    found.check(fingerprint(model.vpd))
    other = decomposed(seed=5).vpd
    with pytest.raises(ArtefactError, match="another decomposition"):
        Harvest.load(tmp_path / "harvest", other)
    with pytest.raises(ArtefactError, match="another decomposition"):
        found.check(fingerprint(other))


def test_what_is_mostly_empty_is_stored_as_its_entries(found, tmp_path):
    """A thousand more tokens that never occur hardly grow the files, and come back as zeros."""
    wide = {
        side: TokenTable(F.pad(table.at_firings, (0, 1000)), F.pad(table.everywhere, (0, 1000)))
        for side, table in (("inputs", found.inputs), ("outputs", found.outputs))
    }
    strings = [*found.strings, *map(str, range(1000))]
    wide = dataclasses.replace(found, **wide, strings=strings)
    wide.save(tmp_path / "wide")
    size = (tmp_path / "wide" / "inputs.safetensors").stat().st_size
    assert size < 0.1 * wide.inputs.at_firings.nbytes
    loaded = Harvest.load(tmp_path / "wide")
    for name, tensor in wide._tensors().items():
        again = loaded._tensors()[name]
        assert again.dtype == tensor.dtype, name
        assert torch.equal(again, tensor), name


def test_a_trimmed_harvest_keeps_the_tokens_of_most_information(found, tmp_path):
    found.trimmed(3).save(tmp_path / "small")
    small = Harvest.load(tmp_path / "small")
    assert (small.inputs.at_firings > 0).sum(1).max() == 3
    for site in found.layout.names:
        for index in range(3):
            for side in ("input", "output"):
                kept = small.tokens(site, index, side, k=5)
                every = found.tokens(site, index, side, k=1000)
                assert set(kept) <= set(every)
                assert [t.recall * t.pmi for t in kept] == [t.recall * t.pmi for t in every[:3]]
            pairs = zip(small.examples(site, index), found.examples(site, index), strict=True)
            for ours, theirs in pairs:
                assert (ours.tokens, ours.focus) == (theirs.tokens, theirs.focus)
                assert ours.activation == pytest.approx(theirs.activation, rel=1e-3, abs=1e-4)


def test_damaged_and_unfitting_files_are_refused(found, tmp_path):
    folder = found.save(tmp_path / "harvest")
    record = storage.read(folder, HarvestRecord).record
    tensors = {name: vars(getattr(found, name)) for name in PARTS}
    other = record.model_copy(update={"sites": ["a"], "n_subcomponents": [1]})
    storage.write(tmp_path / "other", other, tensors)
    with pytest.raises(ArtefactError, match="do not fit"):
        Harvest.load(tmp_path / "other")
    file = folder / "top.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match="top"):
        Harvest.load(folder)


def test_what_version_0_1_saved_still_loads(tmp_path):
    old = Harvest.load(V01 / "harvest")
    for part in PARTS:
        stored = load_file(V01 / "harvest" / f"{part}.safetensors")
        assert vars(getattr(old, part)).keys() == stored.keys()
        assert all(torch.equal(vars(getattr(old, part))[name], x) for name, x in stored.items())
    assert old.table("blocks.0.mlp.in")[0].density >= 0
    new = Harvest.load(old.save(tmp_path / "new"))
    assert_same(new, old)
    assert (new.settings, new.layout, new.strings) == (old.settings, old.layout, old.strings)
    assert (new.fingerprint, new.data_state) == (old.fingerprint, old.data_state)


# --------------------------------------------------------------------------- asking


def test_cards(found, model):
    seen = {None: 0, dict: 0}
    for name in model.vpd.layout.names:
        density = {row.index: row.density for row in found.table(name)}
        for index in range(6):
            card = found.card(name, index, k=4)
            if not density[index]:
                assert card is None
                assert found.examples(name, index, "random") == []
                assert found.tokens(name, index) == []
                seen[None] += 1
                continue
            seen[dict] += 1
            assert list(card) == [
                "density",
                "mean_importance",
                "examples",
                "input_tokens",
                "output_tokens",
            ]
            assert card["density"] == pytest.approx(density[index])
            assert json.loads(json.dumps(card)) == card
            for example in card["examples"]:
                assert list(example) == ["tokens", "importance", "activation", "focus"]
                lengths = {len(example[key]) for key in ("tokens", "importance", "activation")}
                assert len(lengths) == 1
                assert 0 <= example["focus"] < lengths.pop()
                assert all(re.fullmatch(r"<\d+>", token) for token in example["tokens"])
                assert example["importance"][example["focus"]] > THRESHOLD
            for side in ("input_tokens", "output_tokens"):
                assert 1 <= len(card[side]) <= 4
                assert all(list(row) == ["token", "recall", "pmi"] for row in card[side])
    assert min(seen.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blocks.9.mlp.in", 0), "blocks.9.mlp.in"),
        (("blocks.0.mlp.in", 6), "6 subcomponents"),
        (("blocks.0.mlp.in", -1), "index is -1"),
    ],
)
def test_unknown_subcomponents(found, arguments, message):
    for ask in (found.card, found.examples, found.tokens):
        with pytest.raises(InputError, match=message):
            ask(*arguments)


def test_wrong_arguments(model, tokens, found):
    with pytest.raises(InputError, match="n_top is 0"):
        Settings(n_top=0)
    with pytest.raises(InputError, match="n_batches is 0"):
        harvest(model, tokens, n_batches=0)
    with pytest.raises(InputError, match=r"blocks\.7"):
        harvest(model, tokens, sites=["blocks.7"])
    with pytest.raises(InputError, match=r"memory_limit=1e-05.*sites="):
        harvest(model, tokens, memory_limit=1e-5)
    with pytest.raises(AttachError):
        harvest(tiny_bridge(), tokens)
    with pytest.raises(InputError, match="kind"):
        found.examples("blocks.0.mlp.in", 0, "best")
    with pytest.raises(InputError, match="side"):
        found.tokens("blocks.0.mlp.in", 0, "middle")
    with pytest.raises(InputError, match="by="):
        found.tokens("blocks.0.mlp.in", 0, by="best")


class FakeTokenizer:
    """Five tokens: a SentencePiece word, a word, half a character, nothing, markup."""

    texts = ("word", " word", "\N{REPLACEMENT CHARACTER}", "", "<b>")
    pieces = ("▁word", "Ġword", "Ã", None, "<b>")

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return [self.texts[token] for (token,) in rows]

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[token] for token in ids]


def test_token_strings():
    assert token_strings(FakeTokenizer(), 6) == [" word", " word", "Ã", "<3>", "<b>", "<5>"]
    assert token_strings(None, 2) == ["<0>", "<1>"]


# ----------------------------------------------------------------------------- pages

HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\u2028&<!--"]


def test_pages_are_safe_and_self_contained(found, tmp_path):
    strings = [HOSTILE[i % 3] + str(i) for i in range(29)]
    index = write(dataclasses.replace(found, strings=strings), tmp_path, "A <title>")
    sites = found.layout.names
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html",
        *(page_name(site) for site in sites),
    }
    for path in tmp_path.iterdir():
        page = path.read_text(encoding="utf-8")
        assert "A &lt;title&gt;" in page
        assert not re.search(r"alert\(1\)</script|<img|<!--|https://|<link|@import|\bsrc=\"", page)
        assert page.count("</script>") == (0 if path == index else 2)
        assert "default-src 'none'" in page
    text = (tmp_path / page_name(sites[0])).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert set(data["tokens"]) <= set(strings)
    assert [card["i"] for card in data["cards"]] == [
        row.index for row in found.table(sites[0]) if row.density
    ]
    card = data["cards"][0]
    focus, shown, importance, _ = card["top"][0]
    example = found.examples(sites[0], card["i"])[0]
    assert [data["tokens"][i] for i in shown] == [strings[i] for i in example.tokens]
    assert (focus, importance) == (example.focus, [round(100 * g) for g in example.importance])
    for site in sites:
        assert f'href="{page_name(site)}"' in index.read_text(encoding="utf-8")


def test_a_site_where_nothing_fires(model, tokens, tmp_path):
    silent = harvest(model, tokens, **SETTINGS, threshold=0.999999)
    silent.usage.firings.zero_()
    assert write(silent, tmp_path).is_file()


def test_command(model, tokens, tmp_path, capsys):
    from vpd_lens.cli.analyse import harvest_command
    from vpd_lens.models import load_model

    plain = load_model(save_tiny(tmp_path / "model"))
    vpd_lens.decompose(plain, n_subcomponents=6).vpd.save(tmp_path / "vpd")
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    harvest_command(
        tmp_path / "vpd",
        model=str(tmp_path / "model"),
        data=str(tmp_path / "tokens.npy"),
        output=tmp_path / "out",
        n_batches=2,
        batch_size=4,
        device="cpu",
    )
    assert "index.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "dashboard" / "index.html").is_file()
    assert Harvest.load(tmp_path / "out" / "harvest").n_batches == 2
