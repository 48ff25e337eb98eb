"""Every kind of data source: contents, policies, errors, and resuming to the bit."""

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vpd_lens.data import Batch, TokenBatches, one_pass, token_batches
from vpd_lens.data import arrays as data_arrays
from vpd_lens.data import documents as data_documents
from vpd_lens.data.batches import BatchSpec
from vpd_lens.errors import DataError, InputError

CORPUS = Path(os.path.dirname(json.__file__))
SOURCES = sorted(CORPUS.glob("*.py"))
TEXTS = [path.read_text() for path in SOURCES]
LINES = [line for text in TEXTS for line in text.splitlines()]

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = SimpleNamespace(d_vocab=len(tokenizer), n_ctx=64, default_prepend_bos=True)
    return SimpleNamespace(cfg=cfg, tokenizer=tokenizer)


@pytest.fixture
def toy():
    return SimpleNamespace(tokenizer=None)


def take(batches, n):
    """The tokens of the next batches, `[n, batch, pos]`; none of them is padded."""
    taken = [next(batches) for _ in range(n)]
    assert all(batch.real is None for batch in taken)
    return torch.stack([batch.tokens for batch in taken])


def assert_resumes(make, steps=(0, 1, 3, 8, 21), ahead=12, rewinds=True):
    """Stopping after any number of steps, and going on in a new object, changes nothing."""
    whole = take(make(), max(steps) + ahead)
    for n in steps:
        interrupted = make()
        for _ in range(n):
            next(interrupted)
        state = json.dumps(interrupted.state_dict())
        resumed = make()
        resumed.load_state_dict(json.loads(state))
        assert json.loads(json.dumps(resumed.state_dict())) == json.loads(state)
        assert torch.equal(take(resumed, ahead), whole[n : n + ahead]), f"after {n} steps"
        # and again from the resumed one: positions add up
        again = make()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert torch.equal(next(again).tokens, next(resumed).tokens)
        if not rewinds:
            continue
        resumed.load_state_dict(json.loads(state))
        assert torch.equal(take(resumed, ahead), whole[n : n + ahead])


# --- arrays ---------------------------------------------------------------------------------------


ROWS = torch.arange(10 * 6).reshape(10, 6)
STREAM = torch.arange(103)


def batches_of(source, model, **kw):
    return token_batches(source, model=model, **{"batch_size": 3, "seq_len": 4, **kw})


def test_rows_are_drawn_without_replacement_and_reshuffled(model):
    batches = batches_of(ROWS, model, batch_size=5)
    assert isinstance(batches, TokenBatches)
    assert iter(batches) is batches
    epochs = take(batches, 6).reshape(3, 10, 4)
    assert epochs.dtype == torch.int64
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], ROWS[:, :4])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    other = take(batches_of(ROWS, model, batch_size=5, seed=1), 2).reshape(10, 4)
    assert not torch.equal(other, epochs[0])
    ordered = take(batches_of(ROWS, model, batch_size=5, shuffle=False), 4).reshape(2, 10, 4)
    assert torch.equal(ordered, ROWS[:, :4].expand(2, -1, -1))
    assert "10 x 6 tokens" in batches.description
    assert "no BOS" in batches.description


def test_a_stream_is_cut_into_windows_with_new_borders_every_epoch(model):
    batches = batches_of(STREAM, model, batch_size=5)  # 25 windows, perhaps 24
    starts = []
    for _ in range(4):
        epoch = take(batches, 4).reshape(20, 4)
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(4))
        assert len(epoch[:, 0].unique()) == 20
        offset = epoch[0, 0] % 4
        assert (epoch[:, 0] % 4 == offset).all()
        starts.append(int(offset))
        while batches.state_dict()["position"]["batch"] < (len(STREAM) - offset) // 4 // 5:
            next(batches)
    assert len(set(starts)) > 1
    ordered = take(batches_of(STREAM, model, batch_size=5, shuffle=False), 5)
    assert torch.equal(ordered.reshape(-1), STREAM[:100])


def test_a_stream_that_just_fills_a_batch_always_does(model):
    batches = batches_of(STREAM[:13], model)
    assert take(batches, 20).shape == (20, 3, 4)


def test_bos_in_front_of_windows(model):
    batches = batches_of(STREAM, model, prepend_bos=True)
    rows = take(batches, 8).reshape(-1, 4)
    assert (rows[:, 0] == BOS).all()
    assert torch.equal(rows[:, 1:], rows[:, 1:2] + torch.arange(3))
    assert f"BOS ({BOS}) before every row" in batches.description


