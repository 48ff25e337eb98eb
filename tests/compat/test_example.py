"""The decomposition that ships with the library, on both versions of TransformerLens."""

import shutil

import pytest
import torch

import vpd_lens
from vpd_lens import example
from vpd_lens.errors import ArtefactError
from vpd_lens.evaluation.verdict import findings

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def model():
    return vpd_lens.load_example()


def test_it_is_small_and_all_of_the_blocks(model):
    files = [file for file in example.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    assert len(model.vpd.sites) == 28
    assert model.vpd.trained_steps >= 6000


def test_it_brings_its_own_base_model(model):
    """Also where only the decomposition is opened."""
    again = vpd_lens.load(example.FOLDER / example.DECOMPOSITION)
    tokens = model.to_tokens("import os")
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def test_its_report_is_of_it(model):
    """What was measured is measured again, on a few lines of code."""
    report = example.example_report()
    assert report.trained_steps == model.vpd.trained_steps
    assert report.audit is not None
    assert not [found for found in findings(report) if found.status == "fails"]
    tokens = model.to_tokens("import os\n\n\nclass Queue:\n    def __init__(self, maxsize=0):\n")
    with torch.no_grad():
        target = model(tokens).log_softmax(-1)
        divergences = {}
        for mode in ("unmasked", "ci", "zero"):
            with model.vpd.masked(mode):
                masked = model(tokens).log_softmax(-1)
            divergences[mode] = float((target.exp() * (target - masked)).sum(-1).mean())
    assert divergences["unmasked"] < 0.02
    assert divergences["ci"] < 0.2 * divergences["zero"]


def test_its_harvest_is_of_it(model):
    harvest = example.example_harvest(model.vpd)
    assert harvest.layout == model.vpd.layout
    most = harvest.table("blocks.0.mlp.in")[0].index
    assert harvest.tokens("blocks.0.mlp.in", most)
    assert harvest.examples("blocks.0.mlp.in", most)


@pytest.mark.parametrize("part", ["model/model.safetensors", "report.json", "harvest/record.json"])
def test_what_was_changed_is_refused(part, tmp_path):
    folder = shutil.copytree(example.FOLDER, tmp_path / "example")
    content = bytearray((folder / part).read_bytes())
    content[-3] ^= 1
    (folder / part).write_bytes(content)
    with pytest.raises(ArtefactError, match="the example is damaged"):
        vpd_lens.load_example(folder)
