"""The authors' frozen values of four losses on fixed arrays, reproduced by this implementation."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import shared_folder
from safetensors.torch import load_file
from torch import nn

from vpd_lens.decomposition import Divergence
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.masks import Masks, Sources
from vpd_lens.training.losses import faithfulness
from vpd_lens.training.minimality import Power, minimality, penalty_sum

MATRICES = ("gate", "up", "down")


class Block(nn.Module):
    def __init__(self, gate, up, down, eps):
        super().__init__()
        self.gate, self.up, self.down = (self._linear(w) for w in (gate, up, down))
        self.eps = eps

    @staticmethod
    def _linear(weight):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        return layer

    def forward(self, x):
        h = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GoldenModel(nn.Module):
    """Three decomposed blocks, one frozen tail block, final norm and unembedding."""

    def __init__(self, arrays, eps):
        super().__init__()
        self.layers = nn.ModuleList(
            Block(arrays[f"Wg_{i}"], arrays[f"Wu_{i}"], arrays[f"Wd_{i}"], eps) for i in range(3)
        )
        self.tail = Block(arrays["tail_Wg_0"], arrays["tail_Wu_0"], arrays["tail_Wd_0"], eps)
        self.head = arrays["lm_head"]
        self.eps = eps

    def forward(self, resid):
        x = resid
        for layer in [*self.layers, self.tail]:
            x = layer(x)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) @ self.head.T


@pytest.fixture(scope="module")
def golden():
    folder = shared_folder("goodfire_loss_golden")
    arrays = load_file(folder / "fixtures.safetensors")
    reference = json.loads((folder / "reference.json").read_text())
    model = GoldenModel(arrays, reference["scalars"]["EPS"])
    attach(
        model,
        sites=r"^layers\.",
        n_subcomponents=reference["scalars"]["C"],
        example=arrays["resid"],
        divergence="kl",
    )
    names = dict(zip(MATRICES, "gud", strict=True))
    for site, v, u in zip(
        model.vpd.sites, model.vpd.subcomponents.v, model.vpd.subcomponents.u, strict=True
    ):
        _, layer, matrix = site.name.split(".")
        v.data.copy_(arrays[f"V{names[matrix]}_{layer}"])
        u.data.copy_(arrays[f"U{names[matrix]}_{layer}"])
    return model, arrays, reference


def by_site(arrays, prefix):
    """`[batch, pos, layer, k]` arrays of the three matrices -> one list in site order."""
    return [arrays[f"{prefix}_{m}"][:, :, layer] for layer in range(3) for m in MATRICES]


@torch.no_grad()
def test_faithfulness(golden):
    model, _, reference = golden
    loss = faithfulness(model.vpd.subcomponents.deltas([s.weight for s in model.vpd.sites]))
    assert float(loss) == pytest.approx(reference["reference"]["faith"], rel=1e-6)


def test_minimality(golden):
    _, arrays, reference = golden
    s = reference["scalars"]
    # The stored values are importances after the upper sigmoid, which leaves those below 1 alone.
    upper = torch.cat(by_site(arrays, "ci_upper"), dim=-1)
    z = torch.where(upper > 1, 1 + (upper - 1) / 0.01, upper)
    power_sum = penalty_sum(z, Power(s["IMP_P"], s["IMP_EPS"]))
    loss = minimality(power_sum, s["B"] * s["T"], s["IMP_BETA"])
    assert float(loss) == pytest.approx(reference["reference"]["imp"], rel=1e-5)


@torch.no_grad()
def test_stochastic_reconstruction(golden):
    model, arrays, reference = golden
    vpd = model.vpd
    importance = torch.cat(by_site(arrays, "ci_lower"), -1)
    sources = Sources(
        torch.cat(by_site(arrays, "stoch_u"), -1), torch.stack(by_site(arrays, "stoch_delta"), -1)
    )
    output, _ = vpd.target(arrays["resid"])
    divergence = Divergence(output)
    losses = []
    for layer in range(3):
        masks = sources.masks(importance)
        routed = torch.zeros(2, 5, 9, dtype=torch.bool)
        for k, matrix in enumerate(MATRICES):
            routed[..., 3 * layer + k] = arrays[f"route_chunk{layer}_{matrix}"].bool()
        losses.append(
            divergence(vpd.run(Masks(masks.components, masks.delta, routed), arrays["resid"]))
        )
    got = float(torch.stack(losses).mean())
    assert got == pytest.approx(reference["reference"]["stoch"], rel=1e-5)


@torch.no_grad()
def test_adversarial_reconstruction(golden):
    model, arrays, reference = golden
    importance = torch.cat(by_site(arrays, "ci_lower"), -1)
    stored = by_site(arrays, "ppgd_source")
    sources = Sources(
        torch.cat([s[..., :-1] for s in stored], -1), torch.stack([s[..., -1] for s in stored], -1)
    )
    output, _ = model.vpd.target(arrays["resid"])
    loss = Divergence(output)(model.vpd.run(sources.masks(importance), arrays["resid"]))
    assert float(loss) == pytest.approx(reference["reference"]["ppgd"], rel=1e-5)
