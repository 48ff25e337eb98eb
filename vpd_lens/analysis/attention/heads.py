"""Which heads a subcomponent is spread over, and how alike heads are in what they move.

A head moves what `W_OV = W_V W_O` reads at the key to what it writes at the query. Two heads are
compared by the Frobenius cosine of their `W_OV` (*raw*), of `M_read = W_OV W_OV^T`, which says what
is read, or of `M_write = W_OV^T W_OV`, what is written. With data, only directions count in which
inputs vary: `W_OV` is preceded by `S Z^T`, principal axes `Z` of the centred inputs with their
standard deviations `S`.

Two random projections onto `d_head` of `d_model` dimensions have a cosine of
`d_head / (d_model + d_head + 1)`. Random heads, and those with data, are drawn.

Source: VPD, attention (head spread, OV overlap).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, repeat
from jaxtyping import Float
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.attention.form import heads_of
from vpd_lens.analysis.attention.parts import unit_vectors
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown, titled

KINDS = ("raw", "read", "write")


@dataclass(repr=False)
class HeadSpread(Shown):
    """How large every subcomponent of an attention matrix is in every head.

    Attributes:
        site: The matrix.
        norms: `||V_c|| ||U_c[h]||`, at o `||V_c[h]|| ||U_c||`; heads of k and v are the key-value
            heads.
    """

    site: str
    norms: Float[Tensor, "C head"]

    @property
    def n_heads(self) -> Float[Tensor, " C"]:
        """Over how many heads each is spread: `(sum_h n_h^2)^2 / sum_h n_h^4`, 0 if it is zero.

        1 if it is in one head alone, as many as there are if it is in all alike.
        """
        squares = self.norms.double().square()
        total, fourth = squares.sum(1).square(), squares.square().sum(1)
        return torch.where(fourth > 0, total / fourth, 0).to(self.norms.dtype)

    def top(self, n: int = 10) -> list[tuple[str, list[float]]]:
        """The `n` largest subcomponents, and their norms by head."""
        best = self.norms.norm(dim=1).topk(min(n, len(self.norms))).indices.tolist()
        return [(f"{self.site}:{c}", self.norms[c].tolist()) for c in best]

    def __rich__(self) -> Group:
        title, table = f"Norm by head, {self.site}", Table()
        table.add_column("subcomponent")
        for head in range(self.norms.shape[1]):
            table.add_column(f"head {head}", justify="right")
        table.add_column("heads", justify="right")
        for name, norms in self.top():
            heads = float(self.n_heads[int(name.rpartition(":")[2])])
            table.add_row(name, *(f"{norm:.3f}" for norm in norms), f"{heads:.1f}")
        return titled(title, table)


@torch.no_grad()
def head_spread(vpd: Decomposition, layer: int, part: str) -> HeadSpread:
    """The norms of all subcomponents of a matrix, by head."""
    norms = unit_vectors(vpd, layer, part).norm(dim=-1).cpu()
    return HeadSpread(f"blocks.{layer}.attn.{part}", norms)


@dataclass(repr=False)
class Overlap(Shown):
    """How alike the heads of a layer are in what they move.

    Attributes:
        layer: The block.
        cosines: `"raw"`, `"read"` and `"write"`: `[head, head]`.
        analytic: Cosine of two random projections, for `"read"` and `"write"` without data.
        random: Mean and standard deviation of the cosines of random heads, of the same inputs.
        n_inputs: Positions whose inputs weight the directions; 0: unweighted.
    """

    layer: int
    cosines: dict[str, Float[Tensor, "head head"]]
    analytic: float
    random: dict[str, tuple[float, float]]
    n_inputs: int = 0

    def mean(self, kind: str) -> float:
        """Mean over pairs of different heads; NaN if there is one head."""
        cosines = self.cosines[kind]
        return float(cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean())

    def __rich__(self) -> Group:
        weighting = f"weighted by {self.n_inputs} inputs" if self.n_inputs else "unweighted"
        title = f"OV overlap of layer {self.layer}, {weighting}"
        table = Table()
        for heading in ("cosine", "mean", "largest pair", "random heads"):
            table.add_column(heading, justify="left" if heading == "cosine" else "right")
        for kind, cosines in self.cosines.items():
            mean, deviation = self.random[kind]
            off = cosines - 2 * torch.eye(len(cosines))
            i, j = divmod(int(off.argmax()), len(cosines))
            pair = f"{off[i, j]:+.3f} ({i}, {j})" if len(cosines) > 1 else ""
            row = f"{self.mean(kind):+.3f}", pair, f"{mean:+.3f} ± {deviation:.3f}"
            table.add_row(kind, *row)
        note = "" if self.n_inputs else f"Two random projections: {self.analytic:.3f}"
        return titled(title, table, Text(note))


@torch.no_grad()
def ov_overlap(
    vpd: Decomposition,
    layer: int,
    inputs: Float[Tensor, "n d_model"] | None = None,
    n_random: int = 64,
    seed: int = 0,
) -> Overlap:
    """Overlap of a layer's heads, weighted by the given inputs of its v matrix if there are some.

    Raises:
        InputError: If there are fewer than two inputs.
    """
    v, o = (vpd.site(f"blocks.{layer}.attn.{part}").weight.float() for part in "vo")
    (kv_heads, width), (heads, _) = heads_of(vpd, layer, "v"), heads_of(vpd, layer, "o")
    w_v = repeat(v, "i (kv d) -> (kv group) i d", kv=kv_heads, group=heads // kv_heads)
    w_o = o.unflatten(0, (heads, width))
    root = None if inputs is None else _root(inputs)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(n_random):
        pair = (torch.randn(2, *w.shape[1:], generator=generator).to(w) for w in (w_v, w_o))
        for kind, cosines in head_cosines(*pair, root).items():
            drawn[kind].append(float(cosines[0, 1]))
    stacked = {kind: torch.tensor(values) for kind, values in drawn.items()}
    random = {kind: (float(x.mean()), float(x.std())) for kind, x in stacked.items()}
    cosines = {kind: x.cpu() for kind, x in head_cosines(w_v, w_o, root).items()}
    analytic = width / (len(v) + width + 1)
    return Overlap(layer, cosines, analytic, random, 0 if inputs is None else len(inputs))


def head_cosines(
    w_v: Float[Tensor, "head d_in d_head"],
    w_o: Float[Tensor, "head d_head d_out"],
    root: Float[Tensor, "n d_in"] | None = None,
) -> dict[str, Float[Tensor, "head head"]]:
    """Frobenius cosines of all pairs of heads, by `KINDS`, none of whose `W_OV` is formed.

    With `A = root W_V` and `B = W_O`, `<A B, A' B'> = tr(A'^T A B B'^T)`, and the Gram matrices'
    products are those of matrices of `d_head` dimensions, too.
    """
    a = w_v if root is None else einsum(root, w_v, "n i, head i d -> head n d")
    a_a = einsum(a, a, "g n d, h n e -> g h d e")  # A_g^T A_h
    b_b = einsum(w_o, w_o, "g d o, h e o -> g h d e")  # B_g B_h^T
    own_a, own_b = (x.diagonal(0, 0, 1).movedim(-1, 0) for x in (a_a, b_b))
    raw = einsum(a_a, b_b, "g h d e, g h d e -> g h")
    # <A B B^T A^T, A' B' B'^T A'^T> = |L^T A^T A' L'|^2 with L L^T = B B^T; the same for writing.
    read = einsum(own_b, a_a, own_b, a_a, "g d e, g h e f, h f i, g h d i -> g h")
    write = einsum(own_a, b_b, own_a, b_b, "g d e, g h e f, h f i, g h d i -> g h")
    return {kind: _cosine(x) for kind, x in zip(KINDS, (raw, read, write), strict=True)}


def _cosine(products: Float[Tensor, "head head"]) -> Float[Tensor, "head head"]:
    norms = products.diagonal().clamp(min=1e-30).sqrt()
    return products / norms[:, None] / norms


def _root(inputs: Float[Tensor, "n d"]) -> Float[Tensor, "axis d"]:
    """`S Z^T`: principal axes of the centred inputs, times their standard deviations."""
    if len(inputs) < 2:
        raise InputError(
            f"{len(inputs)} inputs to weight by; expected at least 2. Give more data, or another "
            "subcomponent in where=."
        )
    x = inputs.float()
    x = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    _, s, z = torch.linalg.svd(x, full_matrices=False)
    return s[:, None] * z
