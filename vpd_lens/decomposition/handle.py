"""`Decomposition`: the handle `model.vpd` that an attached model carries.

Every forward of the model passes through `_forward`, which decides the masks; every site calls
`_read` with its input and `_edit` with its output. Without masks and without listeners `_edit`
returns at once and the output is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vpd_lens.decomposition.attachment import Attachment, without_user_hooks
from vpd_lens.decomposition.causal_importance import CausalImportanceConfig, build_importance
from vpd_lens.decomposition.divergence import CustomDivergence, Divergence, DivergenceKind
from vpd_lens.decomposition.generation import Generation, call_as_prefix
from vpd_lens.decomposition.masked_site import edited_site, masked_site
from vpd_lens.decomposition.masks import Layout, Masks, SiteMasks, Sources
from vpd_lens.decomposition.modes import MODES, NEEDS_IMPORTANCE, MaskContext, masks_from_tensors
from vpd_lens.decomposition.pgd import pgd_sources
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site
from vpd_lens.sites.site import has_listeners

_FLAGS = (
    "Switch off flags that multiply per head or go around a matrix "
    "(model.set_use_split_qkv_input(False), model.set_use_attn_result(False), "
    "model.set_use_attn_in(False)), or decompose other sites."
)


class Decomposition(nn.Module):
    """Subcomponents and causal importance function of a model, attached to it by hooks.

    Made by `vpd_lens.decompose`, found as `model.vpd`. The base model's weights are never
    changed; `vpd_lens.remove` takes everything off again.

    Args:
        model: The model to decompose.
        sites: Its sites.
        counts: Number of subcomponents of each.
        importance: Which causal importance function.
        divergence: What "the same output" means: `"kl"` for logits, `"mse"`, or a callable.
        seed: Seed of the initialisation.

    Attributes:
        sites: The decomposed matrices, in forward order.
        subcomponents: `V` and `U`.
        importance: The causal importance function.
        layout: Names and sizes of the sites.
        trained_steps: Training steps behind this decomposition; 0 if it is untrained.
        training_config: The `VPDConfig` it was trained with, as a dictionary.
    """

    # Kept in __dict__: registered, they would put the base model's weights into this module.
    model: nn.Module
    sites: list[Site]
    attachment: Attachment

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        counts: Sequence[int],
        importance: CausalImportanceConfig,
        divergence: DivergenceKind | CustomDivergence = "kl",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.__dict__["sites"] = list(sites)
        self.importance_config = importance
        self.divergence = divergence
        self.trained_steps = 0
        self.training_config: dict[str, Any] | None = None
        width, depth = _target_size(model, sites)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.subcomponents = Subcomponents(sites, counts)
            self.importance = build_importance(
                importance, [site.shape[0] for site in sites], counts, width, depth
            )
        self.layout: Layout = self.subcomponents.layout
        self.to(sites[0].weight.device)
        self._contexts: list[MaskContext] = []
        self._generation: Generation | None = None
        self._running = False
        self._masks: list[SiteMasks] | None = None
        self._edited = [False] * len(sites)
        self._finished = False
        self._inputs: list[Tensor | None] = [None] * len(sites)
        self._outputs: list[Tensor | None] | None = None
        self.__dict__["attachment"] = Attachment(self)

    # ---------------------------------------------------------------- looking

    def site(self, name: str) -> Site:
        """The site called `name`.

        Raises:
            InputError: If there is none.
        """
        return self.sites[self._index(name)]

    def v(self, name: str) -> Float[Tensor, "d_in C"]:
        """Read directions of a site."""
        return self.subcomponents.v[self._index(name)]

    def u(self, name: str) -> Float[Tensor, "C d_out"]:
        """Write directions of a site."""
        return self.subcomponents.u[self._index(name)]

    @torch.no_grad()
    def delta(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents leave over: `W - V U`."""
        index = self._index(name)
        weight = self.sites[index].weight.float()
        return torch.addmm(
            weight, self.subcomponents.v[index], self.subcomponents.u[index], alpha=-1
        )

    def save(self, path: str | Path, metrics: dict[str, Any] | None = None) -> Path:
        """Write this decomposition to a directory; see `vpd_lens.decomposition.saving.save`."""
        from vpd_lens.decomposition.saving import save

        return save(self, path, metrics)

    def _index(self, name: str) -> int:
        if name not in self.layout.names:
            raise InputError(f"no site named {name!r}; sites: {list(self.layout.names)}.")
        return self.layout.names.index(name)

    def __repr__(self) -> str:
        state = f"trained for {self.trained_steps} steps" if self.trained_steps else "untrained"
        return (
            f"Decomposition({len(self.sites)} sites, {self.layout.total} subcomponents, "
            f"{type(self.importance).__name__}, {state})"
        )

    # ------------------------------------------------------------ using masks

    @contextmanager
    def masked(
        self,
        mode: str | Masks | Mapping[str, Tensor] | Tensor = "ci",
        *,
        threshold: float = 0.0,
        delta: float | Mapping[str, float | Tensor] = 1.0,
        n_steps: int = 20,
        step_size: float = 0.1,
        seed: int | None = None,
    ) -> Iterator[Decomposition]:
        """Run the model under masks inside a `with` block.

        Blocks nest: the innermost counts, and leaving one (also by an exception) restores the
        one outside. Importances come from the unmasked model on the same input, without the
        hooks of the call (permanent hooks stay).

        Args:
            mode: `"target"`, `"unmasked"`, `"ci"`, `"rounded"`, `"stochastic"`,
                `"adversarial"`, `"random"`, `"zero"`; or explicit masks: a mapping from site
                name to `[*batch, C]` (sites left out keep their weight), or one concatenated
                `[*batch, C_total]`.
            threshold: For `"rounded"`: a subcomponent is on where its importance exceeds it.
            delta: The deltas' mask with explicit masks; the named modes fix it themselves.
            n_steps: Ascent steps of `"adversarial"`.
            step_size: Step size of `"adversarial"`.
            seed: Seed of `"stochastic"`, `"random"` and `"adversarial"`; `None` draws from
                torch's global generator.

        Raises:
            InputError: If the mode is unknown or the masks do not fit.

        Example:
            >>> with model.vpd.masked("rounded", threshold=0.1):  # doctest: +SKIP
            ...     model.generate("The princess", max_new_tokens=10)
        """
        generator = None
        if seed is not None:
            generator = torch.Generator(device=self.device).manual_seed(seed)
        if isinstance(mode, str):
            if mode not in MODES:
                raise InputError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
            context = MaskContext(mode, threshold, n_steps, step_size, generator)
        else:
            given = masks_from_tensors(mode, delta, self.layout, self.device)
            context = MaskContext("given", given=given)
        self._contexts.append(context)
        try:
            yield self
        finally:
            self._contexts.pop()

    @property
    def device(self) -> torch.device:
        """Where `V` and `U` live."""
        return self.subcomponents.v[0].device

    # ------------------------------------------------- forwards for analyses

    def run(self, masks: Masks | None, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model under fixed masks (`None`: the target model itself).

        Args:
            masks: The masks; broadcast over leading dimensions of size 1.
            *args: Passed to the model.
            **kwargs: Passed to the model.

        Raises:
            InputError: If the masks do not fit the input's batch and positions.
            VPDError: If the forward pass went around a masked matrix.
        """
        before = self._running, self._masks
        self._running, self._masks = True, None
        if masks is not None:
            self._masks = masks.per_site(self.layout)
            self._edited = [False] * len(self.sites)
            self._finished = self.attachment.end is None
            self._inputs = [None] * len(self.sites)
        try:
            output = self.attachment.original["forward"](*args, **kwargs)
        finally:
            self._running, self._masks = before
        if masks is not None:
            self._require_all_edited(kwargs)
        return output

    def _require_all_edited(self, kwargs: Mapping[str, Any]) -> None:
        """A flag switched on after attaching may bypass a matrix; its masks would do nothing."""
        reached = [index for index, done in enumerate(self._edited) if done] or [0]
        # A run may start or stop at a layer; between its ends no site may be missing.
        start = 0 if kwargs.get("start_at_layer") is None else reached[0]
        stop = len(self._edited) if self._finished else reached[-1]
        missed = [self.layout.names[i] for i in range(start, stop) if not self._edited[i]]
        if missed:
            raise VPDError(f"masks are active, but the forward pass went around {missed}. {_FLAGS}")

    @torch.no_grad()
    def run_recording(self, masks: Masks | None, *args: Any) -> tuple[Any, list[Tensor]]:
        """Like `run`, without gradients, and with every site's output as written.

        Args:
            masks: The masks, or `None` for the target model.
            *args: Passed to the model.
        """
        outputs: list[Tensor | None] = [None] * len(self.sites)
        self._outputs = outputs
        try:
            output = self.run(masks, *args)
            return output, [y for y in outputs if y is not None]
        finally:
            self._outputs = None

    def target(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """One forward of the target model: its output and every site's input.

        Temporary hooks are silenced and no gradient is recorded.

        Raises:
            VPDError: If some site was not reached.
        """
        with torch.no_grad(), without_user_hooks(self.model):
            output = self.run(None, *args, **kwargs)
        return output, self._take_inputs()

    def pre_importance(self, inputs: Sequence[Tensor]) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid causal importances `z` from every site's input, in fp32."""
        return self.importance(inputs, self.subcomponents).float()

    def causal_importance(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*batch C_total"]:
        """Causal importances `g` in [0, 1] of all subcomponents on an input of the model.

        Args:
            *args: Passed to the model.
            **kwargs: Passed to the model.

        Returns:
            Concatenated over sites; `layout.split` or `layout.columns` separates them.
        """
        _, inputs = self.target(*args, **kwargs)
        with torch.no_grad():
            return lower_leaky(self.pre_importance(inputs))

    def _take_inputs(self) -> list[Tensor]:
        missing = [n for n, x in zip(self.layout.names, self._inputs, strict=True) if x is None]
        inputs = [x for x in self._inputs if x is not None]
        self._inputs = [None] * len(self.sites)
        if missing:
            raise VPDError(
                f"the forward pass never reached {missing}, so causal importances cannot be "
                "computed. Run the whole model (no stop_at_layer) and leave split-qkv flags off."
            )
        if len({x.shape[:-1] for x in inputs}) > 1:
            raise VPDError(f"the sites' inputs differ in batch or positions. {_FLAGS}")
        return inputs

    # ------------------------------------------------------- what hooks call

    def _read(self, index: int, x: Tensor) -> None:
        self._inputs[index] = x

    def _edit(self, index: int, y: Tensor) -> Tensor | None:
        edited = self._new_output(index, y)
        if self._outputs is not None:
            self._outputs[index] = y if edited is None else edited
        return edited

    def _new_output(self, index: int, y: Tensor) -> Tensor | None:
        hooks = self.sites[index].hooks
        if self._masks is None:
            if self._contexts and self._contexts[-1].mode != "target" and not self._running:
                raise VPDError(
                    "masks are active, but the model runs without passing through model.forward "
                    "(hf_generate, a submodule called by hand). Call the model itself, or leave "
                    "the masked(...) block."
                )
            if not hooks.masks_are_watched():
                return hooks.hook_out(y) if has_listeners(hooks.hook_out) else None
            return hooks.hook_out(self._watched(index, y, None))  # type: ignore[no-any-return]
        masks = self._masks[index]
        self._edited[index] = True
        self._require_fit(index, masks, y)
        if hooks.masks_are_watched():
            y = self._watched(index, y, masks)
        else:
            v, u = self._directions(index)
            x = self._input_of(index, y)
            y = masked_site(x, y, v, u, masks, self.sites[index].bias)
        return hooks.hook_out(y)  # type: ignore[no-any-return]

    def _input_of(self, index: int, y: Tensor) -> Tensor:
        x = self._inputs[index]
        if x is None or x.shape[:-1] != y.shape[:-1]:
            raise VPDError(
                f"the output of {self.layout.names[index]} was computed from something other than "
                f"one input per position. {_FLAGS}"
            )
        return x

    def _require_fit(self, index: int, masks: SiteMasks, y: Tensor) -> None:
        batch = y.shape[:-1]
        for mask in (masks.components, masks.delta):
            given = mask.shape[:-1]
            pairs = zip(reversed(given), reversed(batch), strict=False)
            if len(given) > len(batch) or any(got not in (1, need) for got, need in pairs):
                raise InputError(
                    f"the masks of {self.layout.names[index]} have leading shape {tuple(given)}, "
                    f"but the model runs on {tuple(batch)} (batch and positions); give the same, "
                    "or 1 where one mask serves all."
                )

    def _note_end(self, _module: nn.Module, _args: tuple) -> None:
        self._finished = True

    def _directions(self, index: int) -> tuple[Tensor, Tensor]:
        v, u = self.subcomponents.v[index], self.subcomponents.u[index]
        return (v.detach(), u.detach()) if self._frozen else (v, u)

    _frozen = False

    @contextmanager
    def frozen_subcomponents(self) -> Iterator[None]:
        """Forwards inside record no gradient for `V` and `U` (the adversary's inner steps)."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def _watched(self, index: int, y: Tensor, masks: SiteMasks | None) -> Tensor:
        """The site's output when someone listens to its activations or masks."""
        hooks = self.sites[index].hooks
        v, u = self._directions(index)
        x = self._input_of(index, y)
        acts = x.to(y.dtype) @ v.to(y.dtype)
        batch = acts.shape[:-1]
        if masks is None:
            mask, delta = acts.new_ones(acts.shape), acts.new_ones(batch)
        else:
            # Copies, because a hook may write to them in place.
            mask = masks.components.expand(acts.shape).clone()
            delta = masks.delta.squeeze(-1).expand(batch).clone()
            if masks.routed is not None:
                mask = torch.where(masks.routed, mask, 1)
                delta = torch.where(masks.routed.squeeze(-1), delta, 1)
        backward = False
        for hook, leaf in ((hooks.hook_mask, mask), (hooks.hook_delta_mask, delta)):
            if hook._backward_hooks and torch.is_grad_enabled() and not leaf.requires_grad:
                leaf.requires_grad_()
            backward |= bool(hook._backward_hooks)
        backward |= bool(hooks.hook_acts._backward_hooks)
        # The untouched path: hooks that only look leave the model's own output in place. The
        # version counters notice an edit in place.
        versions = [t._version for t in (acts, mask, delta)]
        new_acts = hooks.hook_acts(acts)
        new_mask = hooks.hook_mask(mask)
        new_delta = hooks.hook_delta_mask(delta)
        same = new_acts is acts and new_mask is mask and new_delta is delta
        same = same and versions == [t._version for t in (acts, mask, delta)]
        if masks is None and same and not (backward and torch.is_grad_enabled()):
            return y
        clean = x.to(y.dtype) @ v.to(y.dtype) if acts._version != versions[0] else acts
        return edited_site(y, u, clean, new_acts, new_mask, new_delta, self.sites[index].bias)

    # -------------------------------------------------- the wrapped forwards

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._running:
            return self.attachment.original["forward"](*args, **kwargs)
        self._follow_device()
        context = self._contexts[-1] if self._contexts else None
        try:
            if context is None or context.mode == "target":
                output = self.run(None, *args, **kwargs)
                self._fire_importance()
                return output
            return self.run(self._masks_for(context, args, kwargs), *args, **kwargs)
        finally:
            self._inputs = [None] * len(self.sites)

    def _fire_importance(self) -> None:
        """After an unmasked forward: `hook_ci`, if anyone listens and every site was reached."""
        if any(x is None for x in self._inputs) or not self._importance_watched():
            return
        inputs = [x for x in self._inputs if x is not None]
        self._through_hooks(lower_leaky(self.pre_importance(inputs)))

    def _importance_watched(self) -> bool:
        return any(has_listeners(site.hooks.hook_ci) for site in self.sites)

    def _through_hooks(self, importance: Tensor) -> Tensor:
        if not self._importance_watched():
            return importance
        parts = self.layout.split(importance)
        return torch.cat(
            [s.hooks.hook_ci(part) for s, part in zip(self.sites, parts, strict=True)], dim=-1
        )

    def _masks_for(self, context: MaskContext, args: tuple, kwargs: dict) -> Masks:
        """The masks of this forward; importances come from a clean forward of the target."""
        if context.mode not in NEEDS_IMPORTANCE:
            if self._importance_watched():
                args, kwargs = call_as_prefix(args, kwargs)
                self._through_hooks(self.causal_importance(*args, **kwargs))
            return context.constant_masks(self.layout, self.device)
        if self._generation is not None:
            return self._generation.masks(self, context, args, kwargs)
        args, kwargs = call_as_prefix(args, kwargs)
        output, inputs = self.target(*args, **kwargs)
        with torch.no_grad():
            importance = self._through_hooks(lower_leaky(self.pre_importance(inputs)))
        if context.mode != "adversarial":
            return context.masks(importance, self.layout)
        sources = self.find_adversary(context, importance, output, args, kwargs)
        return sources.masks(importance)

    def find_adversary(
        self, context: MaskContext, importance: Tensor, output: Tensor, args: tuple, kwargs: dict
    ) -> Sources:
        """Sources, shared over batch and positions, that hurt the output on one input most."""

        def divergence_of(masks: Masks) -> Tensor:
            return distance(self.run(masks, *args, **kwargs))

        # HookedTransformer.generate runs in inference mode, whose tensors cannot take part in a
        # backward pass; clones made outside it can.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_user_hooks(self.model),
            self.frozen_subcomponents(),
        ):
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            distance = Divergence(output.clone(), self.divergence)
            sources, _ = pgd_sources(
                divergence_of,
                importance.clone(),
                self.layout,
                context.n_steps,
                context.step_size,
                context.generator,
            )
        return sources

    def _follow_device(self) -> None:
        """Move along when the user has moved the model."""
        device = self.sites[0].weight.device
        if self.device != device:
            self.to(device)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._generating():
            return self.attachment.original["generate"](*args, **kwargs)

    def _generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._generating():
            yield from self.attachment.original["generate_stream"](*args, **kwargs)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        before, self._generation = self._generation, Generation()
        try:
            yield
        finally:
            self._generation = before


def _target_size(model: nn.Module, sites: Sequence[Site]) -> tuple[int, int]:
    """Residual width and depth of the target, for the size of the importance function."""
    cfg = getattr(model, "cfg", None)
    width = getattr(cfg, "d_model", None) or max(site.shape[0] for site in sites)
    depth = getattr(cfg, "n_layers", None) or 1
    return int(width), int(depth)
