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
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpd_lens.analysis.circuits.linear import LinearNorm, attended, gained, norm_modules
from vpd_lens.decomposition import Decomposition
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site, find_sites, model_kind
from vpd_lens.sites.site import move_last

EMBEDDING, POSITIONS = "embed", "embed.position"


@dataclass
class Cut:
    """One forward of a batch, or of copies of a prompt, cut at the decomposed matrices.

    Gradients end at the leaves, zeros added to the output of each matrix, to each norm with a bias,
    to what neurons of a linear MLP add, and to the residual stream's beginning. That of `unembed`,
    with no matrix behind it, has one position. `constants` are what of these places does not depend
    on the subcomponents: biases `[d]`, and, in the first row, what is added to the token embeddings
    or to neurons `[pos, d]`.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)  # [row, pos, d_in], with graph
    leaves: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # input and output
    residuals: dict[int, Tensor] = field(default_factory=dict)  # after each block, with graph
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))  # [row, pos, d_model]


class CutForward:
    """Runs a decomposed transformer cut at its matrices; if `frozen`, linear between two cuts."""

    def __init__(self, vpd: Decomposition, frozen: bool, through_delta: bool) -> None:
        if model_kind(vpd.model) == "module":
            raise InputError(
                f"attribution graphs need a HookedTransformer or a TransformerBridge; "
                f"{type(vpd.model).__name__} is neither."
            )
        self.vpd, self.frozen, self.through_delta = vpd, frozen, through_delta
        # The decomposition's own Site objects where there are some, for names and weights.
        own = {site.name: site for site in vpd.sites}
        self.sites = [own.get(s.name, s) for s in find_sites(vpd.model, r".")]
        self.decomposed = set(own)
        self.n_blocks = len(vpd.model.blocks)  # type: ignore[arg-type]
        names = {site.name for site in self.sites}
        for i, block in enumerate(vpd.model.blocks):  # type: ignore[arg-type]
            mlp = f"blocks.{i}.mlp"
            if frozen and block._modules.get("mlp") is not None and f"{mlp}.out" not in names:
                raise InputError(
                    f"frozen=True: {mlp} is no MLP of two or three matrices (a mixture of "
                    "experts?), so it has no linear form. Use frozen=False."
                )
        attention = {f"blocks.{i}.attn.o" for i in range(self.n_blocks)}
        self.mixes_positions = through_delta or not attention <= self.decomposed
        with vpd.undisturbed():
            width, like, norms = vpd.model.cfg.d_model, vpd.sites[0].weight, norm_modules(vpd.model)
            self.norms = [(name, norm, LinearNorm(norm, width, like)) for name, norm in norms]

    def __call__(
        self, tokens: Int[Tensor, "*row pos"], rows: int = 1, hooks: Sequence[tuple[str, Any]] = ()
    ) -> Cut:
        """Run the target model on a batch, or on `rows` copies of a prompt.

        Each copy can receive its own cotangents. Further `hooks` see tensors with their graph.
        """
        model, once = self.vpd.model, torch.atleast_2d(tokens)
        with ExitStack() as stack:
            stack.enter_context(self.vpd.undisturbed())
            pass_ = _Pass(self, self._attention_patterns(once) if self.frozen else {})
            stack.enter_context(torch.enable_grad())
            stack.enter_context(model.hooks(fwd_hooks=[*hooks, *pass_.lens_hooks()]))
            for name, module, norm in self.norms:
                hook = module.register_forward_hook(partial(pass_.norm, name, norm))
                stack.callback(hook.remove)
            for site in self.sites:
                read = partial(pass_.cut.inputs.__setitem__, site.name)
                for hook in site.attach(read, partial(pass_.edit, site)):
                    stack.callback(hook.remove)
            stack.enter_context(narrowed_unembedding(model, lambda stream: stream[:1, -1:]))
            self.vpd.run(None, once.expand(max(rows, len(once)), -1))
        if EMBEDDING not in pass_.cut.leaves or "unembed" not in pass_.cut.inputs:
            raise VPDError(
                f"the forward pass of this {type(model).__name__} went around its residual "
                "stream's beginning or its unembedding, so no graph can be traced."
            )
        return pass_.cut

    def _attention_patterns(self, tokens: Int[Tensor, "row pos"]) -> dict[str, Tensor]:
        """Every layer's pattern, from a forward of its own: some models show it too late."""
        patterns: dict[str, Tensor] = {}
        layers = [s.name.removesuffix(".o") for s in self.sites if s.name.endswith(".attn.o")]
        hooks = [(f"{layer}.hook_pattern", keep_in(patterns, layer)) for layer in layers]
        with torch.no_grad(), self.vpd.model.hooks(fwd_hooks=hooks):
            self.vpd.run(None, tokens)
        if missing := [layer for layer in layers if layer not in patterns]:
            raise VPDError(
                f"frozen=True needs the attention patterns, but hook_pattern of {missing} did not "
                "fire (load the model with eager attention), or use frozen=False."
            )
        return patterns