def test_sequence_length_of_arrays(model):
    make = partial(token_batches, model=model, batch_size=1, seq_len=None)
    assert next(make(ROWS)).tokens.shape == (1, 6)
    assert next(make(torch.zeros(4, 100, dtype=torch.int16))).tokens.shape == (1, 64)
    assert make(STREAM).seq_len == 64
    unlimited = {"model": SimpleNamespace(), "batch_size": 1, "seq_len": None}
    assert next(token_batches(ROWS, **unlimited)).tokens.shape == (1, 6)
    with pytest.raises(DataError, match="seq_len is None"):
        token_batches(STREAM, **unlimited)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, np.uint8, ">i4"])
def test_files_give_what_arrays_give(model, tmp_path, dtype):
    for tokens in (ROWS, STREAM):
        expected = take(batches_of(tokens, model), 10)
        path = tmp_path / "tokens.npy"
        np.save(path, tokens.numpy().astype(dtype))
        for source in (path, str(path), np.load(path)):
            assert torch.equal(take(batches_of(source, model), 10), expected)
        if dtype != ">i4":
            path = tmp_path / "tokens.safetensors"
            extra = {"other": torch.zeros(2)} if tokens is ROWS else {}
            stored = torch.from_numpy(tokens.numpy().astype(dtype))
            save_file({"tokens": stored, **extra}, path)
            assert torch.equal(take(batches_of(path, model), 10), expected)


def test_fortran_order_and_memory_mapping(model, tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(ROWS.numpy()))
    batches = batches_of(tmp_path / "f.npy", model)
    assert torch.equal(take(batches, 7), take(batches_of(ROWS, model), 7))
    assert isinstance(batches._tokens, np.memmap)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["rows", "stream", "npy", "safetensors", "bos"])
def test_arrays_resume(model, tmp_path, kind, shuffle):
    np.save(tmp_path / "t.npy", STREAM.numpy().astype(np.uint16))
    save_file({"x": ROWS}, tmp_path / "t.safetensors")
    source = {
        "rows": ROWS,
        "npy": tmp_path / "t.npy",
        "safetensors": tmp_path / "t.safetensors",
    }.get(kind, STREAM)
    bos = True if kind == "bos" else None
    assert_resumes(lambda: batches_of(source, model, shuffle=shuffle, prepend_bos=bos, seed=5))


def test_vocabulary_is_checked_in_the_whole_array(model, monkeypatch, tmp_path):
    monkeypatch.setattr(data_arrays, "CHUNK", 16)
    bad = ROWS.clone()
    bad[8, 5] = 500
    with pytest.raises(DataError, match=r"token 500 at index \[8, 5\].*d_vocab = 500"):
        batches_of(bad, model)
    np.save(tmp_path / "bad.npy", np.where(STREAM == 77, -1, STREAM))
    with pytest.raises(DataError, match=r"token -1 at index \[77\]"):
        batches_of(tmp_path / "bad.npy", model)
    bad[8, 5] = 499
    batches_of(bad, model)


@pytest.mark.parametrize(
    ("source", "kw", "message"),
    [
        (ROWS.float(), {}, "dtype torch.float32"),
        (ROWS.bfloat16(), {}, "dtype torch.bfloat16"),
        (ROWS.bool(), {}, "dtype torch.bool"),
        (ROWS.numpy().astype(float), {}, "dtype float64"),
        (ROWS[None], {}, r"shape \[1, 10, 6\]"),
        (torch.tensor(3), {}, r"shape \[\]"),
        (ROWS[:0], {}, "no tokens"),
        (ROWS, {"seq_len": 7}, "rows of 6 tokens, shorter than seq_len=7"),
        (ROWS, {"batch_size": 11}, "10 rows .*batch_size=11"),
        (STREAM, {"batch_size": 26}, "25 rows .*batch_size=26"),
        (ROWS, {"prepend_bos": True}, "prepend_bos=True, but source is a 2-D array"),
        (ROWS, {"seq_len": 65}, "seq_len is 65.*n_ctx is 64"),
        (ROWS, {"seq_len": 0}, "seq_len is 0"),
        (ROWS, {"batch_size": 0}, "batch_size is 0"),
        (STREAM, {"seq_len": 1, "prepend_bos": True}, "no room"),
        (None, {}, "NoneType"),
        ({"train": ROWS}, {}, r"keys \['train'\]"),
        ("no/such/place", {}, "no files"),
        ("no/such.npy", {}, "no such file"),
        ("no/such/*.txt", {}, "no files"),
    ],
)
def test_clear_errors(model, source, kw, message):
    with pytest.raises((DataError, InputError), match=message):
        batches_of(source, model, **kw)


def test_bos_needs_a_tokenizer_that_has_one():
    with pytest.raises(DataError, match="no BOS token"):
        batches_of(STREAM, SimpleNamespace(tokenizer=None), prepend_bos=True)


