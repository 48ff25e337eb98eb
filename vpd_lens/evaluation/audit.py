"""The audit: attacks on a decomposition that need no gradient, and what they cost.

Masks made of importances may be right for the tokens they were trained on and wrong in company:
an audit switches on, all together, what other tokens need; deletes what no token needs; leaves
what is in use between its importance and 1; and masks some layers only (METHOD: Audit).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from vpd_lens.data import Batch
from vpd_lens.decomposition import Decomposition, Divergence, Layout
from vpd_lens.decomposition.masks import NEEDED, Masks, uniform_sources
from vpd_lens.rendering import Shown

DONORS = (1, 2, 4, 8, 16, 32, 64)
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
UNUSED = (0.0, 0.01, 0.1)
SETS = ("donors", "same text", "frequency", "random")


class Estimate(BaseModel):
    """A mean over positions, with its standard error over sequences (NaN where it has none)."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    mean: float
    error: float = math.nan

    def __str__(self) -> str:
        return f"{self.mean:.3g}" + ("" if math.isnan(self.error) else f" ±{self.error:.2g}")


class Audit(Shown, BaseModel):
    """What an audit found: divergences from the target, by attack.

    Attributes:
        aggregation: By kind of set, then by the number k of donors: the masks are the importances,
            and the set is switched fully on. `"donors"`: what k random other tokens of the batch
            need (importance above 0.1), `"same text"`: of the same sequence; `"random"`: as many
            subcomponents of every site at random; `"frequency"`: each with its own frequency among
            k tokens, but independently.
        levels: By level s: masks `g + s (1 - g)` for what is in use (g > 0), and 0 for the rest.
        unused: By threshold, then by level s: all subcomponents whose importance stays at or below
            the threshold on the whole sample are deleted together; the others have masks
            `g + s (1 - g)`, the deltas `s`.
        n_unused: How many those are, by threshold.
        subsets: By mode (`"ci"`, `"stochastic"`), then by number k of layers: masks on k random
            layers of every position only, so that errors of one reach the next.
        parallel: By mode: every layer masked, and each reads the target's own residual stream.
        n_sequences: Sequences that were audited.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    aggregation: dict[str, dict[str, Estimate]]
    levels: dict[str, Estimate]
    unused: dict[str, dict[str, Estimate]]
    n_unused: dict[str, int]
    subsets: dict[str, dict[str, Estimate]]
    parallel: dict[str, Estimate]
    n_sequences: int

    def tables(self) -> list[Table]:
        """As rich tables."""
        unused = {f"<= {t}: {self.n_unused[t]}": row for t, row in self.unused.items()}
        layers = {mode: dict(row) for mode, row in self.subsets.items()}
        for mode, estimate in self.parallel.items():
            layers[mode]["parallel"] = estimate
        return [
            self._table("Switched on: what k tokens need", "whose", self.aggregation),
            self._table("Levels of what is in use", "", {"g + s (1 - g)": self.levels}),
            self._table("Deleted: never needed, others at level s", "importance", unused),
            self._table("Masks on k layers", "masks", layers),
        ]

    def _table(self, title: str, first: str, rows: dict[str, dict[str, Estimate]]) -> Table:
        made = Table(title=f"{title} ({self.n_sequences} sequences)", title_justify="left")
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        made.add_column(first)
        for column in columns:
            made.add_column(column, justify="right")
        for name, row in rows.items():
            made.add_row(name, *(str(row.get(column, "")) for column in columns))
        return made

    def __rich__(self) -> Group:
        return Group(*self.tables())


@dataclass
class Audited:
    """One batch of the audit, with its importances `[batch, pos, C_total]`."""

    batch: Batch
    importance: Float[Tensor, "*batch C_total"]
    divergence: Divergence


class _Estimates:
    """Sums per sequence of what was measured, by name."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)

    def add(self, name: tuple[str, ...], found: Audited, masked: Tensor) -> None:
        """Add the divergence of an output on a batch."""
        real, divergence = found.batch.real, found.divergence
        n = found.importance.shape[:-1]
        if not isinstance(divergence.kind, str):
            self.rows[name].append((float(divergence(masked)), float(math.prod(n))))
            return
        each = divergence.per_position(masked).double()
        weight = torch.ones_like(each) if real is None else real.to(each)
        sums, counts = ((t.reshape(n[0], -1)).sum(1).tolist() for t in (each * weight, weight))
        self.rows[name] += [(s / c, c) for s, c in zip(sums, counts, strict=True) if c]

    def estimate(self, name: tuple[str, ...]) -> Estimate:
        """The mean over positions, and its standard error from the spread between sequences."""
        values, weights = (torch.tensor(t).double() for t in zip(*self.rows[name], strict=True))
        mean = float(values @ weights / weights.sum())
        if len(values) < 2:
            return Estimate(mean=mean)
        share = weights / weights.sum()
        n = len(values)
        error = ((share * (values - mean)).square().sum() * n / (n - 1)).sqrt()
        return Estimate(mean=mean, error=float(error))

    def by_key(self, *prefix: str) -> dict[str, Estimate]:
        """The estimates whose name is `prefix` and one more word, by that word."""
        n = len(prefix)
        names = [name for name in self.rows if name[:n] == prefix and len(name) == n + 1]
        return {name[-1]: self.estimate(name) for name in names}


