"""Transcoders, and what they and a decomposition cost when they stand in for a model's MLPs."""

from vpd_lens.baselines.transcoders.measuring import (
    PROTOCOLS,
    MaskedMLPs,
    Part,
    ReplacedReport,
    Transcoded,
    measure_replaced,
)
from vpd_lens.baselines.transcoders.mlps import MLPs
from vpd_lens.baselines.transcoders.responses import alive_latents, latent_responses
from vpd_lens.baselines.transcoders.saelens import import_saelens
from vpd_lens.baselines.transcoders.training import TranscoderConfig, train_transcoder
from vpd_lens.baselines.transcoders.transcoder import Transcoder, batch_top_k

__all__ = ["PROTOCOLS", "MLPs", "MaskedMLPs", "Part", "ReplacedReport", "Transcoded"]
__all__ += ["Transcoder", "TranscoderConfig", "alive_latents", "batch_top_k", "import_saelens"]
__all__ += ["latent_responses", "measure_replaced", "train_transcoder"]