def test_damaged_files(model, tmp_path):
    npy, safe = tmp_path / "t.npy", tmp_path / "t.safetensors"
    np.save(npy, ROWS.numpy())
    save_file({"t": ROWS}, safe)
    for path in (npy, safe):
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(DataError, match="truncated or damaged"):
            batches_of(path, model)
        path.write_bytes(b"")
        with pytest.raises(DataError, match="truncated or damaged"):
            batches_of(path, model)
    np.save(npy, np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        batches_of(npy, model)
    save_file({"a": ROWS, "b": ROWS + 1}, safe)
    with pytest.raises(DataError, match=r"\['a', 'b'\]"):
        batches_of(safe, model)
    save_file({"a": ROWS.bfloat16()}, safe)
    with pytest.raises(DataError, match="bfloat16"):
        batches_of(safe, model)


def test_resuming_with_other_data_or_arguments(model):
    state = batches_of(ROWS, model).state_dict()
    for other in (
        batches_of(ROWS + 1, model),
        batches_of(ROWS, model, seed=1),
        batches_of(ROWS, model, batch_size=2),
        batches_of(STREAM, model),
        batches_of([ROWS[:3, :4]], model),
    ):
        with pytest.raises(DataError, match="state belongs to other batches"):
            other.load_state_dict(state)


# --- text -----------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """Real text in a directory tree, with what else lies about in such directories."""
    for i, text in enumerate(TEXTS):
        path = tmp_path / "corpus" / f"part{i % 2}" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root = tmp_path / "corpus"
    (root / "part0" / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    (root / "zeros.bin").write_bytes(bytes(10))
    (root / "empty.txt").write_text("")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.txt").write_text("hidden " * 100)
    (root / "again").symlink_to(root)  # followed, every file would be read many times
    return root


def packed(tokenizer, texts):
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), EOS]]


def corpus_texts(root):
    return [path.read_text() for path in sorted(root.rglob("*.py"))]


@pytest.mark.slow
def test_a_directory_becomes_one_packed_stream(corpus, model, tokenizer):
    expected = packed(tokenizer, corpus_texts(corpus))
    for source in (corpus, str(corpus), str(corpus / "**" / "*.py"), corpus / "part*" / "*.py"):
        batches = batches_of(source, model, seq_len=16, shuffle=False, prepend_bos=False)
        n = len(expected) // 16 // 3
        assert take(batches, n).reshape(-1).tolist() == expected[: n * 48]
    batches = batches_of(corpus, model)
    text = batches.description
    assert f"{len(TEXTS) + 1} text files, 2 binary files skipped" in text
    assert f"EOS ({EOS})" in text
    assert f"{len(expected)} tokens" in text


def test_a_single_file_and_its_byte_order_mark(tmp_path, model, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    batches = batches_of(path, model, shuffle=False, prepend_bos=False, batch_size=1, seq_len=20)
    assert next(batches).tokens.tolist()[0] == packed(tokenizer, TEXTS[:1])[:20]
    assert tokenizer.decode(next(batches).tokens[0]) in TEXTS[0]


def test_long_texts_are_tokenised_in_chunks(corpus, model, monkeypatch):
    whole = take(batches_of(corpus, model), 5)
    monkeypatch.setattr("vpd_lens.data.text.CHUNK_CHARACTERS", 1000)
    assert torch.equal(take(batches_of(corpus, model), 5), whole)


@pytest.mark.parametrize(
    ("default", "asked", "has_bos", "expected"),
    [
        (True, None, True, True),
        (False, None, True, False),
        (True, False, True, False),
        (False, True, True, True),
        (True, None, False, False),
    ],
)
@pytest.mark.parametrize("kind", ["files", "stream", "dataset"])
def test_bos_policy(corpus, tokenizer, kind, default, asked, has_bos, expected):
    if not has_bos:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"
        )
    cfg = SimpleNamespace(d_vocab=500, n_ctx=64, default_prepend_bos=default)
    model = SimpleNamespace(cfg=cfg, tokenizer=tokenizer)
    source = corpus
    if kind != "files":
        source = datasets.Dataset.from_dict({"text": corpus_texts(corpus)})
    if kind == "stream":
        source = source.to_iterable_dataset()
    batches = batches_of(source, model, seq_len=16, shuffle=False, prepend_bos=asked)
    rows = take(batches, 20).reshape(-1, 16)
    tokens = packed(tokenizer, corpus_texts(corpus))
    if expected:
        assert (rows[:, 0] == BOS).all()
        rows = rows[:, 1:]
        assert "BOS (0) before every row" in batches.description
    else:
        assert "no BOS" in batches.description
    assert rows.reshape(-1).tolist() == tokens[: rows.numel()]


def test_same_rows_as_transformer_lens(model, tokenizer):
    utilities = pytest.importorskip("transformer_lens.utilities.tokenize_utils")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    theirs = utilities.tokenize_and_concatenate(
        dataset,
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<eos>",
        ),
        max_length=32,
        num_proc=None,
    )["tokens"][:]
    ours = batches_of(dataset, model, seq_len=32, shuffle=False, batch_size=1)
    rows = take(ours, len(theirs))[:, 0]
    assert torch.equal(rows[: len(rows) - 1], torch.as_tensor(theirs)[: len(rows) - 1])


