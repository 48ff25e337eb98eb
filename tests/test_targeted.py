"""Decomposing one behaviour: two streams in the step and the loop, and the redundancy test."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_bridge
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vpd_lens
from vpd_lens import VPDConfig, decompose, redundancy
from vpd_lens.data import Batch
from vpd_lens.decomposition import Divergence, Masks
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import uniform_sources
from vpd_lens.errors import ConfigError, DataError, InputError
from vpd_lens.evaluation.redundancy import ABLATED
from vpd_lens.toys.modular_addition import last_position_kl
from vpd_lens.toys.two_tasks import TwoTasks
from vpd_lens.training import train
from vpd_lens.training.minimality import Power, minimality, penalty_sum
from vpd_lens.training.step import Stepper
from vpd_lens.training.streams import Streams

# A target that `TwoTasks().train_target()` made; `python tests/test_targeted.py` makes it anew.
TARGET = Path(__file__).parent / "data" / "two_tasks.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")


def config(**changes: Any) -> VPDConfig:
    start = VPDConfig.targeted(steps=8, batch_size=4, n_subcomponents=6, log_every=2)
    return start.replaced({"importance.hidden": (16,), **changes})


def tokens(seed: int, n: int = 16, length: int = 8) -> Tensor:
    return torch.randint(4, 29, (n, length), generator=torch.Generator().manual_seed(seed))


INSIDE, OUTSIDE = tokens(1), tokens(2)


def stepper(sites: str = "all", **changes: Any) -> Stepper:
    model = tiny_bridge()
    start = config(**changes)
    attach(model, sites, start.n_subcomponents, start.importance)
    return Stepper(model.vpd, start)


@pytest.mark.parametrize("changes", [{}, {"positions": "last"}], ids=["tpd", "last"])
def test_the_step_has_two_parts(changes: dict[str, Any]) -> None:
    """Losses and gradients against a computation from their definitions."""
    own = stepper(**{"adversary.inner_steps": 0, "stochastic.coefficient": 0.7, **changes})
    vpd, cfg = own.vpd, own.config
    own.step(INSIDE[:4], 0, elsewhere=Batch(OUTSIDE[:4]))  # makes sources and moments
    draws = torch.Generator().set_state(own.generator.get_state())
    sources = [leaf.detach().clone() for leaf in own.adversary.leaves()]
    seen: dict[str, Tensor] = {}
    own._update = lambda losses, *_: seen.update(losses)
    own.step(INSIDE[4:8], 3, elsewhere=Batch(OUTSIDE[4:8]))
    got = [p.grad.clone() for p in vpd.parameters() if p.grad is not None]
    from_adversary = [leaf.grad.clone() for leaf in own.adversary.leaves()]
    vpd.zero_grad()

    expected: dict[str, Tensor] = {}
    phi = Power(2.0 + (0.4 - 2.0) * 3 / cfg.steps)
    for name, rows in (("data", INSIDE[4:8]), ("elsewhere", OUTSIDE[4:8])):
        output, inputs = vpd.target(rows)
        z = vpd.pre_importance(inputs)
        g = lower_leaky(z)
        r = uniform_sources(g, vpd.layout, draws)
        counted = slice(-1, None) if changes and name == "data" else slice(None)
        under = partial(under_masks, vpd, rows, output, counted)
        least = minimality(penalty_sum(z, phi), 4 * 8, cfg.minimality.frequency)
        if name == "data":
            expected["stochastic"] = under(g + (1 - g) * r.components, r.delta)
            leaves = [leaf.requires_grad_() for leaf in sources]
            expected["adversarial"] = under(g + (1 - g) * leaves[0], leaves[1])
            expected["minimality"] = least
        else:
            deltas_on = torch.ones_like(r.delta)
            expected["elsewhere"] = under(g + (1 - g) * r.components, deltas_on)
            expected["minimality_elsewhere"] = least
    price = cfg.minimality.coefficient
    weights = {"stochastic": 0.7, "adversarial": cfg.adversary.coefficient, "elsewhere": 1.0}
    weights |= {"minimality": price, "minimality_elsewhere": 2 * price}
    expected["total"] = torch.stack([weights[name] * expected[name] for name in weights]).sum()
    expected["total"].backward()
    for name, loss in expected.items():
        torch.testing.assert_close(seen[name], loss.detach(), rtol=1e-4, atol=1e-6)
    wanted = [p.grad for p in vpd.parameters() if p.grad is not None]
    for a, b in zip([*got, *from_adversary], [*wanted, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def under_masks(
    vpd: Any, rows: Tensor, output: Tensor, counted: slice, mask: Any, delta: Any
) -> Tensor:
    masked = vpd.run(Masks(mask, delta), rows)
    return Divergence(output[:, counted])(masked[:, counted])


def test_the_adversary_knows_nothing_of_the_other_stream() -> None:
    sources = []
    for rows in (OUTSIDE[:4], OUTSIDE[4:8]):
        own = stepper(**{"adversary.lr_warmup": 0.0})
        own.step(INSIDE[:4], 0, elsewhere=Batch(rows))
        sources.append([leaf.detach().clone() for leaf in own.adversary.leaves()])
    assert all(a.equal(b) for a, b in zip(*sources, strict=True))


@pytest.mark.parametrize(
    ("sites", "changes"),
    [
        (r"blocks\.1\.", {}),  # block 0 runs once per batch, in both streams
        ("all", {"micro_batches": 2}),
        ("all", {"recompute": True, "adversary.merge": 0.5}),
        pytest.param("all", {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_whatever_saves_time_or_memory_takes_both_streams(
    sites: str, changes: dict[str, Any]
) -> None:
    """Masks that do not depend on random draws make the losses comparable."""
    found = []
    for options in ({}, changes):
        always = {"adversary.inner_steps": 0, "adversary.merge": options.get("adversary.merge", 0)}
        own = stepper(sites, **{**options, **always})
        if not options:
            own.vpd.forwards.passable = False
        # Importances above 1 leave nothing to draw.
        with torch.no_grad():
            last = [p for p in own.vpd.importance.parameters() if p.ndim == 1][-1]
            last.fill_(50.0)
            for v in own.vpd.subcomponents.v:
                v.copy_(torch.linspace(-1, 1, v.numel()).reshape(v.shape) * 0.1)
        own.coefficients["stochastic"] = own.coefficients["stochastic"] and 1.0
        losses, importance = own.step(INSIDE[:4], 0, elsewhere=Batch(OUTSIDE[:4]))
        found.append(losses)
        assert importance.elsewhere.whole().shape == (4, 8, own.vpd.layout.total)
    for name in ("elsewhere", "minimality", "minimality_elsewhere"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_padding_counts_nowhere_in_the_other_stream() -> None:
    """Rows with pads give the minimality of their real positions alone."""
    real = torch.ones(4, 8, dtype=torch.bool)
    real[:, 6:] = False
    found = []
    for rows, mask in ((OUTSIDE[:4], real), (OUTSIDE[:4, :6], None)):
        own = stepper(**{"adversary.coefficient": 0.0})
        found.append(own.step(INSIDE[:4], 0, elsewhere=Batch(rows, mask))[0])
    name = "minimality_elsewhere"
    torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_the_last_position_is_that_before_the_pads() -> None:
    """Of rows of unlike lengths, in micro-batches: the mean over rows of their last positions."""
    lengths = torch.tensor([8, 6, 3, 6])
    real = torch.arange(8) < lengths[:, None]
    own = stepper(positions="last", micro_batches=2)
    parts = own._cut(Batch(INSIDE[:4], real), last=True)
    masked = torch.randn(4, 8, own.vpd.model.cfg.d_vocab, generator=torch.Generator())
    got = 0.0
    for part in parts:
        own._look(part, gradient=False)
        got += part.share * part.divergence(masked[part.rows])
    output = own.vpd.target(INSIDE[:4], attention_mask=real.long())[0]
    ends = torch.arange(4), lengths - 1
    torch.testing.assert_close(got, Divergence(output[ends])(masked[ends]))


def test_a_divergence_of_ones_own_knows_its_positions_itself() -> None:
    model = tiny_bridge()
    attach(model, n_subcomponents=4, divergence=last_position_kl)
    with pytest.raises(ConfigError, match="positions='last' and a divergence of your own"):
        Stepper(model.vpd, config(positions="last"))


def test_a_run_is_resumed_in_both_streams(tmp_path: Path) -> None:
    """After an interruption, the rest of the run is that of a whole one, bit for bit."""
    run = {"config": config(checkpoint_every=4), "elsewhere": OUTSIDE, "progress": False}
    whole, broken = tiny_bridge(), tiny_bridge()
    train(whole, INSIDE, output=tmp_path / "whole", **run)
    with pytest.MonkeyPatch.context() as patch:
        steps = Stepper.step

        def step(self: Stepper, batch: Tensor, step: int, *rest: Any, **more: Any) -> Any:
            if step == 6:
                raise KeyboardInterrupt
            return steps(self, batch, step, *rest, **more)

        patch.setattr(Stepper, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(broken, INSIDE, output=tmp_path / "broken", **run)
    broken = tiny_bridge()
    result = train(broken, INSIDE, output=tmp_path / "broken", resume=True, **run)
    for a, b in zip(whole.vpd.parameters(), broken.vpd.parameters(), strict=True):
        assert a.equal(b)
    assert {"elsewhere", "minimality_elsewhere", "l0_elsewhere"} <= result.metrics.keys()
    other = {**run, "elsewhere": OUTSIDE[:8]}
    with pytest.raises(DataError, match="Resume with the data"):
        train(tiny_bridge(), INSIDE, output=tmp_path / "broken", resume=True, **other)


def test_processes_share_the_rows_of_both_streams() -> None:
    model, made = SimpleNamespace(), partial(Streams, config(), INSIDE, OUTSIDE)
    whole = next(made(model=model))
    halves = [next(made(model=model, rows=slice(i, i + 2))) for i in (0, 2)]
    for stream, batch in enumerate(whole):
        parts = torch.cat([half[stream].tokens for half in halves])
        assert parts.equal(batch.tokens)
    assert not whole[0].tokens.equal(whole[1].tokens)


def test_streams_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    model, decompose = tiny_bridge(), partial(vpd_lens.decompose, output=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="elsewhere is None"):
        decompose(model, INSIDE, config())
    with pytest.raises(ConfigError, match=r"VPDConfig\.targeted"):
        decompose(model, INSIDE, VPDConfig.small(), elsewhere=OUTSIDE)
    with pytest.raises(DataError, match="are the same"):
        decompose(model, INSIDE, config(), elsewhere=INSIDE)
    for empty in (OUTSIDE[:0], []):
        with pytest.raises(DataError, match="elsewhere: "):
            decompose(model, INSIDE, config(), elsewhere=empty)
    with pytest.raises(ConfigError, match="half_life"):
        config(**{"minimality.half_life": 10})
    assert "vpd" not in model.__dict__


# ------------------------------------------------------------------- the truth


def target(task: TwoTasks) -> nn.Module:
    """The trained transformer with two tasks."""
    pytest.importorskip("transformer_lens.HookedTransformer", reason="its weights are named so")
    model = task.transformer()
    different = model.load_state_dict(load_file(TARGET), strict=False)
    assert not different.unexpected_keys
    return model.eval()


@pytest.mark.slow
def test_ablating_what_was_found_destroys_one_task_and_leaves_the_other(tmp_path: Path) -> None:
    task = TwoTasks()
    model = target(task)
    assert task.accuracy(model, "add") == task.accuracy(model, "copy") == 1
    changes = {"importance.hidden": (128,), "adversary.scope": "sequence"}
    changes |= {"adversary.inner_steps": 1}
    changes |= {"elsewhere.coefficient": 3.0, "elsewhere.minimality": 30.0}
    start = VPDConfig.targeted(steps=600, batch_size=49, n_subcomponents=32).replaced(changes)
    streams = {"data": task.data("add"), "elsewhere": task.data("copy")}
    run = {"divergence": last_position_kl, "output": tmp_path, "progress": False}
    decompose(model, config=start, **streams, **run)
    rows = task.rows("add"), task.rows("copy")
    found = redundancy(model, *rows, batch_size=49, progress=False)
    _, ablated, alone, nothing, kept = found.inside
    chosen = torch.zeros(model.vpd.layout.total)
    names = [f"{n}:{i}" for n in model.vpd.layout.names for i in model.vpd.original_indices(n)]
    chosen[[names.index(name) for name in found.important]] = 1
    assert found.inside[ablated] > 2 > 0.3 > found.outside[ablated]
    assert found.inside[alone] < 0.1 < 1 < found.inside[nothing]
    assert max(found.inside[kept], found.outside[kept]) < 0.1
    assert "does not need" not in found.verdict
    with model.vpd.masked(1 - chosen, delta=1.0):
        assert task.accuracy(model, "add") < 0.3
        assert task.accuracy(model, "copy") > 0.95
    with model.vpd.masked(chosen, delta=0.0):
        assert task.accuracy(model, "add") > 0.95


def test_the_target_of_two_tasks_learns() -> None:
    task = TwoTasks()
    rows = torch.cat([task.rows("add"), task.rows("copy")])

    def loss(steps: int) -> float:
        model = task.train_target(steps=steps, progress=False)
        with torch.no_grad():
            logits = model(rows)[:, -1]
        return float(nn.functional.cross_entropy(logits, task.answers(rows)))

    assert loss(40) < 0.9 * loss(1)
    drawn = task.data("copy")(torch.Generator().manual_seed(0), 5)
    assert drawn[:, 0].eq(task.p + 1).all()
    assert task.answers(drawn).equal(drawn[:, 2])


# ------------------------------------------------------------------- redundancy


class Saturated(nn.Module):
    """Two ways to the same answer, of which one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, 40.0)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(self.linear(x))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_second_mechanism_in_the_delta_is_seen(share: float) -> None:
    """A subcomponent has half of a weight, or all of it; one half would be enough."""
    x = torch.linspace(0.5, 1, 12)[:, None]
    model = attach(Saturated(), n_subcomponents=1, example=x)
    vpd = model.vpd
    with torch.no_grad():
        vpd.subcomponents.v[0].fill_(1.0)
        vpd.subcomponents.u[0].fill_(40.0 * share)
    vpd.causal_importance = lambda rows: (rows > 0).float()
    found = redundancy(model, [x[:5], x[5:]], [-x], each=True, progress=False)
    lost = list(found.inside.values())
    assert found.important == ["linear:0"]
    assert lost[0] == pytest.approx(0, abs=1e-6)  # everything on
    assert lost[2] == pytest.approx(0, abs=1e-6)  # the important alone
    assert lost[3] == pytest.approx(25, rel=1e-3)  # nothing
    effect = found.effects["linear:0"]
    assert effect.in_model == pytest.approx(lost[1]) == pytest.approx(50 * share - 25, abs=1e-3)
    assert effect.in_circuit == pytest.approx(25, rel=1e-3)
    assert found.hidden == (["linear:0"] if share == 0.5 else [])
    assert ("does not need" in found.verdict) == (share == 0.5)
    assert found.verdict.split()[0] in str(found)


