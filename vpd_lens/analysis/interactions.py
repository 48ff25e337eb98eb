"""`interactions`: which subcomponents of an MLP's input meet in its neurons.

What two subcomponents add to the same neurons goes through the nonlinearity together, so that their
effects on it need not add up. How much of that is to be expected,

    I[c, c'] = sum_i |U_ci| |U_c'i| / sum_i U_ci^2  *  sum |g a|_c |g a|_c' / sum |g a|_c^2,

is how far the second writes to the neurons of the first, where the first is important: i runs over
neurons, the other sums over positions. It is 1 for c with itself, and not symmetric.

Whether it is so is measured by a second difference. With f(.) the neurons after the nonlinearity
when what some subcomponents add there, `g a U`, is taken away,

    D[c, c'] = sum |f() - f(c) - f(c') + f(c, c')| / sum |f() - f(c)|,

over positions and neurons: how far the effect of both together is from the sum of their effects, in
units of that of the first.

Source: VPD, interpretation (I); the measurement is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

from vpd_lens.analysis.clustering import Clusters
from vpd_lens.data import Batch, one_pass
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.attach import decomposition_of
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import Masks
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import ArtefactError, DataError, InputError
from vpd_lens.rendering import Shown, titled
from vpd_lens.sites import find_sites


class Meeting(NamedTuple):
    """Two subcomponents, and how far the second writes to the neurons of the first."""

    first: str
    second: str
    value: float


@dataclass(repr=False, eq=False)
class NeuronInteractions(Shown):
    """How the subcomponents of one site meet in its neurons; `interactions` makes it.

    Attributes:
        site: `blocks.0.mlp.in`, or where the MLP is gated `blocks.0.mlp.gate`.
        indices: The subcomponents that are important anywhere, in the order of the table.
        values: I, of the row with the column.
        groups: Of each its cluster, -1 where it has none; `None` without clusters.
        n_positions: Positions that were looked at.
        fingerprint: Of the decomposition.
    """

    site: str
    indices: tuple[int, ...]
    values: Float[Tensor, "n n"]
    groups: tuple[int, ...] | None
    n_positions: int
    fingerprint: str

    def of(self, first: int, second: int) -> float:
        """I of two subcomponents, by their numbers in the site.

        Raises:
            InputError: If one is important nowhere, or does not exist.
        """
        for index in (first, second):
            if index not in self.indices:
                raise InputError(
                    f"{self.site}:{index} is important at none of the {self.n_positions} positions "
                    "that were looked at, or does not exist."
                )
        return float(self.values[self.indices.index(first), self.indices.index(second)])

    def top(self, n: int = 10) -> list[Meeting]:
        """The `n` pairs of the largest values, none of them one with itself."""
        values = self.values.clone().fill_diagonal_(-1)
        best = values.flatten().topk(min(n, values.numel() - len(values))).indices
        names = [f"{self.site}:{index}" for index in self.indices]
        rows = zip(*(x.tolist() for x in torch.unravel_index(best, values.shape)), strict=True)
        return [Meeting(names[r], names[c], float(values[r, c])) for r, c in rows]

    def others(self) -> Float[Tensor, " n"]:
        """All values but those of subcomponents with themselves."""
        return self.values[~torch.eye(len(self.values), dtype=torch.bool)]

    def inside(self) -> tuple[float, float]:
        """Mean value of pairs within a cluster, and of all others; NaN where there are none.

        Raises:
            InputError: If it was made without clusters.
        """
        if self.groups is None:
            raise InputError("these interactions were made without clusters=...")
        group = torch.tensor(self.groups)
        same = (group[:, None] == group) & (group >= 0)
        other = ~torch.eye(len(group), dtype=torch.bool)
        within, between = (self.values[which & other].mean() for which in (same, ~same))
        return float(within), float(between)

    def __rich__(self) -> RenderableType:
        values = self.others()
        above = (values > 0.1).float().mean()
        title = (
            f"{self.site}: {len(self.indices)} subcomponents, {self.n_positions} positions; "
            f"median interaction {values.median():.2g}, {above:.1%} above 0.1"
        )
        table = Table("subcomponent", "meets")
        table.add_column("interaction", justify="right")
        for first, second, value in self.top():
            table.add_row(first, second, f"{value:.3f}")
        return titled(title, table)


@dataclass(repr=False, eq=False)
class SecondDifferences(Shown):
    """What `measure` found: pairs, what I predicted, and D.

    Attributes:
        pairs: Names, the first being what D is relative to.
        predicted: I.
        measured: D.
        n_positions: Positions that were looked at.
    """

    pairs: list[tuple[str, str]]
    predicted: Float[Tensor, " n"]
    measured: Float[Tensor, " n"]
    n_positions: int

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of I with D."""
        return float(spearmanr(self.predicted.numpy(), self.measured.numpy()).statistic)

    def __rich__(self) -> Group:
        title = (
            f"{len(self.pairs)} pairs, {self.n_positions} positions: rank correlation of I with "
            f"the second difference {self.rank_correlation:.2f}"
        )
        table = Table("subcomponent", "with")
        for heading in ("I", "second difference"):
            table.add_column(heading, justify="right")
        for i in self.measured.argsort(descending=True)[:10].tolist():
            table.add_row(*self.pairs[i], f"{self.predicted[i]:.3f}", f"{self.measured[i]:.3f}")
        return titled(title, table)


