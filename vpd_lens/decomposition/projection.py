"""Gradients of a loss, projected on subcomponents.

If every subcomponent has a strength `s_c`, so that `W(s) = W + sum_c (s_c - 1) V_c U_c`, then

    dL/ds_c = V_c^T (dL/dW) U_c

at `s = 1`, the model itself: which parts of the model a loss would strengthen or weaken. The sum
over positions is in `dL/dW` already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from vpd_lens.decomposition.handle import Decomposition
from vpd_lens.errors import InputError


def project(
    vpd: Decomposition, gradients: Mapping[str, Tensor] | Callable[[], Tensor]
) -> dict[str, Float[Tensor, " C"]]:
    """The derivative of a loss by the strength of each subcomponent, by site, in the loss's unit.

    A positive one means that strengthening the subcomponent makes the loss larger. Nothing of the
    model is changed. To first order, ablating a subcomponent changes the loss by minus that.

    Args:
        vpd: The decomposition, `model.vpd`.
        gradients: A function without arguments that runs the model and returns a scalar loss; or
            gradients of any loss by decomposed weights, `{site: [d_in, d_out]}`, of some sites.

    Raises:
        InputError: If a site does not exist, a gradient has another shape than its weight, or the
            loss is no scalar or does not come from the model.

    Examples:
        >>> found = model.vpd.project(lambda: model(tokens, return_type="loss"))  # doctest: +SKIP
        >>> found["blocks.0.mlp.in"].topk(3)  # doctest: +SKIP
    """
    if callable(gradients):
        return _by_masks(vpd, gradients)
    found = {}
    for name, gradient in gradients.items():
        expected = vpd.site(name).shape
        if tuple(gradient.shape) != expected:
            raise InputError(
                f"the gradient of {name} has the shape {tuple(gradient.shape)}; expected that of "
                f"its weight, [d_in, d_out] = {expected}."
            )
        v, u = vpd.v(name).detach(), vpd.u(name).detach()
        found[name] = ((v.T @ gradient.to(v)) * u).sum(-1)
    return found


def _by_masks(vpd: Decomposition, loss_of: Callable[[], Tensor]) -> dict[str, Float[Tensor, " C"]]:
    """The strengths are masks of the whole input, and the deltas stay on."""
    with torch.inference_mode(False), torch.enable_grad():
        strengths = torch.ones(vpd.layout.total, device=vpd.device, requires_grad=True)
        with vpd.masked(strengths), vpd.frozen_subcomponents():
            loss = loss_of()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(
                "the function passed to project must run the model, with gradients, and return a "
                f"scalar loss; it returned {_described(loss)}."
            )
        (found,) = torch.autograd.grad(loss.reshape(()), strengths, allow_unused=True)
    if found is None:
        raise InputError(
            "the loss passed to project does not depend on any decomposed weight of this model."
        )
    return dict(zip(vpd.layout.names, vpd.layout.split(found), strict=True))


def _described(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return f"a {type(loss).__name__}"
    shape = f"a tensor of shape {tuple(loss.shape)}"
    return shape if loss.requires_grad else f"{shape} without a gradient"
