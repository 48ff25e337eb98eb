"""Base models written to a directory and read back, and what is said when that fails."""

import json
import shutil
import sys

import pytest
import torch
from compat.builders import boot, has_hooked_transformer, hooked, native, save_architecture, tokens

import vpd_lens
from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.models import load_model, save_model

pytestmark = pytest.mark.compat


needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_architecture("llama", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def saved(tmp_path):
    return save_model(native("ln"), tmp_path / "model")


def assert_same(model, other):
    with torch.no_grad():
        assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.parametrize("name", ["ln", "rms_gated", "grouped", "no_norm", "attn_only"])
def test_native_bridges_come_back_bit_for_bit(name, tmp_path):
    model = native(name)
    state = torch.get_rng_state()
    other = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert_same(model, other)
    assert not other.training
    assert model.cfg.to_dict() == other.cfg.to_dict()


@needs_hooked
@pytest.mark.parametrize("name", ["ln", "lnpre", "rms", "grouped", "rotary", "attn_only"])
def test_hooked_transformers_come_back_bit_for_bit(name, tmp_path):
    model = hooked(name)
    state = torch.get_rng_state()
    other = load_model(save_model(model, tmp_path / "model"), model_class="hooked_transformer")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(other) is type(model)
    assert_same(model, other)
    assert model.cfg.to_dict() == other.cfg.to_dict()


def test_half_precision(tmp_path):
    model = native("ln", torch.bfloat16)
    other = load_model(save_model(model, tmp_path / "model"))
    assert next(other.parameters()).dtype == torch.bfloat16
    assert_same(model, other)


def test_a_decomposition_is_left_out_and_fits_again(tmp_path):
    model = native("ln")
    plain = dict.fromkeys(model.state_dict())
    vpd_lens.decompose(model, n_subcomponents=5)
    save_model(model, tmp_path / "model")
    model.vpd.save(tmp_path / "vpd")
    other = load_model(tmp_path / "model")
    assert dict.fromkeys(other.state_dict()) == plain
    vpd_lens.load(tmp_path / "vpd", other)
    with model.vpd.masked("unmasked"), other.vpd.masked("unmasked"):
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
    other = load_model(save_model(model, tmp_path / "model"))
    text = "w5 w6 w7"
    assert torch.equal(model.to_tokens(text), other.to_tokens(text))
    assert other.to_string(other.to_tokens(text)[0]) == model.to_string(model.to_tokens(text)[0])
    assert other.cfg.default_prepend_bos == model.cfg.default_prepend_bos
    again = load_model(save_model(other, tmp_path / "again"))  # and a second time
    assert torch.equal(model.to_tokens(text), again.to_tokens(text))


@pytest.mark.parametrize("processing", ["default", "none", "full"])
def test_hugging_face_directories(processing, hf_folder):
    model = load_model(hf_folder, processing=processing)
    assert_same(model, boot(hf_folder, "processed" if processing == "full" else "default"))
    assert model.tokenizer is not None
    assert not model.training


def test_models_that_cannot_be_saved(hf_folder, tmp_path):
    with pytest.raises(ConfigError, match="save_pretrained"):
        save_model(load_model(hf_folder), tmp_path / "model")
    with pytest.raises(ConfigError, match="Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    processed = native("ln")
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ConfigError, match="compatibility mode"):
        save_model(processed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


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
    with pytest.raises(ArtefactError, match=r"model\.json"):
        load_model(tmp_path)


def test_damaged_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        load_model(saved)


def edit(folder, **changes):
    path = folder / "model.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))
    return record


def test_damaged_descriptions(saved):
    record = edit(saved, format_version=99)
    with pytest.raises(ArtefactError, match="Upgrade vpd-lens"):
        load_model(saved)
    edit(saved, format_version=1, cfg={**record["cfg"], "d_model": 32})
    with pytest.raises(ArtefactError, match="cannot rebuild this model"):
        load_model(saved)
    edit(saved, cfg={**record["cfg"], "dtype": "float3"})
    with pytest.raises(ArtefactError, match="float3"):
        load_model(saved)
    edit(saved, cfg=record["cfg"], colour="red")
    with pytest.raises(ArtefactError, match="colour"):
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
    with pytest.raises(ConfigError, match="as they were"):
        load_model(saved, processing="full")
    with pytest.raises(ConfigError, match="device='nonsense'"):
        load_model(saved, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            load_model(saved, device="cuda")
    assert next(load_model(saved, device="auto").parameters()).device.type in ("cpu", "cuda")


def test_saving_again_replaces(saved):
    other = native("rms_gated")
    save_model(other, saved)
    assert_same(load_model(saved), other)
    assert {p.name for p in saved.iterdir()} == {"model.json", "model.safetensors"}
    shutil.move(saved, saved.with_name(".model.old"))  # an interruption between two renames
    assert_same(load_model(saved), other)
