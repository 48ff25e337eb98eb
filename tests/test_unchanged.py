"""What was computed before the code was rearranged is computed after it.

Ten training steps of both classes, an evaluation, a graph and a harvest on fixed seeds, compared
with `data/unchanged.json`. `python tests/test_unchanged.py` writes that file anew; do so only when
a change of the numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FILE = Path(__file__).parent / "data" / "unchanged.json"
STEPS = 10
PRESETS = ("small", "paper", "spd")
CLASSES = ("bridge", "hooked")


def build(kind: str) -> nn.Module:
    """A 2-layer model of one of the two classes with random, non-trivial parameters."""
    from compat.builders import hooked, native

    return native("grouped") if kind == "bridge" else hooked("rms")


def rows(n: int, seed: int) -> Tensor:
    return torch.randint(4, 61, (n, 12), generator=torch.Generator().manual_seed(seed))


def projections(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of every tensor its norm and its product with a fixed random direction."""
    result = {}
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(tensor.shape, generator=generator)
        flat = tensor.detach().float()
        result[name] = [float(flat.norm()), float((flat * direction).sum())]
    return result


def trained(kind: str, preset: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model after ten steps, with the losses, gradients and parameters that were seen."""
    import vpd_lens

    model = build(kind)
    importance = vpd_lens.CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2)
    config = getattr(vpd_lens.VPDConfig, preset)(
        steps=STEPS, batch_size=4, seq_len=12, log_every=1, importance=importance, seed=3
    )
    if preset == "paper":
        config = config.replaced({"optimiser.lr": 1e-3, "faithfulness.warmup_steps": 20})
    vpd_lens.decompose(model, config=config, n_subcomponents=7)
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.vpd.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
        )
    batches = [rows(4, seed) for seed in range(STEPS)]
    result = vpd_lens.train(model, batches, config, output=folder, progress=False)
    timing = ("seconds_per_step",)
    return model, {
        "losses": [{k: v for k, v in row.items() if k not in timing} for row in result.history],
        "gradients": projections(gradients),
        "parameters": projections(dict(model.vpd.named_parameters())),
    }


def evaluated(model: nn.Module) -> dict[str, Any]:
    import vpd_lens

    report = vpd_lens.evaluate(
        model, rows(8, 99), batch_size=4, n_batches=2, pgd_steps=(3, 6), progress=False
    )
    fields = ("modes", "pgd", "l0", "alive", "hidden_error", "delta", "mean_ci", "n_positions")
    return report.model_dump(include=set(fields))


def graphs(model: nn.Module) -> dict[str, Any]:
    import vpd_lens

    result = {}
    for frozen in (False, True):
        graph = vpd_lens.attribute(
            model, rows(1, 98)[0, :6], frozen=frozen, idle=0.0, progress=False
        )
        result[f"frozen={frozen}"] = {
            "nodes": graph.n_nodes,
            "edges": graph.n_edges,
            "strongest": graph.incoming(graph.nodes.name(graph.n_nodes - 1), top=5),
            "gaps": projections({"gaps": graph.gaps().nan_to_num()}),
            "weights": projections({"weights": graph.adjacency().to_dense()}),
            "influence": projections({"influence": graph.influence().nodes}),
        }
    return result


def harvested(model: nn.Module) -> dict[str, Any]:
    import vpd_lens

    result = vpd_lens.harvest(model, rows(8, 97), batch_size=4, n_batches=2, progress=False)
    site = result.layout.names[3]
    cards = [result.card(site, index, k=3) for index in range(7)]
    return {"positions": result.n_positions, "cards": cards}


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in CLASSES:
        for preset in PRESETS:
            model, found[f"{kind} {preset}"] = trained(kind, preset, folder / f"{kind}-{preset}")
            if preset == "small":
                found[f"{kind} evaluation"] = evaluated(model)
                found[f"{kind} graph"] = graphs(model)
                found[f"{kind} harvest"] = harvested(model)
    return found


def largest(nest: Any) -> float:
    """The largest absolute value among the numbers of a nest of dictionaries and lists."""
    if isinstance(nest, dict | list | tuple):
        values = nest.values() if isinstance(nest, dict) else nest
        return max(map(largest, values), default=0.0)
    return abs(nest) if isinstance(nest, float) and nest == nest else 0.0


def differences(got: Any, expected: Any, path: str, scale: float) -> list[str]:
    """Where two nests of dictionaries, lists and numbers differ beyond rounding.

    Ten steps of a sign-like optimiser make percents of what another processor rounds otherwise,
    so numbers are compared on the `scale` of the largest that belongs to them.
    """
    if isinstance(expected, dict):
        missing = [f"{path}/{key}: missing" for key in expected if key not in got]
        pairs = [(key, value) for key, value in expected.items() if key in got]
        return missing + [d for k, v in pairs for d in differences(got[k], v, f"{path}/{k}", scale)]
    if isinstance(expected, list | tuple):
        if len(got) != len(expected):
            return [f"{path}: {len(got)} entries instead of {len(expected)}"]
        pairs = enumerate(zip(got, expected, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}", scale)]
    if isinstance(expected, float):
        close = got == pytest.approx(expected, rel=0.1, abs=0.01 * scale, nan_ok=True)
        return [] if close else [f"{path}: {got} instead of {expected}"]
    return [] if got == expected else [f"{path}: {got!r} instead of {expected!r}"]


@pytest.mark.slow
def test_numbers_are_what_they_were(tmp_path: Path) -> None:
    from compat.builders import has_hooked_transformer

    if not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    torch.set_num_threads(1)
    found, recorded = everything(tmp_path), json.loads(FILE.read_text())
    assert found.keys() == recorded.keys()
    problems = []
    for kind, sections in recorded.items():
        for name, expected in sections.items():
            scale = 0.0 if name == "losses" else largest(expected)
            problems += differences(found[kind][name], expected, f"{kind}/{name}", scale)
    assert not problems, "\n".join(problems[:40])


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(everything(Path(folder))) + "\n")
