"""What makes the model between two cuts linear: scales, patterns and gains held fixed.

With a norm's scale, an attention pattern and every neuron's gain (activation over
pre-activation) at their values on the prompt, a matrix' input is a linear function of the outputs
of earlier matrices, so the contributions of all of them add up to it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from vpd_lens.errors import VPDError
from vpd_lens.sites.site import relative_error

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
_TOLERANCE = 2e-2  # bf16 rounds at 4e-3
_LARGE = 1e3  # beside it no norm's epsilon counts


def norm_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms on the residual stream, by TransformerLens' names."""
    owners = {f"blocks.{i}.": (block, _NORMS) for i, block in enumerate(model.blocks)}  # type: ignore[arg-type]
    for prefix, (owner, names) in {**owners, "": (model, ("ln_final",))}.items():
        for name in names:
            module = owner._modules.get(name)
            if module is not None and not isinstance(module, nn.Identity):
                yield f"{prefix}{name}", module


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Without the hooks on its hook points, permanent ones included: no input of the model's."""
    points = [part for part in module.modules() if isinstance(part, HookPoint)]
    saved = [dict(point._forward_hooks) for point in points]
    for point in points:
        point._forward_hooks.clear()
    try:
        yield
    finally:
        for point, hooks in zip(points, saved, strict=True):
            point._forward_hooks.update(hooks)


class LinearNorm:
    """A LayerNorm or RMSNorm, of whatever class, as a linear map with a fixed scale.

    Its `weight [d_model]` and `bias` (or `None`) are found by what it does to some inputs like
    `like`, because libraries keep them differently (`w`, `weight`, `1 + weight`, folded).
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, d_model: int, like: Tensor) -> None:
        sign = torch.ones(d_model, device=like.device)
        sign[1::2] = -1

        def norm(x: Tensor) -> Tensor:
            return module(x.to(like.dtype)[None, None])[0, 0].float()

        # f(x) = w (x - mean) / scale + b, so b is the mean of an input's and its negative's.
        with _silent(module):
            up, down = norm(_LARGE * sign), norm(-_LARGE * sign)
            bias = (up + down) / 2
            constant = norm(torch.full_like(sign, _LARGE)) - bias
        self.centred = bool(constant.abs().max() < 0.1 * (up - bias).abs().max())
        direction = sign - sign.mean() if self.centred else sign
        self.weight = (up - bias) / (direction / direction.square().mean().sqrt())
        self.bias = bias if bool(bias.abs().max() > 0) else None

    def linear(self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The output `y` as a linear function of the input `x`, whose scale is a constant."""
        scaled = self.unbiased(y.float())
        with torch.no_grad():
            inverse = self.inverse_scale(x.float(), scaled)
        out = inverse * (self.weight * self.centre(x.float()))
        _require_equal(out, scaled, "a norm does not multiply by one scale per position")
        return out.to(y.dtype)

    def centre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The input without its mean, if the norm takes that off."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def unbiased(self, y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The output without the norm's bias."""
        return y if self.bias is None else y - self.bias

    def inverse_scale(
        self, x: Float[Tensor, "*b d"], scaled: Float[Tensor, "*b d"]
    ) -> Float[Tensor, "*b 1"]:
        """One over the scale at every position, from the input and the output without bias."""
        unscaled = self.weight * self.centre(x)
        square = torch.linalg.vecdot(unscaled, unscaled).clamp(min=1e-30)
        return (torch.linalg.vecdot(scaled, unscaled) / square).unsqueeze(-1)


def attended(
    pattern: Float[Tensor, "#row head query key"],
    value: Float[Tensor, "row key kv"],
    z: Float[Tensor, "row query d"],
    name: str,
) -> Float[Tensor, "row query d"]:
    """The attention's result `z` as a linear function of its values, with a constant pattern."""
    n_heads, d_head = pattern.shape[1], z.shape[-1] // pattern.shape[1]
    value = rearrange(value, "row key (head d_head) -> row head key d_head", d_head=d_head)
    value = repeat(value, "row g key d -> row (g r) key d", r=n_heads // value.shape[1])
    out = rearrange(pattern.to(value.dtype) @ value, "row head query d -> row query (head d)")
    _require_equal(out.detach(), z.detach(), f"the input of {name} is not pattern times values")
    return out


def gained(
    pre: Float[Tensor, "row pos d_mlp"], x: Float[Tensor, "row pos d_mlp"]
) -> tuple[Float[Tensor, "row pos d_mlp"], Float[Tensor, "row pos d_mlp"] | None]:
    """Neurons' activations `x` as a fixed gain times what `mlp.in` writes, and what is left of `x`.

    In a gated MLP `gate` acts through the gain only, like q and k through the pattern. What is left
    is `None` unless an activation is not 0 at 0.
    """
    x, fixed = x.detach(), pre.detach()
    gain = torch.where(fixed == 0, 0, x / torch.where(fixed == 0, 1, fixed))
    left = x - gain * fixed
    return gain * pre, left if bool((left.abs() > 1e-3 * x.abs().max()).any()) else None


def _require_equal(got: Tensor, expected: Tensor, problem: str) -> None:
    error = relative_error(got.float(), expected.float())
    if not error <= _TOLERANCE:
        raise VPDError(
            f"frozen=True: {problem} (they differ by {error:.1e}). Use frozen=False, which follows "
            "the gradients of whatever the model computes."
        )
