"""Subcomponents: the rank-1 matrices `V[:, c] U[c, :]` of every site, and what they leave over."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.decomposition.masks import Layout
from vpd_lens.decomposition.ranks import ranks
from vpd_lens.errors import ConfigError
from vpd_lens.sites import Site

# Matrices that write to neurons or heads, and those that read from them.
WRITES, READS = ("q", "k", "v", "in", "gate"), ("o", "out")

# Size of subcomponents for which the aligned start has no axis, relative to those that have one.
SURPLUS = 0.1

CountSpec = int | str | Mapping[str, int] | Callable[[Any], int]


@runtime_checkable
class NamedMatrix(Protocol):
    """What the counting rules look at: a `Site`, or a matrix that exists on paper only."""

    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        ...


# Subcomponents in the paper's 67M model, relative to a dimension of the matrix (0: d_in, 1: d_out):
# d_model 768, d_mlp 3072; q, k 512; v, o 1024; up 3072; down 3584.
_PAPER_RATIO = {"q": (2 / 3, 1), "k": (2 / 3, 1), "v": (4 / 3, 1), "o": (4 / 3, 1)}
_PAPER_RATIO |= {"in": (1.0, 1), "gate": (1.0, 1), "out": (7 / 6, 0)}


def paper_count(site: NamedMatrix) -> int:
    """Number of subcomponents after the paper's ratios, from 8 on rounded up to a multiple of 8.

    q and k get 2/3, v 4/3 of the width they write, which all their heads have together (fewer
    key-value heads, fewer subcomponents); o 4/3 d_model, MLP inputs d_mlp, MLP outputs 7/6 d_mlp.
    Other matrices get 4/3 of their smaller dimension.
    """
    part = site.name.rsplit(".", 1)[-1]
    if part not in _PAPER_RATIO:
        return _multiple_of_8(4 / 3 * min(site.shape))
    ratio, dim = _PAPER_RATIO[part]
    return _multiple_of_8(ratio * site.shape[dim])


def faithful_count(site: NamedMatrix) -> int:
    """Like `paper_count`, but never fewer than the matrix' rank, so that `V U = W` is possible."""
    return max(paper_count(site), _multiple_of_8(min(site.shape)))


def rank_count(site: Site) -> int:
    """Twice the number of singular values that hold 99 % of the matrix' energy.

    About what a matrix without superposition needs; one that stores more features than it has
    dimensions needs more.

    Raises:
        ConfigError: If the site has no weights, as in a plan.
    """
    weight = getattr(site, "decomposed", None)
    found = None if weight is None else ranks(weight)
    if found is None:
        raise ConfigError(
            f'n_subcomponents="2x-rank" needs the weights of {site.name}; give "faithful" or '
            "numbers where there are none."
        )
    return max(1, 2 * found.rank99)


def _multiple_of_8(x: int | float) -> int:
    return math.ceil(x - 1e-9) if x < 8 else 8 * math.ceil(x / 8 - 1e-9)


def resolve_counts(sites: Sequence[NamedMatrix], spec: CountSpec) -> tuple[int, ...]:
    """Number of subcomponents of every site.

    Given as an int for all; `"paper"` (`paper_count`), `"faithful"` (`faithful_count`) or
    `"2x-rank"` (`rank_count`); a mapping from regular expressions to ints, the first match in the
    name winning and `paper_count` for the rest; or a callable from a `Site` to an int.

    Raises:
        ConfigError: If a count is below 1 or a pattern of the mapping matches no site.
    """
    if isinstance(spec, str):
        rules: dict[str, Callable[[Any], int]] = {
            "paper": paper_count,
            "faithful": faithful_count,
            "2x-rank": rank_count,
        }
        if spec not in rules:
            raise ConfigError(
                f"n_subcomponents={spec!r} is not known; give 'paper', 'faithful', '2x-rank', an "
                "int, a dict of patterns or a callable."
            )
        spec = rules[spec]
    if isinstance(spec, int):
        counts = [spec] * len(sites)
    elif isinstance(spec, Mapping):
        if unused := [p for p in spec if not any(re.search(p, site.name) for site in sites)]:
            raise ConfigError(f"n_subcomponents: the patterns {unused} match no site.")
        counts = [
            next((n for p, n in spec.items() if re.search(p, site.name)), paper_count(site))
            for site in sites
        ]
    else:
        counts = [spec(site) for site in sites]
    for site, count in zip(sites, counts, strict=True):
        if not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"n_subcomponents for {site.name} is {count!r}; it must be at least 1."
            )
    return tuple(counts)


class PerSubcomponent(NamedTuple):
    """A parameter that has one row or column for each subcomponent."""

    parameter: nn.Parameter
    dim: int  # which of its dimensions counts subcomponents
    site: int | None  # index of the site whose they are; `None`: of all sites, side by side
    off: float = 0.0  # what it holds for one whose importance is 0 on every input

    def shape(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The parameter's shape if sites have these numbers of subcomponents."""
        shape = list(self.parameter.shape)
        shape[self.dim] = sum(sizes) if self.site is None else sizes[self.site]
        return tuple(shape)


class Folded(nn.Module):
    """Subcomponents of one site that were folded into its delta: kept, never trained again.

    `indices` are their columns from before anything was folded.
    """

    v: Float[Tensor, "d_in F"]
    u: Float[Tensor, "F d_out"]

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(d_in, 0))
        self.register_buffer("u", torch.zeros(0, d_out))
        self.indices: list[int] = []


