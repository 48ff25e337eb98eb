"""The causal importance function: from every site's input to a number per subcomponent.

All kinds share one interface: `ci_fn(inputs, subcomponents, real) -> z [*batch, C_total]`, the
pre-sigmoid importances, which two leaky hard sigmoids turn into ones in [0, 1]. The transformer
sees all sites at once (VPD); the MLPs of `importance_mlps` serve toys (SPD).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.conditioning import Conditioning
from vpd_lens.decomposition.importance_mlps import (
    GlobalMLP,
    Inputs,
    PerSubcomponentMLP,
    SharedMLP,
    VectorMLP,
    linear,
    rows,
)
from vpd_lens.decomposition.masks import Layout
from vpd_lens.decomposition.subcomponents import PerSubcomponent, Subcomponents
from vpd_lens.errors import ConfigError


class TransformerImportance(nn.Module):
    """VPD's causal importance function: a pre-norm transformer over all sites.

    Each site's input (of width `d_inputs`) is RMS-normalised on its own and all are concatenated,
    projected to `d_model`, passed through the blocks and projected to `C_total`. Attention looks
    both ways, so importance at a position depends on later tokens, unless it is `causal`. With
    `conditioning` it depends on the subcomponent's own activation, too. It `reads` these sites, by
    index; `None`: all. The generator is of the CPU.
    """

    def __init__(
        self,
        d_inputs: Sequence[int],
        c_total: int,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        d_ffn: int,
        rope_base: float = 10_000.0,
        causal: bool = False,
        conditioning: bool = False,
        reads: Sequence[int] | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.reads = list(range(len(d_inputs)) if reads is None else reads)
        if d_model % (2 * n_heads) != 0:
            raise ConfigError(
                f"causal_importance: d_model={d_model} must be a multiple of 2 * n_heads="
                f"{2 * n_heads}, because rotary embeddings turn pairs of dimensions in each head."
            )
        width = sum(d_inputs[site] for site in self.reads)
        self.project_in = linear(width, d_model, generator, gain=math.sqrt(2))
        self.blocks = nn.ModuleList(
            _Block(d_model, n_heads, d_ffn, rope_base, generator) for _ in range(n_blocks)
        )
        self.project_out = linear(d_model, c_total, generator)
        self.conditioning = Conditioning(c_total) if conditioning else None

    def forward(
        self,
        inputs: Inputs,
        subcomponents: Subcomponents,
        real: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid importances from every site's input, `[batch, pos, d_in]` or `[batch, d_in]`.

        Nothing is read from positions that are not `real`, which are padding; `None`: all are.
        """
        dtype = self.project_in.weight.dtype
        # q, k and v read the same tensor: normalise it once.
        read = [inputs[site] for site in self.reads]
        distinct = {id(x): x for x in read}
        normed = {i: F.rms_norm(x.to(dtype), x.shape[-1:]) for i, x in distinct.items()}
        z = self.project_in(torch.cat([normed[id(x)] for x in read], dim=-1))
        flat, seen = z.ndim == 2, None
        z = z.unsqueeze(1) if flat else z
        if real is not None:
            # A position always sees itself: attention to nothing would be 0 / 0.
            itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
            seen = (real[:, None, :] | itself)[:, None]
            seen = seen.tril() if self.causal else seen
        for block in self.blocks:
            z = block(z, seen, self.causal and real is None)
        z = self.project_out(z.squeeze(1) if flat else z)
        if self.conditioning is not None:
            z = z + self.conditioning(subcomponents.acts(inputs))
        return z  # type: ignore[no-any-return]

    def per_subcomponent(self) -> list[PerSubcomponent]:
        """The rows of the last projection, and what conditions them."""
        more = [] if self.conditioning is None else self.conditioning.per_subcomponent()
        return [*rows(self.project_out, None), *more]


class _Block(nn.Module):
    def __init__(
        self, d_model: int, n_heads: int, d_ffn: int, rope_base: float, generator: Generator | None
    ) -> None:
        super().__init__()
        self.n_heads, self.rope_base = n_heads, rope_base
        self.qkv = linear(d_model, 3 * d_model, generator, gain=None)
        self.out = linear(d_model, d_model, generator, gain=None)
        self.up = linear(d_model, d_ffn, generator, gain=math.sqrt(2))
        self.down = linear(d_ffn, d_model, generator)

    def forward(
        self,
        z: Float[Tensor, "batch pos d"],
        seen: Bool[Tensor, "batch 1 pos pos"] | None,
        causal: bool = False,
    ) -> Float[Tensor, "batch pos d"]:
        qkv, heads = self.qkv(F.rms_norm(z, z.shape[-1:])), "b t (three h d) -> three b h t d"
        q, k, v = rearrange(qkv, heads, three=3, h=self.n_heads)
        q, k = _rotate(q, self.rope_base), _rotate(k, self.rope_base)
        mixed = F.scaled_dot_product_attention(
            q, k, v.contiguous(), attn_mask=seen, is_causal=causal
        )
        z = z + self.out(rearrange(mixed, "b h t d -> b t (h d)"))
        return z + self.down(F.gelu(self.up(F.rms_norm(z, z.shape[-1:]))))


def _rotate(x: Float[Tensor, "b h t d"], base: float) -> Float[Tensor, "b h t d"]:
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


ImportanceFunction = TransformerImportance | PerSubcomponentMLP | VectorMLP | SharedMLP | GlobalMLP


