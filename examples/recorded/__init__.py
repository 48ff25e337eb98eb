"""Named runs that are recorded and can be repeated."""

from recorded.record import Machine, RunRecord, versions
from recorded.run import Run, Target, load_decomposed, perform

__all__ = ["Machine", "Run", "RunRecord", "Target", "load_decomposed", "perform", "versions"]
