"""Masks while tokens are generated, the same with and without a key-value cache.

The paper's causal importance function looks ahead, so importances of old tokens would change with
every token that is appended, and cached keys and values would belong to masks that no longer hold.
The rule here: the prompt is masked as in one forward on the prompt; each later token gets the
masks that follow from everything up to and including itself; masks once used are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpd_lens.decomposition.call import whole_call
from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.errors import VPDError


class Generation:
    """What one call of `generate` has seen: the input so far and the masks already used.

    Attributes:
        history: The whole input so far, `[batch, pos]` tokens or `[batch, pos, d_model]`.
        used: Masks of its positions, but for those that are new.
        sources: Those that `adversarial` masks found on the prompt, kept for what follows.
    """

    def __init__(self) -> None:
        self.history: Tensor | None = None
        self.used: Masks | None = None
        self.sources: Sources | None = None

    @property
    def n_used(self) -> int:
        """Positions that have masks already."""
        return 0 if self.used is None else self.used.components.shape[1]

    def whole_call(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of an uncached forward on everything up to this call's last position.

        Args:
            args: Positional arguments of the call, the first being tokens or residual.
            kwargs: Its keyword arguments.

        Raises:
            VPDError: If the call neither repeats the whole sequence nor adds one token to it.
        """
        self.history = self._extended(args[0] if args else kwargs["input"])
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        return whole_call((self.history,), rest, generating=True)

    def remember(self, new: Masks, args: tuple, kwargs: dict[str, Any]) -> Masks:
        """Keep the masks of the new positions.

        Args:
            new: Those, `[batch, new, C_total]`.
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.

        Returns:
            The masks of the positions that the call passes.
        """
        if self.used is not None:
            new = Masks(
                torch.cat([self.used.components, new.components], dim=1),
                torch.cat([self.used.delta, new.delta], dim=1),
                None
                if self.used.routed is None or new.routed is None
                else torch.cat([self.used.routed, new.routed], dim=1),
            )
        self.used = new
        last = slice(-(args[0] if args else kwargs["input"]).shape[1], None)
        routed = None if new.routed is None else new.routed[:, last]
        return Masks(new.components[:, last], new.delta[:, last], routed)

    def _extended(self, x: Tensor) -> Tensor:
        if self.history is None or x.shape[1] == self.history.shape[1] + 1:
            return x
        if x.shape[1] == 1:
            return torch.cat([self.history, x], dim=1)
        raise VPDError(
            f"generation passed {x.shape[1]} positions after {self.history.shape[1]}; masked "
            "generation needs the whole sequence or its last token at each step."
        )
