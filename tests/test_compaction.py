"""Compaction: outputs under masks, importances, optimiser state, faithfulness, resuming, saving."""

import json

import pytest
import torch
from conftest import tiny_bridge
from test_compiled import hooked_transformer

from vpd_lens import load
from vpd_lens.decomposition import CausalImportanceConfig, Divergence, Masks
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.decomposition.pgd import pgd_sources
from vpd_lens.errors import ArtefactError, ConfigError, InputError, TrainingInterrupted
from vpd_lens.training import VPDConfig, losses, train
from vpd_lens.training.compaction import ImportanceWindow, compact, compact_when_due, survivors
from vpd_lens.training.losses import faithfulness
from vpd_lens.training.step import Stepper

IMPORTANCES = [
    CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32),
    CausalImportanceConfig(kind="mlp", hidden=4),
    CausalImportanceConfig(kind="mlp", hidden=0),
    CausalImportanceConfig(kind="shared_mlp", hidden=4),
    CausalImportanceConfig(kind="shared_mlp", hidden=0),
]
NAMES = ["transformer", "mlp", "affine mlp", "shared mlp", "affine shared mlp"]
COUNTS = {r"\.[qk]$": 5, r"attn": 7, r"mlp": 9}


def decomposed(make=tiny_bridge, importance=IMPORTANCES[0]):
    model = make()
    attach(model, n_subcomponents=COUNTS, importance=importance)
    return model


def some(vpd, seed=0):
    """About half of every site's subcomponents, at least one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for size in vpd.layout.sizes:
        kept = (torch.rand(size, generator=generator) < 0.5).nonzero().flatten().tolist()
        chosen.append(kept or [size - 1])
    return Columns(vpd.layout.sizes, chosen, vpd.device)


def as_delta(masks, layout, keep):
    """The same masks with those of all but `keep` equal to their site's delta mask."""
    parts = []
    for index, part in enumerate(layout.split(masks.components)):
        folded = masks.delta[..., index : index + 1].expand(part.shape).clone()
        columns = keep.by_site[index]
        folded[..., columns] = part[..., columns]
        parts.append(folded)
    return Masks(torch.cat(parts, -1), masks.delta, masks.routed)


@pytest.mark.parametrize("make", [tiny_bridge, hooked_transformer], ids=["bridge", "transformer"])
def test_outputs_are_those_with_the_delta_s_mask_on_what_was_folded(make, tokens):
    """Under random masks, routed or not, and under an adversary's against the folded one."""
    model = decomposed(make)
    vpd, batch = model.vpd, tokens[:3]
    before, keep = vpd.layout, some(model.vpd)
    g = vpd.causal_importance(batch)
    u = torch.rand(3, 8, before.total + before.n_sites)
    masks = Masks(g + (1 - g) * u[..., : before.total], u[..., before.total :])
    masks = as_delta(masks, before, keep)
    routed = Masks(masks.components, masks.delta, torch.rand(3, 8, before.n_sites) < 0.5)
    expected = [vpd.run(m, batch).detach() for m in (masks, routed)]
    target = model(batch)
    fold(vpd, keep)
    assert vpd.layout.sizes == tuple(map(len, keep.by_site))
    small = [Masks(m.components[..., keep.joined], m.delta, m.routed) for m in (masks, routed)]
    for got, want in zip([vpd.run(m, batch) for m in small], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert (want - target).abs().max() > 1e-2
    survivors = vpd.causal_importance(batch)
    torch.testing.assert_close(survivors, g[..., keep.joined], rtol=1e-5, atol=1e-6)

    divergence = Divergence(target)
    sources, curve = pgd_sources(
        lambda m: divergence(vpd.run(m, batch)), survivors, vpd.layout, 5, 0.2, checkpoints=(5,)
    )
    worst = sources.masks(survivors)
    unfold(vpd)
    wide = worst.components.new_zeros(3, 8, before.total)
    wide[..., keep.joined] = worst.components
    again = divergence(vpd.run(as_delta(Masks(wide, worst.delta), before, keep), batch)).detach()
    assert again.item() == pytest.approx(curve[5], rel=1e-3)
