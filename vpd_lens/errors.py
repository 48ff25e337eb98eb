"""The errors that `vpd_lens` raises: what was got, what was expected and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class VPDError(Exception):
    """Base class of every error raised by `vpd_lens`."""


class AttachError(VPDError):
    """A decomposition cannot be attached to this model, or is attached already."""


class InputError(VPDError, ValueError):
    """Tokens, masks or another argument have the wrong shape, range or type."""


class ConfigError(VPDError, ValueError):
    """A configuration has unknown, inconsistent or unusable fields."""


class DataError(VPDError, ValueError):
    """A data source cannot be read or does not fit the model."""


class ArtefactError(VPDError):
    """A saved decomposition or checkpoint is damaged, foreign or too new."""


class HubError(VPDError):
    """The Hugging Face hub cannot be reached, refuses, or has no such repository."""


class EndpointError(VPDError):
    """A language model that is asked for labels or judgements cannot be reached, or refuses."""


class NonFiniteLossError(VPDError, ArithmeticError):
    """A loss term became NaN or infinite during training."""


class OutOfMemoryError(VPDError, MemoryError):
    """A run needs, or has asked for, more memory than the device has."""


class TrainingInterrupted(VPDError):
    """Training stopped on a signal after writing a checkpoint."""


class CollapseError(VPDError):
    """The causal importance function collapsed, and the run was told to stop then."""


class BusyError(VPDError):
    """The explorer's model is at work for somebody else, or too much is waiting for it."""


class ProcessError(VPDError):
    """The processes of a training job disagree, or one of them died or fell silent."""


def did_you_mean(got: str, known: Iterable[str], likely: Sequence[str] = ()) -> str:
    """The end of a message about an unknown name: `"; did you mean ...?"`, or `""`.

    `likely` is what may have been meant where no known name resembles the one got.
    """
    meant = difflib.get_close_matches(got, list(known), n=1) or list(likely)[:3]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 300 characters; or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
