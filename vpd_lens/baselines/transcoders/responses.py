"""Where latents fire: which are alive, and passages for the judges of `vpd_lens.intruder`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vpd_lens.analysis.gathering import token_strings
from vpd_lens.analysis.interpretation import Passage, Responses
from vpd_lens.baselines.transcoders.measuring import Transcoded
from vpd_lens.baselines.transcoders.transcoder import Transcoder
from vpd_lens.data import Batch, one_pass
from vpd_lens.errors import DataError, InputError


def alive_latents(
    model: nn.Module,
    transcoder: Transcoder,
    data: Any,
    *,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
) -> dict[str, Int[Tensor, " _n_alive"]]:
    """Indices of the latents that fire anywhere in the data, `{"blocks.N.mlp": indices}`.

    For `alive` of the comparisons in `vpd_lens.analysis.comparison`. The arguments and errors are
    those of `measure_replaced`.
    """
    transcoded = Transcoded(model, transcoder)
    counts: dict[str, Tensor] = {}
    sizes = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
    for _, fired in _firing(transcoded, data, sizes):
        for part, active in zip(transcoded.parts, fired, strict=True):
            counts[part.name] = counts.get(part.name, 0) + active.flatten(0, -2).sum(0)
    return {name: count.nonzero().squeeze(1) for name, count in counts.items()}


def latent_responses(
    model: nn.Module,
    transcoder: Transcoder,
    data: Any,
    *,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    n_passages: int = 10,
    context: int = 8,
    seed: int = 0,
) -> dict[str, Responses]:
    """What every latent responds to, as the judges of `vpd_lens.intruder` read it.

    Named `blocks.N.mlp:LATENT`; latents that never fire are left out. Latents fire on the model's
    own stream, as selected in training.

    Args:
        model: The model that the transcoder was trained on, with its tokenizer.
        transcoder: The transcoder.
        data: As for `measure_replaced`, as are `batch_size`, `n_batches` and `seq_len`.
        batch_size: Sequences per batch.
        n_batches: Batches; fewer if the data ends before.
        seq_len: Tokens per sequence.
        n_passages: Examples of each, drawn from all places where it fires.
        context: Tokens of an example on either side of that place.
        seed: Of what is drawn.

    Raises:
        DataError: If the data is empty or does not fit the model.
        InputError: If the model has no tokenizer, or the transcoder is of another model.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so there is no text; set model.tokenizer.")
    strings = token_strings(tokenizer, model.cfg.d_vocab)
    transcoded, generator = Transcoded(model, transcoder), torch.Generator().manual_seed(seed)
    sizes = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
    seen = list(_firing(transcoded, data, sizes))
    n = sum(int(_real(batch).sum()) for batch, _ in seen)
    found: dict[str, Responses] = {}
    for index, part in enumerate(transcoded.parts):
        # [n_firings, 4]: batch, row, position, latent
        places = torch.cat(
            [
                torch.nn.functional.pad(fired[index].nonzero(), (1, 0), value=number)
                for number, (_, fired) in enumerate(seen)
            ]
        )
        places = places[torch.randperm(len(places), generator=generator)]
        places = places[places[:, 3].argsort(stable=True)]
        latents, counts = places[:, 3].unique_consecutive(return_counts=True)
        groups = places.split(counts.tolist())
        for latent, group in zip(latents.tolist(), groups, strict=True):
            passages = tuple(
                _passage(seen[number], index, row, pos, latent, context, strings)
                for number, row, pos, _ in group[:n_passages].tolist()
            )
            found[f"{part.name}:{latent}"] = Responses(len(group) / n, passages)
    return found


def _firing(
    transcoded: Transcoded, data: Any, sizes: dict[str, Any]
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Every batch, and where the latents of each layer fire in it, `[batch, pos, latents]`."""
    mlps, empty = transcoded.mlps, True
    for batch in one_pass(data, model=mlps.model, **sizes):
        empty, clean = False, mlps.clean(batch.to(mlps.device))
        yield batch, [active.cpu() for active in transcoded.on_clean(clean)[1]]
    if empty:
        raise DataError("data is empty; pass at least one row.")


def _real(batch: Batch) -> Tensor:
    return torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real


def _passage(
    seen: tuple[Batch, list[Tensor]],
    index: int,
    row: int,
    pos: int,
    latent: int,
    context: int,
    strings: list[str],
) -> Passage:
    """The text around one place where a latent fires, without padding."""
    (tokens, real), fired = seen
    end = tokens.shape[1] if real is None else int(real[row].sum())
    places = range(max(0, pos - context), min(end, pos + context + 1))
    text = tuple(strings[int(tokens[row, place])] for place in places)
    fires = tuple(i for i, place in enumerate(places) if fired[index][row, place, latent])
    return Passage(text, fires, pos - places.start)
