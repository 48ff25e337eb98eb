"""`Decomposition`: the handle `model.vpd` that an attached model carries.

Every forward of the model goes through `_forward`, which decides the masks of `forward.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.call import Generation, cached_positions, real_positions, whole_call
from vpd_lens.decomposition.divergence import CustomDivergence, Divergence, DivergenceKind
from vpd_lens.decomposition.forward import FLAGS_HINT, Forwards, Pass
from vpd_lens.decomposition.importance import build_importance, lower_leaky, sized_importance
from vpd_lens.decomposition.masks import AnyMasks, Layout, Masks, Sources
from vpd_lens.decomposition.modes import MODES, MaskContext, masks_from_tensors
from vpd_lens.decomposition.ranks import Ranks, ranks, sites_table
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import InputError, VPDError
from vpd_lens.sites import Site
from vpd_lens.sites.site import has_listeners


def target_size(model: nn.Module, sites: Sequence[Site]) -> tuple[int, int]:
    """Residual width and number of layers of a target."""
    cfg = getattr(model, "cfg", None)
    width = getattr(cfg, "d_model", None) or max(site.shape[0] for site in sites)
    return int(width), int(getattr(cfg, "n_layers", None) or 1)


class Decomposition(nn.Module):
    """Subcomponents and causal importance function of a model, attached to it by hooks.

    Made by `vpd_lens.decompose`, found as `model.vpd`. The base model's weights are never
    changed; `vpd_lens.remove` takes everything off again.

    Attributes:
        sites: The decomposed matrices, in forward order.
        subcomponents: `V` and `U`.
        importance: The causal importance function.
        divergence: What "the same output" means: `"kl"` for logits, `"mse"`, or a callable.
        trained_steps: Training steps behind this decomposition; 0 if it is untrained.
        training_config: The `VPDConfig` it was trained with, as a dictionary; of an imported one,
            its authors' configuration.
    """

    # Kept in __dict__: registered, they would put the base model's weights into this module.
    model: nn.Module
    sites: list[Site]
    forwards: Forwards
    attachment: Any  # what attaching changed about the model; made by `attach`

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
        sites = list(sites)
        width, depth = target_size(model, sites)
        generator = torch.Generator().manual_seed(seed)
        self.subcomponents = Subcomponents(sites, counts, generator)
        d_inputs = [site.shape[0] for site in sites]
        importance = sized_importance(importance, [s.shape for s in sites], self.layout, width)
        self.importance = build_importance(
            importance, d_inputs, self.layout, width, depth, generator
        )
        forwards = Forwards(model, sites, self.subcomponents)
        self.__dict__.update(model=model, sites=sites, forwards=forwards)
        self.importance_config = importance
        self.divergence: DivergenceKind | CustomDivergence = divergence
        self.trained_steps = 0
        self.training_config: dict[str, Any] | None = None

    @property
    def layout(self) -> Layout:
        """Names and sizes of the sites."""
        return self.subcomponents.layout

    @property
    def device(self) -> torch.device:
        """Where the base weights are; `V`, `U` and the importance function follow them there."""
        device = self.sites[0].weight.device
        if self.subcomponents.v[0].device != device:
            # Tensors made in `generate`'s inference mode could not take part in a backward pass.
            with torch.inference_mode(False):
                self.to(device)
        return device

    def site(self, name: str) -> Site:
        """The site called `name`; an `InputError` if there is none."""
        return self.sites[self._index(name)]

    def v(self, name: str) -> Float[Tensor, "d_in C"]:
        """Read directions of a site."""
        return self.subcomponents.v[self._index(name)].to(self.device)

    def u(self, name: str) -> Float[Tensor, "C d_out"]:
        """Write directions of a site."""
        return self.subcomponents.u[self._index(name)].to(self.device)

    @torch.no_grad()
    def delta(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """What the subcomponents leave over: `W - V U`."""
        weight = self.site(name).weight.float()
        return torch.addmm(weight, self.v(name), self.u(name), alpha=-1)

    @cached_property
    def ranks(self) -> list[Ranks | None]:
        """Ranks of every site's weight, as it was when they were first asked for."""
        return [ranks(site.weight) for site in self.sites]

    def original_indices(self, name: str) -> list[int]:
        """The column number that each subcomponent of a site had before others were folded."""
        return list(self.subcomponents.original[self._index(name)])

    def save(
        self,
        path: str | Path,
        metrics: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write this decomposition to a directory; see `vpd_lens.decomposition.saving.save`."""
        from vpd_lens.decomposition.saving import save

        return save(self, path, metrics, dtype)

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

    def __str__(self) -> str:
        console = Console(width=100, no_color=True, file=(text := StringIO()))
        console.print(repr(self), sites_table(self), sep="\n", highlight=False, markup=False)
        return text.getvalue().rstrip()

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
                `"stochastic_subset"`, `"adversarial"`, `"random"`, `"zero"`; or explicit masks:
                a mapping from site name to `[*batch, C]` (sites left out keep their weight), or
                one concatenated `[*batch, C_total]`. Masks hold in this thread only.
            threshold: For `"rounded"`: a subcomponent is on where its importance exceeds it.
            delta: The deltas' mask with explicit masks; the named modes fix it themselves.
            n_steps: Ascent steps of `"adversarial"`, each of `step_size`.
            step_size: See `n_steps`.
            seed: For modes that draw random numbers; `None`: from torch's global generator.

        Raises:
            InputError: If the mode is unknown or the masks do not fit.
            VPDError: In a forward that goes around the masks, or is handed a key-value cache under
                masks that follow from the whole sequence.

        Examples:
            >>> with model.vpd.masked("rounded", threshold=0.1):  # doctest: +SKIP
            ...     model.generate("The princess", max_new_tokens=10)
        """
        context = None  # the target's
        if not isinstance(mode, str):
            given = masks_from_tensors(mode, delta, self.layout, self.device)
            context = MaskContext("given", given=given)
        elif mode not in MODES:
            raise InputError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
        elif mode != "target":
            generator = None
            if seed is not None:
                generator = torch.Generator(device=self.device).manual_seed(seed)
            context = MaskContext(mode, threshold, n_steps, step_size, generator)
        with self.forwards.during(context=context):
            yield self

    def undisturbed(self) -> AbstractContextManager[None]:
        """A block in evaluation mode in which a user's temporary hooks from outside are silent."""
        return self.forwards.undisturbed()

    def kept_below(self) -> AbstractContextManager[None]:
        """A block in which forwards on an input that was seen before begin at the first site.

        The model's blocks below it run once per input (the tensor, not its values), also for the
        target's forward. Permanent hooks of those blocks run once, too.
        """
        return self.forwards.kept_below()

    def frozen_subcomponents(self) -> AbstractContextManager[None]:
        """A block in which forwards record no gradient for `V` and `U`."""
        return self.forwards.during(frozen=True)

    def run(self, masks: AnyMasks | None, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model under fixed masks, in evaluation mode, without user hooks.

        Masks are broadcast over leading dimensions of size 1; `None` runs the target. The other
        arguments are passed to the model.

        Raises:
            InputError: If the masks do not fit the input's batch and positions.
            VPDError: If the forward pass went around a masked matrix.
        """
        return self._run(masks, args, kwargs)[0]

    @torch.no_grad()
    def run_recording(
        self, masks: AnyMasks | None, *args: Any, **kwargs: Any
    ) -> tuple[Any, list[Tensor]]:
        """Like `run`, without gradients, and with every site's output as written."""
        output, done = self._run(masks, args, kwargs, record=True)
        return output, [y for y in done.outputs or () if y is not None]

    def _run(
        self, masks: AnyMasks | None, args: tuple, kwargs: dict[str, Any], record: bool = False
    ) -> tuple[Any, Pass]:
        _ = self.device
        with self.undisturbed():
            return self.forwards.run(masks, args, kwargs, record)

    @torch.no_grad()
    def target(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """One forward of the target, like `run`: output, and input `[*batch, d_in]` of every site.

        Raises:
            VPDError: If some site was not reached.
        """
        with self.forwards.undisturbed(again=True):
            output, done = self._run(None, args, kwargs)
        if missing := [n for n, x in zip(self.layout.names, done.inputs, strict=True) if x is None]:
            raise VPDError(
                f"the forward pass never reached {missing}, so causal importances cannot be "
                "computed. Run the whole model (no stop_at_layer) and leave split-qkv flags off."
            )
        inputs = [x for x in done.inputs if x is not None]
        if len({x.shape[:-1] for x in inputs}) > 1:
            raise VPDError(f"the sites' inputs differ in batch or positions. {FLAGS_HINT}")
        return output, inputs

    def pre_importance(
        self, inputs: Sequence[Tensor], real: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid causal importances `z` from every site's input (see `target`), in fp32.

        Those of `real` positions do not depend on the others, which are padding.
        """
        real = None if real is None else real.to(inputs[0].device)
        return self.importance(inputs, self.subcomponents, real).float()

    @torch.no_grad()
    def causal_importance(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*batch C_total"]:
        """Causal importances `g` in [0, 1] of all subcomponents on an input of the model.

        `layout.split` or `layout.columns` tells the sites apart. Padding in an `attention_mask` is
        left out of account.
        """
        _, inputs = self.target(*args, **kwargs)
        return lower_leaky(self.pre_importance(inputs, real_positions(self.model, args, kwargs)))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.forwards.state
        if state.current is not None:
            return self.forwards.original(*args, **kwargs)
        _ = self.device
        if (context := state.context) is not None:
            return self.forwards.run(self._masks_for(context, args, kwargs), args, kwargs)[0]
        output, done = self.forwards.run(None, args, kwargs)
        inputs = [x for x in done.inputs if x is not None]
        if len(inputs) == len(self.sites) and self._importance_watched(kwargs):
            real = real_positions(self.model, args, kwargs)
            self._through_hooks(lower_leaky(self.pre_importance(inputs, real)))
        return output

    def _importance_watched(self, kwargs: dict[str, Any]) -> bool:
        """Whether anyone listens to `hook_ci` where the function sees the whole sequence."""
        listened = any(has_listeners(site.hooks.hook_ci) for site in self.sites)
        return listened and cached_positions(kwargs) == 0

    def _through_hooks(self, importance: Tensor) -> Tensor:
        if not any(has_listeners(site.hooks.hook_ci) for site in self.sites):
            return importance
        parts = zip(self.sites, self.layout.split(importance), strict=True)
        return torch.cat([site.hooks.hook_ci(part) for site, part in parts], dim=-1)

    def _masks_for(self, context: MaskContext, args: tuple, kwargs: dict[str, Any]) -> Masks:
        """The masks of this forward; importances come from a clean forward of the target."""
        generation: Generation | None = self.forwards.state.generation
        if not context.needs_importance:
            if self._importance_watched(kwargs):
                whole, named = whole_call(args, kwargs, generation is not None)
                self._through_hooks(self.causal_importance(*whole, **named))
            return context.masks(torch.zeros(self.layout.total, device=self.device), self.layout)
        if generation is not None:
            whole, named = generation.whole_call(args, kwargs)
        elif n := cached_positions(kwargs):
            raise VPDError(
                f"masks {context.mode!r} follow from the whole sequence, but {n} of its positions "
                "lie in a key-value cache that was handed in. Use model.generate, pass the whole "
                "sequence without a cache, or give explicit masks."
            )
        else:
            whole, named = whole_call(args, kwargs)
        output, inputs = self.target(*whole, **named)
        real = real_positions(self.model, whole, named)
        with torch.no_grad():
            importance = lower_leaky(self.pre_importance(inputs, real))
        if generation is not None:
            importance = importance[:, generation.n_used :]
            real = None if real is None else real[:, generation.n_used :]
        importance = self._through_hooks(importance)
        if context.mode != "adversarial":
            masks = context.masks(importance, self.layout, real)
        else:
            sources = None if generation is None else generation.sources
            if sources is None:
                sources = self.find_adversary(context, importance, output, whole, named)
            if generation is not None:
                generation.sources = sources
            masks = sources.masks(importance)
        return masks if generation is None else generation.remember(masks)

    def find_adversary(
        self, context: MaskContext, importance: Tensor, output: Tensor, args: tuple, kwargs: dict
    ) -> Sources:
        """Sources, shared over batch and positions, that hurt the output on one input most."""
        real = real_positions(self.model, args, kwargs)
        quiet, frozen = self.forwards.undisturbed(again=True), self.frozen_subcomponents()
        # HookedTransformer.generate runs in inference mode, whose tensors cannot take part in a
        # backward pass; clones made outside it can.
        below = self.kept_below()
        with torch.inference_mode(False), torch.enable_grad(), quiet, frozen, below:
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            distance = Divergence(output.clone(), self.divergence, real)
            return ascend(
                lambda masks: distance(self.run(masks, *args, **kwargs)),
                importance.clone(),
                shared_sources(importance, self.layout, context.generator),
                context.n_steps,
                context.step_size,
            )[0]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.forwards.during(generation=Generation()):
            return self.attachment.original["generate"](*args, **kwargs)

    def _generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self.forwards.during(generation=Generation()):
            yield from self.attachment.original["generate_stream"](*args, **kwargs)

    def _run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        output, cache = self.attachment.original["run_with_cache"](*args, **kwargs)
        if self.forwards.state.context is not None:
            for name in ("compute_head_results", "_ensure_head_results"):  # the latter since 4.3
                if hasattr(cache, name):
                    setattr(cache, name, partial(self.forwards.compute_head_results, cache))
        return output, cache
