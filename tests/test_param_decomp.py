"""What an imported decomposition is good for, which layouts are read, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from compat.builders import boot, has_hooked_transformer, save_architecture
from param_decomp_targets import GPT2, LENGTH, LLAMA, VOCABULARY, Language, write_run
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import vpd_lens
from convert_jax_run import unstack
from vpd_lens import CausalImportanceConfig
from vpd_lens.cli import app
from vpd_lens.errors import ArtefactError, AttachError, ConfigError
from vpd_lens.interop.param_decomp import ParamDecompWarning, import_param_decomp
from vpd_lens.interop.param_decomp.checkpoint import read_checkpoint, sort_tensors
from vpd_lens.interop.param_decomp.config import read_config

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:no tokenizer:UserWarning"),
]

SHIPPED = Path(__file__).parent / "data" / "param_decomp"
LLAMA_MLP = SHIPPED / "llama_simple_mlp"
TARGET = LLAMA_MLP / "target"


def opened(**arguments):
    return import_param_decomp(LLAMA_MLP / "decomposition", TARGET, **arguments)


@pytest.fixture(scope="module")
def imported():
    return opened()


@pytest.fixture(scope="module")
def tokens():
    return load_file(LLAMA_MLP / "golden.safetensors")["tokens"]


def test_it_is_saved_and_loaded_like_any_other(imported, tokens, tmp_path):
    vpd = imported.vpd
    assert vpd.trained_steps == 100
    assert vpd.training_config["pretrained_model_name"] == "example/spd/runs/t-00000001"
    folder = vpd.save(tmp_path / "saved")
    base = vpd_lens.remove(opened())
    assert base.cfg.model_name == "t-00000001"
    again = vpd_lens.load(folder, base)
    for mode in ("ci", "rounded"):
        with vpd.masked(mode), again.vpd.masked(mode), torch.no_grad():
            assert torch.equal(again(tokens), imported(tokens))


def test_both_classes_take_the_same_saved_decomposition(imported, tokens, tmp_path):
    if not has_hooked_transformer():
        with pytest.raises(ArtefactError, match="no longer has that class"):
            opened(model_class="hooked_transformer")
        return
    folder = imported.vpd.save(tmp_path / "saved")
    hooked = vpd_lens.load(folder, vpd_lens.remove(opened(model_class="hooked_transformer")))
    with imported.vpd.masked("ci"), hooked.vpd.masked("ci"), torch.no_grad():
        assert_close(hooked(tokens), imported(tokens), atol=2e-5, rtol=0)


def test_it_is_harvested_and_attributed(imported, tokens):
    harvest = vpd_lens.harvest(imported, tokens, batch_size=4, n_batches=1, progress=False)
    assert harvest.n_positions == tokens.numel()
    graph = vpd_lens.attribute(imported, "w5 w17 w3 w5", progress=False)
    assert len(graph.nodes) > 10
    with imported.vpd.masked("rounded"):
        made = imported.generate(
            tokens[:1, :4], max_new_tokens=3, verbose=False, return_type="tokens"
        )
    assert made.shape == (1, 7)


def test_every_layout_of_a_run_says_the_same(tmp_path):
    expected = read_config(LLAMA_MLP / "decomposition")
    for folder in ("config_2026-05", "new_layout"):
        found = read_config(LLAMA_MLP / folder)
        assert found.unknown == expected.unknown == ()
        for name in ("patterns", "importance", "target_class", "target_run", "tokenizer"):
            assert getattr(found, name) == getattr(expected, name), (folder, name)
    assert expected.importance == CausalImportanceConfig(
        d_model=64, n_blocks=2, n_heads=4, d_ffn=96
    )
    shutil.copytree(LLAMA_MLP / "new_layout", tmp_path / "run")
    shutil.copy(LLAMA_MLP / "decomposition/model_100.pth", tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").step == 100


def test_names_of_october_2025_and_before(tmp_path):
    """`ci_fn_type` came between `gate_type` and `ci_config`; a global function had a flag."""
    config = yaml.safe_load((SHIPPED / "layerwise_old_keys/tms_mlp/final_config.yaml").read_text())
    del config["gate_type"], config["gate_hidden_dims"]
    for fields, expected in (
        ({"ci_fn_type": "shared_mlp", "ci_fn_hidden_dims": [5, 4]}, ("shared_mlp", (5, 4))),
        ({"ci_fn_hidden_dims": [6], "use_global_ci": True}, ("global_mlp", 6)),
        ({"gate_type": "layerwise_global_mlp", "gate_hidden_dims": [3]}, ("shared_mlp", 3)),
    ):
        (tmp_path / "final_config.yaml").write_text(yaml.safe_dump(config | fields))
        found = read_config(tmp_path).importance
        assert (found.kind, found.hidden) == expected


@pytest.fixture
def copy(tmp_path):
    """A copy of the language model's run, and a function that changes its configuration."""
    shutil.copytree(LLAMA_MLP / "decomposition", tmp_path / "run")

    def change(**fields):
        path = tmp_path / "run" / "final_config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))
        return tmp_path / "run"

    return change