def test_tokenizer_without_eos(tokenizer, corpus):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    model = SimpleNamespace(cfg=SimpleNamespace(n_ctx=64, d_vocab=500), tokenizer=bare)
    batches = batches_of(corpus, model, shuffle=False)
    assert "no EOS" in batches.description
    assert EOS not in take(batches, 300)


@pytest.mark.parametrize("shuffle", [True, False])
def test_text_files_resume(corpus, model, shuffle):
    # 50 batches per epoch or so: cross two borders
    make = partial(batches_of, corpus, model, seq_len=64, batch_size=20, shuffle=shuffle)
    n = len(make()._rows) // 20
    assert_resumes(make, steps=(0, 3, n - 1, n, n + 1, 2 * n))


def test_text_errors(tmp_path, model, corpus):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no files"):
        batches_of(tmp_path / "void", model)
    (tmp_path / "void" / "a.txt").write_text("")
    (tmp_path / "void" / "b.bin").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"no text in it \(2 files, 1 of them binary\)"):
        batches_of(tmp_path / "void", model)
    (tmp_path / "void" / "a.txt").write_text("few words")
    with pytest.raises(DataError, match="rows of 3 tokens, fewer than"):
        batches_of(tmp_path / "void", model, batch_size=50)
    with pytest.raises(DataError, match="no tokenizer"):
        batches_of(corpus, SimpleNamespace(cfg=model.cfg, tokenizer=None))
    small = SimpleNamespace(cfg=SimpleNamespace(d_vocab=100, n_ctx=64), tokenizer=model.tokenizer)
    with pytest.raises(DataError, match="d_vocab = 100"):
        batches_of(corpus, small)


# --- Hugging Face datasets ------------------------------------------------------------------------


def lines_dataset():
    return datasets.Dataset.from_dict({"text": LINES[:200], "n": list(range(200))})


def dataset_of(kind, tmp_path):
    """One way to get at the same 200 documents, as a function that starts afresh."""
    dataset = lines_dataset()
    tokens = [[(7 * i + j) % 500 for j in range(20)] for i in range(200)]
    if kind.startswith("hf:"):
        path = tmp_path / kind.replace(":", "_")
        if kind == "hf:saved":
            dataset.save_to_disk(str(path))
        elif kind == "hf:saved_splits:test":
            datasets.DatasetDict({"test": dataset}).save_to_disk(str(path))
            return lambda: f"hf:{path}:test"
        else:
            path.mkdir()
            for i in range(3):
                dataset.shard(3, i).to_parquet(str(path / f"train-{i}.parquet"))
        return lambda: f"hf:{path}"
    if kind.startswith("tokens"):
        dataset = datasets.Dataset.from_dict({"tokens": tokens})
        return lambda: dataset.to_iterable_dataset(3) if kind == "tokens_streamed" else dataset
    stream = partial(dataset.to_iterable_dataset, num_shards=3)
    return {
        "mapped": lambda: dataset,
        "formatted": lambda: dataset.with_format("torch"),
        "streamed": stream,
        "generated": lambda: datasets.IterableDataset.from_generator(
            lambda: ({"text": line} for line in LINES[:200])
        ),
        "batch_mapped": lambda: stream().map(
            lambda b: {"text": [t.upper() for t in b["text"]]}, batched=True, batch_size=30
        ),
        "shuffled": lambda: stream().shuffle(seed=3, buffer_size=50),
        "interleaved": lambda: datasets.interleave_datasets(
            [stream(), stream()], probabilities=[0.3, 0.7], seed=1
        ),
    }[kind]


