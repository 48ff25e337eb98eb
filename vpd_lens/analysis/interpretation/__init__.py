"""What subcomponents are for, in words: automatic labels, and whether there is one thing to say."""

from vpd_lens.analysis.interpretation.endpoint import Endpoint, Spent
from vpd_lens.analysis.interpretation.intruder import IntruderReport, Score, intruder
from vpd_lens.analysis.interpretation.judges import (
    EmbeddingJudge,
    EndpointJudge,
    Judge,
    TokenJudge,
    static_embeddings,
)
from vpd_lens.analysis.interpretation.labelling import LabelRun, label
from vpd_lens.analysis.interpretation.passages import Passage, Responses, of_groups, of_harvest

__all__ = [
    "EmbeddingJudge",
    "Endpoint",
    "EndpointJudge",
    "IntruderReport",
    "Judge",
    "LabelRun",
    "Passage",
    "Responses",
    "Score",
    "Spent",
    "TokenJudge",
    "intruder",
    "label",
    "of_groups",
    "of_harvest",
    "static_embeddings",
]