def sized_importance(
    config: CausalImportanceConfig,
    shapes: Sequence[tuple[int, int]],
    layout: Layout,
    target_width: int,
) -> CausalImportanceConfig:
    """`config` with the gaps of a transformer's size filled from the matrices that it serves.

    As deep as there are blocks with a site. As wide as the authors advise, but never so wide that
    it has more than `MOST_PARAMETERS` times as many parameters as V and U (theirs has 4.5 times).
    """
    if config.kind != "transformer":
        return config
    blocks = {name.split(".")[1] for name in layout.names if name.startswith("blocks.")}
    full = config.filled(target_width, max(1, len(blocks)))
    assert full.d_model is not None
    assert full.n_heads is not None
    assert full.n_blocks is not None
    if config.d_model or config.n_heads or config.d_ffn:
        return full
    sizes = zip(layout.sizes, shapes, strict=True)
    most = MOST_PARAMETERS * sum(count * (d_in + d_out) for count, (d_in, d_out) in sizes)
    every = range(len(shapes))
    reads = first_of_each_block(layout.names) if config.reads == "blocks" else every
    ends = sum(shapes[i][0] for i in reads) + layout.total
    head, n_heads = full.d_model // full.n_heads, full.n_heads
    # Four attention matrices and two of a feed-forward layer four times as wide.
    while n_heads > 1 and head * n_heads * (ends + 12 * full.n_blocks * head * n_heads) > most:
        n_heads -= 1
    size = {"d_model": head * n_heads, "n_heads": n_heads, "d_ffn": 4 * head * n_heads}
    return full.model_copy(update=size)


def build_importance(
    config: CausalImportanceConfig,
    d_inputs: Sequence[int],
    layout: Layout,
    target_width: int,
    target_depth: int,
    generator: Generator | None = None,
) -> ImportanceFunction:
    """The causal importance function that `config` describes, its gaps filled from the target."""
    sizes = layout.sizes
    if config.kind == "mlp":
        return PerSubcomponentMLP(sum(sizes), config.hidden, generator)
    if config.kind == "vector_mlp":
        return VectorMLP(d_inputs, sizes, config.hidden, generator)
    if config.kind == "shared_mlp":
        return SharedMLP(d_inputs, sizes, config.hidden, generator)
    if config.kind == "global_mlp":
        return GlobalMLP(d_inputs, sum(sizes), config.hidden, generator)
    names = {"d_model", "n_blocks", "n_heads", "d_ffn", "rope_base", "causal", "conditioning"}
    size = config.filled(target_width, target_depth).model_dump(include=names)
    reads = None if config.reads == "sites" else first_of_each_block(layout.names)
    return TransformerImportance(d_inputs, sum(sizes), **size, reads=reads, generator=generator)


def first_of_each_block(names: Sequence[str]) -> list[int]:
    """The first site of every block (`blocks.0`, ...), and every site that is in none.

    Its input is the residual stream before the block, normalised, where attention is decomposed.
    """
    blocks: dict[str, int] = {}
    for index, name in enumerate(names):
        parts = name.split(".")
        blocks.setdefault(".".join(parts[:2]) if parts[0] == "blocks" else name, index)
    return sorted(blocks.values())


# Of the importance function, for each of V and U.
MOST_PARAMETERS = 5
LEAK = 0.01
_BLOCK_ELEMENTS = 2**17  # 512 KiB of fp32, a share of a core's second-level cache


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        out = torch.empty_like(z)
        for z_rows, grad, result in row_blocks(z, grads[0].contiguous(), out):
            # Below zero only the push upwards (negative gradient) passes, scaled by alpha, so
            # that a dead subcomponent can revive without its mask ever turning negative.
            torch.clamp(grad, max=0, out=result).mul_(ctx.alpha)
            result -= where_above(result, z_rows, 0.0)
            result += where_above(grad, z_rows, 0.0)
            result -= where_above(grad, z_rows, 1.0)
        return out, None


def where_above(x: Tensor, z: Tensor, threshold: float) -> Tensor:
    """`x` where `z > threshold`, else 0; on a CPU it is faster than `torch.where`."""
    return torch.ops.aten.threshold_backward(x, z, threshold)  # type: ignore[no-any-return]


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors `[*batch, C]` cut into the same blocks of rows, as 2-D views."""
    flat = [t.view(-1, t.shape[-1]) for t in tensors]
    rows = flat[0].shape[0]
    if flat[0].device.type == "cpu":  # a chain of operations is faster on what fits the cache
        rows = max(1, _BLOCK_ELEMENTS // flat[0].shape[1])
    yield from zip(*(t.split(rows) for t in flat), strict=True)


def lower_leaky(z: Float[Tensor, "*shape"], alpha: float = LEAK) -> Float[Tensor, "*shape"]:
    """Hard sigmoid for masks: `clamp(z, 0, 1)` with a one-sided leak in its gradient.

    Backward: 1 on `(0, 1]`, 0 above 1; at `z <= 0` the gradient passes times `alpha` only if it
    is negative, that is, only if descent would raise `z`. Negative masks made SPD unstable.
    """
    return _LowerLeaky.apply(z, alpha)  # type: ignore[no-any-return]


def upper_leaky(z: Float[Tensor, "*shape"], alpha: float = LEAK) -> Float[Tensor, "*shape"]:
    """Hard sigmoid for minimality losses: `clamp(z, 0, 1)`; above 1 a slope `alpha` pulls back."""
    positive = z.clamp(min=0)
    # Below 1 the second line lies above the first, beyond 1 below it.
    return torch.minimum(positive, positive * alpha + (1 - alpha))
