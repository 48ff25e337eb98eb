"""Baked edits against edits at run time, on every model class, architecture and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .builders import ARCHITECTURES, HOOKED, MODES, NATIVE, tokens
from .dense import dense_weights, error

CASES = [f"bridge-{name}-{mode}" for name in ARCHITECTURES for mode in MODES]
CASES += [f"native-{name}" for name in NATIVE] + [f"hooked-{name}" for name in HOOKED]
# Whole, fused with rows interleaved by head, fused in a Conv1D, grouped keys; both native formats.
SAVED = ["bridge-gpt2-default", "bridge-gpt_neox-unprocessed", "bridge-phi3-default"]
SAVED += ["bridge-gemma2-default", "native-grouped", "hooked-grouped"]

pytestmark = pytest.mark.filterwarnings("ignore:this decomposition is untrained")


def edits(vpd: Any) -> list[Any]:
    """One of each kind, in turn, at every site."""
    import vpd_lens

    generator, found = torch.Generator().manual_seed(0), []
    for number, site in enumerate(vpd.sites):
        names = [f"{site.name}:{c}" for c in range(5)]
        write = torch.randn(site.shape[1], generator=generator)
        kinds = (
            vpd_lens.Rescale([names[0], names[2]], [-1.0, 0.5]),
            vpd_lens.Rewrite(names[1], write),
            vpd_lens.Swap(names[3], names[4]),
        )
        found.append(kinds[number % 3])
    return found


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_baked_weights_do_what_the_edit_does(
    case: str, decomposed: Callable[[str], nn.Module], undecomposed: Callable[[str], nn.Module]
) -> None:
    import vpd_lens

    model, x = decomposed(case), tokens()
    before, parameters = model(x), [p.clone() for p in model.parameters()]
    u = [u.clone() for u in model.vpd.subcomponents.u]
    changes = edits(model.vpd)
    with vpd_lens.edited(model, changes):
        expected = model(x)
    with vpd_lens.baked(model, changes):
        assert error(model(x), expected) < 1e-5
        weights = {site.name: site.weight.clone() for site in model.vpd.sites}
    assert error(expected, before) > 0.05
    # Undone to the bit, in every parameter.
    assert torch.equal(model(x), before)
    assert all(map(torch.equal, model.parameters(), parameters))
    assert all(map(torch.equal, model.vpd.subcomponents.u, u))
    with dense_weights(undecomposed(case), weights):
        assert error(undecomposed(case)(x), expected) < 1e-5


@pytest.mark.parametrize("case", SAVED)
@torch.no_grad()
def test_a_baked_copy_is_a_plain_model_that_can_be_saved(
    case: str, decomposed: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    import vpd_lens
    from vpd_lens.exporting import save_model
    from vpd_lens.models import load_model

    model, x = decomposed(case), tokens()
    changes = edits(model.vpd)
    with vpd_lens.edited(model, changes):
        expected = model(x)
    plain = vpd_lens.bake(model, changes)
    assert "vpd" not in plain.__dict__
    assert not any(".vpd." in name for name in plain.hook_dict)
    assert error(plain(x), expected) < 1e-5
    loaded = load_model(save_model(plain, tmp_path / "plain"))
    assert torch.equal(loaded(x), plain(x))
    if case.startswith("bridge"):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        assert error(theirs(x).logits, expected) < 1e-5


@torch.no_grad()
def test_a_bridge_with_folded_norms_is_no_hugging_face_model(
    decomposed: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    """Of LayerNorms; RMSNorms leave a model that Hugging Face's class computes, too."""
    import vpd_lens
    from vpd_lens.errors import ConfigError
    from vpd_lens.exporting import save_model

    model = decomposed("bridge-gpt2-processed")
    plain = vpd_lens.bake(model, edits(model.vpd))
    with pytest.raises(ConfigError, match="norms are folded"):
        save_model(plain, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "case", ["bridge-gpt2-default", "bridge-llama-processed", "hooked-grouped"]
)
@torch.no_grad()
def test_an_edit_where_something_is_important_is_the_edit_there(
    case: str, decomposed: Callable[[str], nn.Module]
) -> None:
    """Against masks by hand; and generation with and without a cache writes the same text."""
    import vpd_lens

    model, x, name = decomposed(case), tokens(), "blocks.1.mlp.out:2"
    g = model.vpd.causal_importance(x)[..., model.vpd.layout.columns("blocks.1.mlp.out").start + 2]
    tau = float(g.median())
    masks = torch.ones(*x.shape, model.vpd.layout.total)
    column = model.vpd.layout.columns("blocks.1.mlp.out").start + 2
    masks[..., column] = torch.where(g > tau, -3.0, 1.0)
    with model.vpd.masked(masks, delta=1.0):
        expected = model(x)
    edit = vpd_lens.Rescale(name, -3.0, above=tau)
    with vpd_lens.edited(model, edit):
        assert error(model(x), expected) < 1e-5
        texts = [
            model.generate(
                x[:1],
                max_new_tokens=4,
                do_sample=False,
                verbose=False,
                stop_at_eos=False,
                return_type="tokens",
                **{"use_past_kv_cache": cached},
            )
            for cached in (True, False)
        ]
    assert torch.equal(*texts)
    assert error(vpd_lens.intervene(model, x[0], edit).edited, expected[0]) < 1e-5
