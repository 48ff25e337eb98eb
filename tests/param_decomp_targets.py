"""Language models of the authors' other classes in plain PyTorch, and checkpoints as theirs are.

Written from the description of the classes, apart from how the library builds them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, HIDDEN = 40, 16, 4, 2, 12, 24
LLAMA = {
    "model_type": "LlamaSimple",
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "block_size": LENGTH,
    "n_ctx": LENGTH,
    "n_intermediate": HIDDEN,
    "n_key_value_heads": 2,
    "use_grouped_query_attention": True,
    "rotary_adjacent_pairs": False,
    "rotary_base": 10000,
    "rotary_dim": 4,
    "rms_norm_eps": 1e-6,
    "attn_bias": False,
    "mlp_bias": False,
    "flash_attention": False,
}
GPT2 = {
    "model_type": "GPT2Simple",
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "block_size": LENGTH,
    "flash_attention": True,
}


class Block(nn.Module):
    def __init__(self, llama: bool, n_groups: int) -> None:
        super().__init__()
        self.llama, bias = llama, not llama
        d_key = WIDTH // HEADS * n_groups
        self.attn, self.mlp = nn.Module(), nn.Module()
        shapes = {
            "q": (WIDTH, WIDTH),
            "k": (WIDTH, d_key),
            "v": (WIDTH, d_key),
            "o": (WIDTH, WIDTH),
        }
        for part, shape in shapes.items():
            setattr(self.attn, f"{part}_proj", nn.Linear(*shape, bias=bias))
        d_mlp = HIDDEN if llama else 4 * WIDTH
        for name in ("gate_proj", "up_proj") if llama else ("c_fc",):
            setattr(self.mlp, name, nn.Linear(WIDTH, d_mlp, bias=bias))
        self.mlp.down_proj = nn.Linear(d_mlp, WIDTH, bias=bias)
        for number in (1, 2):
            name = f"rms_{number}" if llama else f"ln_{number}"
            setattr(self, name, nn.RMSNorm(WIDTH, 1e-6) if llama else nn.LayerNorm(WIDTH, 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        norms = (self.rms_1, self.rms_2) if self.llama else (self.ln_1, self.ln_2)
        x = x + self.attend(norms[0](x))
        h, mlp = norms[1](x), self.mlp
        if self.llama:
            return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return x + mlp.down_proj(F.gelu(mlp.c_fc(h), approximate="tanh"))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self.attn, f"{part}_proj")(x) for part in "qkv")
        q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in (q, k, v))
        if self.llama:
            q, k = turned(q), turned(k)
            k, v = (y.repeat_interleave(HEADS // y.shape[1], dim=1) for y in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.attn.o_proj(mixed.transpose(1, 2).flatten(2))


def turned(x: Tensor) -> Tensor:
    """Rotary position embedding: dimension `i` with dimension `i + d / 2`."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Language(nn.Module):
    """`LlamaSimple` or `GPT2Simple` with random weights, norms and biases included."""

    def __init__(self, fields: dict) -> None:
        super().__init__()
        llama = fields["model_type"] == "LlamaSimple"
        n_groups = fields.get("n_key_value_heads", HEADS)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = None if llama else nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block(llama, n_groups) for _ in range(LAYERS))
        self.ln_f = nn.RMSNorm(WIDTH, 1e-6) if llama else nn.LayerNorm(WIDTH, 1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        x = x if self.wpe is None else x + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def write_run(folder: Path, target: nn.Module, class_path: str, paths: list[str]) -> Path:
    """A decomposition of some modules into 3 subcomponents each, with affine importances."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"target_model.{name}": x.detach() for name, x in target.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for path in sorted(paths):
        d_out, d_in = target.get_submodule(path).weight.shape
        site = path.replace(".", "-")
        state[f"_components.{site}.V"] = torch.randn(d_in, 3, generator=generator)
        state[f"_components.{site}.U"] = torch.randn(3, d_out, generator=generator)
        if (bias := target.get_submodule(path).bias) is not None:
            state[f"_components.{site}.bias"] = bias.detach()
        state[f"ci_fn._ci_fns.{site}.layers.0.W"] = torch.randn(3, 1, 1, generator=generator)
        state[f"ci_fn._ci_fns.{site}.layers.0.b"] = torch.randn(3, 1, generator=generator)
    torch.save(state, folder / "model_7.pth")
    config = {
        "ci_config": {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": []},
        "module_info": [{"module_pattern": path, "C": 3} for path in paths],
        "pretrained_model_class": class_path,
        "pretrained_model_name": "somebody/project/runs/t-1",
        "sigmoid_type": "leaky_hard",
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    return folder
