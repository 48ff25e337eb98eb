"""Attention across heads, by subcomponents: pairs of q and k, of v and o, and what heads share."""

from vpd_lens.analysis.attention.attention import Attention, attention
from vpd_lens.analysis.attention.data import DataAttention, PatternChange, Profile, Together
from vpd_lens.analysis.attention.form import ScoreForm, score_forms
from vpd_lens.analysis.attention.heads import HeadSpread, Overlap, head_cosines
from vpd_lens.analysis.attention.in_graphs import HeadLoadings, attention_pairs, head_loadings
from vpd_lens.analysis.attention.interactions import Interaction, Interactions
from vpd_lens.analysis.attention.prompt import Contributions, PromptAttention

__all__ = [
    "Attention",
    "Contributions",
    "DataAttention",
    "HeadLoadings",
    "HeadSpread",
    "Interaction",
    "Interactions",
    "Overlap",
    "PatternChange",
    "Profile",
    "PromptAttention",
    "ScoreForm",
    "Together",
    "attention",
    "attention_pairs",
    "head_cosines",
    "head_loadings",
    "score_forms",
]
