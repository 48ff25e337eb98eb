"""`attention`: the analysis of attention across heads, by subcomponents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.analysis.attention.data import (
    DataAttention,
    PatternChange,
    over_batches,
    profiles_of,
)
from vpd_lens.analysis.attention.form import ScoreForm, probe_tokens, score_forms
from vpd_lens.analysis.attention.heads import HeadSpread, Overlap, head_spread, ov_overlap
from vpd_lens.analysis.attention.interactions import (
    Interactions,
    static_interactions,
    used_signs,
    value_output_interactions,
)
from vpd_lens.analysis.attention.parts import parse_name
from vpd_lens.analysis.attention.prompt import PromptAttention
from vpd_lens.analysis.circuits.targets import explained_decomposition, prompt_tokens
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import NEEDED
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import DataError, InputError
from vpd_lens.rendering import Shown, titled
from vpd_lens.sites.discovery import attends_both_ways, model_kind

OFFSETS = 17


def attention(
    model: nn.Module, harvest: Harvest | None = None, threshold: float = 1e-3
) -> Attention:
    """Analyse a model's attention across heads, by subcomponents of q, k, v and o.

    A decomposition sees the q matrices of all heads of a layer as one, and so a mechanism that is
    spread over heads as one pair of subcomponents.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge, with causal attention.
        harvest: Of this decomposition. It says which subcomponents are used at all, and which sign
            their activations have. Without one all are looked at, and signs are a convention.
        threshold: Mean importance in the harvest above which a subcomponent is used.

    Returns:
        What to ask; nothing is computed yet.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If no layer has both q and k decomposed, attention is not causal, the harvest is
            of another decomposition, or a difference of two models is what is decomposed.

    Examples:
        >>> import vpd_lens
        >>> from vpd_lens.example import example_harvest
        >>> model = vpd_lens.load_example()
        >>> heads = vpd_lens.attention(model, example_harvest(model.vpd))
        >>> pair = heads.static(2).standardised().top(1, offset=1)[0]
        >>> prompt = heads.on("import os")
        >>> prompt.pair(pair.first, pair.second).shape == prompt.scores(2).shape
        True
    """
    return Attention(model, harvest, threshold)


class Attention(Shown):
    """A model's attention, as `attention` opens it.

    Attributes:
        layers: Blocks whose q and k are both decomposed.
        harvest: What says which subcomponents are used, and their signs.
    """

    def __init__(self, model: nn.Module, harvest: Harvest | None, threshold: float) -> None:
        self.vpd, self.harvest = explained_decomposition(model), harvest
        if model_kind(model) == "module" or attends_both_ways(model):
            raise InputError(
                "attention needs a HookedTransformer or a TransformerBridge whose positions see "
                f"none after them; this {type(model).__name__} is another kind of model."
            )
        if harvest is not None and harvest.fingerprint != fingerprint(self.vpd):
            raise InputError("harvest= is of another decomposition; gather one of this model.")
        names = set(self.vpd.layout.names)
        self.layers = tuple(
            layer
            for layer in range(int(model.cfg.n_layers))  # type: ignore[union-attr]
            if {f"blocks.{layer}.attn.{part}" for part in "qk"} <= names
        )
        if not self.layers:
            raise InputError(
                "no layer has both q and k decomposed; attention is about pairs of the two. "
                f"Decomposed: {list(self.vpd.layout.names)}."
            )
        self._used = used_signs(self.vpd, harvest, threshold)
        self._forms: dict[int, dict[int, ScoreForm]] = {}

    def on(
        self, prompt: str | Sequence[int] | Tensor, prepend_bos: bool | None = None
    ) -> PromptAttention:
        """Take the attention on one prompt, text or token ids, apart into pairs.

        Raises:
            InputError: If it is no prompt for this model.
            VPDError: If a layer's attention is not a softmax of scores that are bilinear in q and
                k, so that nothing adds up to them.
        """
        tokens = prompt_tokens(self.vpd.model, prompt, prepend_bos)
        return PromptAttention(self.vpd, tokens, self._forms_for(len(tokens)))

    def static(self, layer: int, offsets: int | None = None) -> Interactions:
        """How the q and k subcomponents of a layer go together by head, at each of some distances.

        In the units of an attention score, for activations of 1 along the read directions. Where q
        or k is normalised, the norm's gain is in it, but not its divisor, a positive number at
        every position. A soft cap is left out of account.

        Args:
            layer: The block.
            offsets: Number of distances, from 0, the position itself, on; `None`: 17, or as many as
                there are.

        Raises:
            InputError: If q and k of the layer are not decomposed, or there is no such distance.
        """
        self._require(layer)
        n = min(OFFSETS, self._n_ctx) if offsets is None else offsets
        form, given = self._forms_for(n)[layer], tuple(range(n))
        return static_interactions(self.vpd, form, given, self._used, self.harvest is not None)

    def value_output(self, layer: int) -> Interactions:
        """How much of what each v subcomponent writes into a head each o subcomponent reads.

        Raises:
            InputError: If v and o of the layer are not decomposed.
        """
        self._require(layer, "vo")
        return value_output_interactions(self.vpd, layer, self._used, self.harvest is not None)

    def spread(self, site: str) -> HeadSpread:
        """Norms of the subcomponents of `"blocks.1.attn.q"`, or k, v or o, by head."""
        layer, part, _ = parse_name(self.vpd, f"{site}:0")
        return head_spread(self.vpd, layer, part)

    def overlap(
        self,
        layer: int,
        data: Any = None,
        where: str | None = None,
        *,
        n_random: int = 64,
        seed: int = 0,
        **reading: Any,
    ) -> Overlap:
        """How alike the heads of a layer are in what they move.

        Args:
            layer: The block.
            data: As for `over`. With it, only directions count in which the inputs of v vary.
            where: Only at positions where this k subcomponent is important.
            n_random: Pairs of random heads that are drawn to compare with.
            seed: Of these.
            **reading: `n_batches`, `batch_size`, `seq_len` and `prepend_bos`, as for `over`.

        Raises:
            InputError: If v and o of the layer are not decomposed, `where` is no k subcomponent, or
                is given without data, or is important at fewer than two positions.
        """
        self._require(layer, "vo")
        if data is None and where is not None:
            raise InputError("where= says at which inputs to look, and so needs data=.")
        inputs = None if data is None else self._inputs(layer, where, self._read(data, **reading))
        return ov_overlap(self.vpd, layer, inputs, n_random, seed)

    def over(
        self,
        data: Any,
        *,
        offsets: int = OFFSETS,
        n_batches: int = 16,
        batch_size: int = 16,
        seq_len: int | None = None,
        threshold: float = NEEDED,
        prepend_bos: bool | None = None,
    ) -> DataAttention:
        """Where heads look over data, which pairs contribute, and which k and v go together.

        Args:
            data: As for `vpd_lens.train`. Read in order, once at most.
            offsets: Number of distances.
            n_batches: Batches at most.
            batch_size: Sequences per batch.
            seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
            threshold: Importance above which a subcomponent is important at a position.
            prepend_bos: BOS policy for text; `None` follows the model.

        Raises:
            DataError: If the data does not fit the model.
        """
        how = {"batch_size": batch_size, "seq_len": seq_len, "prepend_bos": prepend_bos}
        first, batches = _peeked(self._read(data, n_batches=n_batches, **how))
        n = first.tokens.shape[1]
        forms, given = self._forms_for(n), tuple(range(min(offsets, n)))
        return over_batches(self.vpd, forms, batches, given, self._used, threshold)

    def ablate(
        self,
        subcomponents: str | Sequence[str],
        data: Any,
        *,
        offsets: int = OFFSETS,
        **reading: Any,
    ) -> PatternChange:
        """Mean attention by distance without some subcomponents, everything else being as it is.

        Args:
            subcomponents: A name, `"blocks.1.attn.q:316"`, or several, of any matrices.
            data: As for `over`.
            offsets: Number of distances.
            **reading: `n_batches`, `batch_size`, `seq_len` and `prepend_bos`, as for `over`.

        Raises:
            InputError: If there is no such subcomponent.
            DataError: If the data does not fit the model.
        """
        names = (subcomponents,) if isinstance(subcomponents, str) else tuple(subcomponents)
        first, batches = _peeked(self._read(data, **reading))
        given = tuple(range(min(offsets, first.tokens.shape[1])))
        return profiles_of(self.vpd, self.layers, batches, given, names)

    def __rich__(self) -> Group:
        known = "used subcomponents" if self.harvest is not None else "subcomponents"
        title, table = f"Attention: {known} by layer", Table()
        for heading in ("layer", "q", "k", "v", "o"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            names = (f"blocks.{layer}.attn.{part}" for part in "qkvo")
            counts = [len(self._used[n][0]) if n in self._used else "" for n in names]
            table.add_row(str(layer), *map(str, counts))
        return titled(title, table)

    def _require(self, layer: int, parts: str = "qk") -> None:
        names = [f"blocks.{layer}.attn.{part}" for part in parts]
        if missing := [name for name in names if name not in self.vpd.layout.names]:
            raise InputError(f"layer={layer}: {' and '.join(missing)} are not decomposed.")

    @property
    def _n_ctx(self) -> int:
        return int(self.vpd.model.cfg.n_ctx)  # type: ignore[union-attr]

    def _forms_for(self, n: int) -> dict[int, ScoreForm]:
        """How all layers attend, on at least `n` positions."""
        if not 1 <= n <= self._n_ctx:
            raise InputError(f"{n} positions: the model has between 1 and {self._n_ctx}.")
        n = max(n, 2)
        if n not in self._forms:
            tokens = probe_tokens(self.vpd.model, n)
            self._forms[n] = score_forms(self.vpd, self.layers, tokens)
        return self._forms[n]

    def _read(self, data: Any, n_batches: int = 16, batch_size: int = 16, **how: Any) -> Any:
        batches = one_pass(data, model=self.vpd.model, batch_size=batch_size, **how)
        return (batch for _, batch in zip(range(n_batches), batches, strict=False))

    @torch.no_grad()
    def _inputs(
        self, layer: int, where: str | None, batches: Iterator[Batch]
    ) -> Float[Tensor, "n d_model"]:
        """Inputs of a layer's v at all positions, or where a k subcomponent is important."""
        vpd, found = self.vpd, []
        index = vpd.layout.names.index(f"blocks.{layer}.attn.v")
        if where is not None:
            of_layer, _, c = parse_name(vpd, where, "k")
            if of_layer != layer:
                raise InputError(f"where={where!r} is of another layer than {layer}.")
            column = vpd.layout.columns(f"blocks.{layer}.attn.k").start + c
        for batch in batches:
            batch = batch.to(vpd.device)
            inputs = vpd.inputs(batch.tokens, **batch.mask_argument())
            keep = torch.ones_like(batch.tokens, dtype=torch.bool)
            if batch.real is not None:
                keep = batch.real
            if where is not None:
                importance = lower_leaky(vpd.pre_importance(inputs, batch.real))
                keep = keep & (importance[..., column] > NEEDED)
            found.append(inputs[index][keep].float())
        return torch.cat(found) if found else torch.empty(0, vpd.sites[index].shape[0])


def _peeked(batches: Iterator[Batch]) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all of them."""
    if (first := next(batches, None)) is None:
        raise DataError("there is no batch of data (n_batches of 0?); give at least one.")
    return first, chain([first], batches)
