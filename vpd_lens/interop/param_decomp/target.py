"""The language models that the authors trained and decomposed, as TransformerLens models.

| class | norm | positions | MLP |
|---|---|---|---|
| `LlamaSimpleMLP` | RMS | rotary, halves of a head turned | GELU (tanh) |
| `LlamaSimple` | RMS | the same | gated by SiLU |
| `GPT2Simple` | LayerNorm | learned | GELU (tanh) |

A bridge wraps the Hugging Face class that computes exactly the same (`ArceeForCausalLM` is a Llama
whose MLP has no gate and any activation). A HookedTransformer is made from its configuration.
Nothing is folded or centred: subcomponents read what the matrices really multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens import storage
from vpd_lens.config.base import read_yaml
from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.interop.param_decomp.checkpoint import Checkpoint, newest, read_tensors, require_same
from vpd_lens.interop.param_decomp.hooked import hooked_transformer
from vpd_lens.interop.param_decomp.hugging_face import CLASSES, hugging_face_model
from vpd_lens.interop.param_decomp.tokenizer import find_tokenizer
from vpd_lens.models import load_model, without_progress_bars

CONFIG = "model_config.yaml"

# Fields that change nothing here, and the values with which others may be there.
_NO_MATTER = {"model_type", "flash_attention", "rotary_dim", "n_ctx", "block_size"}
_EXPECTED = {
    "rotary_adjacent_pairs": False,
    "use_grouped_query_attention": True,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Target:
    """What a decomposition's target is, before it is a TransformerLens model.

    Attributes:
        kind: `LlamaSimpleMLP`, `LlamaSimple` or `GPT2Simple`.
        name: What to call it: its run.
        fields: Its `model_config.yaml`.
        weights: Its tensors, by the authors' names.
        tokenizer: Of Hugging Face.
    """

    kind: str
    name: str
    fields: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    tokenizer: Any


def read_target(checkpoint: Checkpoint, folder: str | Path | None) -> Target:
    """Read a target run's folder; the weights are the checkpoint's copy.

    Only `model_config.yaml` has to be there. A `model_step_<n>.pt` is checked against the copy, and
    a `tokenizer.json` is used.

    Raises:
        ArtefactError: If something is missing, damaged, of another run or not supported.
    """
    run = checkpoint.config.target_run
    if folder is None:
        raise ArtefactError(
            f"the decomposition in {checkpoint.path.parent} is of {run!r}, a "
            f"{checkpoint.config.target_class}. Give the folder with that run's {CONFIG} as "
            "target=..., or the model as TransformerLens has it as model=..."
        )
    folder = storage.existing_folder(Path(folder).expanduser())
    try:
        fields = read_yaml(folder / CONFIG)
    except ConfigError as error:
        raise ArtefactError(f"{error} It says what the target is; download it.") from None
    kind = fields.get("model_type") or checkpoint.config.target_class
    _require_supported(folder / CONFIG, kind, fields)
    weights = checkpoint.state.target
    saved = [newest(place, r"model_step_(\d+)\.pt") for place in (folder, folder / "checkpoints")]
    for file in filter(None, saved):
        require_same(read_tensors(file), weights, file)
    tokenizer = find_tokenizer(folder, checkpoint.config.tokenizer, int(fields["vocab_size"]))
    return Target(kind, (run or folder.name).rsplit("/", 1)[-1], fields, weights, tokenizer)


def _require_supported(path: Path, kind: str, fields: Mapping[str, Any]) -> None:
    if kind not in CLASSES:
        raise ArtefactError(
            f"{path}: the target is a {kind}, of which no TransformerLens model is made here; "
            f"those that can be: {', '.join(CLASSES)}. If you have it as a TransformerLens model, "
            "pass that as model=..."
        )
    for name, value in fields.items():
        expected = _EXPECTED.get(name, False)
        known = name in _NO_MATTER or name in CLASSES[kind].fields
        if not known and value is not None and value != expected:
            raise ArtefactError(
                f"{path}: {name} is {value!r}, which is not supported; only {expected!r} is."
            )
    if missing := [name for name in CLASSES[kind].fields if name not in fields]:
        raise ArtefactError(f"{path}: {missing} are missing. Download it again.")


def save_target(target: Target, folder: Path) -> None:
    """Write a target as a Hugging Face model with its tokenizer, which `load_model` reads."""
    model = hugging_face_model(target.kind, target.fields, target.weights, target.tokenizer)
    with without_progress_bars():
        model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)


def transformer_lens_model(target: Target, model_class: str) -> nn.Module:
    """A target as a `"bridge"` or a `"hooked_transformer"` (TransformerLens 3), on the CPU.

    Raises:
        ConfigError: If this TransformerLens has no such class.
        ArtefactError: If the weights do not fit the target's configuration.
    """
    if model_class not in ("bridge", "hooked_transformer"):
        raise ConfigError(f"model_class={model_class!r} is not one of bridge, hooked_transformer.")
    # TransformerLens reads a tokenizer again from where it lies.
    with TemporaryDirectory() as place, torch.random.fork_rng(devices=[]):
        if model_class == "bridge":
            save_target(target, Path(place))
            model = load_model(place)
        else:
            from transformers import AutoTokenizer

            target.tokenizer.save_pretrained(place)
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = hooked_transformer(target.kind, target.fields, target.weights, tokenizer)
    model.cfg.model_name, model.cfg.default_prepend_bos = target.name, False
    return model
