"""`import_saelens`: transcoders and autoencoders in the format that SAELens saves.

A folder holds one of them: `cfg.json`, and `sae_weights.safetensors` with `W_enc [d_in, d_sae]`,
`b_enc`, `W_dec [d_sae, d_out]`, `b_dec` and, for JumpReLU, `threshold`. BatchTopK is saved by
SAELens as JumpReLU. SAELens itself is not needed, and is not there for TransformerLens 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vpd_lens.baselines.transcoders.transcoder import Selection, Transcoder, TranscoderRecord
from vpd_lens.errors import ArtefactError, InputError
from vpd_lens.storage import read_json

# Of SAELens' architectures, those that are an encoder, one selection and a decoder.
_SELECTIONS: dict[str, Selection] = {
    "standard": "threshold",
    "jumprelu": "threshold",
    "topk": "topk",
    "transcoder": "threshold",
    "jumprelu_transcoder": "threshold",
}


def import_saelens(folders: Mapping[int, str | Path]) -> Transcoder:
    """One per-layer transcoder from folders that SAELens wrote, one for every block.

    Transcoders must read what the MLP's first matrix multiplies; autoencoders read and write the
    MLP's output. Whether that is what they were trained on their `cfg.json` says only in words.
    A bias that is taken from the input first is folded into the encoder's.

    Args:
        folders: The folder of each block, by the block's number.

    Raises:
        ArtefactError: If a folder cannot be read or its tensors do not fit its `cfg.json`.
        InputError: If there is no folder, an architecture is none of a plain encoder and decoder,
            activations were rescaled, or those of different blocks are unlike.

    Examples:
        >>> plt = import_saelens({0: "layer_0", 1: "layer_1"})  # doctest: +SKIP
    """
    if not folders:
        raise InputError("folders is empty; pass a folder for at least one block.")
    found = {layer: _read(Path(folders[layer])) for layer in sorted(folders)}
    configs = [config for config, _ in found.values()]
    alike = {name: _one_of(name, configs) for name in ("d_in", "d_out", "selection", "k", "reads")}
    record = TranscoderRecord(
        layers=tuple(found),
        n_latents=tuple(config["d_sae"] for config in configs),
        source="from SAELens",
        **alike,
    )
    made = Transcoder(record)
    for index, (_, tensors) in enumerate(found.values()):
        with torch.no_grad():
            made.W_enc[index].copy_(tensors["W_enc"])
            made.b_enc[index].copy_(tensors["b_enc"])
            made.W_dec[index].copy_(tensors["W_dec"].unsqueeze(0))
            made.b_dec[index].copy_(tensors["b_dec"])
            made.thresholds[index].copy_(tensors["threshold"])
    return made


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a folder holds, in this library's words."""
    config = read_json(folder / "cfg.json")
    if "metadata" not in config:
        raise InputError(
            f"{folder}: cfg.json is from before SAELens 6; load and save it in a newer one."
        )
    architecture = config["architecture"]
    if architecture not in _SELECTIONS:
        raise InputError(
            f"{folder}: architecture is {architecture!r}; expected one of "
            f"{', '.join(_SELECTIONS)}. Others are more than an encoder and a decoder."
        )
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name, "none") != "none":
            raise InputError(
                f"{folder}: {name} is {config[name]!r}; fold it into the weights in SAELens first."
            )
    tensors = _tensors(folder / "sae_weights.safetensors")
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    tensors.setdefault("threshold", torch.zeros(d_sae))
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "threshold": (d_sae,)}
    for name, shape in {**shapes, "W_dec": (d_sae, d_out), "b_dec": (d_out,)}.items():
        if name not in tensors or tensors[name].shape != shape:
            got = list(tensors[name].shape) if name in tensors else "missing"
            raise ArtefactError(
                f"{folder}: its tensors do not fit cfg.json: {name!r} is {got}, expected "
                f"{list(shape)}."
            )
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=-1)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
        tensors["W_dec"] = tensors["W_dec"] / norms.unsqueeze(-1)
    transcoder = architecture.endswith("transcoder")
    if config.get("apply_b_dec_to_input", not transcoder):
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    selection = _SELECTIONS[architecture]
    words = {"d_in": d_in, "d_out": d_out, "d_sae": d_sae, "selection": selection}
    words |= {"k": config.get("k") if selection == "topk" else None}
    return {**words, "reads": "input" if transcoder else "output"}, tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path}: not readable as safetensors ({error}).") from None


def _one_of(name: str, configs: Sequence[Mapping[str, Any]]) -> Any:
    """The value that all have."""
    values = list(dict.fromkeys(config[name] for config in configs))
    if len(values) > 1:
        raise InputError(
            f"{name} is {values} in different folders; one transcoder has the same in every layer. "
            "Import those that are alike together."
        )
    return values[0]
