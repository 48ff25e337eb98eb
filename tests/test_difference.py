"""Differences between two models, and gradients on subcomponents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import tiny_bridge
from torch import Tensor, nn

import vpd_lens
from vpd_lens import VPDConfig, decompose, load, remove
from vpd_lens.decomposition import Masks
from vpd_lens.errors import ArtefactError, AttachError, InputError
from vpd_lens.evaluation.metrics import delta_sizes

IMPORTANCE = vpd_lens.CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)
RANKS = {"blocks.0.attn.v": 2, "blocks.1.mlp.in": 3, "blocks.1.attn.o": 1}


def both(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model and its fine-tune, which differs by matrices of low rank at three sites."""
    if kind == "bridge":
        base = tiny_bridge()
    else:
        from compat.builders import has_hooked_transformer, hooked

        if not has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        base = hooked("ln")
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    for site in vpd_lens.sites.find_sites(tuned, list(RANKS)):
        rank = RANKS[site.name]
        left, right = (torch.randn(n, rank, generator=generator) for n in site.shape)
        add_to(site, 0.2 * left @ right.T)
    return base, tuned


def add_to(site: Any, change: Tensor) -> None:
    """Add to the parameter that a site's weight is a view of, whatever that view is."""
    leaf = site.read_weight()
    parameter = next(p for p in owners(leaf) if p.is_leaf)
    before = parameter.detach().clone()
    parameter.requires_grad_()
    (direction,) = torch.autograd.grad((site.read_weight() * change).sum(), parameter)
    with torch.no_grad():
        parameter.copy_(before + direction)


