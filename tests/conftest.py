"""Shared fixtures. transformer_lens is imported inside functions: the shape checks come first."""

import gc
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# What is imported makes a million objects, and a full collection looks at all of them.
gc.set_threshold(20_000, 20)

# Fixtures that take seconds: on one worker only, not once on each, and first, so that none is left
# over. Models that tests of many files share are on one worker, too: `bridge-llama-default`.
LONG = (
    "addition",
    "circuit",
    "finished",
    "first_claim",
    "report",
    "whole",
    "found",
    "dense",
    "explored",
)
CASES = ("bridge-", "native-", "hooked-")
# The cases of which every test of many models has one: on another version of TransformerLens these
# run with checks of types and shapes, and the others, marked `repeated`, without.
CHECKED = ("bridge-gpt2-default", "bridge-llama-processed", "native-ln", "native-rms_gated")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in LONG:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{name}"))
                break
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            if isinstance(value, str) and value.startswith(CASES):
                item.add_marker(pytest.mark.xdist_group(value))
                if not value.startswith(CHECKED):
                    item.add_marker(pytest.mark.repeated)
                break


def shared_folder(name: str) -> Path:
    """A folder of reference data kept beside the repository; skips where it is absent."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the reference data {name!r} is not beside this repository")
    return folder


def tiny_bridge(seed: int = 0, **changes):
    """A 2-layer native bridge with every parameter, norms and biases included, randomised."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    shape = {
        "d_model": 16,
        "d_head": 8,
        "n_heads": 2,
        "n_layers": 2,
        "n_ctx": 12,
        "d_vocab": 29,
        "d_mlp": 24,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": seed,
    }
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save_tiny(folder: Path, n_layers: int = 2) -> Path:
    """A Hugging Face directory of a Llama that takes the same tokens as `tiny_bridge`."""
    from compat.builders import make_tokenizer, randomise
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    randomise(LlamaForCausalLM(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)  # whose other words no test uses
    return folder


def save_0_1(model, folder: Path) -> Path:
    """Write a TransformerLens model as version 0.1 did."""
    from importlib.metadata import version

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().contiguous().clone() for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    record = {
        "format_version": 1,
        "class": "bridge" if hasattr(model, "original_model") else "hooked_transformer",
        "transformer_lens_version": version("transformer-lens"),
        "tokenizer": model.tokenizer is not None,
        "cfg": vars(model.cfg),
    }
    text = json.dumps(record, default=lambda x: str(x).removeprefix("torch."))
    (folder / "model.json").write_text(text)
    return folder


@pytest.fixture
def model():
    return tiny_bridge()


@pytest.fixture
def tokens():
    return torch.randint(0, 29, (64, 8), generator=torch.Generator().manual_seed(1))


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures and leave them empty: drawing one takes longer than all else of its page."""

    def savefig(figure, file, **_):
        write = Path(file).write_text if isinstance(file, str | Path) else file.write
        write('<svg viewBox="0 0 1 1"></svg>')

    monkeypatch.setattr("vpd_lens.plots.style.Figure.savefig", savefig)


@pytest.fixture
def undrawn(monkeypatch):
    without_drawing(monkeypatch)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {place} 2>/dev/null"):
        pytest.skip("needs the right to mount a file system")
    yield place
    os.system(f"umount {place}")


@pytest.fixture(scope="session")
def browser():
    from tests.browser import running

    with running() as found:
        yield found


@pytest.fixture
def open_file(browser):
    from tests.browser import opening

    with opening(browser) as open_file:
        yield open_file
