"""`find_subcomponents`: which subcomponents to edit.

By what the model predicts where they fire (the output tokens' mutual information, by which editing
works best), by how much more important they are on one kind of data than on another, by the text
they fire on, or by a label.

Source: the method authors' notes on editing; "German removal" (2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.analysis.circuits.targets import token_id
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.data import one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.editing.effects import Where
from vpd_lens.errors import DataError, InputError


class Found(NamedTuple):
    """A subcomponent by name, and how well it answers, the more the better.

    By token its pointwise mutual information in nats; by contrast the difference of its mean
    importances; by text the share of its examples that match; by label 1.
    """

    name: str
    score: float


def find_subcomponents(
    model: nn.Module,
    harvest: Harvest | None = None,
    *,
    token: str | int | None = None,
    contrast: tuple[Any, Any] | None = None,
    where: Where | None = None,
    text: str | None = None,
    label: str | None = None,
    labels: Mapping[str, str] | None = None,
    sites: str = "",
    k: int = 10,
    least: float = 0.05,
    batch_size: int = 16,
    n_batches: int = 8,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
) -> list[Found]:
    """Subcomponents for an edit, the best first. Give exactly one of the four questions.

    Args:
        model: A decomposed language model.
        harvest: Of its decomposition; for `token` and `text`.
        token: Those at whose firings the model predicts this token, text or id: by PMI, among
            those where it has at least `least` of the probability.
        contrast: Two data sets, as for `vpd_lens.train`: those more important on the first.
        where: From tokens `[batch, pos]` to a mask: which positions of the first count.
        text: A regular expression: those whose top examples match where they fire, tokens before
            included.
        label: A regular expression, searched in `labels`.
        labels: Labels by name of a subcomponent.
        sites: A regular expression that names of sites match; `""`: all.
        k: How many, at most.
        least: See `token`.
        batch_size: Sequences per batch of `contrast`.
        n_batches: Batches of each of its data sets.
        seq_len: Their length; `None`: the model's context length (or the row length).
        prepend_bos: BOS policy for text; `None` follows the model.

    Raises:
        AttachError: If the model carries no decomposition.
        ArtefactError: If the harvest is of another one.
        DataError: If a data set is empty or cannot be read.
        InputError: If not exactly one question is asked, or what it needs is missing.

    Examples:
        >>> vpd_lens.find_subcomponents(model, harvest, token=" #")  # doctest: +SKIP
    """
    vpd = decomposition_of(model)
    asked = {"token": token, "contrast": contrast, "text": text, "label": label}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"find by {given or 'nothing'}; give exactly one of {', '.join(asked)}.")
    sizes = zip(vpd.layout.names, vpd.layout.sizes, strict=True)
    names = [f"{s}:{i}" for s, n in sizes for i in range(n)]
    if contrast is not None:
        reading = {"batch_size": batch_size, "n_batches": n_batches, "seq_len": seq_len}
        reading["prepend_bos"] = prepend_bos
        scores = _mean_importance(vpd, contrast[0], reading, where)
        scores = scores - _mean_importance(vpd, contrast[1], reading)
    elif label is not None:
        if labels is None:
            raise InputError("label needs labels=..., a mapping from names to labels.")
        hits = [float(bool(re.search(label, labels.get(name, "")))) for name in names]
        scores = torch.tensor(hits)
    elif harvest is None:
        raise InputError(f"{given[0]} needs harvest=..., what subcomponents respond to.")
    else:
        harvest.check(vpd)
        if token is not None:
            number = token_id(model, token, int(model.cfg.d_vocab))  # type: ignore[arg-type, union-attr]
            scores = harvest.outputs.of_token(number, harvest.usage.firings, least)
        else:
            scores = torch.tensor([_share(harvest, name, str(text)) for name in names])
    wanted = torch.tensor([bool(re.search(sites, name.rpartition(":")[0])) for name in names])
    scores = torch.where(wanted, scores.cpu().nan_to_num(-torch.inf), -torch.inf)
    best = scores.topk(min(k, len(names))).indices.tolist()
    return [Found(names[i], float(scores[i])) for i in best if scores[i] > 0]


@torch.no_grad()
def _mean_importance(
    vpd: Decomposition, source: Any, reading: dict[str, Any], where: Where | None = None
) -> Float[Tensor, " C_total"]:
    total, n = torch.zeros(vpd.layout.total, device=vpd.device), 0
    for batch in one_pass(source, model=vpd.model, **reading):
        batch = batch.to(vpd.device)
        g = vpd.causal_importance(batch.tokens, **batch.mask_argument())
        at = torch.ones_like(batch.tokens).bool() if batch.real is None else batch.real
        g = g[at if where is None else at & where(batch.tokens)]
        total, n = total + g.sum(0), n + len(g)
    if not n:
        raise DataError("a data set of contrast has no positions; nothing could be compared.")
    return total / n


def _share(harvest: Harvest, name: str, pattern: str) -> float:
    """Of the top examples, how many match up to and including the token where it fires."""
    site, _, index = name.rpartition(":")
    examples = harvest.examples(site, int(index))
    texts = ("".join(harvest.strings[t] for t in e.tokens[: e.focus + 1]) for e in examples)
    hits = [bool(re.search(f"(?:{pattern})$", text)) for text in texts]
    return sum(hits) / len(hits) if hits else 0.0
