"""Base models from a directory or a name, and what is said when that fails."""

import json
import sys
from pathlib import Path

import pytest
import torch
from compat.builders import boot, has_hooked_transformer, hooked, native, save_architecture, tokens
from conftest import save_0_1
from safetensors.torch import load_file

from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.models import load_model
from vpd_lens.native import native_transformer

pytestmark = pytest.mark.compat


needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_architecture("llama", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def saved(tmp_path):
    return save_0_1(native("ln"), tmp_path / "model")


def assert_same(model, other):
    with torch.no_grad():
        assert torch.equal(model(tokens()), other(tokens()))


def test_what_version_0_1_saved_is_loaded():
    folder = Path(__file__).parent / "data" / "v01" / "model"
    model = load_model(folder)
    weights = load_file(folder / "model.safetensors")
    assert weights
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("name", ["ln", "rms_gated", "grouped", "no_norm", "attn_only"])
def test_native_bridges_come_back_bit_for_bit(name, tmp_path):
    model = native(name)
    state = torch.get_rng_state()
    other = load_model(save_0_1(model, tmp_path / "model"))
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert_same(model, other)
    assert not other.training
    assert model.cfg.to_dict() == other.cfg.to_dict()


@needs_hooked
@pytest.mark.parametrize("name", ["ln", "lnpre", "rms", "grouped", "rotary", "attn_only"])
def test_hooked_transformers_come_back_bit_for_bit(name, tmp_path):
    model = hooked(name)
    state = torch.get_rng_state()
    other = load_model(save_0_1(model, tmp_path / "model"), model_class="hooked_transformer")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(other) is type(model)
    assert_same(model, other)
    assert model.cfg.to_dict() == other.cfg.to_dict()


def test_half_precision(tmp_path):
    model = native("ln", torch.bfloat16)
    other = load_model(save_0_1(model, tmp_path / "model"))
    assert next(other.parameters()).dtype == torch.bfloat16
    assert_same(model, other)


@pytest.mark.parametrize("kind", ["native", pytest.param("hooked", marks=needs_hooked)])
def test_the_tokenizer_comes_along(kind, hf_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(hf_folder))
    if kind == "native":
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_native(native("ln").cfg, tokenizer=tokenizer)
    else:
        model = hooked("ln")
        model.set_tokenizer(tokenizer)
    other = load_model(save_0_1(model, tmp_path / "model"))
    text = "w5 w6 w7"
    assert torch.equal(model.to_tokens(text), other.to_tokens(text))
    assert other.to_string(other.to_tokens(text)[0]) == model.to_string(model.to_tokens(text)[0])
    assert other.cfg.default_prepend_bos == model.cfg.default_prepend_bos


@pytest.mark.parametrize("processing", ["default", "none", "full"])
def test_hugging_face_directories(processing, hf_folder):
    model = load_model(hf_folder, processing=processing)
    assert_same(model, boot(hf_folder, "processed" if processing == "full" else "default"))
    assert model.tokenizer is not None
    assert not model.training


@pytest.mark.parametrize("source", ["no-such-model-anywhere", "nobody/no-such-model"])
def test_unknown_names(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=source):
        load_model(source)
    if has_hooked_transformer():
        with pytest.raises(ConfigError, match=source):
            load_model(source, model_class="hooked_transformer")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_directories(source):
    with pytest.raises(ArtefactError, match="no such directory"):
        load_model(source)


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ArtefactError, match=r"config\.json"):
        load_model(tmp_path)


def test_damaged_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"model\.safetensors \(SafetensorError"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors \(FileNotFoundError"):
        load_model(saved)


def edit(folder, **changes):
    path = folder / "model.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))
    return record


def test_damaged_descriptions(saved):
    record = edit(saved)
    edit(saved, cfg={**record["cfg"], "d_model": 32})
    with pytest.raises(ArtefactError, match="cannot rebuild this model"):
        load_model(saved)
    edit(saved, cfg={**record["cfg"], "dtype": "float3"})
    with pytest.raises(ArtefactError, match="float3"):
        load_model(saved)
    (saved / "model.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"model\.json"):
        load_model(saved)


def test_a_class_that_is_gone(saved, monkeypatch):
    edit(saved, **{"class": "hooked_transformer"})
    monkeypatch.setitem(sys.modules, "transformer_lens", None)  # importing from it now fails
    with pytest.raises(ArtefactError, match="no longer has that class"):
        load_model(saved)


def test_arguments(saved):
    with pytest.raises(ConfigError, match="holds a bridge"):
        load_model(saved, model_class="hooked_transformer")
    with pytest.raises(ConfigError, match="processing='full'"):
        load_model(saved, processing="full")
    with pytest.raises(ConfigError, match="device='nonsense'"):
        load_model(saved, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            load_model(saved, device="cuda")
    assert next(load_model(saved, device="auto").parameters()).device.type in ("cpu", "cuda")


SHAPE = {"n_layers": 1, "d_model": 8, "n_ctx": 4, "d_head": 4, "n_heads": 2, "d_vocab": 5}


def test_native_transformers_touch_no_global_random_state(monkeypatch):
    def refused(_):
        raise AssertionError("a global generator was seeded")

    monkeypatch.setattr(torch, "manual_seed", refused)
    monkeypatch.setattr("numpy.random.seed", refused)
    monkeypatch.setattr("random.seed", refused)
    state = torch.get_rng_state()
    one, other, again = (native_transformer(s, **SHAPE, attn_only=True) for s in (0, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.W_E, again.W_E)
    assert not torch.equal(one.W_E, other.W_E)


@needs_hooked
def test_a_native_transformer_has_the_weights_of_a_seeded_one():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with torch.random.fork_rng(devices=[]):
        seeded = HookedTransformer(HookedTransformerConfig(**SHAPE, attn_only=True, seed=3))
    made = native_transformer(3, **SHAPE, attn_only=True)
    for name, value in seeded.state_dict().items():
        assert torch.equal(value, made.state_dict()[name]), name