def test_unknown_fields_are_named_and_ignored(copy):
    folder = copy(shiny=3, empty=None)
    with pytest.warns(ParamDecompWarning, match=r"not known here: shiny\."):
        model = import_param_decomp(folder, TARGET)
    assert model.vpd.training_config["shiny"] == 3


def test_the_last_step_is_taken_and_a_file_can_be_named(copy):
    folder = copy()
    shutil.copy(folder / "model_100.pth", folder / "model_20.pth")
    assert read_checkpoint(folder).step == 100
    assert read_checkpoint(folder / "model_20.pth").step == 20


def test_configurations_that_cannot_be_imported(copy):
    info = [{"module_pattern": "h.*.attn.q_proj", "C": 50}]
    transformer = {"fn_type": "global_shared_transformer", "mode": "global"}
    attention = {"n_heads": 4}
    size = {"d_model": 64, "n_blocks": 2, "mlp_hidden_dim": [96, 96], "attn_config": attention}
    for fields, message in (
        ({"sigmoid_type": "normal"}, "sigmoid_type is 'normal'"),
        ({"identity_module_info": info}, "identity sites"),
        ({"ci_config": {"fn_type": "global_reverse_residual"}}, "not supported; these are"),
        ({"ci_config": transformer | {"simple_transformer_ci_cfg": size}}, "2 hidden layers"),
        ({"ci_config": transformer}, "simple_transformer_ci_cfg is missing"),
        ({"ci_config": {"fn_type": "mlp", "hidden_dims": [-3]}}, "hidden"),
        ({"module_info": None}, "not the configuration of a decomposition"),
        ({"module_info": info}, "subcomponents in the checkpoint"),
    ):
        original = yaml.safe_load((LLAMA_MLP / "decomposition/final_config.yaml").read_text())
        folder = copy(**(original | fields))
        with pytest.raises(ArtefactError, match=message):
            import_param_decomp(folder, TARGET)
    patterns = [*original["module_info"], {"module_pattern": "h.9.*", "C": 4}]
    with pytest.raises(ArtefactError, match=r"no component of the checkpoint is at \['h\.9"):
        import_param_decomp(copy(**(original | {"module_info": patterns})), TARGET)
    patterns = [*original["module_info"], {"module_pattern": "h.0.attn.q*", "C": 50}]
    with pytest.raises(ArtefactError, match=r"the patterns that match it say \[50, 50\]"):
        import_param_decomp(copy(**(original | {"module_info": patterns})), TARGET)
    size = {**size, "mlp_hidden_dim": [90]}
    ci = {"ci_config": transformer | {"simple_transformer_ci_cfg": size}}
    with pytest.raises(ArtefactError, match="is not the one that"):
        import_param_decomp(copy(**(original | ci)), TARGET)
    (folder / "final_config.yaml").write_text("a: [")
    with pytest.raises(ArtefactError, match="not YAML"):
        import_param_decomp(folder, TARGET)
    (folder / "final_config.yaml").unlink()
    with pytest.raises(ArtefactError, match="neither final_config"):
        import_param_decomp(folder, TARGET)


