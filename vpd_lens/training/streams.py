"""The data of a run: one stream, or two where one behaviour is decomposed.

Both give as many rows a step, each in an order of its own, and stop and go on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vpd_lens.config import VPDConfig
from vpd_lens.data import Batch, TokenBatches, token_batches
from vpd_lens.errors import ConfigError, DataError, InputError


class Streams:
    """Endless pairs of batches: of `data`, and of `elsewhere` (or `None`).

    `reading` are further arguments of `token_batches`.

    Attributes:
        data: The stream that shows the behaviour, or all that the model does.
        elsewhere: The stream of everything else, if there is one.

    Raises:
        ConfigError: If `elsewhere` is given and not asked for by the configuration, or missing.
        DataError: If data cannot be read or does not fit the model, or both are the same.
    """

    def __init__(self, config: VPDConfig, data: Any, elsewhere: Any, **reading: Any) -> None:
        _require_asked_for(config, data, elsewhere)
        reading |= {"batch_size": config.batch_size}
        self.data = token_batches(data, seq_len=config.seq_len, seed=config.seed, **reading)
        self.elsewhere: TokenBatches | None = None
        if elsewhere is not None:
            length = config.elsewhere.seq_len or config.seq_len
            own = {"seq_len": length, "seed": config.seed + 1, **reading}
            with _named():
                self.elsewhere = token_batches(elsewhere, **own)

    @property
    def longest(self) -> int:
        """Tokens per row, of the stream with more; 1 where that is not known."""
        return max(self.data.seq_len or 1, (self.elsewhere and self.elsewhere.seq_len) or 1)

    def __next__(self) -> tuple[Batch, Batch | None]:
        """This process's rows of the next step."""
        batch = next(self.data)
        with _named():
            return batch, None if self.elsewhere is None else next(self.elsewhere)

    def state_dict(self) -> dict[str, Any]:
        """The positions of both, as JSON."""
        state = self.data.state_dict()
        return (
            state if self.elsewhere is None else state | {"elsewhere": self.elsewhere.state_dict()}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to positions from `state_dict`; see `TokenBatches`."""
        self.data.load_state_dict(state)
        if self.elsewhere is not None:
            self.elsewhere.load_state_dict(state["elsewhere"])


@contextmanager
def _named() -> Iterator[None]:
    """Errors of the second stream's data say that they are of it."""
    try:
        yield
    except (DataError, InputError) as error:
        raise type(error)(f"elsewhere: {error}") from error


def _require_asked_for(config: VPDConfig, data: Any, elsewhere: Any) -> None:
    wanted, given = config.elsewhere.coefficient > 0, elsewhere is not None
    if wanted and not given:
        raise ConfigError(
            "the configuration decomposes one behaviour (elsewhere.coefficient="
            f"{config.elsewhere.coefficient:g}), and elsewhere is None. Pass elsewhere=, data of "
            "everything else; or use VPDConfig.small() to decompose the whole model."
        )
    if given and not wanted:
        raise ConfigError(
            "elsewhere is given, but the configuration has elsewhere.coefficient=0 and would not "
            "look at it. Use VPDConfig.targeted(), or leave elsewhere out."
        )
    if given and elsewhere is data:
        raise DataError(
            "data and elsewhere are the same. Pass what shows the behaviour as data, and what does "
            "not as elsewhere."
        )
