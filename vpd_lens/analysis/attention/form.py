"""How a layer turns the outputs of q and k into attention, read off the model by probing it.

The pattern of every head is, for some numbers and matrices that differ between architectures,

    pattern = softmax(cap(s) + prior),   s[t, t'] = q_t^T M_(t - t') k_t'

where `M` holds the scale and whatever rotation the model has, `prior` the mask and all that depends
on neither q nor k (ALiBi, a relative bias), and `cap` is a soft cap. With q = 0 the pattern is
`softmax(prior)`, and its derivative by q, where k is one unit vector at one position, is a column
of `M`. So no architecture has to be known; the pattern of a prompt, computed again from what was
read (`ScoreForm.pattern`), says whether it is of this form.

Where q and k are normalised, they stand for what the norms return. With the norms' divisors as they
are at each position this is linear, too: `w * y / rms(y)`, see `Normalised`.

Source: VPD, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.cut_forward import keep_in, narrowed_unembedding
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import VPDError
from vpd_lens.sites.discovery import head_count

_MAX_ELEMENTS = 2**26  # of the patterns of one probing forward


@dataclass
class ScoreForm:
    """What a layer's attention makes of q and k at `pos` positions.

    Attributes:
        layer: The block.
        matrices: `M` of every distance between query and key, the same for all heads; 0 where the
            model looks at no such distance.
        prior: What scores get added that depends on neither q nor k, 0 where a position looks at
            itself, -inf where it may not look.
        cap: Soft cap on scores, or None.
        q_norm: The norm on q; None: there is none.
        k_norm: The norm on k.
    """

    layer: int
    matrices: Float[Tensor, "offset d_head d_head"]
    prior: Float[Tensor, "head pos pos"]
    cap: float | None
    q_norm: Normalised | None
    k_norm: Normalised | None

    @property
    def sees_offsets(self) -> bool:
        """Whether the form depends on the distance, as with rotary positions."""
        seen = self.matrices[self.matrices.flatten(1).any(1)]
        return not torch.allclose(seen, seen[:1].expand_as(seen), atol=1e-5)

    def scores(
        self, q: Float[Tensor, "pos head d_head"], k: Float[Tensor, "pos kv_head d_head"]
    ) -> Float[Tensor, "head pos pos"]:
        """`s[head, query, key]`; 0 where the key is the later."""
        group = q.shape[1] // k.shape[1]
        k = repeat(k, "pos kv d -> pos (kv group) d", group=group)
        scores = q.new_zeros(q.shape[1], len(q), len(q))
        for offset, matrix in enumerate(self.matrices[: len(q)]):
            diagonal = einsum(q[offset:], matrix, k[: len(q) - offset], "t h i, i j, t h j -> h t")
            scores.diagonal(-offset, 1, 2).copy_(diagonal)
        return scores

    def pattern(self, scores: Float[Tensor, "head pos pos"]) -> Float[Tensor, "head pos pos"]:
        """The attention pattern that follows from scores."""
        if self.cap is not None:
            scores = self.cap * (scores / self.cap).tanh()
        n = scores.shape[-1]
        return (scores + self.prior[:, :n, :n]).softmax(-1)


@dataclass
class Normalised:
    """A root-mean-square norm on q or k: `gain * y / rms(y)`.

    Attributes:
        norm: The model's module.
        gain: Its weight, `[heads, d_head]`.
        by_head: Whether the mean is over one head, and not over all of them.
    """

    norm: nn.Module
    gain: Float[Tensor, "head d_head"]
    by_head: bool

    @classmethod
    def of(cls, norm: nn.Module, heads: int, d_head: int, like: Tensor) -> Normalised:
        """Read the gain off a norm by calling it on a constant."""
        by_head = sum(p.numel() for p in norm.parameters()) == d_head
        ones = like.new_full((1, 1, heads, d_head), 1e3)
        gain = (norm(ones) if by_head else norm(ones.flatten(-2))).reshape(heads, d_head)
        return cls(norm, gain.detach().float(), by_head)

    def inverse_rms(
        self, y: Float[Tensor, "*batch head d_head"]
    ) -> Float[Tensor, "*batch head_or_1 1"]:
        """What the norm divides by, inverted, at every position.

        Raises:
            VPDError: If the norm is of another kind.
        """
        dtype = next(self.norm.parameters()).dtype
        with torch.no_grad():
            shaped = y if self.by_head else y.flatten(-2)
            # A norm on heads may want exactly four dimensions, and others none but three.
            out = self.norm(shaped.reshape(1, -1, *shaped.shape[y.ndim - 2 :]).to(dtype))
        out, expected = out.reshape(y.shape).float(), self.gain * y
        over = (-1,) if self.by_head else (-2, -1)
        square = expected.square().sum(over, keepdim=True).clamp(min=1e-30)
        inverse = (out * expected).sum(over, keepdim=True) / square
        tolerance = 1e-3 if dtype == torch.float32 else 3e-2
        if not torch.allclose(expected * inverse, out, atol=tolerance, rtol=tolerance):
            raise VPDError(
                f"{type(self.norm).__name__} on q or k is no root-mean-square norm, so attention "
                "scores are no sums over subcomponents, even with its divisor held fixed."
            )
        return inverse


def heads_of(vpd: Decomposition, layer: int, part: str) -> tuple[int, int]:
    """Number and width of the heads of a layer's `"q"`, `"k"`, `"v"` or `"o"` matrix."""
    heads = head_count(vpd.model.cfg, part)
    width = vpd.site(f"blocks.{layer}.attn.{part}").shape[part != "o"]
    return heads, width // heads