def owners(tensor: Tensor) -> list[Tensor]:
    """The leaves a tensor is computed from."""
    if tensor.is_leaf:
        return [tensor]
    stack, found = [tensor.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return found


def rows(n: int = 3) -> Tensor:
    return torch.randint(4, 29, (n, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_masks_lead_from_one_model_to_the_other(kind: str) -> None:
    base, tuned = both(kind)
    target, start = tuned(rows()).detach(), base(rows()).detach()
    decompose(tuned, base=base, n_subcomponents="2x-rank", importance=IMPORTANCE)
    vpd = tuned.vpd
    assert set(vpd.layout.names) == set(RANKS)
    assert [found.rank for found in vpd.ranks] == [RANKS[name] for name in vpd.layout.names]
    sizes = dict(zip(vpd.layout.names, vpd.layout.sizes, strict=True))
    assert all(size <= 2 * RANKS[name] for name, size in sizes.items())
    assert tuned(rows()).equal(target)
    with vpd.masked("zero"):
        torch.testing.assert_close(tuned(rows()), start, atol=1e-5, rtol=1e-4)
    if kind == "hooked":  # which then adds up the results of its heads
        tuned.set_use_attn_result(True)
        with vpd.masked("zero"):
            torch.testing.assert_close(tuned(rows()), start, atol=1e-5, rtol=1e-4)
        tuned.set_use_attn_result(False)
    with vpd.masked(torch.ones(vpd.layout.total), delta=1.0):
        torch.testing.assert_close(tuned(rows()), target, atol=1e-5, rtol=1e-4)
    # Singular components of a difference of low rank are all of it.
    with vpd.masked(torch.ones(vpd.layout.total), delta=0.0):
        torch.testing.assert_close(tuned(rows()), target, atol=1e-5, rtol=1e-4)
    for name, rank in RANKS.items():
        norms = vpd.v(name).norm(dim=0) * vpd.u(name).norm(dim=1)
        assert int((norms > 1e-5).sum()) == rank
        torch.testing.assert_close(
            vpd.delta(name), torch.zeros_like(vpd.delta(name)), atol=1e-6, rtol=0
        )
    assert delta_sizes(vpd)["total"]["relative"] < 1e-5
    remove(tuned)
    assert tuned(rows()).equal(target)


def test_masks_of_a_difference_are_a_dense_weight_and_have_its_gradients() -> None:
    base, tuned = both("bridge")
    decompose(tuned, base=base, n_subcomponents=4, importance=IMPORTANCE)
    vpd = tuned.vpd
    generator = torch.Generator().manual_seed(1)
    for v, u in zip(vpd.subcomponents.v, vpd.subcomponents.u, strict=True):
        for part in (v, u):
            part.data.copy_(torch.randn(part.shape, generator=generator) * 0.3)
    masks = torch.rand(vpd.layout.total, generator=generator).requires_grad_()
    delta = torch.rand(len(vpd.sites), generator=generator).requires_grad_()
    weight = torch.randn(3, 8, 29, generator=generator)
    one = torch.ones(3, 8, 1)

    def loss(model: nn.Module) -> Tensor:
        return (vpd.run(Masks(one * masks, one * delta), rows()).log_softmax(-1) * weight).mean()

    leaves = [masks, delta, *vpd.subcomponents.parameters()]
    got = torch.autograd.grad(loss(tuned), leaves)
    dense = copy.deepcopy(base)
    changes = {}
    for i, (site, part, u, v) in enumerate(
        zip(
            vpd.sites,
            vpd.layout.split(masks),
            vpd.subcomponents.u,
            vpd.subcomponents.v,
            strict=True,
        )
    ):
        product = v @ (part[:, None] * u)
        left = site.weight - site.origin - v @ u
        changes[site.name] = product + delta[i] * left
    for site in vpd_lens.sites.find_sites(dense, list(RANKS)):
        # y + x C by a hook that keeps the graph, where the weight would have been W + C.
        seen: list[Tensor] = []
        site.attach(seen.append, lambda y, c=changes[site.name], s=seen: y + s.pop() @ c)
    expected = torch.autograd.grad((dense(rows()).log_softmax(-1) * weight).mean(), leaves)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-3)


def test_a_difference_is_saved_with_the_hash_of_what_it_is_from(tmp_path: Any) -> None:
    base, tuned = both("bridge")
    decompose(tuned, base=base, n_subcomponents=3, importance=IMPORTANCE)
    with tuned.vpd.masked("zero"):
        start = tuned(rows())
    folder = tuned.vpd.save(tmp_path / "difference")
    remove(tuned)
    with pytest.raises(ArtefactError, match="base="):
        load(folder, tuned)
    other = copy.deepcopy(base)
    add_to(vpd_lens.sites.find_sites(other, ["blocks.0.attn.v"])[0], torch.ones(16, 16))
    with pytest.raises(ArtefactError, match="base="):
        load(folder, tuned, base=other)
    assert "vpd" not in tuned.__dict__
    load(folder, tuned, base=base)
    with tuned.vpd.masked("zero"):
        assert tuned(rows()).equal(start)


def test_bases_that_cannot_be_a_base_change_nothing() -> None:
    base, tuned = both("bridge")
    with pytest.raises(AttachError, match="same weights at all"):
        decompose(tuned, base=copy.deepcopy(tuned))
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.in in the shape"):
        decompose(tuned, base=tiny_bridge(d_mlp=12))
    with pytest.raises(AttachError, match="base: No site"):
        decompose(tuned, base=tiny_bridge(n_layers=1))
    assert "vpd" not in tuned.__dict__
    decompose(tuned, base=base, importance=IMPORTANCE)
    with pytest.raises(InputError, match="without base="):
        vpd_lens.attribute(tuned, [5, 6, 7], target=8, progress=False)


@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_a_difference_is_trained_and_resumed(tmp_path: Any) -> None:
    base, tuned = both("bridge")
    config = VPDConfig.small(steps=4, batch_size=4, importance=IMPORTANCE, initialisation="svd")
    config = config.replaced({"n_subcomponents": 4, "faithfulness.warmup_steps": 0})
    decompose(tuned, rows(8), config, base=base, output=tmp_path / "run", progress=False)
    before = [p.detach().clone() for p in tuned.vpd.parameters()]
    assert delta_sizes(tuned.vpd)["total"]["relative"] < 0.5
    remove(tuned)
    again = {"output": tmp_path / "run", "resume": True, "progress": False}
    with pytest.raises(ArtefactError):
        decompose(tuned, rows(8), config, sites=tuple(RANKS), **again)
    decompose(tuned, rows(8), config, base=base, **again)
    assert all(a.equal(b) for a, b in zip(before, tuned.vpd.parameters(), strict=True))


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_projected_gradients_are_derivatives_by_strength(kind: str) -> None:
    _, model = both(kind)
    decompose(model, n_subcomponents=5, importance=IMPORTANCE)
    vpd, answer = model.vpd, torch.tensor([3, 5, 7])

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(rows())[:, -1], answer)

    found = vpd.project(loss)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in vpd.parameters())
    # The same from gradients of the weights, where each is reached as a parameter of the model.
    model.requires_grad_()
    gradients = weight_gradients(vpd, loss())
    model.requires_grad_(False)
    projected = vpd.project(gradients)
    assert projected.keys() == found.keys() == set(vpd.layout.names)
    for name in found:
        torch.testing.assert_close(found[name], projected[name], atol=1e-5, rtol=1e-3)
    # And by finite differences of a few strengths.
    for name, column in (("blocks.0.attn.q", 1), ("blocks.1.mlp.out", 4), ("blocks.0.mlp.in", 0)):
        strengths = torch.ones(vpd.layout.total)
        at, losses = vpd.layout.columns(name).start + column, []
        for step in (-1e-2, 1e-2):
            strengths[at] = 1 + step
            with vpd.masked(strengths.clone()):
                losses.append(float(loss().detach()))
        slope = (losses[1] - losses[0]) / 2e-2
        assert float(found[name][column]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def weight_gradients(vpd: Any, loss: Tensor) -> dict[str, Tensor]:
    """`dL/dW` of every site, from the gradients of the model's parameters."""
    parameters = [p for p in vpd.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient_of = {id(p): g for p, g in zip(parameters, grads, strict=True)}
    found = {}
    for site in vpd.sites:
        parameter = next(p for p in owners(site.read_weight()) if id(p) in gradient_of)
        kept = parameter.data
        parameter.data = gradient_of[id(parameter)]
        found[site.name] = site.weight.clone()
        parameter.data = kept
    return found


def test_what_is_no_gradient_of_the_model_is_refused() -> None:
    _, model = both("bridge")
    decompose(model, n_subcomponents=5, importance=IMPORTANCE)
    with pytest.raises(InputError, match="no site named"):
        model.vpd.project({"blocks.9.mlp.in": torch.zeros(16, 24)})
    with pytest.raises(InputError, match=r"\(24, 16\)"):
        model.vpd.project({"blocks.0.mlp.in": torch.zeros(24, 16)})
    with pytest.raises(InputError, match="scalar loss"):
        model.vpd.project(lambda: model(rows()))
    with pytest.raises(InputError, match="scalar loss"):
        model.vpd.project(lambda: 1.0)  # type: ignore[arg-type, return-value]
    apart = torch.ones((), requires_grad=True)
    with pytest.raises(InputError, match="does not depend"):
        model.vpd.project(lambda: apart * 2)