KINDS = [
    "mapped",
    "formatted",
    "streamed",
    "generated",
    "batch_mapped",
    "shuffled",
    "interleaved",
    "tokens",
    "tokens_streamed",
    "hf:saved",
    "hf:saved_splits:test",
    "hf:parquet",
]


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_resume(kind, tmp_path, model, monkeypatch):
    # Small, so that the steps cross blocks, reads, epochs, and batches across blocks.
    monkeypatch.setattr(data_documents, "READ", 32)
    monkeypatch.setattr(data_documents, "BLOCK_ROWS", 30)
    source = dataset_of(kind, tmp_path)
    probe = batches_of(source(), model, seq_len=20, batch_size=7)
    n = 0
    while probe.epoch < 2:
        next(probe)
        n += 1
    make = lambda: batches_of(source(), model, seq_len=20, batch_size=7, seed=4)  # noqa: E731
    assert_resumes(make, steps=(0, n // 2, n - 1, n + 9), ahead=12)


@pytest.mark.slow
def test_unshuffled_stream_is_the_packed_text(model, tokenizer):
    dataset = lines_dataset()
    expected = packed(tokenizer, [line for line in LINES[:200] if line])
    for source in (dataset, dataset.to_iterable_dataset(3)):
        batches = batches_of(source, model, seq_len=9, shuffle=False)
        n = len(expected) // 8 // 3 + 40  # into the second epoch: the carry goes over its border
        tokens = take(batches, n)[:, :, 1:].reshape(-1).tolist()
        assert tokens == (expected + expected)[: len(tokens)]
        assert_resumes(
            partial(batches_of, source, model, seq_len=9, shuffle=False),
            steps=(0, 1, n - 45, n - 40, n - 39),
        )


def test_shuffled_blocks_hold_the_same_rows(model):
    source = lines_dataset().to_iterable_dataset(3)
    ordered = batches_of(source, model, seq_len=9, shuffle=False, batch_size=8)
    mixed = batches_of(source, model, seq_len=9, batch_size=8)
    rows = lambda b: take(b, 128).reshape(-1, 9)  # noqa: E731  # 1024 rows: one block
    ordered, mixed = rows(ordered).tolist(), rows(mixed).tolist()
    if len(set(map(tuple, ordered))) == len(ordered):
        assert sorted(ordered) == sorted(mixed)
    assert ordered != mixed


def test_mapped_documents_are_permuted_every_epoch(model):
    rows = datasets.Dataset.from_dict({"input_ids": [[i, i] for i in range(12)]})
    batches = batches_of(rows, model, seq_len=2, batch_size=12)
    epochs = take(batches, 3)[:, :, 0]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(12))
    assert not torch.equal(epochs[0], epochs[1])
    assert "column 'input_ids'" in batches.description


def test_saved_dataset_by_plain_path_and_text_column(tmp_path, model):
    dataset = lines_dataset().rename_column("text", "body")
    dataset.save_to_disk(str(tmp_path / "saved"))
    batches = batches_of(tmp_path / "saved", model, text_column="body")
    assert "200 documents of text (column 'body')" in batches.description
    assert torch.equal(take(batches, 5), take(batches_of(dataset, model, text_column="body"), 5))
    datasets.DatasetDict({"a": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"splits \['a'\]"):
        batches_of(tmp_path / "splits", model)
    with pytest.raises(DataError, match=r"columns \['body', 'n'\].*text_column"):
        batches_of(tmp_path / "saved", model)


def test_dataset_errors(tmp_path, model):
    dataset = lines_dataset()
    with pytest.raises(DataError, match=r"keys \['train'\].*source\['train'\]"):
        batches_of(datasets.DatasetDict({"train": dataset}), model)
    with pytest.raises(DataError, match="is empty"):
        batches_of(dataset.select([]), model)
    with pytest.raises(DataError, match="load_dataset"):
        batches_of("hf:no/such-dataset", model)
    with pytest.raises(DataError, match="dtype int64 and shape"):
        batches_of(dataset, model, text_column="n")
    with pytest.raises(DataError, match="no tokenizer"):
        batches_of(dataset, SimpleNamespace(cfg=model.cfg, tokenizer=None))
    with pytest.raises(DataError, match=r"rows of 4 tokens in a whole pass.*batch_size=3000"):
        next(batches_of(dataset.select(range(40)), model, batch_size=3000))
    with pytest.raises(DataError, match=r"0 rows .* empty"):
        next(batches_of(datasets.Dataset.from_dict({"text": ["", None]}), model))

    rows = datasets.Dataset.from_dict({"tokens": [[1, 2, 3], [4, 5, 600], [7]]})
    with pytest.raises(DataError, match="row of 1 tokens"):
        next(batches_of(rows, model, seq_len=3))
    with pytest.raises(DataError, match="token 600"):
        next(batches_of(rows.select([0, 1]), model, seq_len=3, batch_size=2))
    with pytest.raises(DataError, match="tokenised already"):
        batches_of(rows, model, seq_len=3, prepend_bos=True)
    with pytest.raises(DataError, match="rows of 3 tokens, shorter than seq_len=4"):
        batches_of(rows, model)
    floats = datasets.Dataset.from_dict({"tokens": [[0.5, 1.5]]})
    with pytest.raises(DataError, match="dtype float64"):
        batches_of(floats, model)


def test_damaged_dataset_files(tmp_path, model):
    lines_dataset().to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match=r"no text.*hf:DIRECTORY"):
        batches_of(tmp_path, model)
    with pytest.raises(DataError, match="split"):
        batches_of(f"hf:{tmp_path}:nope", model)
    whole = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError):
        next(batches_of(f"hf:{tmp_path}", model))