def test_damaged_and_foreign_tensors(copy, tmp_path):
    folder = copy()
    file = folder / "model_100.pth"
    state = torch.load(file, weights_only=True)
    v, weight = "_components.h-0-attn-q_proj.V", "target_model.h.0.attn.q_proj.weight"
    embedding = {
        "_components.wte.V": torch.zeros(300, 5),
        "_components.wte.U": torch.zeros(5, 48),
    }
    identity = {
        "_components.h-0-attn-q_proj-pre_identity.V": torch.zeros(48, 5),
        "_components.h-0-attn-q_proj-pre_identity.U": torch.zeros(5, 48),
    }
    for changes, message in (
        ({"model.layers.0.weight": torch.zeros(1)}, "is no tensor of a decomposition"),
        (embedding, "wte is an embedding"),
        (identity, "is an identity site"),
        ({v: torch.zeros(47, 50)}, "do not make up its weight"),
        ({v: None}, "expected V, U and a weight"),
        ({weight: None}, "no weight there"),
        ({"_components.h-0-attn-q_proj.bias": torch.zeros(48)}, "bias"),
        ({"ci_fn._global_ci_fn._output_head.b": None}, "_output_head.b"),
    ):
        changed = {k: x for k, x in {**state, **changes}.items() if x is not None}
        torch.save(changed, file)
        with pytest.raises(ArtefactError, match=message):
            import_param_decomp(folder, TARGET)
    torch.save({"model": state}, file)
    with pytest.raises(ArtefactError, match="something else than tensors"):
        import_param_decomp(folder, TARGET)
    for content in (b"", b"PK\x03\x04 and no more", file.read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(ArtefactError, match="not readable as tensors"):
            import_param_decomp(folder, TARGET)
    file.unlink()
    with pytest.raises(ArtefactError, match="there is no model_<step>"):
        import_param_decomp(folder, TARGET)
    with pytest.raises(ArtefactError, match="there is no model_<step>"):
        import_param_decomp(tmp_path / "nowhere", TARGET)


def test_targets_that_cannot_be_imported(tmp_path):
    checkpoint = LLAMA_MLP / "decomposition"
    with pytest.raises(ArtefactError, match=r"t-00000001', a LlamaSimpleMLP.*target=\.\.\."):
        import_param_decomp(checkpoint)
    with pytest.raises(ArtefactError, match="no such directory"):
        import_param_decomp(checkpoint, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"model_config\.yaml: there is no such file"):
        import_param_decomp(checkpoint, tmp_path / "empty")
    with pytest.raises(ConfigError, match="model_class='module'"):
        opened(model_class="module")
    fields = yaml.safe_load((TARGET / "model_config.yaml").read_text())
    folder = shutil.copytree(TARGET, tmp_path / "target")
    for changes, message in (
        ({"model_type": "GPT2"}, "the target is a GPT2"),
        ({"rotary_adjacent_pairs": True}, "rotary_adjacent_pairs is True"),
        ({"attention_sinks": True}, "attention_sinks is True"),
        ({"n_embd": None}, "n_embd"),
        ({"n_layer": 3}, "are not those of the LlamaSimpleMLP"),
        ({"n_intermediate": 64}, "are not those of the LlamaSimpleMLP"),
    ):
        changed = {k: v for k, v in {**fields, **changes}.items() if v is not None}
        (folder / "model_config.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ArtefactError, match=message):
            import_param_decomp(checkpoint, folder)
    shutil.copy(TARGET / "model_config.yaml", folder)
    state = torch.load(folder / "model_step_99.pt", weights_only=True)
    state["ln_f.weight"] = state["ln_f.weight"] + 1
    torch.save(state, folder / "model_step_100.pt")
    with pytest.raises(ArtefactError, match=r"1 of 19 tensors differ.*ln_f\.weight"):
        import_param_decomp(checkpoint, folder)
    (folder / "model_step_100.pt").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtefactError, match="not a tokenizer"):
        import_param_decomp(checkpoint, folder)


def test_without_a_tokenizer_texts_are_numbers(tmp_path):
    shutil.copy(TARGET / "model_config.yaml", tmp_path)
    with pytest.warns(ParamDecompWarning, match="no tokenizer"):
        model = import_param_decomp(LLAMA_MLP / "decomposition", tmp_path)
    assert model.to_tokens("<17> <4>", prepend_bos=False).tolist() == [[17, 4]]
    assert model.to_string(torch.tensor([[17, 4]])) == ["<17> <4>"]


def test_a_model_of_ones_own(imported, tokens):
    base = vpd_lens.remove(opened())
    state = torch.get_rng_state()
    model = import_param_decomp(LLAMA_MLP / "decomposition", model=base)
    assert torch.equal(torch.get_rng_state(), state)
    with imported.vpd.masked("ci"), model.vpd.masked("ci"), torch.no_grad():
        assert torch.equal(model(tokens), imported(tokens))
    with pytest.raises(AttachError, match="decomposed already"):
        import_param_decomp(LLAMA_MLP / "decomposition", model=model)
    vpd_lens.remove(model)
    before = set(model.hook_dict)
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.weight[0, 0] += 1e-3
    with pytest.raises(AttachError, match=r"1 of 12 .* no site of this .*h\.1\.mlp\.down_proj"):
        import_param_decomp(LLAMA_MLP / "decomposition", model=model)
    assert "vpd" not in model.__dict__
    assert set(model.hook_dict) == before


def test_a_decomposition_of_a_hugging_face_model(tmp_path):
    """Other classes than the authors' own come as a TransformerLens model."""
    bridge = boot(save_architecture("llama", tmp_path))
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    paths = [f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.k_proj", "mlp.up_proj")]
    run = write_run(tmp_path / "run", target, "transformers.LlamaForCausalLM", paths)
    with pytest.raises(ArtefactError, match="as model="):
        import_param_decomp(run)
    vpd = import_param_decomp(run, model=bridge).vpd
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.k", "mlp.in")]
    assert list(vpd.layout.names) == names
    expected = torch.load(run / "model_7.pth")["_components.model-layers-1-mlp-up_proj.V"]
    assert torch.equal(vpd.v("blocks.1.mlp.in"), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [LLAMA, {**LLAMA, "n_key_value_heads": 4}, GPT2],
    ids=["LlamaSimple", "LlamaSimple-ungrouped", "GPT2Simple"],
)
@pytest.mark.parametrize("model_class", ["bridge", "hooked_transformer"])
def test_the_other_classes_compute_the_same(fields, model_class, tmp_path):
    if model_class == "hooked_transformer" and not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    kind = fields["model_type"]
    target = Language(fields)
    paths = [name for name, module in target.named_modules() if isinstance(module, nn.Linear)]
    run = write_run(tmp_path / "run", target, f"spd.pretrain.models.{kind}", paths[:-1])
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model_config.yaml").write_text(yaml.safe_dump(fields))
    torch.save(target.state_dict(), tmp_path / "target" / "model_step_3.pt")
    model = import_param_decomp(run, tmp_path / "target", model_class=model_class)
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    assert_close(model(tokens), target(tokens), atol=2e-5, rtol=0)
    assert len(model.vpd.sites) == len(paths) - 1
    assert {site.name for site in model.vpd.sites} >= {"blocks.0.attn.o", "blocks.1.mlp.in"}
    biased = kind == "GPT2Simple"
    assert all(
        (site.bias is not None and bool(site.bias.any())) == biased for site in model.vpd.sites
    )


def test_a_followers_checkpoint_is_read_and_its_embedding_refused(tmp_path):
    """A real trained run of somebody else: the names and shapes of its tensors."""
    keys = json.loads((SHIPPED / "bilinear_vpd" / "tensor_keys.json").read_text())
    entries = keys["runs/vpd_v16_B/component_model_final.pt"]["entries"]
    tensors = {name: torch.zeros(shape) for name, (shape, _) in entries.items()}
    state = sort_tensors(tensors, Path("component_model_final.pt"))
    assert len(state.components) == len(state.importance) == 20
    assert len(state.target) == 25
    torch.save(tensors, tmp_path / "component_model_final.pt")
    with pytest.raises(ArtefactError, match="embed is an embedding"):
        import_param_decomp(tmp_path / "component_model_final.pt")


def test_toys_know_their_target_from_its_own_run_too(tmp_path):
    folder = SHIPPED / "layerwise" / "resid_mlp_mlp"
    model = import_param_decomp(folder, SHIPPED / "layerwise" / "resid_mlp_target")
    x = load_file(folder / "golden.safetensors")
    assert_close(model(x["x"]), x["out.target"], atol=2e-5, rtol=0)
    saved = model.vpd.save(tmp_path / "saved")
    again = vpd_lens.load(saved, vpd_lens.remove(import_param_decomp(folder)))
    with again.vpd.masked("ci"):
        assert_close(again(x["x"]), x["out.ci"], atol=2e-5, rtol=0)
    with pytest.raises(ArtefactError, match="train_config"):
        import_param_decomp(folder, tmp_path)
    with pytest.raises(ArtefactError, match="is not what it describes"):
        import_param_decomp(folder, SHIPPED / "layerwise" / "tms_mlp")


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_command(tokens, tmp_path):
    out, run = tmp_path / "out", LLAMA_MLP / "decomposition"
    said = call("import", run, "--target", TARGET, "--output", out).output
    assert "606 subcomponents" in said
    assert f"vpd-lens eval {out} --data" in said
    out = out.rename(tmp_path / "moved")  # the target moves with it
    model = vpd_lens.load(out)
    assert model.to_tokens("w5 w17").tolist() == [[5, 17]]  # without BOS, as in training
    assert vpd_lens.load(out, out / "target").to_tokens("w5 w17").tolist() == [[5, 17]]
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    evaluate = ("eval", out, "--data", tmp_path / "tokens.npy")
    report = tmp_path / "report.json"
    call(*evaluate, "--pgd-steps", "none", "--seq-len", 48, "--json", report, "--quiet")
    kl = json.loads(report.read_text())["modes"]["ci"]["kl"]
    expected = json.loads((LLAMA_MLP / "golden.json").read_text())["kl_ce_per_logits"]["ci"]["kl"]
    assert kl == pytest.approx(expected, abs=5e-6)
    assert "t-00000001" in call("info", out).output
    again = call("import", run, "--target", TARGET, "--output", out, code=2)
    assert "something is there already" in again.output


def test_the_command_leaves_nothing_after_an_error(tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "nowhere",), "there is no such file or directory"),
        ((LLAMA_MLP / "decomposition",), "Give the folder with that run's model_config.yaml"),
        ((SHIPPED / "layerwise" / "tms_mlp",), "a plain module"),
    ):
        result = call("import", *arguments, "--output", out, code=2)
        assert message in " ".join(result.output.split())
        assert not list(tmp_path.iterdir())


