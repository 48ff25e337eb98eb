"""The published decomposition of the 67M model, against the figures that others measured on it.

Gigabytes: `VPD_LENS_PUBLISHED=folder pytest -m network tests/test_published.py`, where the folder
has `s-55ea3f9b/` and `t-9d2b8f02/` (see docs/tutorials/published.md) and, where the hub cannot be
reached, `tokens.npy`, rows of the validation split.
"""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import vpd_lens

pytestmark = pytest.mark.network

DATA = "danbraunai/pile-uncopyrighted-tok-shuffled"
ROWS, LENGTH = 1024, 512


def rows(folder):
    """The first rows of the validation split."""
    if (folder / "tokens.npy").is_file():
        return np.load(folder / "tokens.npy")[:ROWS, :LENGTH]
    from datasets import load_dataset

    stream = load_dataset(DATA, split="val", streaming=True)
    return np.array([row["input_ids"][:LENGTH] for row in islice(stream, ROWS)])


def test_the_figures_of_the_paper_s_decomposition():
    if (place := os.environ.get("VPD_LENS_PUBLISHED")) is None:
        pytest.skip("VPD_LENS_PUBLISHED names no folder with the published run")
    folder = Path(place)
    model = vpd_lens.import_param_decomp(folder / "s-55ea3f9b", folder / "t-9d2b8f02")
    assert model.vpd.trained_steps == 400_000
    assert model.vpd.layout.total == 4 * (3072 + 3584 + 2 * 512 + 2 * 1024)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    report = vpd_lens.evaluate(
        model,
        torch.from_numpy(rows(folder).astype(np.int64)),
        n_batches=ROWS // 16,
        seq_len=LENGTH,
        pgd_steps=(),
    )
    kl = {mode: value["kl"] for mode, value in report.modes.items()}
    assert kl["unmasked"] == pytest.approx(0.0115, abs=2e-4)
    assert kl["ci"] == pytest.approx(0.342, abs=2e-3)
    assert kl["rounded>0"] == pytest.approx(0.311, abs=2e-3)
    l0 = {float(threshold): value["total"] for threshold, value in report.l0.items()}
    assert l0[0.0] == pytest.approx(203.4, abs=0.5)
