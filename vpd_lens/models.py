"""`load_model`: base models by name or directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpd_lens.config import ModelClass, Processing
from vpd_lens.errors import ArtefactError, ConfigError, first_line
from vpd_lens.storage import existing_folder, read_json

# TransformerLens' own options of processing, all of which `"full"` switches on.
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def load_model(
    source: str | Path,
    model_class: ModelClass = "auto",
    device: str = "cpu",
    processing: Processing | Mapping[str, bool] = "default",
    weights: bool = True,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a base model, in evaluation mode, with its tokenizer if there is one.

    | `source` | what happens |
    |---|---|
    | a Hugging Face model directory | a TransformerBridge around it |
    | a directory with `model.json`, as version 0.1 wrote | the model that was saved, bit for bit |
    | anything else | a name for TransformerLens, which may download it |

    Args:
        source: The directory or name.
        model_class: `"hooked_transformer"` (TransformerLens 3 only), `"bridge"`, or `"auto"`: what
            the directory says, otherwise a bridge.
        device: Where to put it: `"cpu"`, `"cuda"`, `"cuda:N"`, or `"auto"` for CUDA if there is.
        processing: What is done to weights that come from Hugging Face. `"none"`: as they are;
            `"full"`: layer norms folded, weights centred; `"default"`: what TransformerLens does
            for that class (bridge: none, HookedTransformer: full). Some of TransformerLens' own
            options by name, as in `{"fold_ln": True}`, leave the others off. A directory of
            version 0.1 holds weights as they were and takes only `"default"`.
        weights: False: a Hugging Face model as a bridge comes with fake tensors, for which its
            configuration is enough (to plan a run).
        revision: Of a name on the Hugging Face hub: a commit, a branch or a tag.
        dtype: Of the weights; those of version 0.1 are as they were saved.

    Raises:
        ArtefactError: If a directory is missing, damaged, or holds a class that this
            TransformerLens does not have.
        ConfigError: If a name is unknown or cannot be downloaded, or an argument does not fit.
    """
    choices = [("model_class", model_class, get_args(ModelClass))]
    if isinstance(processing, str):
        choices += [("processing", processing, get_args(Processing))]
    else:
        choices += [("processing", name, FLAGS) for name in processing]
    for argument, value, known in choices:
        if value not in known:
            raise ConfigError(f"{argument}={value!r} is not one of {', '.join(known)}.")
    device = usable_device(device)
    path = Path(source).expanduser()
    name = str(source)  # on the hub `name` or `owner/name`; anything else can only be a directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or path.is_dir():
        path = existing_folder(path)
        if (path / "model.json").exists():
            return _load_0_1(path, model_class, device, processing)
        if not (path / "config.json").exists():
            raise ArtefactError(f"{path}: no Hugging Face model (config.json) in this directory.")
        name = str(path)
    try:
        options = {"dtype": dtype} | ({} if revision is None else {"revision": revision})
        model = _pretrained(name, model_class, device, processing, weights, options).eval()
    except ArtefactError:
        raise
    except Exception as error:  # whatever transformers, the hub client or TransformerLens raise
        raise ConfigError(
            f"source={name!r}: no such directory here, or not a model that TransformerLens "
            f"{version('transformer-lens')} can load ({type(error).__name__}: "
            f"{first_line(error)}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from None
    model.__dict__["loaded_revision"] = revision  # for `origin_of`; TransformerLens keeps none
    return model


def _pretrained(
    source: str,
    model_class: str,
    device: str,
    processing: str | Mapping[str, bool],
    weights: bool,
    options: dict[str, Any],
) -> nn.Module:
    if isinstance(processing, str):
        by_default = model_class == "hooked_transformer"
        full = processing == "full" or (processing == "default" and by_default)
        flags = dict.fromkeys(FLAGS, full)
    else:
        flags = dict.fromkeys(FLAGS, False) | dict(processing)
    if model_class == "hooked_transformer":
        hooked, _ = hooked_transformer_class()
        return hooked.from_pretrained(source, device=device, **flags, **options)
    from transformer_lens.model_bridge import TransformerBridge

    if not weights:
        # Tensors with shapes and no values: fused matrices are split at boot, which "meta" refuses.
        with FakeTensorMode():
            return TransformerBridge.boot_transformers(source, load_weights=False, **options)
    local = Path(source).is_dir()  # where downloads may keep their progress bars
    with without_progress_bars() if local else nullcontext():
        bridge = TransformerBridge.boot_transformers(source, device=device, **options)
    if any(flags.values()):
        bridge.enable_compatibility_mode(disable_warnings=True, **flags)
    return bridge


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """A block in which transformers reads and writes weights without showing how far it is."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def hooked_transformer_class() -> tuple[Any, Any]:
    """`HookedTransformer` and its configuration; an `ArtefactError` where they are no more."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise ArtefactError(
            f"HookedTransformer: TransformerLens {version('transformer-lens')} no longer has that "
            "class. Install transformer-lens<4, or use a Hugging Face model as a 'bridge'."
        ) from None
    return HookedTransformer, HookedTransformerConfig


def _load_0_1(path: Path, model_class: str, device: str, processing: Any) -> nn.Module:
    """A HookedTransformer or a native bridge: `model.json`, `model.safetensors`, a tokenizer."""
    record = read_json(path / "model.json")
    if processing != "default" or model_class not in ("auto", record.get("class")):
        raise ConfigError(
            f"{path} holds a {record.get('class')} with weights as saved, and takes neither "
            f"processing={processing!r} nor model_class={model_class!r}. Leave both out."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # building draws weights that are then replaced
            model = _built(path, record, device)
        model.load_state_dict(load_file(path / "model.safetensors"))
    except ArtefactError:
        raise
    except Exception as error:  # whatever a damaged file makes of TransformerLens
        raise ArtefactError(
            f"{path}: TransformerLens {version('transformer-lens')} cannot rebuild this model, "
            f"saved with {record.get('transformer_lens_version')}, from model.json and "
            f"model.safetensors ({type(error).__name__}: {first_line(error)})."
        ) from None
    return model.eval()


def _built(path: Path, record: dict[str, Any], device: str) -> nn.Module:
    from transformers import AutoTokenizer

    saved = record["cfg"]
    tokenizer = AutoTokenizer.from_pretrained(str(path)) if record["tokenizer"] else None
    # Without a seed, which would reset every global random generator.
    blank = {"seed": None, "init_weights": False, "tokenizer_name": None}
    cfg = {**saved, **blank, "device": device, "dtype": getattr(torch, saved["dtype"])}
    if record["class"] == "hooked_transformer":
        hooked, config_class = hooked_transformer_class()
        model = hooked(config_class(**cfg), tokenizer=tokenizer)
    else:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        config = TransformerBridgeConfig.from_dict(cfg)
        model = TransformerBridge.boot_native(config, tokenizer, device, cfg["dtype"])
    for name in blank:
        setattr(model.cfg, name, saved[name])
    return model


def usable_device(device: str) -> str:
    """The device that is meant, of which `"auto"` is CUDA if there is."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {first_line(error)}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but PyTorch sees no CUDA device. Use device='cpu'.")
    return device
