"""`Decomposition`: the handle `model.vpd` that an attached model carries.

Every forward of the model goes through `_forward`, which decides the masks of `forward.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.call import Generation, real_positions
from vpd_lens.decomposition.divergence import CustomDivergence, DivergenceKind
from vpd_lens.decomposition.forward import Forwards
from vpd_lens.decomposition.heads import compute_head_results
from vpd_lens.decomposition.importance import build_importance, lower_leaky, sized_importance
from vpd_lens.decomposition.labels import Labels
from vpd_lens.decomposition.masking import importance_watched, masks_for, through_hooks
from vpd_lens.decomposition.masks import Masks
from vpd_lens.decomposition.modes import MODES, MaskContext, masks_from_tensors
from vpd_lens.decomposition.ranks import Ranks, ranks, sites_table
from vpd_lens.decomposition.runs import Runs
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.description import Origin
from vpd_lens.errors import InputError, did_you_mean
from vpd_lens.rendering import Shown
from vpd_lens.sites import Site


def target_size(model: nn.Module, sites: Sequence[Site]) -> tuple[int, int]:
    """Residual width and number of layers of a target."""
    cfg = getattr(model, "cfg", None)
    width = getattr(cfg, "d_model", None) or max(site.shape[0] for site in sites)
    return int(width), int(getattr(cfg, "n_layers", None) or 1)


class Decomposition(Shown, Runs):
    """Subcomponents and causal importance function of a model, attached to it by hooks.

    Made by `vpd_lens.decompose`, found as `model.vpd`. The base model's weights are never
    changed; `vpd_lens.remove` takes everything off again.

    Attributes:
        sites: The decomposed matrices, in forward order.
        subcomponents: `V` and `U`.
        importance: The causal importance function.
        divergence: What "the same output" means: `"kl"` for logits, `"mse"`, or a callable.
        trained_steps: Training steps behind this decomposition; 0 if it is untrained.
        other_origin: Where the model came from whose difference from it is decomposed, if any.
        training_config: The `VPDConfig` it was trained with, as a dictionary; of an imported one,
            its authors' configuration.
    """

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
        self.other_origin: Origin | None = None
        self._labels = Labels()

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
        """What the subcomponents leave over of what is decomposed: `W - V U`."""
        weight = self.site(name).decomposed.float()
        return torch.addmm(weight, self.v(name), self.u(name), alpha=-1)

    @cached_property
    def ranks(self) -> list[Ranks | None]:
        """Ranks of what is decomposed at every site, as it was when they were first asked for."""
        return [ranks(site.decomposed) for site in self.sites]

    def project(
        self, gradients: Mapping[str, Tensor] | Callable[[], Tensor]
    ) -> dict[str, Float[Tensor, " C"]]:
        """The derivative of a loss by the strength of each subcomponent; see `projection`."""
        from vpd_lens.decomposition.projection import project

        return project(self, gradients)

    @property
    def labels(self) -> Labels:
        """What subcomponents are called; everything made from the model shows it.

        Labels are of V and U as they are. Once those have changed, by training or folding, there
        are none, with a warning.

        Raises:
            ArtefactError: If labels of another decomposition are set.

        Examples:
            >>> model.vpd.labels["blocks.0.mlp.out:17"] = "self after ("  # doctest: +SKIP
        """
        from vpd_lens.decomposition.saving import fingerprint

        if (own := fingerprint(self)) != self._labels.fingerprint:
            if self._labels:
                warnings.warn(
                    f"the decomposition has changed since {len(self._labels)} of its subcomponents "
                    "were labelled; those labels are of what it was, and no longer shown.",
                    stacklevel=2,
                )
            layout = self.layout
            self._labels = Labels(own, dict(zip(layout.names, layout.sizes, strict=True)))
        return self._labels

    @labels.setter
    def labels(self, labels: Labels) -> None:
        labels.require(self.labels.fingerprint)
        self._labels = labels

    def original_indices(self, name: str) -> list[int]:
        """The column number that each subcomponent of a site had before others were folded."""
        return list(self.subcomponents.original[self._index(name)])

    def save(
        self,
        path: str | Path,
        metrics: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        report: Any = None,
    ) -> Path:
        """Write this decomposition to a directory; see `vpd_lens.decomposition.saving.save`."""
        from vpd_lens.decomposition.saving import save

        return save(self, path, metrics, dtype, report)

    def push_to_hub(self, repository: str, **how: Any) -> str:
        """Publish this decomposition on the Hugging Face hub; see `vpd_lens.interop.hub.push`."""
        from vpd_lens.interop.hub import push

        return push(self, repository, **how)

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

    def __rich__(self) -> Group:
        own, function = (
            sum(p.numel() for p in part.parameters())
            for part in (self.subcomponents, self.importance)
        )
        sizes = (
            f"V and U have {own:,} parameters, the causal importance function {function:,}: "
            f"{function / own:.1f} times as many (importance.d_model, .n_blocks and .n_heads)."
        )
        labelled = f"{len(self.labels):,} subcomponents are labelled (.labels)."
        parts = [Text(repr(self)), Text(sizes), *[Text(labelled)] * bool(self.labels)]
        return Group(*parts, sites_table(self))

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

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.forwards.state
        if state.current is not None:
            return self.forwards.original(*args, **kwargs)
        _ = self.device
        if (context := state.context) is not None:
            return self.forwards.run(masks_for(self, context, args, kwargs), args, kwargs)[0]
        output, done = self.forwards.run(None, args, kwargs)
        inputs = [x for x in done.inputs if x is not None]
        if len(inputs) == len(self.sites) and importance_watched(self, kwargs):
            real = real_positions(self.model, args, kwargs)
            through_hooks(self, lower_leaky(self.pre_importance(inputs, real)))
        return output

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.forwards.during(generation=Generation()):
            return self.attachment.original["generate"](*args, **kwargs)

    def _generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self.forwards.during(generation=Generation()):
            yield from self.attachment.original["generate_stream"](*args, **kwargs)

    def _run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        lists = {name: kwargs.get(name) for name in ("fwd_hooks", "bwd_hooks")}
        self._require_known(args[1:], lists)  # the first is what the model runs on
        return self.attachment.original["run_with_hooks"](*args, **kwargs)

    def _hooks(self, *args: Any, **kwargs: Any) -> Any:
        self._require_known(args, kwargs)
        return self.attachment.original["hooks"](*args, **kwargs)

    def _require_known(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """TransformerLens passes over names that do not exist, and says nothing."""
        known: Any = self.model.hook_dict
        for name in tree_leaves((args, kwargs)):
            if isinstance(name, str) and ".vpd." in name and name not in known:
                ours = [point for point in known if ".vpd." in point]
                raise InputError(f"there is no hook point {name!r}{did_you_mean(name, ours)}")

    def _run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        self._require_known((), {"names_filter": kwargs.get("names_filter")})
        output, cache = self.attachment.original["run_with_cache"](*args, **kwargs)
        if self.forwards.state.context is not None:
            for name in ("compute_head_results", "_ensure_head_results"):  # the latter since 4.3
                if hasattr(cache, name):
                    parts = self.model, self.sites, self.subcomponents, cache
                    setattr(cache, name, partial(compute_head_results, *parts))
        return output, cache
