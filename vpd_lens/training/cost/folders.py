"""Shapes of models by name or directory, read from their configuration, without their weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.files import read_json
from vpd_lens.training.cost.named import NAMED
from vpd_lens.training.cost.target import TargetShape, shape_of_cfg

# Families of Hugging Face whose MLPs have no gate; and whose layers run MLP and attention at once.
_UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "falcon", "starcoder2")
_PARALLEL = ("gpt_neox", "gptj", "phi", "falcon")


def target_shape(source: str) -> TargetShape:
    """The shape of a model.

    Args:
        source: A known name (with or without its owner on the hub), or a directory of
            `save_model` or of a Hugging Face model.

    Raises:
        ConfigError: If the name is not known and there is no such directory.
        ArtefactError: If the directory's configuration cannot be read.
    """
    path = Path(source).expanduser()
    if (path / "model.json").is_file():
        record = read_json(path / "model.json")
        try:
            cfg = SimpleNamespace(**record["cfg"])
            return shape_of_cfg(cfg, record["class"], str(cfg.dtype))
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{path / 'model.json'}: it has no {error}.") from None
    if (path / "config.json").is_file():
        return _hugging_face(path)
    name = source.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    name = "gpt2-small" if name == "gpt2" else name
    if name not in NAMED:
        raise ConfigError(
            f"model={source!r} is neither the directory of a model nor a known name. Names: "
            f"{', '.join(NAMED)}."
        )
    return NAMED[name]


def _hugging_face(path: Path) -> TargetShape:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(path))
        heads, width = config.num_attention_heads, config.hidden_size
        kind = config.model_type
        return TargetShape(
            n_layers=config.num_hidden_layers,
            d_model=width,
            n_heads=heads,
            d_head=getattr(config, "head_dim", None) or width // heads,
            d_mlp=getattr(config, "intermediate_size", None)
            or getattr(config, "n_inner", None)
            or 4 * width,
            d_vocab=config.vocab_size,
            n_ctx=config.max_position_embeddings,
            n_kv_heads=getattr(config, "num_key_value_heads", None),
            gated=kind not in _UNGATED,
            parallel=kind in _PARALLEL,
            tied=bool(config.tie_word_embeddings),
            learned_positions=kind in ("gpt2", "opt"),
            activation=str(
                getattr(config, "hidden_act", None) or getattr(config, "activation_function", "")
            ),
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"{path / 'config.json'}: the shape of a decoder-only transformer cannot be read from "
            f"it: {str(error).partition(chr(10))[0]}"
        ) from None
