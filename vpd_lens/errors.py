"""The errors that `vpd_lens` raises, one class per kind of trouble.

Every message names what was got, what was expected and what to do about it;
`docs/errors.md` lists them with cause and fix.
"""

from __future__ import annotations


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


class NonFiniteLossError(VPDError, ArithmeticError):
    """A loss term became NaN or infinite during training."""


class OutOfMemoryError(VPDError, MemoryError):
    """A run needs, or has asked for, more memory than the device has."""


class TrainingInterrupted(VPDError):
    """Training stopped on a signal after writing a checkpoint."""


class ProcessError(VPDError):
    """The processes of a training job disagree, or one of them died or fell silent."""