@pytest.mark.parametrize("positions", [None, "last"])
def test_redundancy_counts_every_position_once_and_names_bad_data(positions: Any) -> None:
    model = attach(tiny_bridge(), n_subcomponents=6, importance=config().importance)
    vpd = model.vpd
    options: dict[str, Any] = {"batch_size": 3, "positions": positions, "progress": False}
    found = redundancy(model, INSIDE[:7], OUTSIDE[:5], threshold=-1.0, **options)
    assert len(found.important) == vpd.layout.total
    for rows, measured in ((INSIDE[:7], found.inside), (OUTSIDE[:5], found.outside)):
        output, _ = vpd.target(rows)
        counted = slice(-1 if positions and measured is found.inside else 0, None)
        ones = torch.ones(1, 1, vpd.layout.total)
        deltas = torch.ones(1, 1, len(vpd.sites))
        states = (1, 1), (0, 1), (1, 0), (0, 0), (1, 1)
        masks = [Masks(a * ones, d * deltas) for a, d in states]
        outputs = [vpd.run(m, rows).detach()[:, counted] for m in masks]
        expected = [float(Divergence(output[:, counted])(masked)) for masked in outputs]
        assert list(measured.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    some = redundancy(model, INSIDE, OUTSIDE, important=found.important[3:5], progress=False)
    assert some.important == found.important[3:5]
    assert some.inside[ABLATED] == pytest.approx(without(model, found.important[3:5]), rel=1e-4)
    with pytest.raises(InputError, match=r"no subcomponent 'q:9'.*as 'blocks\.0\.attn\.q:0'"):
        redundancy(model, INSIDE, OUTSIDE, important=["q:9"], progress=False)
    for data, elsewhere, name in ((INSIDE[:0], OUTSIDE, "data"), (INSIDE, [], "elsewhere")):
        with pytest.raises(DataError, match=f"^{name}"):
            redundancy(model, data, elsewhere, progress=False)


def without(model: Any, names: list[str]) -> float:
    """The divergence of a model, deltas on, without some subcomponents."""
    mask = torch.ones(model.vpd.layout.total)
    for name in names:
        site, index = name.split(":")
        mask[model.vpd.layout.columns(site).start + int(index)] = 0
    with torch.no_grad():
        divergence = Divergence(model(INSIDE))
        with model.vpd.masked(mask, delta=1.0):
            return float(divergence(model(INSIDE)))


if __name__ == "__main__":
    made = TwoTasks().train_target().named_parameters()
    save_file({name: x.detach().contiguous() for name, x in made}, TARGET)
