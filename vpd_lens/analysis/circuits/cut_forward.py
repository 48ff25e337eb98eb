"""The forward pass that attributions are read from: the target model, cut at its matrices.

Every decomposed matrix receives its input `x` with a gradient graph behind it, and its output
continues as a leaf. So a gradient from an input `x_n` reaches the outputs `y_s` of the matrices
directly before it, and stops there: what is left between two cuts is residual stream, norm,
attention pattern and activation function. Everything else is linear algebra on
`y_s = sum_c a_c U_c + x Delta + b`.

The leaf is a zero added to the output, so values are the target model's, bit for bit. With
`delta="through"` the gradient also passes through `x Delta`, as in the paper.

Source: VPD, attribution graphs (gradients stopped at every subcomponent activation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.linear import LinearNorm, NeuronGains, attended, norm_modules
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site, find_sites, model_kind

EMBEDDING, POSITIONS = "embed", "embed.position"


@dataclass
class Cut:
    """One forward of a prompt or a batch, cut at the decomposed matrices.

    Attributes:
        inputs: Input of each matrix by its name, with graph, `[row, pos, d_in]`; the rows are
            copies of the prompt, or the batch. `unembed` is always there.
        leaves: Zeros added to the output of each matrix (decomposed or not), to each norm with a
            bias, and to the residual stream's beginning (`embed`); gradients end there. That of
            `unembed` has one position, since no matrix comes after it.
        constants: What of a leaf's place does not depend on the input, `[pos, d]` or `[d]`: the
            bias of a matrix or a norm.
        norms: Input and output of each norm.
        residuals: Residual stream after each block, with graph.
        embeddings: Token embeddings `[pos, d_model]`, of a batch `[row, pos, d_model]`.
        positions: What the residual stream begins with beyond those, or `None`.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    residuals: list[Tensor] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Tensor | None = None


