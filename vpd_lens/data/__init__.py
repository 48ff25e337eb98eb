"""Seeded, resumable batches of tokens from whatever the data is: a layer of its own.

`token_batches` is endless, for training; `one_pass` counts every row once, for measuring.
"""

from vpd_lens.data.batches import Batch, TokenBatches
from vpd_lens.data.sources import one_pass, token_batches

__all__ = ["Batch", "TokenBatches", "one_pass", "token_batches"]