def interactions(
    model: nn.Module,
    data: Any,
    *,
    sites: Sequence[str] | None = None,
    clusters: Clusters | None = None,
    n_batches: int = 16,
    batch_size: int = 16,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
) -> dict[str, NeuronInteractions]:
    """How far subcomponents of MLP inputs write to the same neurons, where both are important.

    Args:
        model: A decomposed model with MLPs.
        data: As for `vpd_lens.train`. Read in order, not shuffled, and once at most.
        sites: The inputs of MLPs to look at; `None`: all that are decomposed. Of a gated MLP that
            is `mlp.gate`: `mlp.in` does not go through the nonlinearity.
        clusters: Sorts every table by them: `vpd_lens.cluster` of the same decomposition.
        n_batches: Batches at most.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence; `None`: the model's context length (or the row length).
        prepend_bos: BOS policy for text; `None` follows the model.

    Returns:
        A table by site.

    Raises:
        ArtefactError: If the clusters are of another decomposition.
        AttachError: If the model carries no decomposition.
        InputError: If a site is not the input of an MLP's nonlinearity, or none is decomposed.
        DataError: If the data does not fit the model, or there is none.

    Examples:
        >>> import vpd_lens
        >>> model = vpd_lens.load_example()
        >>> found = vpd_lens.interactions(model, ["def read(self, path):", "import os"] * 4)
        >>> list(found)[0]
        'blocks.0.mlp.gate'
    """
    vpd = decomposition_of(model)
    if clusters is not None:
        clusters.check(vpd)
    names = _nonlinear(vpd, sites)
    how = {"batch_size": batch_size, "seq_len": seq_len, "prepend_bos": prepend_bos}
    products: dict[str, Tensor] = {}
    n = 0
    for batch in islice(one_pass(data, model=model, **how), n_batches):
        sizes = _sizes(vpd, batch.to(vpd.device), names)
        for name, size in sizes.items():
            products[name] = products.get(name, 0) + (size.T @ size).cpu()
        n += len(next(iter(sizes.values())))
    if not n:
        raise DataError("there is no batch of data (n_batches of 0?); give at least one.")
    return {name: _table(vpd, name, products[name], clusters, n) for name in names}


def _nonlinear(vpd: Decomposition, sites: Sequence[str] | None) -> list[str]:
    """The sites asked for, if each is what an MLP's nonlinearity is applied to."""
    gated = {
        s.name.rpartition(".")[0] for s in find_sites(vpd.model) if s.name.endswith("mlp.gate")
    }
    known = [
        name
        for name in vpd.layout.names
        if name.endswith("mlp.gate")
        or (name.endswith("mlp.in") and name.rpartition(".")[0] not in gated)
    ]
    chosen = known if sites is None else list(sites)
    if wrong := [name for name in chosen if name not in known]:
        raise InputError(
            f"sites: {wrong} are not what goes into the nonlinearity of an MLP; expected some of "
            f"{known}."
        )
    if not chosen:
        raise InputError(
            "no input of an MLP's nonlinearity is decomposed, and interactions are of those. "
            f"Decomposed: {list(vpd.layout.names)}."
        )
    return chosen


@torch.no_grad()
def _sizes(
    vpd: Decomposition, batch: Batch, names: Sequence[str]
) -> dict[str, Float[Tensor, "n_positions _C"]]:
    """`|g a|` of the subcomponents of some sites at all positions that are no pads."""
    inputs = vpd.inputs(batch.tokens, **batch.mask_argument())
    g, found = lower_leaky(vpd.pre_importance(inputs, batch.real)), {}
    for name in names:
        x = inputs[vpd.layout.names.index(name)].float()
        size = (g[..., vpd.layout.columns(name)] * (x @ vpd.v(name).float())).abs().double()
        found[name] = size.flatten(0, -2) if batch.real is None else size[batch.real]
    return found