def test_changed_dataset_is_noticed_on_resume(model):
    dataset = lines_dataset()
    batches = batches_of(dataset, model)
    next(batches)
    changed = datasets.Dataset.from_dict({"text": [line[::-1] for line in LINES[:200]]})
    resumed = batches_of(changed, model)
    with pytest.raises(DataError, match="other documents"):
        resumed.load_state_dict(batches.state_dict())


# --- iterables and functions ----------------------------------------------------------------------


class Counter:
    """A re-iterable without state."""

    def __iter__(self):
        return (torch.full((3, 4), i) for i in range(5))


class Stateful:
    """An iterable that keeps its own position, as stateful data loaders do."""

    def __init__(self):
        self.next = 0
        self.drawn = 0

    def __iter__(self):
        while self.next < 5:
            self.next += 1
            self.drawn += 1
            yield torch.full((3, 4), self.next)
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def loader(seed=0, drop_last=False, n=11):
    dataset = torch.utils.data.TensorDataset(torch.arange(4 * n).reshape(n, 4))
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=3,
        shuffle=True,
        generator=generator,
        drop_last=drop_last,
        collate_fn=lambda rows: torch.stack([row[0] for row in rows]),
    )


@pytest.mark.parametrize(
    "source",
    [
        lambda: [torch.full((3, 4), i, dtype=torch.int32) for i in range(5)],
        lambda: [np.full((3, 4), i, dtype=np.uint16) for i in range(5)],
        Counter,
        Stateful,
        loader,  # its last batch is short, and every pass has another order
    ],
)
def test_iterables_restart_and_resume(model, source):
    # A DataLoader's generator has moved on, so only a new one is as it was at the start.
    assert_resumes(
        lambda: batches_of(source(), model), steps=(0, 1, 4, 5, 6, 11), rewinds=source is not loader
    )


def test_a_source_with_state_is_not_drawn_again(model):
    batches = batches_of(Stateful(), model)
    take(batches, 3)
    source = Stateful()
    resumed = batches_of(source, model)
    resumed.load_state_dict(batches.state_dict())
    assert next(resumed).tokens[0, 0] == 4
    assert source.drawn == 1
    assert "own state" in resumed.description


def test_batches_nest(model):
    make = lambda: batches_of(batches_of(ROWS, model), model)  # noqa: E731
    assert torch.equal(take(make(), 5), take(batches_of(ROWS, model), 5))
    assert_resumes(make)


def test_bare_generators_cannot_be_resumed(model):
    make = lambda: batches_of((b for b in Counter()), model)  # noqa: E731
    batches = make()
    assert "cannot be resumed" in batches.description
    fresh = batches.state_dict()
    assert take(batches, 5).shape == (5, 3, 4)
    with pytest.raises(DataError, match="generator, cannot be resumed"):
        make().load_state_dict(json.loads(json.dumps(batches.state_dict())))
    make().load_state_dict(fresh)
    with pytest.raises(DataError, match="ended after 5 batches"):
        next(batches)


def test_an_unseeded_order_is_noticed_on_resume(model):
    batches = batches_of(loader(seed=1, n=100), model)
    take(batches, 4)
    with pytest.raises(DataError, match="other batches"):
        batches_of(loader(seed=2, n=100), model).load_state_dict(batches.state_dict())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((3, 4), 500), r"token 500 at index \[0, 0\]"),
        (torch.zeros(3, 4), "dtype torch.float32"),
        (torch.zeros(3, 4, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(3, 5).long(), "rows of 5 tokens; expected seq_len=4"),
        (torch.zeros(2, 4).long(), "2 rows; expected batch_size=3"),
        (torch.zeros(4, 4).long(), "4 rows; expected batch_size=3"),
        (torch.zeros(12).long(), r"shape \[12\]"),
        ({"tokens": torch.zeros(3, 4)}, "gave a dict.*input_ids"),
        (SimpleNamespace(), "gave a SimpleNamespace"),
    ],
)
def test_batches_are_checked(model, batch, message):
    with pytest.raises(DataError, match=message):
        next(batches_of([batch], model))


def test_more_iterable_errors(model):
    with pytest.raises(DataError, match="no batches"):
        next(batches_of([], model))
    long = [torch.zeros(3, 65).long()]
    with pytest.raises(DataError, match="n_ctx = 64"):
        next(batches_of(long, model, seq_len=None))
    with pytest.raises(DataError, match="prepend_bos"):
        batches_of(long, model, prepend_bos=True)
    good, short = torch.zeros(3, 4).long(), torch.zeros(1, 4).long()
    batches = batches_of([good, short, good], model)
    next(batches)
    with pytest.raises(DataError, match="1 rows; expected batch_size=3"):
        next(batches)

    class Unserialisable(Stateful):
        def state_dict(self):
            return {"state": torch.zeros(3)}

    with pytest.raises(DataError, match="JSON cannot hold"):
        batches_of(Unserialisable(), model)


