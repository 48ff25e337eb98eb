"""`Batch` and `TokenBatches`: what all data looks like, and how it stops and goes on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from vpd_lens.errors import DataError, InputError

STATE_VERSION = 2
PAD = -1  # marks positions without a token in rows that are not yet a `Batch`


class Batch(NamedTuple):
    """Rows of tokens, and which of them are data.

    Padding is on the right whatever it was in the source, so real tokens keep the positions that
    they have without padding.

    Attributes:
        tokens: Int64 `[batch, pos]`; floats `[batch, ...]` for models without vocabulary.
        real: Bool `[batch, pos]`, False at pads; None: every position is real.
    """

    tokens: Shaped[Tensor, "batch *row"]
    real: Bool[Tensor, "batch pos"] | None = None

    @classmethod
    def of_rows(cls, rows: Int64[Tensor, "batch pos"], pad: int) -> Batch:
        """Rows that hold `PAD` where they have no token; `pad` is put there."""
        real = rows != PAD
        return cls(rows) if real.all() else cls(torch.where(real, rows, pad), real)

    def mask_argument(self) -> dict[str, Tensor]:
        """The keyword argument of a model's forward that says what is padding; none if nothing."""
        return {} if self.real is None else {"attention_mask": self.real.long()}

    def to(self, device: torch.device | str) -> Batch:
        """This batch on another device; from pinned memory the copy is asynchronous."""
        return self.each(lambda t: t.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """This batch with the same change to `tokens` and `real`."""
        return Batch(change(self.tokens), None if self.real is None else change(self.real))


@dataclass(frozen=True)
class BatchSpec:
    """Arguments of `token_batches` and `one_pass`, range-checked; what they say of the model."""

    model: Any
    batch_size: int
    seq_len: int | None = None
    seed: int = 0
    shuffle: bool = True
    prepend_bos: bool | None = None
    rows: slice = field(default_factory=lambda: slice(None))  # of a batch, which a process wants
    once: bool = False  # the data ends after one pass, with its short last batch
    n_batches: int | None = None
    version: int = STATE_VERSION  # how the order of an epoch follows from the seed

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_batches", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected at least 1.")
        if self.seq_len is not None and self.seq_len > (self.n_ctx or math.inf):
            raise InputError(
                f"seq_len is {self.seq_len}, but the model's context model.cfg.n_ctx is "
                f"{self.n_ctx}. Pass no more than that, or None for the longest that fits."
            )

    @property
    def d_vocab(self) -> int | None:
        """Number of tokens, if the model says so."""
        return self._positive("d_vocab")

    @property
    def n_ctx(self) -> int | None:
        """Longest row, if the model says so."""
        return self._positive("n_ctx")

    def _positive(self, name: str) -> int | None:
        value = getattr(getattr(self.model, "cfg", None), name, None)
        return int(value) if value is not None and value > 0 else None  # -1: not set

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def bos(self) -> int:
        """The BOS token's number; a `DataError` if there is none."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None:
            raise DataError(
                "prepend_bos=True, but model.tokenizer has no BOS token. Set "
                "model.tokenizer.bos_token, or pass prepend_bos=False."
            )
        return int(bos)

    @property
    def pad(self) -> int:
        """What stands in `tokens` where there is none."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None and pad < (self.d_vocab or pad + 1) else 0

    @property
    def on_cuda(self) -> bool:
        """Whether the model is on a GPU, to which pinned memory is copied asynchronously."""
        parameters = getattr(self.model, "parameters", lambda: ())
        return any(parameter.is_cuda for parameter in islice(parameters(), 1))

    def length(self, row_length: int | None = None, bos: int | None = None) -> int:
        """The length of a row, with its BOS: as asked for, or the longest that is possible.

        `row_length` is that of the data's rows, None for a stream.
        """
        length = self.seq_len or min(filter(None, (self.n_ctx, row_length)), default=None)
        if length is None:
            raise DataError(
                "seq_len is None, but neither model.cfg.n_ctx nor the data gives one. Pass seq_len."
            )
        if row_length is not None and row_length < length:
            raise DataError(
                f"source has rows of {row_length} tokens, shorter than seq_len={length}. Lower it."
            )
        if bos is not None and length < 2:
            raise InputError(
                f"seq_len={length} with BOS: no room for data. Pass more, or prepend_bos=False."
            )
        return length

    def forbid_bos(self, what: str) -> None:
        """Refuse `prepend_bos=True` for rows that are cut already."""
        if self.prepend_bos:
            raise DataError(
                f"prepend_bos=True, but source is {what}, whose rows are used as they are. Put "
                "the BOS token into the rows, or leave prepend_bos=None."
            )


