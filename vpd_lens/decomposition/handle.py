"""`Decomposition`: the handle `model.vpd` that an attached model carries.

Every forward of the model passes through `_forward`, which decides the masks; `running.py` applies
them.
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

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.attachment import Attachment, without_user_hooks
from vpd_lens.decomposition.causal_importance import build_importance
from vpd_lens.decomposition.divergence import CustomDivergence, Divergence, DivergenceKind
from vpd_lens.decomposition.generation import Generation, call_as_prefix
from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.decomposition.modes import MODES, NEEDS_IMPORTANCE, MaskContext, masks_from_tensors
from vpd_lens.decomposition.pgd import pgd_sources
from vpd_lens.decomposition.running import FLAGS_HINT, MaskedForwards
from vpd_lens.decomposition.sigmoids import lower_leaky
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site
from vpd_lens.sites.site import has_listeners


class Decomposition(MaskedForwards):
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

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        counts: Sequence[int],
        importance: CausalImportanceConfig,
        divergence: DivergenceKind | CustomDivergence = "kl",
        seed: int = 0,
    ) -> None:
        width, depth = _target_size(model, sites)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            subcomponents = Subcomponents(sites, counts)
            function = build_importance(
                importance, [site.shape[0] for site in sites], counts, width, depth
            )
        super().__init__(model, list(sites), subcomponents)
        self.importance = function
        self.importance_config = importance
        self.divergence = divergence
        self.trained_steps = 0
        self.training_config: dict[str, Any] | None = None
        self._generation: Generation | None = None
        self.to(sites[0].weight.device)
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

    def original_indices(self, name: str) -> list[int]:
        """The column number that each subcomponent of a site had before others were folded.

        0, 1, 2, ... where nothing was; `subcomponents.folded` holds the rest.
        """
        return list(self.subcomponents.original[self._index(name)])

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
            raise VPDError(f"the sites' inputs differ in batch or positions. {FLAGS_HINT}")
        return inputs

    # -------------------------------------------------- the wrapped forwards

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._running:
            return self.attachment.original["forward"](*args, **kwargs)
        self.follow_device()
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

    def follow_device(self) -> None:
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
