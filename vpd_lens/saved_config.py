"""The `config.json` of a saved decomposition, readable without TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpd_lens.errors import ArtefactError
from vpd_lens.files import FORMAT_VERSION, read_json


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a saved decomposition, checked for its format.

    Raises:
        ArtefactError: If it is damaged, incomplete or written by a newer version.
    """
    config = read_json(folder / "config.json")
    version = config.get("format_version")
    if not isinstance(version, int):
        raise ArtefactError(f"{folder / 'config.json'}: it has no format_version.")
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"{folder}: format version {version} is newer than this library reads "
            f"({FORMAT_VERSION}). Upgrade vpd-lens."
        )
    expected = {
        "vpd_lens_version",
        "sites",
        "n_subcomponents",
        "importance",
        "divergence",
        "trained_steps",
        "training",
        "sha256",
        "format_version",
    }
    if set(config) - {"original_indices"} != expected:
        raise ArtefactError(
            f"{folder / 'config.json'}: missing fields {sorted(expected - set(config))}, unknown "
            f"fields {sorted(set(config) - expected)}. It was changed, or written by another "
            "version."
        )
    return config
