"""What the outputs of q and k are made of: subcomponents, delta, bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.analysis.attention.form import Normalised, ScoreForm, heads_of
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError

PARTS = ("subcomponents", "delta", "bias")


@dataclass
class Side:
    """The output of a layer's q or k matrix on some positions, as its attention sees it.

    Where it is normalised, the norm's gain is in the vectors and its divisor in `inverse_rms`, held
    at what it is at each position; so the parts add up to what the norm returns.

    Attributes:
        site: Its name.
        activations: `a = x V`.
        vectors: Write directions `U_c` by head.
        delta: `x Delta` by head.
        bias: The matrix' bias by head, zeros if it has none.
        inverse_rms: What everything is multiplied by; 1 without a norm.
    """

    site: str
    activations: Float[Tensor, "*batch C"]
    vectors: Float[Tensor, "C head d_head"]
    delta: Float[Tensor, "*batch head d_head"]
    bias: Float[Tensor, "head d_head"]
    inverse_rms: Float[Tensor, "*batch head_or_1 1"]

    @property
    def names(self) -> list[str]:
        """Of the vectors that `at` returns: `blocks.1.attn.q:0`, ..., `blocks.1.attn.q.bias`."""
        numbered = [f"{self.site}:{c}" for c in range(len(self.vectors))]
        return [*numbered, f"{self.site}.delta", f"{self.site}.bias"]

    def at(self, position: int) -> Float[Tensor, "C_and_2 head d_head"]:
        """What every subcomponent, the delta and the bias write at one position of a prompt."""
        written = self.activations[position, :, None, None] * self.vectors
        rest = torch.stack([self.delta[position], self.bias])
        return torch.cat([written, rest]) * self.inverse_rms[position]

    def of(self, index: int) -> Float[Tensor, "*batch head d_head"]:
        """What one subcomponent writes at every position."""
        return self.activations[..., index, None, None] * self.vectors[index] * self.inverse_rms

    def by_part(self) -> Float[Tensor, "3 *batch head d_head"]:
        """What all subcomponents, the delta and the bias write: `PARTS`."""
        written = torch.tensordot(self.activations, self.vectors, 1)
        parts = torch.stack([written, self.delta, self.bias.expand_as(self.delta)])
        return parts * self.inverse_rms


@torch.no_grad()
def sides(
    vpd: Decomposition, form: ScoreForm, inputs: dict[str, Float[Tensor, "*batch d_in"]]
) -> tuple[Side, Side]:
    """The q and k of a layer, from every site's input; in fp32."""
    q = _side(vpd, form.layer, "q", inputs, form.q_norm)
    return q, _side(vpd, form.layer, "k", inputs, form.k_norm)


def _side(
    vpd: Decomposition,
    layer: int,
    part: str,
    inputs: dict[str, Tensor],
    norm: Normalised | None,
) -> Side:
    name, heads = f"blocks.{layer}.attn.{part}", heads_of(vpd, layer, part)
    x, bias = inputs[name].float(), vpd.site(name).bias
    vectors = vpd.u(name).float().unflatten(-1, heads)
    delta = (x @ vpd.delta(name)).unflatten(-1, heads)
    shared = x.new_zeros(heads) if bias is None else bias.float().unflatten(-1, heads)
    inverse_rms = x.new_ones(*x.shape[:-1], 1, 1)
    if norm is not None:
        y = (x @ vpd.site(name).weight.float()).unflatten(-1, heads) + shared
        inverse_rms = norm.inverse_rms(y)
        vectors, delta, shared = vectors * norm.gain, delta * norm.gain, shared * norm.gain
    return Side(name, x @ vpd.v(name).float(), vectors, delta, shared, inverse_rms)


def unit_vectors(
    vpd: Decomposition, layer: int, part: str, norm: Normalised | None = None
) -> Float[Tensor, "C head d_head"]:
    """`||V_c|| U_c` by head: what a subcomponent writes at an activation of one along `V_c`.

    Of `"o"` it is what one reads, `V_c ||U_c||`. With the gain of a norm, but not its divisor,
    which is another at every position.
    """
    name = f"blocks.{layer}.attn.{part}"
    v, u = vpd.v(name).detach().float(), vpd.u(name).detach().float()
    rows = v.T * u.norm(dim=1)[:, None] if part == "o" else v.norm(dim=0)[:, None] * u
    vectors = rows.unflatten(-1, heads_of(vpd, layer, part))
    return vectors if norm is None else vectors * norm.gain


def parse_name(vpd: Decomposition, name: str, parts: str = "qkvo") -> tuple[int, str, int]:
    """Layer, part and number of an attention subcomponent `blocks.1.attn.q:316`.

    Raises:
        InputError: If there is no such one, or it is of another matrix than those asked for.
    """
    site, _, index = name.rpartition(":")
    words = site.split(".")
    if site not in vpd.layout.names or len(words) != 4 or words[3] not in parts:
        expected = ", ".join(parts)
        raise InputError(
            f"{name!r} names no subcomponent of a decomposed attention matrix ({expected}); "
            "expected one like 'blocks.1.attn.q:316'."
        )
    size = vpd.layout.sizes[vpd.layout.names.index(site)]
    if not index.isdigit() or int(index) >= size:
        raise InputError(f"{name!r}: {site} has {size} subcomponents, numbered from 0.")
    return int(words[1]), words[3], int(index)
