"""What must hold wherever a model goes and whoever looks at it: one home for each, tested once."""

from __future__ import annotations

import collections
import copy
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_bridge
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vpd_lens
from vpd_lens.decomposition import Divergence, Masks
from vpd_lens.decomposition.attach import attach
from vpd_lens.errors import AttachError, ConfigError
from vpd_lens.training import VPDConfig
from vpd_lens.training import step as step_module
from vpd_lens.training.step import Stepper

# Public names are imported at their first use; below, that would be with another torch.Generator in
# every annotation.
PUBLIC = {name: getattr(vpd_lens, name) for name in vpd_lens.__all__}
IMPORTANCE = vpd_lens.CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)


def tiny_hooked() -> nn.Module:
    from compat.builders import has_hooked_transformer, hooked

    if not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return hooked("rms")


def decomposed(model: nn.Module | None = None) -> nn.Module:
    return attach(model or tiny_bridge(), n_subcomponents=6, importance=IMPORTANCE)


def tiny_config(**changes: Any) -> VPDConfig:
    small = VPDConfig.small(steps=2, batch_size=4, seq_len=8, importance=IMPORTANCE)
    return small.replaced({"faithfulness.warmup_steps": 1, **changes})


def rows(n: int = 4) -> Tensor:
    return torch.randint(4, 29, (n, 8), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------- devices

# What may fail on the meta device, which has no values.
WITHOUT_VALUES = ("meta tensor", "Meta tensor", "data-dependent", "data-independent")
FUNCTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "causal_importance": lambda m: m.vpd.causal_importance(rows().to("meta")),
    "masked": lambda m: under_masks(m, rows().to("meta")),
    "evaluate": lambda m: vpd_lens.evaluate(m, rows(), pgd_steps=(1,), progress=False),
    "attribute": lambda m: vpd_lens.attribute(m, [5, 6, 7], target=8, progress=False),
    "prune": lambda m: vpd_lens.prune(m, [5, 6, 7], 8, progress=False),
    "intervene": lambda m: vpd_lens.intervene(
        m, [5, 6, 7], vpd_lens.Ablate("blocks.0.mlp.in:1"), target=8
    ),
    "harvest": lambda m: vpd_lens.harvest(m, rows(), batch_size=4, progress=False),
    "dataset_attributions": lambda m: vpd_lens.dataset_attributions(
        m, rows(), batch_size=4, progress=False
    ),
    "delta": lambda m: m.vpd.delta("blocks.0.mlp.in"),
    "step": lambda m: Stepper(m.vpd, tiny_config()).step(rows(), 0),
}


def under_masks(model: nn.Module, tokens: Tensor) -> Tensor:
    with model.vpd.masked("ci"):
        return model(tokens)


def unfused(optimiser: Any, *args: Any, fused: bool, **options: Any) -> torch.optim.Optimizer:
    return optimiser(*args, **options)


class AnywhereGenerator(torch.Generator):
    """A generator for devices that have none, where there is nothing to draw."""

    def __new__(cls, device: Any = None) -> AnywhereGenerator:
        return super().__new__(cls)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_moved_model_takes_its_decomposition_along(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device only what needs a value may raise; a forgotten tensor says so."""
    model = decomposed().to("meta")
    monkeypatch.setattr(torch, "Generator", AnywhereGenerator)
    for optimiser in (torch.optim.Adam, torch.optim.AdamW):  # fused ones are for devices
        monkeypatch.setattr(torch.optim, optimiser.__name__, partial(unfused, optimiser))
    try:
        FUNCTIONS[name](model)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        assert any(reason in text for reason in WITHOUT_VALUES), text
    assert model.vpd.v("blocks.0.mlp.in").device.type == "meta"
    assert all(p.device.type == "meta" for p in model.vpd.parameters())


def test_a_model_on_several_devices_is_refused() -> None:
    model = tiny_bridge()
    model.blocks[1].to("meta")
    with pytest.raises(AttachError, match="several devices"):
        decomposed(model)
    assert "vpd" not in model.__dict__


# ---------------------------------------------------------------- host syncs

SYNCS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"),
    *("aten::item", "aten::masked_select", "aten::_unique2", "aten::unique_dim"),
}


class FailOnSync(TorchDispatchMode):
    """Fails on every operation for which a host would wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indexed = name in ("aten::index", "aten::index_put") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        assert name not in SYNCS, f"{name} inside the step"
        assert not indexed, f"{name} by a mask inside the step"
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adversary.restart": 0.0, "optimiser.kind": "adamw", "adversary.routing": "subset"},
        {"recompute": True, "mask_dtype": "bfloat16"},
        {"micro_batches": 2},
        {"faithfulness.relative": True, "locality.coefficient": 1e-3, "stochastic.donors": 0.1},
        {"adversary.merge": 0.5, "stochastic.donors": 0.1, "minimality.tolerance": 0.1},
    ],
    ids=["small", "paper", "recompute", "micro-batches", "locality", "merged"],
)
def test_a_step_never_waits_for_the_device(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "require_finite", lambda losses: None)  # on a CPU only
    stepper = Stepper(
        decomposed(tiny_bridge() if kind == "bridge" else tiny_hooked()).vpd, tiny_config(**changes)
    )
    real = torch.ones(4, 8, dtype=torch.bool)
    real[1, 5:] = False
    for index, mask in enumerate((None, real)):
        stepper.step(rows(), index, mask)
        with FailOnSync():
            stepper.step(rows(), index, mask)


