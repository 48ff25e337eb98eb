"""`dataset_attributions`: attribution edges summed over data.

Phases: what is alive; by which route each matrix' table is computed; then batch after batch one
forward pass, cut at the matrices, and the tables added up.

Source: VPD, attribution graphs (dataset attributions).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vpd_lens.analysis.circuits.targets import decomposition_of
from vpd_lens.analysis.dataset_attribution.engine import Engine
from vpd_lens.analysis.dataset_attribution.passes import (
    Indices,
    checked_alive,
    find_alive,
    one_pass,
)
from vpd_lens.analysis.dataset_attribution.result import OUTPUT, DatasetAttributions, Settings
from vpd_lens.data import token_batches
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import ArtefactError, ConfigError, InputError
from vpd_lens.evaluation.metrics import ALIVE


def dataset_attributions(
    model: nn.Module,
    data: Any,
    *,
    n_batches: int = 100,
    batch_size: int = 16,
    seq_len: int | None = None,
    targets: Literal["all"] | Sequence[str] = "all",
    alive: Indices | None = None,
    alive_threshold: float = ALIVE,
    absolute: bool = True,
    frozen: bool = False,
    output: str | Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    memory_limit: float = 4.0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> DatasetAttributions:
    """Which subcomponents act on which, over a whole data set.

    Sums the edges of `vpd_lens.attribute` over all positions, or pairs of positions:

        sum (d a_t / d a_s) a_s g_s / (sum g_s * RMS(a_t))

    where gradients are stopped at every subcomponent and delta. The absolute variant has `|a_t|`
    in the place of `a_t`: what makes a target larger, whatever its sign. Sources are subcomponents
    and token embeddings (with the token's count for `sum g_s`); targets are subcomponents, at all
    positions and not only where they are important, and logits (without an absolute variant).

    Memory does not grow with the data. The result is reproducible bit for bit on a CPU, whether
    or not the pass was interrupted and resumed.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        data: As for `vpd_lens.train`. Read in order, not shuffled; tensors, arrays and text files
            at most once, while streams and iterables start again when they end. It is read twice
            unless `alive` is given.
        n_batches: Batches in all, those before a resume included.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        targets: Sites whose subcomponents are targets, and `"output"` for logits; `"all"`: all.
        alive: Subcomponents that are sources and targets, `{site: indices}`, as from
            `vpd_lens.analysis.alive_subcomponents`. `None`: those above `alive_threshold`.
        alive_threshold: Mean importance on this data that a subcomponent must exceed.
        absolute: Have the absolute variant too, which takes most of the time and half the memory.
        frozen: Hold norm scales, attention patterns and neurons' gains at their values; see
            `vpd_lens.attribute`. Without it, what only scales the input of a norm has no effect: in
            a model without position embeddings the first q, k and v owe the embeddings nothing.
        output: Directory of the result; `None`: it is not stored.
        resume: Go on from what is in `output`, with the subcomponents that are alive there.
        save_every: Seconds between the states written to `output`.
        memory_limit: Largest size of the tables, in GiB.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show a progress bar.

    Returns:
        The attributions, on the CPU: `.sources(node)`, `.targets(node)`, `.table(node)`.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If an argument is out of range or the tables exceed `memory_limit`.
        ConfigError: If `output` already holds attributions and `resume` is False.
        ArtefactError: If what is in `output` is damaged, or of another decomposition or other
            arguments.
        DataError: If the data does not fit the model, or is not that of the interrupted pass.

    Example:
        >>> found = dataset_attributions(model, "stories.npy")  # doctest: +SKIP
        >>> found.sources("blocks.1.mlp.in:31", top=10)  # doctest: +SKIP
    """
    vpd = decomposition_of(model)
    _check_arguments(n_batches, alive_threshold, output, resume)
    names = _targets(vpd, targets)
    settings = Settings(
        alive_threshold=alive_threshold, absolute=absolute, frozen=frozen, targets=names
    )
    read = partial(
        token_batches,
        data,
        model=model,
        batch_size=batch_size,
        seq_len=seq_len,
        prepend_bos=prepend_bos,
        shuffle=False,
    )
    given = None if alive is None else checked_alive(vpd, alive)
    stored = _resumed(Path(str(output)), vpd, settings, given) if resume else None
    if stored is not None:
        given = stored.alive
    elif given is None:
        _require_rereadable(data)
        given = find_alive(vpd, read(), n_batches, alive_threshold, progress)
    engine = Engine(vpd, given, settings)
    engine.require_small(memory_limit)
    batches = read()
    if stored is None:
        stored = engine.empty()
    else:
        batches.load_state_dict(stored.data_state or {})
    result = stored.moved(vpd.device)
    last = time.monotonic()
    for tokens, state in one_pass(batches, result.n_batches, n_batches, "Attributing", progress):
        engine.add(result, tokens.to(vpd.device))
        result.data_state = state
        if output is not None and time.monotonic() - last >= save_every:
            result.save(output)
            last = time.monotonic()
    if output is not None:
        result.save(output)
    return result.moved(torch.device("cpu"))


# ------------------------------------------------------------------ before the pass


def _check_arguments(
    n_batches: int, threshold: float, output: str | Path | None, resume: bool
) -> None:
    if n_batches < 1:
        raise InputError(f"n_batches is {n_batches}; expected at least 1.")
    if not 0 <= threshold < 1:
        raise InputError(f"alive_threshold is {threshold:g}; expected a number in [0, 1).")
    if resume and output is None:
        raise InputError("resume=True needs output=..., the directory to go on from.")
    if output is not None and not resume and (Path(output) / "attributions.json").exists():
        raise ConfigError(
            f"output={str(output)!r} already holds dataset attributions. Pass resume=True to "
            "continue them, or another directory."
        )


def _targets(vpd: Decomposition, targets: Literal["all"] | Sequence[str]) -> tuple[str, ...]:
    available = (*vpd.layout.names, OUTPUT)
    if targets == "all":
        return available
    if isinstance(targets, str) or not targets or not set(targets) <= set(available):
        raise InputError(
            f"targets={targets!r}; expected 'all' or a list of some of {list(available)}."
        )
    return tuple(name for name in available if name in targets)


def _require_rereadable(data: Any) -> None:
    if isinstance(data, Iterator):
        raise InputError(
            f"data is a {type(data).__name__}, which can be read only once, but what is alive is "
            "found in a pass of its own. Give alive={site: indices}, or an iterable."
        )


def _resumed(
    output: Path, vpd: Decomposition, settings: Settings, alive: dict[str, Tensor] | None
) -> DatasetAttributions:
    stored = DatasetAttributions.load(output, vpd)
    then, now = stored.settings.model_dump(), settings.model_dump()
    different = [f"{n} was {then[n]!r} and is {now[n]!r}" for n in now if then[n] != now[n]]
    if alive is not None and any(not torch.equal(alive[n], stored.alive[n]) for n in alive):
        different.append("alive was another choice")
    if different:
        raise ArtefactError(
            f"{output}: these attributions were started with other arguments: "
            f"{'; '.join(different)}. Resume with the same ones, or choose a new output directory."
        )
    return stored
