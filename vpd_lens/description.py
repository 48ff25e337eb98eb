"""What a saved decomposition is, read from its directory without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vpd_lens.files import existing_directory, read_json
from vpd_lens.saved_config import read_config


def describe(path: str | Path) -> Group:
    """Sites and sizes, training configuration, base model and metrics, for `rich.print`.

    Args:
        path: The directory that `vpd.save` wrote.

    Raises:
        ArtefactError: If it is missing, damaged or newer than this library.
    """
    folder = existing_directory(Path(path))
    config = read_config(folder)
    base = read_json(folder / "base_model.json")
    metrics = read_json(folder / "metrics.json")
    parts: list[Any] = [_heading(folder, config, base), _sites(config)]
    if config["training"]:
        parts.append(_pairs("Training", _flat(config["training"])))
    parts.append(_pairs("Base model", {k: v for k, v in base.items() if k != "weights"}))
    if metrics:
        parts.append(_pairs("Metrics", _flat(metrics)))
    return Group(*parts)


def _heading(folder: Path, config: dict[str, Any], base: dict[str, Any]) -> Text:
    steps = config["trained_steps"]
    state = f"trained for {steps:,} steps" if steps else "untrained"
    model = base.get("model_name") or base.get("model_class")
    return Text(
        f"{folder}\nVPD decomposition of {model}, {state}, "
        f"written by vpd-lens {config['vpd_lens_version']}\n"
        f"{len(config['sites'])} sites, {sum(config['n_subcomponents']):,} subcomponents, "
        f"{config['importance'].get('kind', 'default')} importance function, "
        f"{config['divergence']} divergence\n"
    )


def _sites(config: dict[str, Any]) -> Table:
    table = Table(title="Sites", title_justify="left")
    table.add_column("site")
    table.add_column("subcomponents", justify="right")
    indices = config.get("original_indices", {})
    if indices:
        table.add_column("folded", justify="right")
        table.add_column("original indices")
    for name, count in zip(config["sites"], config["n_subcomponents"], strict=True):
        row = (
            [f"{len(indices[name]['folded']):,}", _ranges(indices[name]["kept"])] if indices else []
        )
        table.add_row(Text(name), f"{count:,}", *row)
    return table


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs joined: `0-2, 5, 7-8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _pairs(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("name")
    table.add_column("value", overflow="fold")
    for name, value in values.items():
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        table.add_row(Text(name), Text(text))  # as Text: [qk] in a pattern is no markup
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