class Subcomponents(nn.Module):
    """`V` and `U` of every site, kept in fp32, initialised from a generator of the CPU.

    Attributes:
        v: Read directions, one `[d_in, C]` per site, initialised N(0, 1/d_in).
        u: Write directions, one `[C, d_out]` per site, initialised N(0, 1/C).
        layout: Names and sizes.
        original: Of every site, the column numbers of its subcomponents from before any folding.
        folded: Of every site, what was folded into the delta (see `folding.py`).
    """

    def __init__(
        self, sites: Sequence[Site], counts: Sequence[int], generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.layout = Layout(tuple(site.name for site in sites), tuple(counts))
        self.v, self.u = nn.ParameterList(), nn.ParameterList()
        for site, count in zip(sites, counts, strict=True):
            d_in, d_out = site.shape
            v = torch.randn(d_in, count, generator=generator) / math.sqrt(d_in)
            u = torch.randn(count, d_out, generator=generator) / math.sqrt(count)
            self.v.append(nn.Parameter(v))
            self.u.append(nn.Parameter(u))
        self.original = [list(range(count)) for count in counts]
        self.folded: Sequence[Folded] = nn.ModuleList(Folded(*site.shape) for site in sites)  # type: ignore[assignment]

    @property
    def original_sizes(self) -> tuple[int, ...]:
        """Number of subcomponents of every site, folded ones included."""
        pairs = zip(self.layout.sizes, self.folded, strict=True)
        return tuple(size + len(folded.indices) for size, folded in pairs)

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """`V` has a column and `U` a row per subcomponent."""
        sides = ((self.v, 1), (self.u, 0))
        return [PerSubcomponent(p, dim, i) for side, dim in sides for i, p in enumerate(side)]

    def references(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """`W_l - F_l`, F the sum of what was folded: what `V_l U_l` should add up to, in fp32."""
        return [
            torch.addmm(w.float(), f.v, f.u, alpha=-1) if f.indices else w.float().contiguous()
            for w, f in zip(weights, self.folded, strict=True)
        ]

    def deltas(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """`Delta_l = W_l - V_l U_l` of every site, `[d_in, d_out]`, in fp32."""
        parts = zip(weights, self.v, self.u, strict=True)
        return [torch.addmm(w.float(), v, u, alpha=-1) for w, v, u in parts]

    def acts(
        self, inputs: Sequence[Float[Tensor, "*batch _d_in"]]
    ) -> Float[Tensor, "*batch C_total"]:
        """Subcomponent activations `a = x V` of all sites, from the input of each."""
        return torch.cat([x.to(v.dtype) @ v for x, v in zip(inputs, self.v, strict=True)], -1)


@torch.no_grad()
def align(subcomponents: Subcomponents, sites: Sequence[Site]) -> None:
    """Set subcomponent `j` of every site to what the weight does at neuron or head dimension `j`.

    A matrix that writes to neurons or heads (q, k, v, in, gate) is the sum of its columns, each
    written along one axis; one that reads from them (o, out) the sum of its rows. These rank-1
    matrices become the first subcomponents, their norm shared evenly between V and U; any further
    ones keep their random directions, at a tenth of the size of those, so that `V U` is nearly `W`
    before any training; of a matrix of zeros they are 0.
    """
    for site, v, u in zip(sites, subcomponents.v, subcomponents.u, strict=True):
        weight, part = site.decomposed.to(v), site.name.rsplit(".", 1)[-1]
        if part in WRITES:
            _along_columns(v, u, weight)
        elif part in READS:
            _along_columns(u.T, v.T, weight.T)


@torch.no_grad()
def singular(subcomponents: Subcomponents, weights: Sequence[Float[Tensor, "_i _o"]]) -> None:
    """Set subcomponent `j` of every site to the `j`-th singular component of its weight.

    The root of the singular value is in V and in U. Further ones than the weight has dimensions
    keep a random direction in V, of the norm of the last of those, and are 0 in U.
    """
    for weight, v, u in zip(weights, subcomponents.v, subcomponents.u, strict=True):
        left, values, right = torch.linalg.svd(weight.to(v), full_matrices=False)
        least = torch.finfo(v.dtype).eps * max(weight.shape) * values[0]
        n = min(int((values > least).sum()), v.shape[1])
        roots = values[:n].sqrt()
        if n:
            v[:, n:] *= roots[-1] / v[:, n:].norm(dim=0).clamp(min=1e-12)
        u.zero_()
        v[:, :n], u[:n] = left[:, :n] * roots, right[:n] * roots[:, None]


def _along_columns(
    v: Float[Tensor, "d_in C"], u: Float[Tensor, "C d_out"], weight: Float[Tensor, "d_in d_out"]
) -> None:
    n = min(weight.shape[1], v.shape[1])
    # Subcomponents beyond the number of axes.
    typical = weight.norm(dim=0).square().mean().sqrt()
    for surplus, dim in ((v[:, n:], 0), (u[n:], 1)):
        norms = surplus.norm(dim=dim, keepdim=True).clamp(min=1e-12)
        surplus.mul_((SURPLUS * typical).sqrt() / norms)
    scale = weight[:, :n].norm(dim=0).sqrt().clamp(min=1e-6)
    v[:, :n] = weight[:, :n] / scale
    u[:n] = 0
    u[:n, :n].fill_diagonal_(1)
    u[:n] *= scale[:, None]
