"""`load`: the front door to a saved decomposition, here or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vpd_lens import storage
from vpd_lens.decomposition import saving
from vpd_lens.description import DecompositionRecord
from vpd_lens.interop.hub import MODEL, find
from vpd_lens.origin import load_as_recorded, load_base, load_other


def load(
    where: str | Path,
    model: nn.Module | str | Path | None = None,
    divergence: Any = None,
    *,
    device: str = "cpu",
    revision: str | None = None,
    base: nn.Module | str | Path | None = None,
) -> nn.Module:
    """Open a saved decomposition: its base model, with the decomposition as `model.vpd`.

    Every decomposed weight of the model is checked against its hash in the record.

    Args:
        where: A folder that `vpd.save` wrote, the output of a finished training run, or a
            repository on the Hugging Face hub, `"user/name"`, if there is neither such a folder
            nor a folder `user`.
        model: The base model, processed and in the dtype as it was then, onto which to attach; or
            a directory or name to load it from as it was loaded then. `None`: from where the
            record says that it came from.
        divergence: A custom divergence of the training, which cannot be saved.
        device: Where to put a base model that is loaded here: `"cpu"`, `"cuda"`, `"cuda:N"`, or
            `"auto"` for CUDA if there is.
        revision: A commit, branch or tag of the repository; makes `where` one.
        base: The other model, if what was decomposed is the difference from it, or a directory or
            name to load it from. `None`: from where the record says that it came from.

    Raises:
        ArtefactError: If a file is missing, damaged or newer than this library, the record does not
            say where the base model or the other one came from, or a decomposed weight of either
            differs; the message names the site. The model is left untouched.
        AttachError: If the model is decomposed already or a site does not exist.
        ConfigError: If the base model cannot be downloaded, or `device` is none.
        HubError: If the hub cannot be reached, refuses, or has no such repository.

    Examples:
        >>> model = vpd_lens.load("runs/first")  # doctest: +SKIP
        >>> model = vpd_lens.load("user/name", device="cuda")  # doctest: +SKIP
    """
    folder = find(where, revision, also=(MODEL,) if model is None else ())
    artefact = storage.read(folder, DecompositionRecord)
    if model is None:
        model = load_base(artefact.record, artefact.folder, device)
    elif not isinstance(model, nn.Module):
        model = load_as_recorded(artefact.record, model, device)
    if not isinstance(base, nn.Module) and (base or artefact.record.base_model.origin):
        base = load_other(artefact.record, artefact.folder, base)
    return saving.load(artefact.folder, model, divergence, base)
