"""A training step written down literally, as a yardstick: plain PyTorch, one matrix at a time.

The same method on the same target without hooks, fused kernels or shared work: every site forms
its delta `W - V U` in each forward, masks are made per site, gradients come from autograd. How
many times as fast `vpd_lens` is can be compared between machines; milliseconds cannot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vpd_lens.decomposition.importance import TransformerImportance
from vpd_lens.decomposition.masks import uniform_k_subset

LEAK = 0.01


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin, a, b = angle.cos(), angle.sin(), x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """Pre-norm attention and MLP, like the block of the benchmark's target."""

    def __init__(self, d_model: int, d_mlp: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        sizes = dict.fromkeys("qkvo", (d_model, d_model)) | {
            "in": (d_model, d_mlp),
            "out": (d_mlp, d_model),
        }
        self.sites = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        z, site = F.rms_norm(x, x.shape[-1:]), self.sites
        q, k, v = (rearrange(site[n](z), "b t (h d) -> b h t d", h=self.n_heads) for n in "qkv")
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + site["o"](rearrange(mixed, "b h t d -> b t (h d)"))
        z = F.rms_norm(x, x.shape[-1:])
        return x + site["out"](F.gelu(site["in"](z), approximate="tanh"))  # type: ignore[no-any-return]


class Target(nn.Module):
    """The benchmark's target, with random weights."""

    def __init__(self, n_layers: int, d_model: int, n_heads: int, d_mlp: int, d_vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(d_vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, d_mlp, n_heads) for _ in range(n_layers))
        self.unembed = nn.Linear(d_model, d_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(F.rms_norm(x, x.shape[-1:]))  # type: ignore[no-any-return]


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,), (grad,) = ctx.saved_tensors, grads
        below = torch.where(grad < 0, LEAK * grad, 0)
        return torch.where(z <= 0, below, torch.where(z <= 1, grad, 0))


def divergence(output: Tensor, target: Tensor) -> Tensor:
    log_q, log_p = (F.log_softmax(x.flatten(0, 1), -1) for x in (output, target))
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


class LiteralStep:
    """The training step of `VPDConfig.small` with two inner adversarial updates.

    Args:
        shape: Arguments of `Target`.
        counts: Subcomponents by the last part of a site's name.
        importance: Arguments of the causal importance transformer.
        batch_shape: `(batch, pos)`.
    """

    def __init__(
        self,
        shape: dict[str, int],
        counts: dict[str, int],
        importance: dict[str, int],
        batch_shape: tuple[int, int],
    ) -> None:
        self.target = Target(**shape).requires_grad_(False)
        self.sites = {
            name: module
            for name, module in self.target.named_modules()
            if isinstance(module, nn.Linear) and ".sites." in name
        }
        c = {name: counts[name.rsplit(".", 1)[-1]] for name in self.sites}
        self.counts = list(c.values())
        self.v = {n: _normal(m.in_features, c[n], m.in_features) for n, m in self.sites.items()}
        self.u = {n: _normal(c[n], m.out_features, c[n]) for n, m in self.sites.items()}
        self.importance = TransformerImportance(
            [m.in_features for m in self.sites.values()], sum(self.counts), **importance
        )
        self.subcomponents = [*self.v.values(), *self.u.values()]
        self.optimiser = torch.optim.AdamW(
            [*self.subcomponents, *self.importance.parameters()], lr=3e-3, weight_decay=0
        )
        self.sources = {n: torch.rand(*batch_shape, c[n] + 1) for n in self.sites}
        self.moments = {n: [torch.zeros_like(r)] * 2 for n, r in self.sources.items()}
        self.updates = 0
        self.inputs: dict[str, Tensor] = {}
        self.masks: dict[str, tuple[Tensor, Tensor, Tensor | None]] | None = None
        for name, module in self.sites.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Linear, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
            (x,) = arguments
            if self.masks is None:
                self.inputs[name] = x
                return None
            mask, delta_mask, routed = self.masks[name]
            delta = module.weight.T - self.v[name] @ self.u[name]
            y = ((x @ self.v[name]) * mask) @ self.u[name] + delta_mask * (x @ delta)
            return y if routed is None else torch.where(routed, y, output)

        return hook

    def _loss(self, tokens: Tensor, clean: Tensor, g: Any, r: Any, routed: Any = None) -> Tensor:
        self.masks = {
            name: (
                g[name] + (1 - g[name]) * r[name][..., :-1],
                r[name][..., -1:],
                None if routed is None else routed[..., index : index + 1],
            )
            for index, name in enumerate(self.sites)
        }
        output = self.target(tokens)
        self.masks = None
        return divergence(output, clean)

    def _ascend(self, gradients: Any) -> None:
        self.updates += 1
        for (name, r), gradient in zip(self.sources.items(), gradients, strict=True):
            first, second = self.moments[name]
            first = 0.5 * first + 0.5 * gradient
            second = 0.99 * second + 0.01 * gradient**2
            self.moments[name] = [first, second]
            rate = 0.01 / (1 - 0.5**self.updates)
            scale = (second / (1 - 0.99**self.updates)).sqrt() + 1e-8
            self.sources[name] = (r.detach() + rate * first / scale).clamp(0, 1)

    def step(self, tokens: Tensor) -> None:
        """Train on one batch."""
        with torch.no_grad():
            clean = self.target(tokens)
        z = self.importance(list(self.inputs.values()), None)
        g = dict(zip(self.sites, _LowerLeaky.apply(z).split(self.counts, -1), strict=True))
        constant = {name: part.detach() for name, part in g.items()}
        for _ in range(2):
            leaves = [r.requires_grad_() for r in self.sources.values()]
            loss = self._loss(tokens, clean, constant, self.sources)
            self._ascend(torch.autograd.grad(loss, leaves))
        leaves = [r.requires_grad_() for r in self.sources.values()]
        adversarial = self._loss(tokens, clean, g, self.sources)
        routed = uniform_k_subset((*tokens.shape, len(self.sites)), tokens.device)
        uniform = {name: torch.rand_like(r) for name, r in self.sources.items()}
        stochastic = self._loss(tokens, clean, g, uniform, routed)
        loss = 0.5 * adversarial + 0.5 * stochastic + 5e-4 * self._minimality(z, tokens.numel())
        self.optimiser.zero_grad()
        (loss + 1e5 * self._faithfulness()).backward()
        gradients = [leaf.grad for leaf in leaves]
        torch.nn.utils.clip_grad_norm_(self.subcomponents, 0.01)
        self.optimiser.step()
        self._ascend(gradients)

    def _minimality(self, z: Tensor, n_positions: int) -> Tensor:
        total = torch.zeros(())
        for part in z.split(self.counts, -1):
            upper = torch.where(part > 1, 1 + LEAK * (part - 1), part.clamp(0, 1))
            s = (upper + 1e-12).pow(1.5).sum((0, 1))
            total = total + (s + 0.5 * s * torch.log2(1 + s)).sum()
        return total / n_positions

    def _faithfulness(self) -> Tensor:
        deltas = [m.weight.T - self.v[n] @ self.u[n] for n, m in self.sites.items()]
        return sum(d.square().sum() for d in deltas) / sum(d.numel() for d in deltas)  # type: ignore[return-value]


def _normal(rows: int, columns: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(fan_in))