@torch.no_grad()
def audit(
    vpd: Decomposition,
    found: Sequence[Audited],
    largest: Float[Tensor, " C_total"],
    generator: torch.Generator,
    tick: Callable[[], Any] = lambda: None,
) -> Audit:
    """Audit a decomposition on some batches.

    Args:
        vpd: The decomposition.
        found: Batches with their importances.
        largest: The largest importance of every subcomponent on the whole sample.
        generator: Source of donors, sets and masks, on the decomposition's device.
        tick: Called after every forward.
    """
    sums = _Estimates()
    for one in found:

        def measure(name: tuple[str, ...], masks: Masks, one: Audited = one) -> None:
            output = vpd.run(masks, one.batch.tokens, **one.batch.mask_argument())
            sums.add(name, one, output)
            tick()

        _aggregate(one, vpd.layout, generator, measure)
        _scale_levels(one, largest, vpd.layout, measure)
        _mask_layers(one, vpd, generator, measure, sums, tick)
    return Audit(
        aggregation={kind: sums.by_key("aggregation", kind) for kind in SETS},
        levels=sums.by_key("levels"),
        unused={f"{t:g}": sums.by_key("unused", f"{t:g}") for t in UNUSED},
        n_unused={f"{t:g}": int((largest <= t).sum()) for t in UNUSED},
        subsets={mode: sums.by_key("subsets", mode) for mode in ("ci", "stochastic")},
        parallel=sums.by_key("parallel"),
        n_sequences=sum(one.importance.shape[0] for one in found),
    )


def n_forwards(vpd: Decomposition) -> int:
    """Forwards that an audit takes for each batch."""
    blocks = len(layers_of(vpd.layout))
    return len(SETS) * len(DONORS) + len(LEVELS) * (1 + len(UNUSED)) + 2 * (2 * blocks + 1)


Measure = Callable[[tuple[str, ...], Masks], None]


def _without_delta(components: Tensor, layout: Layout) -> Masks:
    return Masks(components, components.new_zeros(*components.shape[:-1], layout.n_sites))


def _aggregate(one: Audited, layout: Layout, generator: torch.Generator, measure: Measure) -> None:
    g, real = one.importance, one.batch.real
    needs = g > NEEDED  # [batch, pos, C_total]
    for kind in SETS:
        for k, on in _sets(kind, needs, real, layout, generator):
            masks = _without_delta(torch.where(on, 1.0, g), layout)
            measure(("aggregation", kind, str(k)), masks)


def _sets(
    kind: str,
    needs: Bool[Tensor, "*batch C_total"],
    real: Bool[Tensor, "*batch"] | None,
    layout: Layout,
    generator: torch.Generator,
) -> Iterator[tuple[int, Bool[Tensor, "*batch C_total"]]]:
    """The sets that are switched on at every position, for each number of donors."""
    donors = _donors(needs, real, generator, same_text=kind == "same text")
    flat = needs.flatten(0, -2)
    kept = flat if real is None else flat[real.flatten()]
    frequency = kept.float().mean(0)
    union = torch.zeros_like(flat)
    order = torch.rand(flat.shape, device=flat.device, generator=generator)
    for k, index in enumerate(donors, 1):
        if kind == "frequency":
            drawn = torch.rand(flat.shape, device=flat.device, generator=generator)
            union = union | (drawn < frequency)
        else:
            union = union | flat[index]
        if k in DONORS:
            on = _as_many(union, order, layout) if kind == "random" else union
            yield k, on.view(needs.shape)


def _donors(
    needs: Bool[Tensor, "*batch C_total"],
    real: Bool[Tensor, "*batch"] | None,
    generator: torch.Generator,
    same_text: bool,
) -> Iterator[Int[Tensor, " n"]]:
    """For every position another one, as flat indices, drawn anew for each of the donors."""
    shape = needs.shape[:-1]
    n, width = math.prod(shape), math.prod(shape[1:])
    device = needs.device
    weights = torch.ones(shape, device=device) if real is None else real.float()
    for _ in range(max(DONORS)):
        if same_text:
            drawn = torch.multinomial(
                weights.reshape(shape[0], -1), width, True, generator=generator
            )
            start = torch.arange(shape[0], device=device)[:, None] * width
            yield (drawn + start).flatten()
        else:
            yield torch.multinomial(weights.flatten(), n, True, generator=generator)


