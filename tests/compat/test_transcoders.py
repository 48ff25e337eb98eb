"""MLPs are read and replaced where they are, in every architecture and version."""

import pytest
import torch

from vpd_lens.baselines.transcoders import MLPs
from vpd_lens.data import Batch

from .builders import LENGTH, VOCABULARY

CASES = ["bridge-gpt2-default", "bridge-llama-processed", "bridge-gemma2-default"]
CASES += ["bridge-opt-default", "native-rms_gated", "hooked-rms", "hooked-ln"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_model_continues_with(build, case):
    """The MLP's own output, computed from its input again, changes nothing; zeros do."""
    model = build(case)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mlps = MLPs(model)
    with torch.no_grad():
        alone = model(tokens)
        clean = mlps.clean(Batch(tokens))
        assert torch.equal(clean.output, alone)
        for (d_in, d_out), x, y in zip(mlps.shapes, clean.inputs, clean.outputs, strict=True):
            assert x.shape == (2, LENGTH, d_in)
            assert y.shape == (2, LENGTH, d_out)
        for (_, out), y in zip(mlps.sites, clean.outputs, strict=True):
            # An MLP's output lies where its last matrix writes.
            rest = y - (0 if out.bias is None else out.bias)
            back = rest @ torch.linalg.pinv(out.weight) @ out.weight
            torch.testing.assert_close(back, rest, rtol=1e-3, atol=1e-4)
        same = mlps.run(lambda i, _x, _y: clean.outputs[i], tokens)
        torch.testing.assert_close(same, alone)
        without = mlps.run(lambda _i, _x, y: torch.zeros_like(y), tokens)
        assert (without - alone).abs().max() > 1e-2
        assert torch.equal(model(tokens), alone)  # nothing stays
