"""`harvest`: one pass over data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.analysis.gathering import check_output, check_same, check_size, chosen, gather, origin
from vpd_lens.analysis.harvest.examples import Firings
from vpd_lens.analysis.harvest.result import Harvest, Settings
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition, Layout
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.errors import InputError
from vpd_lens.progress import Progress


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
        data: As for `vpd_lens.train`. Read in order, not shuffled, and once at most. Pads count
            nowhere.
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
        save_every: Seconds between the states written to `output`.
        memory_limit: Largest size of tables and examples, in GiB.
        prepend_bos: BOS policy for text; `None` follows the model.
        progress: Show how far it is and how long it will still take.

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
    vpd = decomposition_of(model)
    check_output(n_batches, output, resume)
    settings = Settings(
        threshold=threshold, n_top=n_top, n_random=n_random, context=context, seed=seed
    )
    sizes = dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    names = chosen("sites", sites, None, vpd.layout.names)
    layout = Layout(names, tuple(sizes[name] for name in names))
    vocabularies = _vocabularies(model)
    kept = {"settings": settings, **origin(vpd, max(vocabularies))}
    empty = partial(Harvest.empty, layout, vocabularies, **kept)
    size = check_size(empty, memory_limit, "Harvest some sites at a time with sites=[...]")
    result = Harvest.load(output, vpd) if resume else empty()
    different = f"sites were {list(result.layout.names)} and are {list(layout.names)}"
    check_same(output, result.settings, settings, [different] * (result.layout != layout))
    read = partial(
        one_pass, data, model=model, batch_size=batch_size, seq_len=seq_len, prepend_bos=prepend_bos
    )
    batches = read(seed=seed, state=result.data_state)
    cost = f"{n_batches} forwards of {batch_size} sequences; {size}"
    with Progress("Harvesting", n_batches, result.n_batches, progress, cost) as bar:

        def add(result: Harvest, batch: Batch) -> None:
            result.add(*_observed(vpd, layout, threshold, vocabularies[1], batch))
            bar.advance()

        return gather(result, add, batches, n_batches, output, save_every, vpd.device)


@torch.no_grad()
def _observed(
    vpd: Decomposition, layout: Layout, threshold: float, vocabulary: int, batch: Batch
) -> tuple[Firings, Float[Tensor, "batch pos vocab"]]:
    """Where the layout's subcomponents fire, and next-token probabilities."""
    output, inputs = vpd.target(batch.tokens, **batch.mask_argument())
    expected = (*batch.tokens.shape, vocabulary)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != expected:
        raise InputError(
            f"the model's output is {shape}; a harvest needs next-token logits {expected}, so the "
            "model must be a language model."
        )
    g = lower_leaky(vpd.pre_importance(inputs, batch.real))
    importance = torch.cat([g[..., vpd.layout.columns(name)] for name in layout.names], -1)
    x = dict(zip(vpd.layout.names, inputs, strict=True))
    acts = [x[n].float() @ (vpd.v(n) * vpd.u(n).norm(dim=1)) for n in layout.names]
    firings = Firings(batch.tokens, importance, torch.cat(acts, -1), threshold, batch.real)
    return firings, output.float().softmax(-1)


def _vocabularies(model: nn.Module) -> tuple[int, int]:
    """Numbers of input and of output tokens; TransformerLens writes -1 for "not set"."""
    cfg = getattr(model, "cfg", None)
    d_vocab, d_vocab_out = (int(getattr(cfg, n, 0) or 0) for n in ("d_vocab", "d_vocab_out"))
    if d_vocab < 1:
        raise InputError(
            "the model has no vocabulary (model.cfg.d_vocab); a harvest needs a language model."
        )
    return d_vocab, d_vocab_out if d_vocab_out > 0 else d_vocab