def test_components_of_a_jax_run():
    """The part of the conversion that needs no JAX."""
    assert "jax" not in sys.modules
    random = np.random.default_rng(0)
    v, u = random.normal(size=(2, 6, 4)), random.normal(size=(2, 4, 5))
    v[1, :, 3:], u[1, 3:] = 0, 0  # padding
    components = {"q_proj": {"V": v, "U": u}}
    kinds = {"q_proj": {"h.0.attn.q_proj": 4, "h.1.attn.q_proj": 3}}
    arrays = unstack(components, kinds)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state = sort_tensors(tensors, Path("converted.safetensors"))
    assert list(state.components) == ["h.0.attn.q_proj", "h.1.attn.q_proj"]
    second = state.components["h.1.attn.q_proj"]
    assert (tuple(second["V"].shape), tuple(second["U"].shape)) == ((6, 3), (3, 5))
    assert_close(
        (second["V"] @ second["U"]).double(), torch.from_numpy(v[1] @ u[1]), atol=1e-5, rtol=0
    )
    for wrong, message in (
        ({"k_proj": []}, "the kinds"),
        ({"q_proj": ["h.0.attn.q_proj"]}, "2 layers, but 1 sites"),
        ({"q_proj": {"h.0.attn.q_proj": 3, "h.1.attn.q_proj": 3}}, "beyond its C=3"),
    ):
        with pytest.raises(ValueError, match=message):
            unstack(components, wrong)
    with pytest.raises(ValueError, match=r"are not \[layers"):
        unstack({"q_proj": {"V": v[0], "U": u[0]}}, kinds)