# -------------------------------------------------- random state and modes


def test_no_global_random_state_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the global random state was seeded")

    torch.manual_seed(3)
    expected = torch.rand(3)
    model = tiny_bridge()
    for module, name in ((torch, "manual_seed"), (torch.cuda, "manual_seed_all")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "seed", refuse)
    torch.random.default_generator.manual_seed(3)
    attach(model, n_subcomponents=6, seed=5)
    Stepper(model.vpd, tiny_config()).step(rows(), 0)
    vpd_lens.evaluate(model, rows(), pgd_steps=(1,), progress=False)
    vpd_lens.remove(model)
    for kind in ("mlp", "shared_mlp"):
        attach(model, n_subcomponents=6, importance=vpd_lens.CausalImportanceConfig(kind=kind))
        vpd_lens.remove(model)
    assert torch.equal(torch.rand(3), expected)


class WithDropout(nn.Module):
    """A small classifier whose forwards differ in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x).relu()))


def test_analyses_run_in_evaluation_mode_and_leave_the_mode_as_it_was() -> None:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    model = WithDropout()
    importance = vpd_lens.CausalImportanceConfig(kind="mlp")
    attach(model, n_subcomponents=6, example=x, importance=importance)
    model.train()
    model.first.eval()  # modes may differ between modules
    ones = Masks(torch.ones(12), torch.ones(2))
    target, _ = model.vpd.target(x)
    assert torch.equal(model.vpd.run(ones, x), target)
    assert torch.equal(model.vpd.causal_importance(x), model.vpd.causal_importance(x))
    assert [m.training for m in (model, model.first, model.drop)] == [True, False, True]
    assert not torch.equal(model(x), model(x)), "a forward of the user's own keeps its mode"


def test_a_user_s_hooks_are_silent_on_both_sides_of_every_comparison() -> None:
    model = decomposed()
    vpd, x, fired = model.vpd, rows(), collections.Counter()
    clean, _ = vpd.target(x)

    def scale(value: Tensor, hook: Any) -> Tensor:
        fired["forward"] += 1
        return 0.5 * value

    def back(gradient: Tensor, hook: Any) -> None:
        fired["backward"] += 1

    point = "blocks.0.hook_resid_post"
    ones = Masks(torch.ones(vpd.layout.total), torch.ones(vpd.layout.n_sites))
    with model.hooks(fwd_hooks=[(point, scale)], bwd_hooks=[(point, back)]):
        assert float(Divergence(clean)(vpd.run(ones, x))) == 0
        assert not fired
        with vpd.masked("adversarial", n_steps=3, seed=0):
            model(x)
        assert fired == {"forward": 1}, "once in the forward that the user asked for"
        with vpd.masked(ones):
            hooked = model(x)
        assert not torch.allclose(hooked, clean)
    model.add_hook(point, scale)
    report = vpd_lens.evaluate(model, x, pgd_steps=(), progress=False)
    model.reset_hooks()
    again = vpd_lens.evaluate(model, x, pgd_steps=(), progress=False)
    assert report.model_dump() == again.model_dump()


# ---------------------------------------------------------------- surroundings


def test_masks_belong_to_their_thread() -> None:
    model, x = decomposed(), rows()
    with torch.no_grad():
        target = model(x)
        seen = []
        with model.vpd.masked("zero"):
            masked = model(x)
            thread = threading.Thread(target=lambda: seen.append(model(x).detach()))
            thread.start()
            thread.join()
    assert torch.equal(seen[0], target)
    assert not torch.equal(masked, target)


def test_a_copy_made_inside_a_block_is_outside_of_it() -> None:
    model, x = decomposed(), rows()
    with torch.no_grad(), model.vpd.masked("zero"):
        other = copy.deepcopy(model)
        assert torch.equal(other(x), copy.deepcopy(vpd_lens.remove(copy.deepcopy(model)))(x))
        assert not torch.equal(other(x), model(x))


def test_a_compiled_model_is_refused_and_left_alone() -> None:
    model = tiny_bridge()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AttachError, match="compile it afterwards"):
        vpd_lens.decompose(torch.compile(model))
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert "vpd" not in model.__dict__


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_masks_do_not_depend_on_gradient_checkpointing(reentrant: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 29}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **off))
    importance = vpd_lens.CausalImportanceConfig(kind="mlp")
    attach(model, r"mlp", 6, importance, rows(), divergence=lambda a, b: (a - b).square().mean())
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with model.vpd.masked("random", seed=0):
            loss = model(rows()).logits.square().mean()
        loss.backward()
        gradients.append([v.grad.clone() for v in model.vpd.subcomponents.v])
        model.vpd.zero_grad()
        assert model.is_gradient_checkpointing == checkpointing
    assert all(map(torch.equal, *gradients))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_training_inside_blocks_without_gradients(block: Any, tmp_path: Any) -> None:
    results = []
    for around in (block, torch.enable_grad):
        model = tiny_bridge()
        with around():
            vpd_lens.decompose(
                model, rows(), tiny_config(), output=tmp_path / around.__name__, progress=False
            )
        results.append([p.detach().clone() for p in model.vpd.parameters()])
    assert all(map(torch.equal, *results))


def test_half_precision_of_too_narrow_a_range_is_not_trained() -> None:
    model = decomposed(tiny_bridge().to(torch.float16))
    with pytest.raises(ConfigError, match="float16"):
        Stepper(model.vpd, tiny_config())