class TokenBatches(Iterator[Batch]):
    """An iterator of batches that can stop, be saved as JSON, and go on in a new process.

    Attributes:
        batch_size: Rows per batch.
        seq_len: Tokens per row; None if the source decides (iterables without `seq_len`).
        epoch: Number of the pass over the data that the last batch belongs to, from 0.
        description: What the data is, how much there is, and the BOS policy, for people.
    """

    def __init__(
        self,
        spec: BatchSpec,
        seq_len: int | None,
        what: str,
        bos: int | None = None,
        **identity: Any,
    ) -> None:
        self.batch_size, self.seq_len, self.epoch = spec.batch_size, seq_len, 0
        policy = "no BOS added" if bos is None else f"BOS ({bos}) before every row"
        self.description = f"{what}; {policy}"
        self._spec, self._bos = spec, bos
        self._window = (seq_len or 0) - (bos is not None)
        self._left: float = math.inf if spec.n_batches is None else spec.n_batches
        common = {"batch_size": spec.batch_size, "seq_len": seq_len, "bos": bos}
        common |= {"kind": type(self).__name__, "seed": spec.seed, "shuffle": spec.shuffle}
        self._identity = common | identity

    def __next__(self) -> Batch:
        """The wanted rows of the next batch, on the CPU; pinned if the model is on a GPU."""
        if not self._left:
            raise StopIteration
        batch = self._draw().each(lambda t: t[self._spec.rows])
        self._left -= 1
        return batch.each(Tensor.pin_memory) if self._spec.on_cuda else batch

    @abstractmethod
    def _draw(self) -> Batch:
        """All rows of the next batch. Raises StopIteration where a single pass ends."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON: what `load_state_dict` needs to give what would come next."""
        return {"version": self._spec.version, **self._identity, "position": self._position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position from `state_dict` of an object made with the same arguments.

        Raises:
            DataError: If data or arguments differ, or the source cannot be resumed.
        """
        unlike = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if unlike or "position" not in state or state.get("version") not in (1, STATE_VERSION):
            raise DataError(
                "state belongs to other batches than these: "
                + ("; ".join(unlike) or "it has no position, or is of another version")
                + ". Resume with the data and the arguments of the interrupted run."
            )
        self._spec = replace(self._spec, version=state["version"])
        self._seek(state["position"])

    @abstractmethod
    def _position(self) -> dict[str, Any]:
        """What distinguishes this moment from the start, as JSON-serialisable values."""

    @abstractmethod
    def _seek(self, position: dict[str, Any]) -> None:
        """Go to what `_position` returned."""

    def _with_bos(self, rows: Int64[Tensor, "batch n"]) -> Int64[Tensor, "batch pos"]:
        return rows if self._bos is None else F.pad(rows, (1, 0), value=self._bos)

    def _generator(self, step: int) -> torch.Generator:
        """The random generator of epoch or block number `step`."""
        seed = self._spec.seed + step
        if self._spec.version > 1:
            # Unlike a sum, two seeds never share the order of two epochs.
            sequence = np.random.SeedSequence([self._spec.seed % 2**64, step])
            seed = int(sequence.generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(seed)

    def _order(self, n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
        """A permutation of `n` things, or their own order without `shuffle`."""
        return torch.randperm(n, generator=generator) if self._spec.shuffle else torch.arange(n)