class _Pass:
    """The hooks of one forward, which fill its `Cut`."""

    def __init__(self, forward: CutForward, patterns: dict[str, Tensor]) -> None:
        self.forward, self.patterns, self.cut = forward, patterns, Cut()
        self.values: dict[str, Tensor] = {}

    def lens_hooks(self) -> list[tuple[str, Any]]:
        """TransformerLens hooks on the residual stream."""
        points = ((i, f"blocks.{i}.hook_resid_post") for i in range(self.forward.n_blocks))
        hooks: list[Any] = [(point, keep_in(self.cut.residuals, i)) for i, point in points]
        hooks += [("hook_embed", self.note_embedding), ("blocks.0.hook_resid_pre", self.begin)]
        kind = getattr(self.forward.vpd.model.cfg, "positional_embedding_type", None)
        if kind == "shortformer":
            hooks.append(("hook_pos_embed", self.begin_beside))
        return hooks

    def note_embedding(self, embedding: Tensor, hook: Any) -> None:
        self.cut.embeddings = embedding.detach()

    def begin(self, residual: Tensor, hook: Any) -> Tensor:
        """The residual stream begins at a leaf: the token's embedding and what is added to it."""
        start = residual.detach()
        if self.cut.embeddings.shape != start.shape:
            self.cut.embeddings = start
        return start + self._leaf(EMBEDDING, start, (start - self.cut.embeddings)[0])

    def begin_beside(self, positions: Tensor, hook: Any) -> Tensor:
        """Position embeddings that only q and k see, and the residual stream never holds."""
        return positions + self._leaf(POSITIONS, positions, positions[0].detach())

    def norm(self, name: str, norm: LinearNorm, _: nn.Module, args: tuple, y: Tensor) -> Tensor:
        self.cut.norms[name] = args[0].detach(), y.detach()
        if self.forward.frozen:
            y = _same_value(y, norm.linear(args[0], y))
        if norm.bias is None:
            return y
        # HookedTransformer calls a norm once for each of q, k and v: one leaf for all.
        if (leaf := self.cut.leaves.get(name)) is None:
            like = y.new_empty(*self.cut.leaves[EMBEDDING].shape[:2], y.shape[-1])
            leaf = self._leaf(name, like, norm.bias.to(y.dtype))
        return y + leaf.view(y.shape)  # OPT's MLP runs on [row * pos, d]

    def edit(self, site: Site, y: Tensor) -> Tensor:
        """The output of a matrix: its value, what gradients may pass, and a leaf."""
        name, frozen, x = site.name, self.forward.frozen, self.cut.inputs[site.name]
        if name == "unembed":
            pass  # its output is narrowed, and no gradient comes from behind it
        elif frozen or name in self.forward.decomposed:
            if frozen:
                x = self.cut.inputs[name] = self._linear_input(name, x)
            y = _same_value(y, self._passing(site, x))
        y = self.values[name] = y + self._leaf(name, y, site.bias)
        return y

    def _linear_input(self, name: str, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        """What the matrix reads, as a linear function of the cuts before it."""
        prefix, _, part = name.rpartition(".")
        if part == "o":
            linear = attended(self.patterns[prefix], self.values[f"{prefix}.v"], x, name)
        elif part == "out" and prefix.endswith(".mlp"):
            linear, constant = gained(self.values[f"{prefix}.in"], x)
            if constant is not None:
                # The leaf stands before the matrix, where the activation's offset is.
                linear = linear + self._leaf(f"{prefix}.act", x, constant[0])
        else:
            return x
        return _same_value(x, linear)

    def _passing(self, site: Site, x: Float[Tensor, "row pos d"]) -> Tensor | None:
        """What of the output the gradient may pass through; `None` for nothing."""
        if site.name not in self.forward.decomposed:
            return x @ site.weight.to(x.dtype)
        if self.forward.through_delta:
            return x @ self.forward.vpd.delta(site.name).to(x.dtype)
        return None

    def _leaf(self, name: str, like: Tensor, constant: Tensor | None = None) -> Tensor:
        if constant is not None:
            self.cut.constants[name] = constant
        leaf = self.cut.leaves[name] = torch.zeros_like(like).requires_grad_()
        return leaf


def keep_in(store: dict[Any, Tensor], key: Any) -> Callable[[Tensor, Any], None]:
    """A hook that keeps what it sees, under a key."""
    return lambda value, hook: store.__setitem__(key, value)


def _same_value(value: Tensor, linear: Tensor | None) -> Tensor:
    """The value of the first with the gradient of the second."""
    value = value.detach()
    return value if linear is None else value + (linear - linear.detach())


@contextmanager
def narrowed_unembedding(model: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Compute logits only where they are needed: in long prompts they are most of the memory.

    `select` takes from the unembedding's input `[row, pos, d_model]` what it is to multiply. Hooks
    on that input see all of it.
    """
    point = find_sites(model, ["unembed"])[0].inputs[-1]
    module = point.module
    with ExitStack() as stack:
        if point.kind == "argument":
            narrow = module.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
        else:
            narrow = module.register_forward_hook(lambda _, args, x: select(x))
            # A site's own hook moves itself to the end of the queue; this one goes behind it.
            stack.callback(module.register_forward_pre_hook(partial(move_last, narrow.id)).remove)
        stack.callback(narrow.remove)
        yield
