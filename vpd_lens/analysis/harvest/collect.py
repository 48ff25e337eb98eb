"""`harvest`: one pass over data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from vpd_lens.analysis.harvest.result import Harvest, Settings
from vpd_lens.analysis.harvest.token_strings import token_strings
from vpd_lens.data import TokenBatches, token_batches
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.masks import Layout
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.errors import ArtefactError, AttachError, ConfigError, InputError

GIB = 2**30


def harvest(
    model: nn.Module,
    data: Any,
    *,
    n_batches: int = 500,
    batch_size: int = 16,
    seq_len: int | None = None,
    sites: Sequence[str] | None = None,
    threshold: float = 0.1,
    n_top: int = 10,
    n_random: int = 20,
    context: int = 20,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    memory_limit: float = 4.0,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Harvest:
    """Gather what every subcomponent responds to, in one pass over data.

    Memory does not grow with the data. The result is reproducible bit for bit on a CPU, whether
    or not the pass was interrupted and resumed.

    Args:
        model: A decomposed language model.
        data: As for `vpd_lens.train`. Read in order, not shuffled; tensors, arrays and text files
            at most once, while streams and iterables start again when they end.
        n_batches: Batches in all, those before a resume included.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        sites: Names of the sites to harvest; `None`: all.
        threshold: A subcomponent fires where its causal importance exceeds this.
        n_top: Top examples of every subcomponent.
        n_random: Random examples of every subcomponent.
        context: Tokens on either side of an example.
        seed: Seed of the random examples.
        output: Directory of the harvest; `None`: it is not stored.
        resume: Go on from what is in `output`.
        save_every: Seconds between the states written to `output`. An interruption loses no more
            than what came after the last.
        memory_limit: Largest size of tables and examples, in GiB.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show a progress bar.

    Returns:
        The harvest, on the CPU.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If an argument is out of range, the model is no language model, or the tables
            exceed `memory_limit`.
        ConfigError: If `output` already holds a harvest and `resume` is False.
        ArtefactError: If what is in `output` is damaged or belongs to another decomposition.
        DataError: If the data does not fit the model, or is not that of the interrupted pass.
    """
    if "vpd" not in model.__dict__:
        raise AttachError("This model carries no decomposition. Call vpd_lens.decompose first.")
    vpd: Decomposition = model.__dict__["vpd"]
    _check_arguments(n_batches, output, resume)
    settings = Settings(
        threshold=threshold, n_top=n_top, n_random=n_random, context=context, seed=seed
    )
    layout = _layout(vpd, sites)
    vocabularies = _vocabularies(model)
    _check_memory(layout, vocabularies, settings, memory_limit)
    batches = token_batches(
        data,
        model=model,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        prepend_bos=prepend_bos,
        shuffle=False,
    )
    if resume:
        result = _moved(_resumed(Path(str(output)), vpd, layout, settings), vpd.device)
        batches.load_state_dict(result.data_state or {})
    else:
        strings = token_strings(getattr(model, "tokenizer", None), max(vocabularies))
        result = Harvest.empty(
            layout, settings, fingerprint(vpd), strings, vocabularies, vpd.device
        )
    _gather(result, vpd, batches, n_batches, _Saver(output, save_every), progress)
    return _moved(result, torch.device("cpu"))


def _gather(
    result: Harvest,
    vpd: Decomposition,
    batches: TokenBatches,
    n_batches: int,
    saver: _Saver,
    progress: bool,
) -> None:
    observe = _observer(vpd, result.layout, len(result.outputs.everywhere))
    steps = range(result.n_batches, n_batches)
    for _ in track(steps, "Harvesting", disable=not progress):
        tokens = next(batches).tokens
        state = batches.state_dict()
        if batches.epoch > 0:
            break  # the data began again
        tokens = tokens.to(vpd.device)
        result.add(tokens, *observe(tokens))
        result.data_state = state
        saver.maybe(result)
    saver.now(result)


Observer = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _observer(vpd: Decomposition, layout: Layout, vocabulary: int) -> Observer:
    """A function from tokens to importances, activations and next-token probabilities."""
    chosen = [vpd.layout.names.index(name) for name in layout.names]
    directions = [
        (vpd.subcomponents.v[i] * vpd.subcomponents.u[i].norm(dim=1)).detach() for i in chosen
    ]

    @torch.no_grad()
    def observe(tokens: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, Tensor]:
        output, inputs = vpd.target(tokens)
        if not isinstance(output, Tensor) or output.shape != (*tokens.shape, vocabulary):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"the model's output is {shape}; a harvest needs next-token logits "
                f"{(*tokens.shape, vocabulary)}, so the model must be a language model."
            )
        parts = vpd.layout.split(lower_leaky(vpd.pre_importance(inputs)))
        importance = torch.cat([parts[i] for i in chosen], dim=-1)
        acts = [inputs[i].float() @ v for i, v in zip(chosen, directions, strict=True)]
        return importance, torch.cat(acts, dim=-1), _softmax(output)

    return observe


def _softmax(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos vocab"]:
    return logits.float().softmax(dim=-1)


class _Saver:
    """Writes the state now and then, if there is somewhere to write it."""

    def __init__(self, output: str | Path | None, every: float) -> None:
        self.output = None if output is None else Path(output)
        self.every = every
        self.last = time.monotonic()

    def maybe(self, result: Harvest) -> None:
        if time.monotonic() - self.last >= self.every:
            self.now(result)

    def now(self, result: Harvest) -> None:
        if self.output is not None:
            result.save(self.output)
        # Measured from the end, so that slow writing never takes most of the time.
        self.last = time.monotonic()


# ------------------------------------------------------------------ before the pass


def _check_arguments(n_batches: int, output: str | Path | None, resume: bool) -> None:
    if n_batches < 1:
        raise InputError(f"n_batches is {n_batches}; expected at least 1.")
    if resume and output is None:
        raise InputError("resume=True needs output=..., the directory to go on from.")
    if output is not None and not resume and (Path(output) / "harvest.json").exists():
        raise ConfigError(
            f"output={str(output)!r} already holds a harvest. Pass resume=True to continue it, or "
            "another directory."
        )


def _layout(vpd: Decomposition, sites: Sequence[str] | None) -> Layout:
    if sites is None:
        return vpd.layout
    unknown = [name for name in sites if name not in vpd.layout.names]
    if unknown or not sites or isinstance(sites, str):
        raise InputError(
            f"sites={sites!r}; expected a list of some of {list(vpd.layout.names)}, or None."
        )
    pairs = zip(vpd.layout.names, vpd.layout.sizes, strict=True)
    names, sizes = zip(*((name, size) for name, size in pairs if name in sites), strict=True)
    return Layout(names, sizes)


def _vocabularies(model: nn.Module) -> tuple[int, int]:
    cfg = getattr(model, "cfg", None)
    d_vocab = getattr(cfg, "d_vocab", None) or -1
    if d_vocab < 1:
        raise InputError(
            "the model has no vocabulary (model.cfg.d_vocab); a harvest needs a language model."
        )
    # TransformerLens writes -1 for "not set".
    d_vocab_out = getattr(cfg, "d_vocab_out", None) or -1
    return int(d_vocab), int(d_vocab_out if d_vocab_out > 0 else d_vocab)


def _check_memory(
    layout: Layout, vocabularies: tuple[int, int], settings: Settings, limit: float
) -> None:
    window = 2 * settings.context + 1
    # Counts and masses have 4 bytes; a token in a window has an id and two floats.
    example = 8 + 12 * window
    per_row = 4 * sum(vocabularies) + (settings.n_top + settings.n_random) * example
    needed = layout.total * per_row / GIB
    if needed > limit:
        raise InputError(
            f"the token tables and examples of {layout.total} subcomponents over "
            f"{max(vocabularies)} tokens take {needed:.1f} GiB, more than "
            f"memory_limit={limit:g}. Harvest some sites at a time with sites=[...], at most "
            f"{int(limit * GIB / per_row)} subcomponents, or raise memory_limit."
        )


def _resumed(output: Path, vpd: Decomposition, layout: Layout, settings: Settings) -> Harvest:
    stored = Harvest.load(output, vpd)
    then, now = stored.settings.model_dump(), settings.model_dump()
    different = [
        f"{name} was {then[name]!r} and is {now[name]!r}" for name in now if then[name] != now[name]
    ]
    if stored.layout != layout:
        different.append(f"sites were {list(stored.layout.names)} and are {list(layout.names)}")
    if different:
        raise ArtefactError(
            f"{output}: the harvest was started with other arguments: {'; '.join(different)}. "
            "Resume with the same ones, or choose a new output directory."
        )
    return stored


def _moved(result: Harvest, device: torch.device) -> Harvest:
    for part in (result.usage, result.inputs, result.outputs, result.top, result.random):
        for name, tensor in vars(part).items():
            setattr(part, name, tensor.to(device))
    return result