def _as_many(
    union: Bool[Tensor, "n C_total"], order: Float[Tensor, "n C_total"], layout: Layout
) -> Bool[Tensor, "n C_total"]:
    """Sets of as many subcomponents of every site as `union` has, the first by `order`."""
    parts = []
    for on, score in zip(layout.split(union), layout.split(order), strict=True):
        parts.append(score.argsort(-1).argsort(-1) < on.sum(-1, keepdim=True))
    return torch.cat(parts, -1)


def _scale_levels(one: Audited, largest: Tensor, layout: Layout, measure: Measure) -> None:
    g = one.importance
    for s in LEVELS:
        raised = torch.lerp(g, torch.ones_like(g), s)
        in_use = torch.where(g > 0, raised, 0.0)
        measure(("levels", f"{s:g}"), _without_delta(in_use, layout))
        for threshold in UNUSED:
            kept = torch.where(largest <= threshold, 0.0, raised)
            delta = kept.new_full((*kept.shape[:-1], layout.n_sites), s)
            measure(("unused", f"{threshold:g}", f"{s:g}"), Masks(kept, delta))


def layers_of(layout: Layout) -> list[list[int]]:
    """The sites of every layer (`blocks.0`, ...); every other site is a layer of its own."""
    layers: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(layout.names):
        parts = name.split(".")
        layers[".".join(parts[:2]) if parts[0] == "blocks" else name].append(index)
    return list(layers.values())


def _mask_layers(
    one: Audited,
    vpd: Decomposition,
    generator: torch.Generator,
    measure: Measure,
    sums: _Estimates,
    tick: Callable[[], Any],
) -> None:
    g, layers = one.importance, layers_of(vpd.layout)
    lead, device = g.shape[:-1], g.device
    for mode in ("ci", "stochastic"):
        masks = _without_delta(g, vpd.layout)
        if mode == "stochastic":
            masks = uniform_sources(g, vpd.layout, generator, one.batch.real).masks(g)
        order = torch.rand(*lead, len(layers), device=device, generator=generator)
        rank = order.argsort(-1).argsort(-1)
        layer_of = torch.empty(vpd.layout.n_sites, dtype=torch.long, device=device)
        for layer, sites in enumerate(layers):
            layer_of[sites] = layer
        for k in range(1, len(layers) + 1):
            masks.routed = (rank < k)[..., layer_of]
            measure(("subsets", mode, str(k)), masks)
        if points := stream_points(vpd.model, len(layers)):
            output = _in_parallel(one, vpd, masks, layer_of, points, tick)
            sums.add(("parallel", mode), one, output)


def stream_points(model: nn.Module, n_layers: int) -> list[nn.Module]:
    """The hook points after every block, if every layer is a block of the model; else none."""
    blocks = list(getattr(model, "blocks", []))
    if len(blocks) != n_layers:
        return []
    return [getattr(block, "hook_resid_post", None) or block.hook_out for block in blocks]


def _in_parallel(
    one: Audited,
    vpd: Decomposition,
    masks: Masks,
    layer_of: Int[Tensor, " n_sites"],
    points: Sequence[nn.Module],
    tick: Callable[[], Any],
) -> Tensor:
    """The output where each masked layer reads the target's stream, and all write to one."""
    call = (one.batch.tokens,), one.batch.mask_argument()
    with vpd.undisturbed(), _recorded(points) as clean:
        vpd.run(None, *call[0], **call[1])
        clean = list(clean)
    total = clean[-1].clone()
    for layer, point in enumerate(points):
        only = Masks(masks.components, masks.delta, (layer_of == layer).expand(masks.delta.shape))
        with vpd.undisturbed(), _recorded([point]) as written:
            vpd.run(only, *call[0], **call[1])
            total += written[0] - clean[layer]
        tick()

    def replaced(_module: nn.Module, _args: tuple, _output: Tensor) -> Tensor:
        return total

    with vpd.undisturbed(), ExitStack() as stack:
        handle = points[-1].register_forward_hook(replaced)
        stack.callback(handle.remove)
        output: Tensor = vpd.run(None, *call[0], **call[1])
    tick()
    return output


@contextmanager
def _recorded(points: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What passes through some hook points inside the block, in their order."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        seen.append(output)

    handles = [point.register_forward_hook(see) for point in points]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