def features(generator, batch_size):
    return torch.rand(batch_size, 5, generator=generator)


def tokens(generator, batch_size):
    return torch.randint(500, (batch_size, 4), generator=generator)


def test_functions_resume(toy, model):
    make = partial(token_batches, features, model=toy, batch_size=3, seq_len=None, seed=9)
    assert_resumes(make)
    batch = next(make()).tokens
    assert batch.dtype == torch.float32
    assert batch.shape == (3, 5)
    assert torch.equal(batch, features(torch.Generator().manual_seed(9), 3))
    assert "features" in make().description
    assert_resumes(partial(batches_of, tokens, model))
    with pytest.raises(DataError, match=r"dtype torch\.float32"):
        next(batches_of(features, model))
    with pytest.raises(DataError, match="gave 1 rows"):
        next(batches_of(lambda g, n: tokens(g, 1), model))


def test_toy_models_take_float_batches(toy):
    source = [torch.rand(3, 2, 5), torch.rand(3, 2, 5)]
    make = partial(token_batches, source, model=toy, batch_size=3, seq_len=None)
    assert torch.equal(next(make()).tokens, source[0])
    assert_resumes(make)
    with pytest.raises(DataError, match=r"shape \[3\]"):
        next(token_batches([torch.rand(3)], model=toy, batch_size=3, seq_len=None))


# --- one pass -------------------------------------------------------------------------------------


ONCE = {
    "rows": lambda folder: ROWS[:, :4],
    "stream": lambda folder: STREAM[:43],
    "npy": lambda folder: folder / "rows.npy",
    "dataset": lambda folder: datasets.Dataset.from_dict({"tokens": ROWS[:, :4].tolist()}),
    "streamed": lambda folder: datasets.Dataset.from_dict(
        {"tokens": ROWS[:, :4].tolist()}
    ).to_iterable_dataset(2),
    "batches": lambda folder: list(ROWS[:, :4].split(3)),
    "lists": lambda folder: ROWS[:, :4].tolist(),
}


@pytest.mark.parametrize("kind", ONCE)
def test_one_pass_gives_every_row_once_and_the_short_last_batch(kind, model, tmp_path):
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    expected = STREAM[:40].reshape(10, 4) if kind == "stream" else ROWS[:, :4]
    plan = {"model": model, "batch_size": 3, "seq_len": 4}
    make = lambda **kw: one_pass(ONCE[kind](tmp_path), **plan, **kw)  # noqa: E731
    batches = [batch.tokens for batch in make()]
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(batches), expected)
    assert len(list(make(n_batches=2))) == 2
    assert len(list(one_pass(ONCE[kind](tmp_path), **{**plan, "batch_size": 99}))) == (
        4 if kind == "batches" else 1
    )
    # an interrupted pass goes on where it was, also at the end
    for n in range(5):
        begun = make()
        for _ in range(n):
            next(begun)
        state = json.loads(json.dumps(begun.state_dict()))
        rest = [batch.tokens for batch in make(state=state)]
        assert torch.equal(torch.cat([*batches[:n], *rest]), expected)


def test_one_pass_over_nothing(model):
    for nothing in ([], iter([])):
        with pytest.raises(DataError):
            next(one_pass(nothing, model=model, batch_size=2))
    with pytest.raises(InputError, match="n_batches is 0"):
        one_pass(ROWS, model=model, batch_size=2, n_batches=0)


# --- the order of epochs ------------------------------------------------------------------------


def epochs_of(batches, n):
    return take(batches, 2 * n).reshape(n, 10, 4)


def test_neighbouring_seeds_share_no_order(model):
    first = epochs_of(batches_of(ROWS, model, batch_size=5, seed=0), 4)
    second = epochs_of(batches_of(ROWS, model, batch_size=5, seed=1), 4)
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_a_run_of_version_1_keeps_its_order(model):
    """Then the order of epoch e was that of `seed + e`."""
    batches = batches_of(ROWS, model, batch_size=5, seed=3)
    state = {**batches.state_dict(), "version": 1, "position": {"epoch": 1, "batch": 1}}
    batches.load_state_dict(state)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    assert torch.equal(next(batches).tokens, ROWS[order[5:], :4])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(next(batches).tokens, ROWS[order[:5], :4])
    assert batches.state_dict()["version"] == 1


# --- padding ------------------------------------------------------------------------------------


UNEQUAL = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12]]


def padded(side, length=5):
    """Tokens and attention masks of `UNEQUAL`, padded on one side with a token that is no pad."""
    tokens, masks = [], []
    for row in UNEQUAL:
        pads, ones = [17] * (length - len(row)), [1] * len(row)
        zeros = [0] * len(pads)
        tokens.append(pads + row if side == "left" else row + pads)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    return {"input_ids": tokens, "attention_mask": masks}