def norms_of(vpd: Decomposition, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules that normalise a layer's q and k, if there are some."""
    attn = vpd.model.blocks[layer].attn  # type: ignore[index]
    norms = (attn._modules.get(f"{part}_norm") for part in "qk")
    # A bridge may keep a place for a norm that this model does not have.
    return tuple(n if n is not None and any(True for _ in n.parameters()) else None for n in norms)  # type: ignore[return-value]


def soft_cap(cfg: Any) -> float | None:
    """The cap on attention scores, where there is one; TransformerLens writes -1 for none."""
    cap = float(getattr(cfg, "attn_scores_soft_cap", None) or 0)
    return cap if cap > 0 else None


def probe_tokens(model: nn.Module, n: int) -> Int[Tensor, " n"]:
    """`n` times an ordinary token, which no model takes for padding."""
    special = set(getattr(getattr(model, "tokenizer", None), "all_special_ids", ()) or ())
    ordinary = next(i for i in range(int(model.cfg.d_vocab)) if i not in special)  # type: ignore
    return torch.full((n,), ordinary, device=next(model.parameters()).device)


def score_forms(
    vpd: Decomposition, layers: Sequence[int], tokens: Int[Tensor, " pos"]
) -> dict[int, ScoreForm]:
    """Read how some layers attend on as many positions as there are tokens, at least two.

    Raises:
        VPDError: If a layer does not show its pattern, or goes around q or k.
    """
    sizes = {layer: heads_of(vpd, layer, "q")[1] for layer in layers}
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    heads, n = head_count(vpd.model.cfg, "q"), len(tokens)
    step = max(1, _MAX_ELEMENTS // (len(layers) * heads * n * n))
    for rows in torch.arange(max(sizes.values())).split(step):
        for layer, found in _probed(vpd, layers, tokens, rows).items():
            parts[layer].append(found)
    forms = {}
    for layer, found in parts.items():
        columns = torch.cat([columns for columns, _ in found])[: sizes[layer]]
        matrices = rearrange(columns, "column offset row -> offset row column")
        norms = [
            None if norm is None else Normalised.of(norm, *heads_of(vpd, layer, part), matrices)
            for part, norm in zip("qk", norms_of(vpd, layer), strict=True)
        ]
        cap = soft_cap(vpd.model.cfg)
        forms[layer] = ScoreForm(layer, matrices.float(), found[0][1], cap, *norms)
    return forms


@torch.inference_mode(False)
@torch.enable_grad()
def _probed(
    vpd: Decomposition, layers: Sequence[int], tokens: Int[Tensor, " pos"], rows: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Some columns `[row, offset, d_head]` of every layer's matrices, and its prior.

    Every row of the batch sets k to a unit vector, in half of them at position 0, in half at 1: the
    latter show distance 0, which position 0 cannot show, having only itself to attend to.
    """
    model, n, queries, patterns = vpd.model, len(tokens), {}, {}

    def zero(layer: int, y: Tensor, hook: Any) -> Tensor:
        queries[layer] = torch.zeros_like(y).requires_grad_()
        return queries[layer]

    def unit(width: int, y: Tensor, hook: Any) -> Tensor:
        k = torch.zeros_like(y).unflatten(-1, (-1, width))
        for first, position in ((0, 0), (len(rows), 1)):
            which = rows[rows < width]
            k[first + torch.arange(len(which)), position, :, which] = 1
        return k.flatten(-2)

    with ExitStack() as stack:
        stack.enter_context(vpd.undisturbed())
        stack.enter_context(narrowed_unembedding(model, lambda stream: stream[:1, -1:]))
        hooks: list[tuple[str, Any]] = []
        for layer in layers:
            name, width = f"blocks.{layer}.attn", heads_of(vpd, layer, "q")[1]
            hooks += [
                (f"{name}.q.vpd.hook_out", partial(zero, layer)),
                (f"{name}.k.vpd.hook_out", partial(unit, width)),
                (f"{name}.hook_pattern", keep_in(patterns, layer)),
            ]
            for norm in filter(None, norms_of(vpd, layer)):
                stack.callback(norm.register_forward_hook(lambda _, args, y: args[0]).remove)
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        # A copy, because a tensor made in inference mode can take no part in a backward pass.
        vpd.run(None, tokens.clone().expand(2 * len(rows), n))
    found = {}
    for layer in layers:
        if layer not in patterns or not patterns[layer].requires_grad:
            raise VPDError(
                f"hook_pattern of block {layer} did not show an attention pattern that follows "
                "from q and k (load the model with eager attention)."
            )
        found[layer] = _columns(queries[layer], patterns[layer], heads_of(vpd, layer, "q")[1])
    return found


def _columns(
    q: Float[Tensor, "row pos d_q"], pattern: Float[Tensor, "row head pos pos"], width: int
) -> tuple[Float[Tensor, "half pos width"], Float[Tensor, "head pos pos"]]:
    """What the derivative of the log-pattern by q = 0 says, in the first head, and the prior."""
    half = len(q) // 2
    looked = pattern[:half, 0, :, 0], pattern[half:, 0, 1, 1]
    at_zero, at_one = (torch.where(p > 0, p, 1).log().sum() for p in looked)
    slope = torch.autograd.grad(at_zero + at_one, q)[0][..., :width]
    # The softmax' other scores hold none of k, so a score's derivative is that of the log-pattern
    # over one minus the pattern; position 0 sees only itself.
    columns = slope[:half].clone()
    columns[:, 1:] /= (1 - looked[0].detach())[:, 1:, None]
    columns[:, 0] = slope[half:, 1] / (1 - looked[1].detach())[:, None]
    prior = pattern[0].detach().float().log()
    return columns.detach(), prior - prior.diagonal(0, 1, 2)[..., None]