@torch.no_grad()
def _table(
    vpd: Decomposition, name: str, products: Tensor, clusters: Clusters | None, n_positions: int
) -> NeuronInteractions:
    every = [f"{name}:{c}" for c in range(len(products))]
    groups = [-1] * len(every) if clusters is None else clusters.numbers(every)
    used = [c for c in range(len(products)) if products[c, c] > 0]
    used.sort(key=lambda c: (groups[c] < 0, groups[c], -float(products[c, c])))
    u = vpd.u(name).detach().double().cpu().abs()[used]
    shared, together = u @ u.T, products[used][:, used]
    values = (shared / shared.diagonal()[:, None]) * (together / together.diagonal()[:, None])
    return NeuronInteractions(
        site=name,
        indices=tuple(used),
        values=values.float(),
        groups=None if clusters is None else tuple(groups[c] for c in used),
        n_positions=n_positions,
        fingerprint=fingerprint(vpd),
    )


@torch.no_grad()
def measure(
    found: NeuronInteractions,
    model: nn.Module,
    data: Any,
    *,
    indices: Sequence[int] | None = None,
    n: int = 24,
    n_batches: int = 1,
    batch_size: int = 16,
    seq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> SecondDifferences:
    """Check interactions: is the effect of two subcomponents on neurons the sum of their effects?

    One forward for every pair and batch.

    Args:
        found: Interactions of one site.
        model: The model they are of.
        data: As for `interactions`.
        indices: Subcomponents whose pairs are measured; `None`: `n` drawn at random.
        n: How many.
        n_batches: Batches at most.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence.
        prepend_bos: BOS policy for text; `None` follows the model.
        seed: Of the choice.

    Raises:
        ArtefactError: If the interactions are of another decomposition.
        InputError: If a subcomponent is important nowhere.
        DataError: If the data does not fit the model.
    """
    vpd = decomposition_of(model)
    if found.fingerprint != fingerprint(vpd):
        raise ArtefactError("these interactions are of another decomposition; make them anew.")
    if indices is None:
        order = torch.randperm(len(found.indices), generator=torch.Generator().manual_seed(seed))
        indices = sorted(found.indices[i] for i in order[:n].tolist())
    for index in indices:
        found.of(index, index)
    pairs = list(combinations(indices, 2))
    alone = dict.fromkeys(indices, 0.0)
    both, n_positions = dict.fromkeys(pairs, 0.0), 0
    how = {"batch_size": batch_size, "seq_len": seq_len, "prepend_bos": prepend_bos}
    for batch in islice(one_pass(data, model=model, **how), n_batches):
        batch = batch.to(vpd.device)
        importance = vpd.causal_importance(batch.tokens, **batch.mask_argument())
        without = partial(_neurons, vpd, found.site, batch, importance)
        whole = without(())
        effects = {c: whole - without((c,)) for c in indices}
        for c, effect in effects.items():
            alone[c] += float(effect.abs().sum())
        for pair in pairs:
            together = whole - without(pair)
            second = together - effects[pair[0]] - effects[pair[1]]
            both[pair] += float(second.abs().sum())
        n_positions += len(whole)
    ordered = [p for a, b in pairs for p in ((a, b), (b, a)) if alone[p[0]] and alone[p[1]]]
    return SecondDifferences(
        pairs=[(f"{found.site}:{a}", f"{found.site}:{b}") for a, b in ordered],
        predicted=torch.tensor([found.of(*pair) for pair in ordered]),
        measured=torch.tensor([both[min(p), max(p)] / alone[p[0]] for p in ordered]),
        n_positions=n_positions,
    )


def _neurons(
    vpd: Decomposition,
    site: str,
    batch: Batch,
    importance: Float[Tensor, "batch pos C_total"],
    without: Sequence[int],
) -> Float[Tensor, "n_positions d_mlp"]:
    """An MLP's neurons after the nonlinearity, less what some subcomponents add where important."""
    masks = torch.ones_like(importance)
    columns = [vpd.layout.columns(site).start + c for c in without]
    masks[..., columns] -= importance[..., columns]
    block = site.rpartition(".")[0]
    out = find_sites(vpd.model, [f"{block}.out"])[0]
    seen: list[Tensor] = []
    with vpd.undisturbed(), ExitStack() as stack:
        for handle in out.attach(seen.append, lambda y: None):
            stack.callback(handle.remove)
        delta = importance.new_ones(*importance.shape[:-1], vpd.layout.n_sites)
        vpd.run(Masks(masks, delta), batch.tokens, **batch.mask_argument())
    neurons = seen[-1].float()
    return neurons.flatten(0, -2) if batch.real is None else neurons[batch.real]