class CutForward:
    """Runs a decomposed transformer cut at its matrices.

    Args:
        vpd: The decomposition.
        frozen: Hold the norms' scales, the attention patterns and every neuron's gain at their
            values on the prompt, so that what is between two cuts is linear.
        through_delta: Let gradients pass through the deltas.

    Raises:
        InputError: If the model is not a transformer of TransformerLens.
    """

    def __init__(self, vpd: Decomposition, frozen: bool, through_delta: bool) -> None:
        if model_kind(vpd.model) == "module":
            raise InputError(
                f"attribution graphs need a HookedTransformer or a TransformerBridge; "
                f"{type(vpd.model).__name__} is neither."
            )
        self.vpd = vpd
        self.frozen = frozen
        self.through_delta = through_delta
        # The decomposition's own Site objects where there are some, for names and weights.
        own = {site.name: site for site in vpd.sites}
        self.sites = [own.get(s.name, s) for s in find_sites(vpd.model, r".")]
        self.decomposed = set(own)
        attention = {f"blocks.{i}.attn.o" for i in range(len(vpd.model.blocks))}  # type: ignore[arg-type]
        if frozen:
            _require_known_parts(vpd.model, {site.name for site in self.sites})
        self.mixes_positions = through_delta or not attention <= self.decomposed
        with vpd.undisturbed():
            self.norms = [
                (name, module, LinearNorm(module, vpd.model.cfg.d_model, vpd.sites[0].weight))
                for name, module in norm_modules(vpd.model)
            ]

    def __call__(
        self,
        tokens: Int[Tensor, "*row pos"],
        rows: int = 1,
        hooks: Sequence[tuple[str, Any]] = (),
    ) -> Cut:
        """Run the target model on `rows` copies of a prompt, or on a batch.

        Args:
            tokens: The prompt, or the batch.
            rows: Copies of a prompt, each of which can receive its own cotangents.
            hooks: Further TransformerLens hooks, which see tensors with their graph.
        """
        cut = Cut()
        once = torch.atleast_2d(tokens)
        batch = once.expand(max(rows, len(once)), -1)
        with ExitStack() as stack:
            stack.enter_context(self.vpd.undisturbed())
            self._patterns = self._attention_patterns(once) if self.frozen else {}
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.vpd.model.hooks(fwd_hooks=[*hooks, *self._lens_hooks(cut)]))
            gains = NeuronGains(self.sites) if self.frozen else None
            stack.enter_context(_registered(self._norm_hooks(cut)))
            stack.enter_context(_registered(self._site_hooks(cut, gains)))
            stack.enter_context(narrowed_unembedding(self.vpd.model, _one_position))
            self.vpd.run(None, batch)
        if tokens.ndim == 1:
            cut.embeddings = cut.embeddings[0]
            cut.positions = None if cut.positions is None else cut.positions[0]
        if EMBEDDING not in cut.leaves or "unembed" not in cut.inputs:
            raise VPDError(
                f"the forward pass of this {type(self.vpd.model).__name__} went around its "
                "residual stream's beginning or its unembedding, so no graph can be traced."
            )
        return cut

    # ------------------------------------------------------------------ hooks

    def _lens_hooks(self, cut: Cut) -> list[tuple[str, Any]]:
        """TransformerLens hooks on the residual stream."""
        hooks: list[tuple[str, Any]] = [
            ("hook_embed", partial(_note_embedding, cut)),
            ("blocks.0.hook_resid_pre", partial(_begin, cut)),
        ]
        if getattr(self.vpd.model.cfg, "positional_embedding_type", None) == "shortformer":
            hooks.append(("hook_pos_embed", partial(_begin_beside, cut)))
        for i in range(len(self.vpd.model.blocks)):  # type: ignore[arg-type]
            hooks.append((f"blocks.{i}.hook_resid_post", partial(_note_residual, cut)))
        return hooks

    def _attention_patterns(self, tokens: Int[Tensor, "row pos"]) -> dict[str, Tensor]:
        """Every layer's pattern, from a forward of its own: some models show it too late."""
        patterns: dict[str, Tensor] = {}
        layers = [s.name.removesuffix(".o") for s in self.sites if s.name.endswith(".attn.o")]
        hooks = [(f"{n}.hook_pattern", partial(_note_pattern, patterns, n)) for n in layers]
        with torch.no_grad(), self.vpd.model.hooks(fwd_hooks=hooks):
            self.vpd.run(None, tokens)
        if missing := [layer for layer in layers if layer not in patterns]:
            raise VPDError(
                f"frozen=True needs the attention patterns, but hook_pattern of {missing} did not "
                "fire (load the model with eager attention), or use frozen=False."
            )
        return patterns

    def _site_hooks(self, cut: Cut, gains: NeuronGains | None) -> list[Any]:
        handles = []
        self._values: dict[str, Tensor] = {}
        for site in self.sites:
            edit = partial(self._edit, cut, site, gains)
            handles += site.attach(partial(cut.inputs.__setitem__, site.name), edit)
        return handles

    def _edit(self, cut: Cut, site: Site, gains: NeuronGains | None, y: Tensor) -> Tensor | None:
        x = cut.inputs[site.name]
        if site.name == "unembed":
            pass  # its output is narrowed, and no gradient comes from behind it
        elif gains is not None:
            x = self._linear_input(cut, site, gains, x)
            cut.inputs[site.name] = x
            y = _same_value(y, self._linear_output(site, x))
        elif site.name in self.decomposed:
            y = self._cut_output(site, x, y)
        leaf = cut.leaves[site.name] = torch.zeros_like(y).requires_grad_()
        if site.bias is not None:
            cut.constants[site.name] = site.bias
        y = y + leaf
        self._values[site.name] = y
        if gains is not None:
            gains.see(site.name, y)
        return y

    def _cut_output(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """`y`, whose gradient stops at the matrix, or passes through its delta only."""
        if not self.through_delta:
            return y.detach()
        v, u = self.vpd.v(site.name).detach(), self.vpd.u(site.name).detach()
        passing = (x @ v.to(x.dtype)) @ u.to(x.dtype)
        return y - (passing - passing.detach())

    def _linear_input(self, cut: Cut, site: Site, gains: NeuronGains, x: Tensor) -> Tensor:
        """What the matrix reads, as a linear function of the cuts before it."""
        prefix, _, part = site.name.rpartition(".")
        if part == "o":
            value = self._values[f"{prefix}.v"]
            return _same_value(x, attended(self._patterns[prefix], value, x, site.name))
        if part == "out" and prefix.endswith(".mlp"):
            linear, constant = gains.output(prefix, x)
            if constant is not None:
                # The leaf stands before the matrix, where the activation's offset is.
                leaf = torch.zeros_like(x).requires_grad_()
                cut.leaves[f"{prefix}.act"] = leaf
                cut.constants[f"{prefix}.act"] = constant[0]
                linear = linear + leaf
            return _same_value(x, linear)
        return x

    def _linear_output(self, site: Site, x: Tensor) -> Tensor | None:
        """What of the output the gradient may pass through; `None` for nothing."""
        if site.name not in self.decomposed:
            return x @ site.weight.to(x.dtype)
        if self.through_delta:
            return x @ self.vpd.delta(site.name).to(x.dtype)
        return None

    def _norm_hooks(self, cut: Cut) -> list[Any]:
        return [
            module.register_forward_hook(partial(self._norm, cut, name, norm))
            for name, module, norm in self.norms
        ]

    def _norm(
        self, cut: Cut, name: str, norm: LinearNorm, _module: nn.Module, args: tuple, y: Tensor
    ) -> Tensor:
        cut.norms[name] = args[0].detach(), y.detach()
        if self.frozen:
            y = _same_value(y, norm.linear(args[0], y))
        if norm.bias is None:
            return y
        # HookedTransformer calls a norm once for each of q, k and v: one leaf for all.
        if name not in cut.leaves:
            shape = *cut.leaves[EMBEDDING].shape[:2], y.shape[-1]
            cut.leaves[name] = y.new_zeros(shape).requires_grad_()
            cut.constants[name] = norm.bias.to(y.dtype)
        return y + cut.leaves[name].view(y.shape)  # OPT's MLP runs on [row * pos, d]


def _require_known_parts(model: nn.Module, names: set[str]) -> None:
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        mlp = f"blocks.{index}.mlp"
        if block._modules.get("mlp") is not None and f"{mlp}.out" not in names:
            raise InputError(
                f"frozen=True: {mlp} is no MLP of two or three matrices (a mixture of experts?), "
                "so it has no linear form. Use frozen=False."
            )


@contextmanager
def narrowed_unembedding(model: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Compute logits only where they are needed: in long prompts they are most of the memory.

    Args:
        model: A HookedTransformer or TransformerBridge.
        select: From the unembedding's input `[row, pos, d_model]`, what it is to multiply. Hooks
            on that input see all of it.
    """
    point = find_sites(model, ["unembed"])[0].inputs[-1]
    module = point.module
    if point.kind == "argument":
        handles = [module.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))]
    else:
        last = module.register_forward_hook(lambda _, args, x: select(x))
        # A site's own hook moves itself to the end of the queue; this one goes behind it.
        behind = partial(_move_last, last.id)
        handles = [last, module.register_forward_pre_hook(behind)]
    with _registered(handles):
        yield


def _move_last(hook_id: int, module: nn.Module, _args: tuple) -> None:
    module._forward_hooks.move_to_end(hook_id)


def _one_position(stream: Tensor) -> Tensor:
    return stream[:1, -1:]


@contextmanager
def _registered(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same_value(value: Tensor, linear: Tensor | None) -> Tensor:
    """The value of the first with the gradient of the second."""
    value = value.detach()
    return value if linear is None else value + (linear - linear.detach())


def _note_embedding(cut: Cut, embedding: Tensor, hook: Any) -> None:
    cut.embeddings = embedding.detach()


def _begin(cut: Cut, residual: Tensor, hook: Any) -> Tensor:
    """The residual stream begins at a leaf: the token's embedding and what is added to it."""
    start = residual.detach()
    if cut.embeddings.shape != start.shape:
        cut.embeddings = start
    rest = start - cut.embeddings
    cut.positions = rest if bool(rest.abs().max() > 0) else None
    leaf = torch.zeros_like(start).requires_grad_()
    cut.leaves[EMBEDDING] = leaf
    return start + leaf


def _begin_beside(cut: Cut, positions: Tensor, hook: Any) -> Tensor:
    """Position embeddings that only q and k see, and the residual stream never holds."""
    leaf = torch.zeros_like(positions).requires_grad_()
    cut.leaves[POSITIONS] = leaf
    cut.constants[POSITIONS] = positions[0].detach()
    return positions + leaf


def _note_residual(cut: Cut, residual: Tensor, hook: Any) -> None:
    cut.residuals.append(residual)


def _note_pattern(patterns: dict[str, Tensor], prefix: str, pattern: Tensor, hook: Any) -> None:
    patterns[prefix] = pattern.detach()
