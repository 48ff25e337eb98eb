"""`TokenBatches`, the interface of all data, and what is known about the model it feeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from vpd_lens.errors import DataError, InputError

STATE_VERSION = 1


@dataclass(frozen=True)
class ModelLimits:
    """What the data must respect; None where the model does not say.

    Attributes:
        d_vocab: Number of tokens.
        n_ctx: Longest row.
        tokenizer: A Hugging Face tokenizer.
        default_prepend_bos: The model's own BOS policy.
    """

    d_vocab: int | None
    n_ctx: int | None
    tokenizer: Any
    default_prepend_bos: bool

    @classmethod
    def of(cls, model: Any) -> ModelLimits:
        """Read the limits of a TransformerLens model (or of anything that has some of them)."""
        cfg = getattr(model, "cfg", None)

        def positive(name: str) -> int | None:
            # TransformerLens writes -1 for "not set".
            value = getattr(cfg, name, None)
            return int(value) if value is not None and value > 0 else None

        return cls(
            d_vocab=positive("d_vocab"),
            n_ctx=positive("n_ctx"),
            tokenizer=getattr(model, "tokenizer", None),
            default_prepend_bos=bool(getattr(cfg, "default_prepend_bos", True)),
        )


@dataclass(frozen=True)
class BatchSpec:
    """The arguments of `token_batches` that every kind of source shares, range-checked.

    Attributes:
        batch_size: Rows per batch.
        seq_len: Tokens per row; None if the data decides.
        seed: Seed of every random choice.
        shuffle: Whether there are random choices at all.
        prepend_bos: The BOS policy asked for.
        limits: The model's.
        rows: Which rows of every batch are wanted; all processes of a job count the same batches.
    """

    batch_size: int
    seq_len: int | None
    seed: int
    shuffle: bool
    prepend_bos: bool | None
    limits: ModelLimits
    rows: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; expected at least 1.")
        if self.seq_len is None:
            return
        if self.seq_len < 1:
            raise InputError(f"seq_len is {self.seq_len}; expected at least 1, or None.")
        n_ctx = self.limits.n_ctx
        if n_ctx is not None and self.seq_len > n_ctx:
            raise InputError(
                f"seq_len is {self.seq_len}, but the model's context model.cfg.n_ctx is {n_ctx}. "
                f"Pass seq_len={n_ctx} or less, or None for the longest that fits."
            )

    def length(self, row_length: int | None = None, bos: bool = False) -> int:
        """The length of a row: as asked for, or the longest that model and data allow.

        Args:
            row_length: Tokens in a row of the data; None if the data is a stream.
            bos: Whether one of them is a BOS that is put in front.

        Raises:
            DataError: If nothing determines the length, or the rows are too short.
        """
        choices = [n for n in (self.limits.n_ctx, row_length) if n is not None]
        if self.seq_len is None and not choices:
            raise DataError(
                "seq_len is None, but neither the model (model.cfg.n_ctx) nor the data says how "
                "long a row is. Pass seq_len."
            )
        length = min(choices) if self.seq_len is None else self.seq_len
        if row_length is not None and row_length < length:
            raise DataError(
                f"source has rows of {row_length} tokens, shorter than seq_len={length}. Pass "
                f"seq_len={row_length} or less."
            )
        if length - bos < 1:
            raise InputError(
                f"seq_len is {length} with a BOS token in front: no room is left for data. Pass "
                "seq_len of 2 or more, or prepend_bos=False."
            )
        return length

    def forbid_bos(self, what: str) -> None:
        """Refuse `prepend_bos=True` for rows that are cut already.

        Raises:
            DataError: If it is True.
        """
        if self.prepend_bos:
            raise DataError(
                f"prepend_bos=True, but source is {what}, whose rows are used as they are. Put "
                "the BOS token into the rows, or leave prepend_bos=None."
            )

    def generator(self, step: int) -> torch.Generator:
        """The random generator of epoch or block number `step`."""
        return torch.Generator().manual_seed(self.seed + step)

    def order(self, n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
        """A permutation of `n` things, or their own order without `shuffle`."""
        return torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)


class TokenBatches(ABC):
    """An endless iterator of batches that can stop, be saved as JSON, and go on in a new process.

    Attributes:
        batch_size: Rows per batch.
        seq_len: Tokens per row; None if the source decides (iterables without `seq_len`).
        description: What the data is, how much there is, and the BOS policy, for people.
    """

    def __init__(
        self, spec: BatchSpec, seq_len: int | None, description: str, identity: dict[str, Any]
    ) -> None:
        self.batch_size = spec.batch_size
        self.seq_len = seq_len
        self.description = description
        self._spec = spec
        self._identity = {
            "version": STATE_VERSION,
            "kind": type(self).__name__,
            "batch_size": spec.batch_size,
            "seq_len": seq_len,
            "seed": spec.seed,
            "shuffle": spec.shuffle,
            **identity,
        }

    def __iter__(self) -> TokenBatches:
        return self

    @abstractmethod
    def __next__(self) -> Shaped[Tensor, "batch *row"]:
        """The next batch: int64 `[batch_size, seq_len]` on the CPU (floats for toy models).

        Of these rows, those that the specification wants.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-serialisable values.

        Returns:
            What `load_state_dict` needs to go on with exactly the batches that would come next.
        """
        return {**self._identity, "position": self._position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Args:
            state: From `state_dict` of an object made from the same data with the same arguments.

        Raises:
            DataError: If data or arguments differ, or the source cannot be resumed.
        """
        unlike = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if unlike or "position" not in state:
            raise DataError(
                "state belongs to other batches than these: "
                + ("; ".join(unlike) or "it has no position")
                + ". Resume with the data and the arguments of the interrupted run."
            )
        self._seek(state["position"])

    @abstractmethod
    def _position(self) -> dict[str, Any]:
        """What distinguishes this moment from the start, as JSON-serialisable values."""

    @abstractmethod
    def _seek(self, position: dict[str, Any]) -> None:
        """Go to what `_position` returned."""
