"""`Runs`: forwards of a decomposed model without the hooks of whoever else uses it.

What the loss, the adversary, evaluation and analyses are made of: the model under given masks, the
target with the inputs of its sites, and their causal importances.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vpd_lens.decomposition.call import real_positions
from vpd_lens.decomposition.divergence import CustomDivergence, DivergenceKind
from vpd_lens.decomposition.forward import FLAGS_HINT, Forwards, Pass
from vpd_lens.decomposition.importance import ImportanceFunction, lower_leaky
from vpd_lens.decomposition.masks import AnyMasks, Layout
from vpd_lens.decomposition.subcomponents import Subcomponents
from vpd_lens.errors import VPDError
from vpd_lens.sites import Site


class Runs(nn.Module):
    """The part of a `Decomposition` that runs its model."""

    # Kept in __dict__: registered, they would put the base model's weights into this module.
    model: nn.Module
    sites: list[Site]
    forwards: Forwards
    subcomponents: Subcomponents
    importance: ImportanceFunction
    divergence: DivergenceKind | CustomDivergence

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
                for site in self.sites:
                    site.origin = None if site.origin is None else site.origin.to(device)
        return device

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
        self, masks: AnyMasks | None, args: tuple, kwargs: dict[str, Any], **how: bool
    ) -> tuple[Any, Pass]:
        _ = self.device
        with self.undisturbed():
            return self.forwards.run(masks, args, kwargs, **how)

    @torch.no_grad()
    def target(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """One forward of the target, like `run`: output, and input `[*batch, d_in]` of every site.

        Raises:
            VPDError: If some site was not reached.
        """
        with self.forwards.undisturbed(again=True):
            output, done = self._run(None, args, kwargs)
        return output, self._all_inputs(done)

    @torch.no_grad()
    def inputs(self, *args: Any, **kwargs: Any) -> list[Float[Tensor, "*batch d_in"]]:
        """The input of every site in a forward of the target that ends at the last of them.

        The blocks above it and the unembedding do not run.

        Raises:
            VPDError: If some site was not reached.
        """
        with self.forwards.undisturbed(again=True):
            _, done = self._run(None, args, kwargs, only_inputs=True)
        return self._all_inputs(done)

    def _all_inputs(self, done: Pass) -> list[Tensor]:
        if missing := [n for n, x in zip(self.layout.names, done.inputs, strict=True) if x is None]:
            raise VPDError(
                f"the forward pass never reached {missing}, so causal importances cannot be "
                "computed. Run the whole model (no stop_at_layer) and leave split-qkv flags off."
            )
        inputs = [x for x in done.inputs if x is not None]
        if len({x.shape[:-1] for x in inputs}) > 1:
            raise VPDError(f"the sites' inputs differ in batch or positions. {FLAGS_HINT}")
        return inputs

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
        inputs = self.inputs(*args, **kwargs)
        return lower_leaky(self.pre_importance(inputs, real_positions(self.model, args, kwargs)))
