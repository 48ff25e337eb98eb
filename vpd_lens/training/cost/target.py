"""The shape of a target model: all that its cost depends on, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from vpd_lens.sites import Site, model_kind

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a target.

    Attributes:
        name: The name of its site.
        d_in: Input width.
        d_out: Output width.
        reads: Names the tensor that it reads; q, k and v share one.
        stage: Matrices of a stage do not read each other; later ones read earlier ones.
    """

    name: str
    d_in: int
    d_out: int
    reads: str
    stage: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`, as of a `Site`."""
        return self.d_in, self.d_out


@dataclass(frozen=True)
class TargetShape:
    """The shape of a decoder-only transformer, or of a module (then without layers).

    Attributes:
        n_layers: Layers; 0 for a module that is no transformer.
        d_model: Residual width.
        n_heads: Attention heads.
        d_head: Width of a head.
        d_mlp: Hidden width of an MLP; 0: attention only.
        d_vocab: Vocabulary.
        n_ctx: Longest sequence.
        n_kv_heads: Heads of keys and values; `None`: as many as of queries.
        gated: Whether MLPs have a gate.
        parallel: Whether attention and MLP of a layer read the same residual stream.
        tied: Whether embedding and unembedding are one matrix.
        learned_positions: Whether positions have embeddings of their own.
        activation: Of the MLP; TransformerLens computes `gelu_new` in many small steps.
        dtype: Of the weights.
        model_class: `"hooked_transformer"`, `"bridge"` or `"module"`.
        n_parameters: Of the whole model, if counted; otherwise it follows from the rest.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_kv_heads: int | None = None
    gated: bool = False
    parallel: bool = False
    tied: bool = False
    learned_positions: bool = False
    activation: str = "gelu"
    dtype: str = "float32"
    model_class: Literal["hooked_transformer", "bridge", "module"] = "bridge"
    n_parameters: int | None = None

    @property
    def d_query(self) -> int:
        """Width of all heads' queries."""
        return self.n_heads * self.d_head

    @property
    def d_key(self) -> int:
        """Width of all heads' keys, or values."""
        return (self.n_kv_heads or self.n_heads) * self.d_head

    @property
    def bytes_per_weight(self) -> int:
        """Of a weight as the target keeps it."""
        return BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """Weights of the model; norms and biases are left out where they were not counted."""
        if self.n_parameters is not None:
            return self.n_parameters
        embeddings = self.d_vocab * self.d_model * (1 if self.tied else 2)
        positions = self.n_ctx * self.d_model if self.learned_positions else 0
        return embeddings + positions + sum(m.d_in * m.d_out for m in self.matrices()[:-1])

    def matrices(self) -> list[Matrix]:
        """All matrices in forward order, the unembedding last."""
        found = [m for layer in range(self.n_layers) for m in self._layer(layer)]
        last = Matrix("unembed", self.d_model, self.d_vocab, "final", 4 * self.n_layers)
        return [*found, last]

    def _layer(self, layer: int) -> list[Matrix]:
        d, block, first = self.d_model, f"blocks.{layer}", 4 * layer
        # In a parallel layer the MLP reads what the attention reads, through its own norm.
        mlp = first if self.parallel else first + 2
        found = [
            Matrix(f"{block}.attn.q", d, self.d_query, f"{block}.attn", first),
            Matrix(f"{block}.attn.k", d, self.d_key, f"{block}.attn", first),
            Matrix(f"{block}.attn.v", d, self.d_key, f"{block}.attn", first),
            Matrix(f"{block}.attn.o", self.d_query, d, f"{block}.z", first + 1),
        ]
        if self.d_mlp and self.gated:
            found.append(Matrix(f"{block}.mlp.gate", d, self.d_mlp, f"{block}.mlp", mlp))
        if self.d_mlp:
            found.append(Matrix(f"{block}.mlp.in", d, self.d_mlp, f"{block}.mlp", mlp))
            found.append(Matrix(f"{block}.mlp.out", self.d_mlp, d, f"{block}.post", mlp + 1))
        return found

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> TargetShape:
        """The shape of a model in memory.

        Args:
            model: A HookedTransformer, a TransformerBridge or any module.
            sites: Its decomposed sites.
        """
        kind, cfg = model_kind(model), getattr(model, "cfg", None)
        own = [p for name, p in model.named_parameters() if ".vpd." not in name]
        common: dict[str, Any] = {
            "dtype": str(sites[0].weight.dtype).removeprefix("torch."),
            "n_parameters": sum(p.numel() for p in own),
        }
        if kind == "module" or cfg is None:
            width = max(max(site.shape) for site in sites)
            return cls(0, width, 1, width, 0, sites[-1].shape[1], 1, model_class="module", **common)
        gated = any(site.name.endswith(".gate") for site in sites)
        return replace(shape_of_cfg(cfg, kind, **common), gated=gated or _gated(cfg))


def shape_of_cfg(
    cfg: Any, model_class: str, dtype: str, n_parameters: int | None = None
) -> TargetShape:
    """The shape that a TransformerLens configuration describes.

    Args:
        cfg: Has the fields of a `HookedTransformerConfig` or `TransformerBridgeConfig`.
        model_class: `"hooked_transformer"` or `"bridge"`.
        dtype: Of the weights.
        n_parameters: If they were counted.
    """
    positions = getattr(cfg, "positional_embedding_type", None) or "standard"
    return TargetShape(
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_heads=int(cfg.n_heads),
        d_head=int(cfg.d_head),
        d_mlp=0 if getattr(cfg, "attn_only", False) else int(cfg.d_mlp or 4 * cfg.d_model),
        d_vocab=max(int(cfg.d_vocab), int(getattr(cfg, "d_vocab_out", None) or 0)),
        n_ctx=int(cfg.n_ctx),
        n_kv_heads=getattr(cfg, "n_key_value_heads", None),
        gated=_gated(cfg),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        learned_positions=positions == "standard",
        activation=_fused(str(cfg.act_fn), cfg),
        dtype=dtype.removeprefix("torch."),
        model_class="bridge" if model_class == "bridge" else "hooked_transformer",
        n_parameters=n_parameters,
    )


def _gated(cfg: Any) -> bool:
    return bool(getattr(cfg, "gated_mlp", False))


def _fused(activation: str, cfg: Any) -> str:
    """Native bridges compute `gelu_new` as one operation."""
    native = getattr(cfg, "architecture", None) == "TransformerLensNative"
    return "gelu" if native and activation == "gelu_new" else activation
