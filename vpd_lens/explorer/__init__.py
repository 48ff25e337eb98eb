"""The explorer: a page server on this machine over one model and its decomposition.

`workbench` holds the model and does what is asked, `jobs` runs what takes long, `saved` keeps what
was found on disk. `pages` renders the pages of `vpd_lens.viz` with the explorer's parts around
them, `app` answers requests, `guard` decides who may ask, and `server` listens.
"""

from vpd_lens.explorer.server import explore

__all__ = ["explore"]
