"""The masks of one forward inside `with vpd.masked(...)`, from what the block asks for.

Causal importances come from a clean forward of the target on the whole sequence, also where the
forward itself continues a sequence whose beginning lies in a key-value cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.call import cached_positions, real_positions, whole_call
from vpd_lens.decomposition.divergence import Divergence
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.decomposition.modes import MaskContext
from vpd_lens.decomposition.runs import Runs
from vpd_lens.errors import VPDError
from vpd_lens.sites.site import has_listeners


def masks_for(vpd: Runs, context: MaskContext, args: tuple, kwargs: dict) -> Masks:
    """The masks of a forward with these arguments.

    Raises:
        VPDError: If they follow from the whole sequence, and a part of it lies in a cache that was
            handed in.
    """
    generation = vpd.forwards.state.generation
    if not context.needs_importance:
        if importance_watched(vpd, kwargs):
            whole, named = whole_call(args, kwargs, generation is not None)
            through_hooks(vpd, vpd.causal_importance(*whole, **named))
        return context.masks(torch.zeros(vpd.layout.total, device=vpd.device), vpd.layout)
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
    with vpd.kept_below():
        return _from_importance(vpd, context, whole, named)


def importance_watched(vpd: Runs, kwargs: dict[str, Any]) -> bool:
    """Whether anyone listens to `hook_ci` where the function sees the whole sequence."""
    listened = any(has_listeners(site.hooks.hook_ci) for site in vpd.sites)
    return listened and cached_positions(kwargs) == 0


def through_hooks(vpd: Runs, importance: Tensor) -> Tensor:
    """Importances after `hook_ci` of every site."""
    if not any(has_listeners(site.hooks.hook_ci) for site in vpd.sites):
        return importance
    parts = zip(vpd.sites, vpd.layout.split(importance), strict=True)
    return torch.cat([site.hooks.hook_ci(part) for site, part in parts], dim=-1)


def _from_importance(vpd: Runs, context: MaskContext, args: tuple, kwargs: dict) -> Masks:
    generation, adversarial = vpd.forwards.state.generation, context.mode == "adversarial"
    sources = generation.sources if adversarial and generation is not None else None
    output = None
    if adversarial and sources is None:
        output, inputs = vpd.target(*args, **kwargs)
    else:
        inputs = vpd.inputs(*args, **kwargs)
    real = real_positions(vpd.model, args, kwargs)
    with torch.no_grad():
        importance = lower_leaky(vpd.pre_importance(inputs, real))
    if generation is not None:
        importance = importance[:, generation.n_used :]
        real = None if real is None else real[:, generation.n_used :]
    importance = through_hooks(vpd, importance)
    if not adversarial:
        masks = context.masks(importance, vpd.layout, real)
    else:
        if sources is None:
            sources = _find_adversary(vpd, context, importance, output, args, kwargs)
        if generation is not None:
            generation.sources = sources
        masks = sources.masks(importance)
    return masks if generation is None else generation.remember(masks)


def _find_adversary(
    vpd: Runs, context: MaskContext, importance: Tensor, output: Any, args: tuple, kwargs: dict
) -> Sources:
    """Sources, shared over batch and positions, that hurt the output on one input most."""
    real = real_positions(vpd.model, args, kwargs)
    quiet, frozen = vpd.forwards.undisturbed(again=True), vpd.frozen_subcomponents()
    with torch.inference_mode(False), torch.enable_grad(), quiet, frozen:
        args, kwargs = tree_map_only(Tensor, _differentiable, (args, kwargs))
        distance = Divergence(_differentiable(output), vpd.divergence, real)
        return ascend(
            lambda masks: distance(vpd.run(masks, *args, **kwargs)),
            _differentiable(importance),
            shared_sources(importance, vpd.layout, context.generator),
            context.n_steps,
            context.step_size,
        )[0]


def _differentiable(tensor: Tensor) -> Tensor:
    """A tensor that may take part in a backward pass, as those of inference mode may not.

    HookedTransformer.generate runs in inference mode.
    """
    return tensor.clone() if tensor.is_inference() else tensor
