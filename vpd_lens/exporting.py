"""`save_model`: a base model as a directory that needs no vpd_lens.

A TransformerBridge cuts fused matrices into q, k and v, of which some are copies. They are put back
by their element numbers: a bridge around the same architecture, whose parameters hold numbers
instead of weights, says for every element of every matrix which parameter it came from.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpd_lens.errors import ArtefactError, ConfigError
from vpd_lens.models import without_progress_bars
from vpd_lens.sites import find_sites, model_kind
from vpd_lens.sites.site import relative_error
from vpd_lens.storage import atomic_folder


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Write a base model, edited or not, to a directory; a decomposition on it is left out.

    | model | directory |
    |---|---|
    | TransformerBridge around a Hugging Face model | a Hugging Face model, for `from_pretrained` |
    | HookedTransformer, native bridge | `model.json`, `model.safetensors`, the tokenizer |

    `vpd_lens.models.load_model` reads both. An earlier one at that place is replaced.

    Raises:
        ConfigError: If it is no TransformerLens model, or a bridge whose norms were folded into its
            weights, which Hugging Face's model would fold again.
        ArtefactError: If the directory cannot be written, or holds something else.
    """
    path = Path(path).expanduser()
    kind = model_kind(model)
    if kind == "module":
        raise ConfigError(
            f"model is a {type(model).__name__}; expected a HookedTransformer or a "
            "TransformerBridge. Save other modules with torch.save(model.state_dict())."
        )
    original = getattr(model, "original_model", None)
    hugging_face = hasattr(original, "save_pretrained")
    _require_replaceable(path)
    with atomic_folder(path) as folder:
        if hugging_face:
            _save_hugging_face(model, folder)
        else:
            _save_transformer_lens(model, folder)
        if (tokenizer := getattr(model, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(folder)
    return path


def _require_replaceable(path: Path) -> None:
    known = ("config.json", "model.json")
    held = any(path.iterdir()) if path.is_dir() else path.exists()
    if held and not any((path / name).exists() for name in known):
        raise ArtefactError(f"{path} holds something else than a model; name another place.")


def _save_transformer_lens(model: Any, folder: Path) -> None:
    tensors = {n: t.detach() for n, t in model.state_dict().items() if ".vpd." not in n}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    record = {
        "format_version": 1,
        "class": model_kind(model),
        "transformer_lens_version": version("transformer-lens"),
        "tokenizer": model.tokenizer is not None,
        "cfg": vars(model.cfg),
    }
    text = json.dumps(record, default=lambda value: str(value).removeprefix("torch."))
    (folder / "model.json").write_text(text)


@torch.no_grad()
def _save_hugging_face(model: Any, folder: Path) -> None:
    original = model.original_model
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        plain = type(original)(original.config)
        own = dict(plain.named_parameters()) | dict(plain.named_buffers())
        _copy(own, original)
        _put_back(model, type(original)(original.config), dict(plain.named_parameters()))
        plain = plain.to(next(original.parameters()).dtype).eval()
        _require_same(model, plain)
        plain.save_pretrained(folder)


def _require_same(model: Any, plain: Any) -> None:
    """Refuse what Hugging Face's model would compute something else with."""
    n = min(4, int(model.cfg.n_ctx))
    tokens = torch.arange(n)[None] % int(model.cfg.d_vocab)
    got, expected = plain(tokens).logits.float(), model(tokens.to(model.cfg.device)).cpu().float()
    tolerance = 1e-4 if plain.dtype == torch.float32 else 5e-2
    if relative_error(got, expected) > tolerance:
        raise ConfigError(
            "model is a TransformerBridge that computes something else with these weights than its "
            "Hugging Face model does: norms are folded into them, or it has hooks. Load it with "
            "processing='none', and save it without hooks."
        )


def _copy(own: dict[str, Tensor], original: nn.Module) -> None:
    """Values of parameters and buffers of the same name, but for what a bridge puts into names."""
    kept = [*original.named_parameters(remove_duplicate=False), *original.named_buffers()]
    for name, value in kept:
        target = own.get(name.replace("._original_component", ""))
        if target is not None:
            target.data = value.detach().to("cpu").clone()


def _put_back(model: nn.Module, numbers: Any, own: dict[str, Tensor]) -> None:
    """Write every matrix of a bridge to where its elements are in the parameters of its model."""
    from transformer_lens.model_bridge import TransformerBridge

    numbers.double()
    places, begin = [], 0
    for name, parameter in numbers.named_parameters():
        end = begin + parameter.numel()
        parameter.copy_(torch.arange(begin, end, dtype=torch.float64).view(parameter.shape))
        places.append((name, begin, end))
        begin = end
    source = numbers.config.name_or_path or type(numbers).__name__
    probe = TransformerBridge.boot_transformers(
        source, hf_model=numbers, device="cpu", dtype=torch.float64
    )
    sites = [site for site in find_sites(model, ".") if site.name != "unembed"]
    for site, numbered in zip(sites, find_sites(probe, [s.name for s in sites]), strict=True):
        at = numbered.weight.long()
        name, begin, _ = next(p for p in places if p[1] <= int(at.min()) and int(at.max()) < p[2])
        flat = own[name].data.view(-1)
        flat[at - begin] = site.weight.to("cpu", flat.dtype)