def padded_sources(side):
    columns = padded(side)
    tensors = {name: torch.tensor(rows) for name, rows in columns.items()}
    dataset = datasets.Dataset.from_dict(columns)
    return {
        "dataset": dataset,
        "streamed": dataset.to_iterable_dataset(),
        "mapping": tensors,
        "mappings": [{name: rows[i : i + 2] for name, rows in tensors.items()} for i in (0, 2)],
        "batches": [Batch(tensors["input_ids"], tensors["attention_mask"].bool())],
        "lists": UNEQUAL,
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_marked_and_on_the_right(model, side):
    for kind, source in padded_sources(side).items():
        batches = list(one_pass(source, model=model, batch_size=2))
        rows = [row for batch in batches for row in zip(batch.tokens, batch.real, strict=True)]
        assert [tokens[real].tolist() for tokens, real in rows] == UNEQUAL, kind
        assert all(bool((real.int().diff() <= 0).all()) for _, real in rows)


def test_padded_data_in_training_order_and_without_padding(model):
    source = padded_sources("left")["dataset"]
    make = partial(batches_of, source, model, batch_size=2, seq_len=3)
    assert next(make()).tokens.shape == (2, 3)
    batch = next(make(seq_len=6, batch_size=4))  # longer than the rows: padded further
    assert batch.real.sum(1).sort().values.tolist() == [1, 2, 3, 4]
    whole = datasets.Dataset.from_dict({"tokens": [[1, 2]] * 4, "attention_mask": [[1, 1]] * 4})
    assert next(batches_of(whole, model, seq_len=2)).real is None
    state = make()
    next(state)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(next(state), next(resumed), strict=True))


def test_texts_of_unequal_length(model, tokenizer):
    texts = TEXTS[0][:30], TEXTS[0][:90], TEXTS[1][:60]
    batch = next(one_pass(list(texts), model=model, batch_size=3))
    for row, real, text in zip(batch.tokens, batch.real, texts, strict=True):
        assert row[real].tolist() == [BOS, *tokenizer.encode(text, add_special_tokens=False)]
    plain = next(one_pass(list(texts), model=model, batch_size=3, prepend_bos=False, seq_len=4))
    assert plain.real is None
    assert plain.tokens.shape == (3, 4)
    with pytest.raises(DataError, match="no token in row 1"):
        one_pass([[1], []], model=model, batch_size=1)
    with pytest.raises(DataError, match="token 500"):
        one_pass([[1], [500]], model=model, batch_size=1)
    bad = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)}
    with pytest.raises(DataError, match="attention mask of shape"):
        next(one_pass([bad], model=model, batch_size=2))


def test_a_text_that_mentions_a_special_token_has_no_border_there(model):
    dataset = datasets.Dataset.from_dict({"text": ["one <bos> two <eos> three " * 40]})
    batch = next(batches_of(dataset, model, prepend_bos=False, shuffle=False, seq_len=16))
    assert not ((batch.tokens == BOS) | (batch.tokens == EOS)).any()


def test_a_vocabulary_that_holds_special_tokens_as_words_gives_no_border_either():
    words = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", "one", "two"])}
    level = Tokenizer(models.WordLevel(words, "<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, **named)
    model = SimpleNamespace(tokenizer=tokenizer)
    text = ["one <bos> what <eos> two"]
    batch = next(one_pass(text, model=model, batch_size=1, prepend_bos=False))
    assert batch.tokens.tolist() == [[3, 2, 4]]


def test_batches_for_a_gpu_are_pinned(model, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t)
    next(batches_of(ROWS, model))
    assert not pinned
    monkeypatch.setattr(BatchSpec, "on_cuda", True)
    next(batches_of(ROWS, model))
    assert pinned == [(3, 4)]


# --- a real model ---------------------------------------------------------------------------------


def small_hooked_transformer(directory):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer")
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=32, d_head=4, n_heads=2, act_fn="gelu", d_vocab=500
    )
    return HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(directory))


def small_bridge(directory):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = GPT2Config(vocab_size=500, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(cfg).save_pretrained(directory)
    return TransformerBridge.boot_transformers(str(directory), device="cpu")


@pytest.mark.compat
@pytest.mark.parametrize("build", [small_hooked_transformer, small_bridge])
def test_with_a_transformer_lens_model(tokenizer, tmp_path, build):
    tokenizer.save_pretrained(tmp_path)
    model = build(tmp_path)
    batches = token_batches(CORPUS, model=model, batch_size=2, seq_len=None)
    batch = next(batches).tokens
    assert batch.shape == (2, 32)
    assert (batch[:, 0] == BOS).all()
    assert not (batch[:, 1:] == BOS).any()  # although its tokenizer adds BOS by itself
    assert model(batch).shape == (2, 32, 500)
    with pytest.raises(DataError, match="d_vocab = 500"):
        batches_of(STREAM + 400, model)
