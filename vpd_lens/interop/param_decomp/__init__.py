"""Decompositions that the method's authors published (`param-decomp`, earlier `spd`).

1. The checkpoint: its YAML file (`config`), its tensors (`checkpoint`).
2. The target: a language model (`target`, as `hugging_face` or `hooked`, with its `tokenizer`), or
   one of the `toys`.
3. Attached to it: V and U, and the causal importance function in our order (`importance`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens import storage
from vpd_lens.decomposition.attach import attach, decomposition_of
from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.errors import ArtefactError, AttachError, InputError
from vpd_lens.interop.param_decomp.checkpoint import Checkpoint, State, read_checkpoint
from vpd_lens.interop.param_decomp.importance import importance_tensors
from vpd_lens.interop.param_decomp.target import read_target, save_target, transformer_lens_model
from vpd_lens.interop.param_decomp.tokenizer import ParamDecompWarning
from vpd_lens.interop.param_decomp.toys import example_for, is_toy, toy_target
from vpd_lens.models import load_model
from vpd_lens.sites import find_sites, model_kind

__all__ = ["ParamDecompWarning", "import_param_decomp"]


def import_param_decomp(
    checkpoint: str | Path,
    target: str | Path | None = None,
    model: nn.Module | None = None,
    model_class: str = "bridge",
) -> nn.Module:
    """Open a decomposition that the method's authors published, as a model with `.vpd`.

    It is then like any other: saved, evaluated, harvested, masked, attributed, trained on. All is
    in fp32 on the CPU; `.to("cuda")` moves it.

    Args:
        checkpoint: The folder of a decomposition run (`s-...`): `final_config.yaml` (or
            `experiment_config.yaml`) and `model_<step>.pth`, of which the last is taken; or such a
            file.
        target: The folder of its target's run (`t-...`): `model_config.yaml`, and if you like
            `model_step_<n>.pt`, which is checked against the copy of the weights in the checkpoint,
            and `tokenizer.json`. Of a toy: `<task>_train_config.yaml`; `None`: it is beside the
            checkpoint.
        model: The target as you have it, instead of `target`: in fp32, with its weights as they
            were trained. Its matrices are recognised by their values.
        model_class: What to make of a language model: `"bridge"`, or `"hooked_transformer"`, which
            TransformerLens 3 has. A toy becomes a plain module.

    Raises:
        ArtefactError: If something is missing, damaged, foreign, of another run or not supported.
        AttachError: If `model` lacks a decomposed matrix, or is decomposed already; it is left as
            it was.
        ConfigError: If `model_class` is another one.
    """
    published = read_checkpoint(checkpoint)
    if published.config.unknown:
        warnings.warn(
            f"{published.config.path}: ignored fields that are not known here: "
            f"{', '.join(published.config.unknown)}.",
            ParamDecompWarning,
            stacklevel=2,
        )
    if model is None and is_toy(published):
        model = toy_target(published, target)
    elif model is None:
        model = transformer_lens_model(read_target(published, target), model_class)
    return attach_published(model, published)


def import_to_folder(
    checkpoint: str | Path, target: str | Path | None, output: str | Path
) -> nn.Module:
    """Write a published decomposition to `output`, and return it on its model.

    `vpd_lens.load(output)` opens it: `output/decomposition`, on its base model in `output/target`,
    a Hugging Face model with its tokenizer.

    Raises:
        ArtefactError: As for `import_param_decomp`, or something is in `output`.
        InputError: If the target is a toy, for which there is no such format.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArtefactError(f"{output}: something is there already. Name another place.")
    published = read_checkpoint(checkpoint)
    if is_toy(published):
        raise InputError(
            f"the target is the toy {published.config.target_class}, a plain module, which is no "
            "model that a command could load. Open it in Python: vpd_lens.import_param_decomp."
        )
    found = read_target(published, target)
    with storage.disk_errors(output), storage.atomic_folder(output) as folder:
        save_target(found, folder / "target")
        model = load_model(folder / "target")
        # Else the name is where it lay for this moment. The authors' texts begin without BOS.
        model.cfg.model_name, model.cfg.default_prepend_bos = found.name, False
        import_param_decomp(checkpoint, model=model)
        decomposition_of(model).save(folder / "decomposition")
    return model


def attach_published(model: nn.Module, published: Checkpoint) -> nn.Module:
    """Attach a published decomposition to a model with its target's weights."""
    state, config = published.state, published.config
    theirs = recognise(model, state)
    sizes = {ours: state.components[path]["V"].shape[1] for ours, path in theirs.items()}
    divergence: Any = config.divergence if config.divergence in ("kl", "mse") else None
    example = example_for(model)
    attach(
        model,
        list(theirs),
        lambda site: sizes[site.name],
        config.importance,
        example,
        divergence,
        check=example is not None or model_kind(model) != "module",
    )
    vpd = decomposition_of(model)
    try:
        _fill(vpd, published, [theirs[name] for name in vpd.layout.names])
    except BaseException:
        vpd.attachment.detach()
        raise
    vpd.trained_steps, vpd.training_config = published.step, config.values
    return model


def recognise(model: nn.Module, state: State) -> dict[str, str]:
    """The path in the authors' target of every decomposed matrix, by our name of the site.

    A site is the one whose weight has the same values; of equal ones, the first in forward order.

    Raises:
        AttachError: If the model has no such matrix.
    """
    places: dict[tuple, list[str]] = {}
    for site in find_sites(model, ""):
        places.setdefault(_key(site.weight), []).append(site.name)
    found, missing = {}, []
    for path in state.sites:
        if names := places.get(_key(state.weight(path))):
            found[names.pop(0)] = path
        else:
            missing.append(path)
    if missing:
        raise AttachError(
            f"{len(missing)} of {len(state.sites)} decomposed matrices are no site of this "
            f"{type(model).__name__}, among them {', '.join(missing[:4])}: it has none with these "
            "values. Give the decomposition's own target in fp32, with its weights as they were "
            "trained (norms not folded, nothing centred) and q, k and v as separate matrices."
        )
    return found


def _key(weight: Tensor) -> tuple:
    return tuple(weight.shape), weight.dtype, storage.tensor_hash(weight)


@torch.no_grad()
def _fill(vpd: Decomposition, published: Checkpoint, paths: list[str]) -> None:
    """Copy V, U and the importance function; `paths` are the sites' in the order of `vpd`."""
    state, config = published.state, published.config
    parts = vpd.subcomponents
    for path, v, u in zip(paths, parts.v, parts.u, strict=True):
        v.copy_(state.components[path]["V"])
        u.copy_(state.components[path]["U"])
    try:
        tensors = importance_tensors(state, paths, config.importance)
        vpd.importance.load_state_dict(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArtefactError(
            f"{published.path}: its causal importance function is not the one that {config.path} "
            f"describes: {' '.join(str(error).split())[:400]}"
        ) from None
