"""Endless, seeded, resumable token batches from whatever the data is.

`token_batches` takes arrays, files, directories of text, Hugging Face datasets, iterables of
batches and generator functions; each kind is one small class with the interface `TokenBatches`.
"""

from vpd_lens.training.data.batches import TokenBatches
from vpd_lens.training.data.source import token_batches

__all__ = ["TokenBatches", "token_batches"]
