"""What attention does over data: where heads look, which pairs make them, what moves together.

The mean contribution of a pair at a distance,

    E_t[ a_q[t, c] (U_q[c, h]^T M_tau U_k[c', h]) a_k[t - tau, c'] ],

is the product of what is in the weights and of how the two activations go together in the data, so
one table of their products by distance serves all heads. Pads count nowhere.

Source: VPD, attention (offset profiles, P(k | v), ablation of a q or k subcomponent).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.attention.form import ScoreForm
from vpd_lens.analysis.attention.interactions import Interactions, names_of
from vpd_lens.analysis.attention.parts import Side, sides
from vpd_lens.analysis.attention.prompt import patterns_of
from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.labels import Labels
from vpd_lens.rendering import Shown, titled


@dataclass(repr=False)
class Profile(Shown):
    """Where the heads of a layer look, on average.

    Attributes:
        layer: The block.
        offsets: Distances from the query back to the key.
        attention: Mean over all queries that have a position so far back.
        first: Mean attention to the first position, over all queries behind it.
    """

    layer: int
    offsets: tuple[int, ...]
    attention: Float[Tensor, "head offset"]
    first: Float[Tensor, " head"]

    def __rich__(self) -> Group:
        title, table = f"Mean attention of layer {self.layer}", Table()
        shown = self.offsets[:8]
        for heading in ("head", *(f"-{offset}" for offset in shown), "first"):
            table.add_column(heading, justify="right")
        for head, (row, first) in enumerate(zip(self.attention, self.first, strict=True)):
            values = [*row[: len(shown)].tolist(), float(first)]
            table.add_row(str(head), *(f"{value:.3f}" for value in values))
        return titled(title, table)


@dataclass
class Profiles:
    """Sums of attention by distance, of which `Profile` has the means."""

    offsets: tuple[int, ...]
    sums: dict[int, Tensor] = field(default_factory=dict)  # [head, offset]
    firsts: dict[int, Tensor] = field(default_factory=dict)  # [head]
    n: Tensor = field(default_factory=lambda: torch.tensor(0.0))  # queries by offset
    n_first: float = 0.0

    def add(
        self,
        patterns: dict[int, Float[Tensor, "batch head pos pos"]],
        real: Bool[Tensor, "batch pos"],
    ) -> None:
        """Add one batch of patterns, at queries that are no pads."""
        self.n = self.n + torch.tensor([float(real[:, tau:].sum()) for tau in self.offsets])
        self.n_first += float(real[:, 1:].sum())
        for layer, pattern in patterns.items():
            pattern = pattern.double() * real[:, None, :, None]
            sums = [pattern.diagonal(-tau, 2, 3).sum((0, 2)) for tau in self.offsets]
            self.sums[layer] = self.sums.get(layer, 0) + torch.stack(sums, 1).cpu()
            first = pattern[:, :, 1:, 0].sum((0, 2)).cpu()
            self.firsts[layer] = self.firsts.get(layer, 0) + first

    def of(self, layer: int) -> Profile:
        """The means of a layer."""
        mean = (self.sums[layer] / self.n.clamp(min=1)).float()
        first = (self.firsts[layer] / max(self.n_first, 1)).float()
        return Profile(layer, self.offsets, mean, first)


@dataclass(repr=False)
class Together(Shown):
    """How often k and v subcomponents of a layer are important at the same position.

    Attributes:
        keys: Site of k.
        values: Site of v.
        both: Positions where both are, of every pair.
        n_keys: Positions where each of k is.
        n_values: Positions where each of v is.
        n_positions: All positions.
        labels: What subcomponents are called.
    """

    keys: str
    values: str
    both: Float[Tensor, "C_k C_v"]
    n_keys: Float[Tensor, " C_k"]
    n_values: Float[Tensor, " C_v"]
    n_positions: int
    labels: Labels = field(default_factory=Labels)

    @property
    def k_given_v(self) -> Float[Tensor, "C_k C_v"]:
        """P(k is important | v is important); NaN where v never is."""
        return self.both / self.n_values

    @property
    def v_given_k(self) -> Float[Tensor, "C_k C_v"]:
        """P(v is important | k is important); NaN where k never is."""
        return self.both / self.n_keys[:, None]

    def top(self, n: int = 10, at_least: int = 10) -> list[tuple[str, str, float, float, float]]:
        """Pairs whose importance goes together most: k, v, P(k | v), P(v | k), correlation.

        Ordered by the correlation of being important. Pairs are left out of which one is important
        at fewer than `at_least` positions.
        """
        p_k, p_v = self.n_keys / self.n_positions, self.n_values / self.n_positions
        covariance = self.both / self.n_positions - p_k[:, None] * p_v
        spread = ((p_k * (1 - p_k))[:, None] * (p_v * (1 - p_v))).sqrt()
        often = (self.n_keys >= at_least)[:, None] & (self.n_values >= at_least) & (spread > 0)
        correlation = torch.where(often, covariance / spread, -2)
        best = correlation.flatten().topk(min(n, int(often.sum()))).indices
        found = []
        for k, v in torch.stack(torch.unravel_index(best, often.shape), 1).tolist():
            figures = (x[k, v] for x in (self.k_given_v, self.v_given_k, correlation))
            found.append((f"{self.keys}:{k}", f"{self.values}:{v}", *map(float, figures)))
        return found

    def __rich__(self) -> Group:
        title, table = f"{self.keys} and {self.values} together", Table()
        for heading in ("k", "v", "P(k | v)", "P(v | k)", "correlation"):
            table.add_column(heading, justify="left" if len(heading) == 1 else "right")
        for k, v, *figures in self.top():
            ends = (Text(self.labels.named(end)) for end in (k, v))
            table.add_row(*ends, *(f"{figure:.3f}" for figure in figures))
        return titled(title, table)


@dataclass(repr=False)
class DataAttention(Shown):
    """What the attention of some layers does over data; made by `Attention.over`.

    Attributes:
        n_positions: Positions that were seen.
        profiles: Where heads look, by layer.
        contributions: Mean contributions of pairs of q and k, by layer.
        together: How k and v are important together, of layers whose v is decomposed.
    """

    n_positions: int
    profiles: dict[int, Profile]
    contributions: dict[int, Interactions]
    together: dict[int, Together]

    def __rich__(self) -> Group:
        return Group(*self.profiles.values())


@dataclass(repr=False)
class PatternChange(Shown):
    """Where heads look with and without some subcomponents; made by `Attention.ablate`.

    Attributes:
        ablated: Their names.
        before: By layer, with them.
        after: By layer, without them.
    """

    ablated: tuple[str, ...]
    before: dict[int, Profile]
    after: dict[int, Profile]

    def change(self, layer: int) -> Float[Tensor, "head offset"]:
        """Mean attention without less that with them."""
        return self.after[layer].attention - self.before[layer].attention

    def __rich__(self) -> Group:
        title = f"Mean attention with and without {', '.join(self.ablated)}"
        table = Table()
        for heading in ("layer", "head", "offset", "with", "without"):
            table.add_column(heading, justify="right")
        rows = []
        for layer, before in self.before.items():
            for head, row in enumerate(self.change(layer)):
                place = int(row.abs().argmax())
                values = (p.attention[head, place] for p in (before, self.after[layer]))
                rows.append((layer, head, before.offsets[place], *map(float, values)))
        for layer, head, offset, *values in sorted(rows, key=lambda row: -abs(row[4] - row[3])):
            cells = (f"{value:.3f}" for value in values)
            table.add_row(str(layer), str(head), f"-{offset}", *cells)
        return titled(title, table)


@torch.no_grad()
def over_batches(
    vpd: Decomposition,
    forms: dict[int, ScoreForm],
    batches: Iterable[Batch],
    offsets: tuple[int, ...],
    used: dict[str, tuple[Tensor, Tensor]],
    threshold: float,
) -> DataAttention:
    """One pass over batches, of which every one has as many positions as the forms."""
    profiles, n = Profiles(offsets), 0
    products: dict[int, Tensor] = {}
    together = {}
    for layer in forms:
        keys, values = (f"blocks.{layer}.attn.{part}" for part in "kv")
        if values in vpd.layout.names:
            sizes = [len(vpd.u(name)) for name in (keys, values)]
            shapes = sizes, sizes[:1], sizes[1:]
            counts = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
            together[layer] = Together(keys, values, *counts, 0, vpd.labels)
    vectors: dict[int, tuple[Side, Side]] = {}
    for batch in batches:
        batch = batch.to(vpd.device)
        real, mask = _real(batch), batch.mask_argument()
        profiles.add(patterns_of(vpd, list(forms), batch.tokens, **mask), real)
        inputs = vpd.inputs(batch.tokens, **mask)
        important = lower_leaky(vpd.pre_importance(inputs, batch.real))[real] > threshold
        by_name = dict(zip(vpd.layout.names, inputs, strict=True))
        n += len(important)
        for layer, form in forms.items():
            vectors[layer] = sides(vpd, form, by_name)
            found = _products(*vectors[layer], real, offsets, used)
            products[layer] = products.get(layer, 0) + found
            if layer in together:
                _count(together[layer], important, vpd)
    counts = profiles.n.clamp(min=1)
    contributions = {
        layer: _contributions(
            form, vectors[layer], products[layer] / counts[:, None, None], offsets, used, vpd.labels
        )
        for layer, form in forms.items()
    }
    return DataAttention(n, {layer: profiles.of(layer) for layer in forms}, contributions, together)


@torch.no_grad()
def profiles_of(
    vpd: Decomposition,
    layers: Sequence[int],
    batches: Iterable[Batch],
    offsets: tuple[int, ...],
    ablated: tuple[str, ...],
) -> PatternChange:
    """Mean attention of some layers by distance, with and without some subcomponents."""
    before, after = Profiles(offsets), Profiles(offsets)
    for batch in batches:
        batch = batch.to(vpd.device)
        for sums, names in ((before, ()), (after, ablated)):
            found = patterns_of(vpd, layers, batch.tokens, names, **batch.mask_argument())
            sums.add(found, _real(batch))
    return PatternChange(ablated, *({n: p.of(n) for n in layers} for p in (before, after)))


def _real(batch: Batch) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real


def _count(counts: Together, important: Bool[Tensor, "n C_total"], vpd: Decomposition) -> None:
    k, v = (important[:, vpd.layout.columns(n)].float() for n in (counts.keys, counts.values))
    counts.both += (k.T @ v).cpu()
    counts.n_keys += k.sum(0).cpu()
    counts.n_values += v.sum(0).cpu()
    counts.n_positions += len(important)


def _products(
    q: Side,
    k: Side,
    real: Bool[Tensor, "batch pos"],
    offsets: tuple[int, ...],
    used: dict[str, tuple[Tensor, Tensor]],
) -> Float[Tensor, "head_or_1 offset first second"]:
    """Sums over positions of the products of activations, over the norms' divisors if there are."""
    acts = []
    for side in (q, k):
        own = side.activations[..., used[side.site][0].to(real.device)]
        own = torch.cat([own, torch.ones_like(own[..., :1])], -1)  # the bias' is always 1
        acts.append(own[:, :, None] * side.inverse_rms * real[..., None, None])
    of_q, of_k = acts  # [batch, pos, head or 1, C]
    if of_q.shape[2] > 1:  # normalised head by head
        of_k = repeat(of_k, "b t kv c -> b t (kv group) c", group=of_q.shape[2] // of_k.shape[2])
    n = real.shape[1]
    sums = [
        einsum(of_q[:, tau:], of_k[:, : n - tau], "b t h c, b t h d -> h c d") for tau in offsets
    ]
    return torch.stack(sums, 1).double().cpu()


def _contributions(
    form: ScoreForm,
    vectors: tuple[Side, Side],
    products: Float[Tensor, "head_or_1 offset first second"],
    offsets: tuple[int, ...],
    used: dict[str, tuple[Int[Tensor, " _n"], Tensor]],
    labels: Labels,
) -> Interactions:
    """What the forms make of mean products of activations."""
    indices = [used[side.site][0] for side in vectors]
    q, k = (
        torch.cat([side.vectors[index], side.bias[None]]).cpu()
        for side, index in zip(vectors, indices, strict=True)
    )
    k = repeat(k, "c kv d -> c (kv group) d", group=q.shape[1] // k.shape[1])
    seen = einsum(form.matrices[list(offsets)].cpu(), k, "o i j, second h j -> h o second i")
    pairs = einsum(q, seen, "first h i, h o second i -> h o first second")
    sites = [side.site for side in vectors]
    names = [
        (*names_of(site, index), f"{site}.bias") for site, index in zip(sites, indices, strict=True)
    ]
    values = pairs * products.float()
    return Interactions("mean contribution", *sites, *names, offsets, values, labels=labels)
