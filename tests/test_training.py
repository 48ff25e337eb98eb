"""The step and the loop: gradients, micro-batches, resuming, interruption, failures."""

import json
import math
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_bridge
from processes import ended, signalled, start

from vpd_lens import load, remove, storage
from vpd_lens.config import OptimiserConfig, VPDConfig
from vpd_lens.decomposing import decompose
from vpd_lens.decomposition import CausalImportanceConfig, Divergence
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.masks import uniform_sources
from vpd_lens.decomposition.subcomponents import align
from vpd_lens.errors import ArtefactError, CollapseError, ConfigError, NonFiniteLossError
from vpd_lens.training import train
from vpd_lens.training.checkpoint import CheckpointRecord
from vpd_lens.training.distributed import ALONE
from vpd_lens.training.log import Diagnostics, TrainingWarning
from vpd_lens.training.losses import cut, faithfulness
from vpd_lens.training.minimality import Power, minimality, penalty_sum
from vpd_lens.training.optimiser import optimisers
from vpd_lens.training.price import Price
from vpd_lens.training.step import Stepper, warm_up_faithfulness

IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)


def config(**changes):
    """The paper's losses and optimiser, at the sizes of the small preset."""
    base = {
        "initialisation": "random",
        "stochastic": {},
        "adversary": {},
        "optimiser": {"lr": 3e-3, "clip_importance": 1.0},
        "steps": 8,
        "batch_size": 4,
        "n_subcomponents": 12,
        "importance": IMPORTANCE,
        "faithfulness": {"coefficient": 1e3, "warmup_steps": 5},
        "log_every": 2,
    }
    return VPDConfig.small(**{**base, **changes})


def state(vpd):
    return [p.detach().clone() for p in vpd.parameters()]


def fresh_stepper(changes=None):
    model = tiny_bridge()
    attach(model, n_subcomponents=12, importance=IMPORTANCE)
    return Stepper(model.vpd, config(**(changes or {})))


def test_one_step_is_the_paper_s_step(tokens):
    """Losses and parameter gradients of a step against a literal, loss-by-loss computation."""
    stepper = fresh_stepper({"stochastic": {"routing": "all"}})
    vpd, cfg = stepper.vpd, stepper.config
    stepper.step(tokens[:4], 0)  # creates sources and moments
    before = torch.Generator().set_state(stepper.generator.get_state())
    sources = [leaf.detach().clone() for leaf in stepper.adversary.leaves()]
    seen = {}
    stepper._update = lambda losses, *_: seen.update(
        losses=losses, source=[leaf.grad.clone() for leaf in stepper.adversary.leaves()]
    )
    stepper.config = cfg.replaced({"adversary.inner_steps": 0})
    stepper.step(tokens[4:8], 3)
    got = [p.grad.clone() for p in vpd.parameters()]
    vpd.zero_grad()

    output, inputs = vpd.target(tokens[4:8])
    divergence = Divergence(output)
    z = vpd.pre_importance(inputs)
    g = lower_leaky(z)
    p = 2.0 + (0.4 - 2.0) * 3 / cfg.steps
    r = uniform_sources(g, vpd.layout, before)
    stochastic = divergence(vpd.run(_masks(g, r.components, r.delta), tokens[4:8]))
    leaves = [leaf.requires_grad_() for leaf in sources]
    adversarial = divergence(vpd.run(_masks(g, *leaves), tokens[4:8]))
    least = minimality(penalty_sum(z, Power(p)), 4 * 8, 0.5)
    faith = faithfulness(vpd.subcomponents.deltas([s.weight for s in vpd.sites]))
    total = (
        0.5 * stochastic
        + 0.5 * adversarial
        + cfg.minimality.coefficient * least
        + cfg.faithfulness.coefficient * faith
    )
    total.backward()
    for name, expected in (
        ("stochastic", stochastic),
        ("adversarial", adversarial),
        ("minimality", least),
        ("faithfulness", faith),
        ("total", total),
    ):
        torch.testing.assert_close(seen["losses"][name], expected.detach(), rtol=1e-4, atol=1e-6)
    for a, e in zip(got, [p.grad for p in vpd.parameters()], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-6)
    # The main backward leaves the sources' own gradient times the coefficient.
    for a, leaf in zip(seen["source"], leaves, strict=True):
        torch.testing.assert_close(a, leaf.grad, rtol=1e-3, atol=1e-8)


def _masks(g, r, r_delta):
    from vpd_lens.decomposition import Masks

    return Masks(g + (1 - g) * r, r_delta)


def test_source_update_ignores_the_loss_coefficient(tokens):
    """Doubling the adversary's coefficient changes the parameters but not the sources."""
    results = []
    for coefficient in (0.5, 1.0):
        stepper = fresh_stepper({"adversary": {"coefficient": coefficient, "lr_warmup": 0.0}})
        stepper.step(tokens[:4], 0)
        results.append([leaf.detach().clone() for leaf in stepper.adversary.leaves()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_muon_moves_every_direction_of_a_matrix_equally():
    """One step of Muon for matrices, of AdamW for biases, each at its group's own rate."""
    matrix, other = (torch.nn.Parameter(torch.zeros(16, 32)) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(32))
    generator = torch.Generator().manual_seed(0)
    for parameter in (matrix, other, bias):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradient_spread = torch.linalg.svdvals(matrix.grad)
    config = OptimiserConfig(kind="muon", lr=1e-2, importance_lr=5e-3)
    made = optimisers({"subcomponents": [matrix], "importance": [other, bias]}, config)
    assert [group["base"] for o in made for group in o.param_groups] == [1e-2, 5e-3, 5e-3]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["lr"] = group["base"]
        optimiser.step()
    values = torch.linalg.svdvals(matrix.detach())
    # Its Newton-Schulz iteration leaves singular values between about 0.7 and 1.2.
    assert values[0] / values[-1] < 2 < gradient_spread[0] / gradient_spread[-1]
    assert values.median().item() == pytest.approx(0.2 * 1e-2 * 32**0.5, rel=0.3)
    assert values.median() > 1.5 * torch.linalg.svdvals(other.detach()).median()
    torch.testing.assert_close(bias.detach().abs(), torch.full((32,), 5e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_fp32_is_pytorch_s_in_bf16_up_to_rounding(shape):
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    (optimiser,) = optimisers({"subcomponents": [ours]}, OptimiserConfig(kind="muon", lr=1e-2))
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        optimiser.param_groups[0]["lr"] = 1e-2
        optimiser.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=5e-4)
    state, expected = optimiser.state[ours], reference.state[theirs]
    torch.testing.assert_close(dict(state), dict(expected))


def test_muon_costs_a_few_products_of_its_matrices():
    """In bf16 a CPU without bf16 units would take about fifty times as long."""
    matrix = torch.nn.Parameter(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))
    matrix.grad = matrix.detach().clone()
    (optimiser,) = optimisers({"subcomponents": [matrix]}, OptimiserConfig(kind="muon"))

    def products():
        for _ in range(15):
            matrix.detach() @ matrix.detach()

    def seconds(work):
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    ratios = [seconds(optimiser.step) / seconds(products) for _ in range(9)]
    assert sorted(ratios)[4] < 4


def test_aligned_subcomponents_add_up_to_the_weights_along_neurons_and_heads():
    model = tiny_bridge()
    attach(model, n_subcomponents={r"\.q$": 10, ".": 24}, importance=IMPORTANCE)
    vpd = model.vpd
    random = [v.detach().clone() for v in vpd.subcomponents.v]
    align(vpd.subcomponents, vpd.sites)
    for site, before in zip(vpd.sites, random, strict=True):
        v, u = vpd.v(site.name), vpd.u(site.name)
        reads = site.name.endswith((".o", ".out"))
        axes, weight = (v.T, site.weight) if reads else (u, site.weight.T)
        n = min(v.shape[1], axes.shape[1])
        assert torch.equal((axes[:n] != 0).nonzero(), torch.arange(n)[:, None].expand(n, 2))
        rank_one = v[:, :n] @ u[:n]
        kept = rank_one if reads else rank_one.T
        torch.testing.assert_close(kept[:n], weight[:n])
        torch.testing.assert_close(v[:, :n].norm(dim=0), u[:n].norm(dim=1))
        if v.shape[1] > n and not reads:  # their directions, at a tenth of the others' size
            size = (v[:, n:].norm(dim=0) * u[n:].norm(dim=1)) / weight.norm(
                dim=1
            ).square().mean().sqrt()
            torch.testing.assert_close(size, torch.full_like(size, 0.1))
            cosine = torch.cosine_similarity(v[:, n:], before[:, n:], dim=0)
            torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_the_aligned_start_of_a_matrix_has_its_size_whatever_that_is():
    """Scaled weights start as scaled subcomponents, and zeros as zeros."""
    sizes = []
    for scale in (1.0, 1e-3, 0.0):
        model = tiny_bridge()
        with torch.no_grad():
            model.blocks[0].mlp.W_in.mul_(scale)
        attach(model, n_subcomponents=32, importance=IMPORTANCE)
        align(model.vpd.subcomponents, model.vpd.sites)
        v, u = model.vpd.v("blocks.0.mlp.in"), model.vpd.u("blocks.0.mlp.in")
        sizes.append((v @ u).norm().item())
    assert sizes[1] == pytest.approx(1e-3 * sizes[0], rel=1e-3)
    assert sizes[2] == 0


def test_alignment_leaves_what_has_no_known_axes():
    toy = torch.nn.Sequential(torch.nn.Linear(4, 4))
    attach(
        toy, n_subcomponents=4, importance=CausalImportanceConfig(kind="mlp"), example=torch.eye(4)
    )
    before = state(toy.vpd)
    align(toy.vpd.subcomponents, toy.vpd.sites)
    assert all(map(torch.equal, before, state(toy.vpd)))


def test_micro_batches_equal_the_whole_batch(tokens):
    """Sums over the batch inside the frequency term included."""
    gradients, sources = [], []
    for count in (1, 4):
        stepper = fresh_stepper({"micro_batches": count, "stochastic": {"coefficient": 0.0}})
        stepper.optimisers[0].step = lambda: None
        stepper.optimisers[0].zero_grad = lambda set_to_none=True: None
        losses, _ = stepper.step(tokens[:4], 3)
        gradients.append([p.grad.clone() for p in stepper.vpd.parameters()] + list(losses.values()))
        sources.append([leaf.detach().clone() for leaf in stepper.adversary.leaves()])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=2e-4, atol=1e-6)
    for one, many in zip(*sources, strict=True):
        # Adam's first steps follow the sign, so a gradient that is zero up to rounding may differ.
        assert ((one - many).abs() < 1e-5).float().mean() > 0.999


def looked_at(stepper, tokens):
    """A batch in one part, after the first two phases of a step."""
    (part,) = cut(tokens, None, 1, ALONE)
    stepper._look(part, gradient=True)
    return part


def test_importances_are_constant_in_the_inner_steps_and_weights_get_no_gradient(tokens):
    stepper = fresh_stepper()
    part = looked_at(stepper, tokens[:4])
    stepper._refine_adversary([part], 4, 0)
    assert all(p.grad is None for p in stepper.vpd.parameters())
    assert all(p.grad is None for p in stepper.vpd.model.parameters())


def test_inner_updates_mask_every_site_whatever_the_routing_of_the_loss(tokens):
    stepper = fresh_stepper({"adversary": {"routing": "subset"}, "stochastic": {"coefficient": 0}})
    run, routed = stepper.run, []

    def remembered(masks, *args, **kwargs):
        routed.append(masks.routed is not None)
        return run(masks, *args, **kwargs)

    stepper.run = remembered
    stepper.step(tokens[:4], 1)  # the first also ablates everything
    assert routed == [False] * stepper.config.adversary.inner_steps + [True]


def test_only_the_subcomponents_are_clipped_by_default(tokens):
    stepper = fresh_stepper({"optimiser": {"lr": 1e-3, "clip_subcomponents": 1e-3}})
    norms = {}
    stepper.optimisers[0].step = lambda: norms.update(
        v=_norm(stepper.vpd.subcomponents), g=_norm(stepper.vpd.importance)
    )
    losses, _ = stepper.step(tokens[:4], 0)
    assert norms["v"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["g"] == pytest.approx(float(losses["grad_norm/importance"]), rel=1e-4)


def _norm(module):
    return float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())


def test_faithfulness_warm_up_fits_the_weights():
    stepper = fresh_stepper(
        {"faithfulness": {"warmup_steps": 400, "warmup_lr": 1e-2}, "n_subcomponents": 32}
    )
    importance = [p.clone() for p in stepper.vpd.importance.parameters()]
    start = float(faithfulness(stepper.vpd.subcomponents.deltas(stepper.weights)).detach())
    end = warm_up_faithfulness(stepper)
    assert end < start / 20
    assert all(map(torch.equal, importance, stepper.vpd.importance.parameters()))


@pytest.mark.slow
def test_training_improves_and_leaves_the_base_weights_alone(tokens, tmp_path):
    model = tiny_bridge()
    weights = [p.clone() for p in model.parameters()]
    logits = model(tokens[:4])
    result = train(
        model, tokens, config(steps=40, log_every=5), output=tmp_path / "run", progress=False
    )
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(model(tokens[:4]), logits)
    first, last = result.history[0], result.history[-1]
    assert last["stochastic"] < 0.7 * first["stochastic"]
    assert model.vpd.trained_steps == 40
    lines = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    again = load(result.folder / "decomposition", tiny_bridge())
    assert all(map(torch.equal, state(model.vpd), state(again.vpd)))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tokens, tmp_path):
    runs = []
    for name in "ab":
        model = tiny_bridge()
        train(model, tokens, config(), output=tmp_path / name, progress=False)
        runs.append(state(model.vpd))
    assert all(map(torch.equal, *runs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimiser": {"kind": "muon"}, "adversary": {"scope": "sequence", "restart": 0.5}},
        {"mask_dtype": "bfloat16"},
    ],
    ids=["paper", "muon and restarts", "bf16 masks"],
)
def test_resuming_after_a_crash_is_bit_identical(tokens, tmp_path, changes):
    """2N steps equal N steps, a crash some steps after the checkpoint, and the rest."""
    run = config(checkpoint_every=4, **changes)
    straight = tiny_bridge()
    train(straight, tokens, run, output=tmp_path / "straight", progress=False)

    class Crash(Exception):
        pass

    broken = tiny_bridge()
    original, calls = Stepper.step, []

    def failing(self, batch, step, *rest):
        if step == 6 and not calls:
            calls.append(step)
            raise Crash
        return original(self, batch, step, *rest)

    Stepper.step = failing
    try:
        with pytest.raises(Crash):
            train(broken, tokens, run, output=tmp_path / "broken", progress=False)
    finally:
        Stepper.step = original
    with pytest.raises(ConfigError, match="resume=True"):
        train(tiny_bridge(), tokens, run, output=tmp_path / "broken", progress=False)
    resumed = tiny_bridge()
    train(resumed, tokens, run, output=tmp_path / "broken", resume=True, progress=False)
    assert all(map(torch.equal, state(straight.vpd), state(resumed.vpd)))
    # Resuming what is finished changes nothing, its metrics included.
    record = tmp_path / "broken" / "decomposition" / "record.json"
    before = record.read_text()
    train(resumed, tokens, run, output=tmp_path / "broken", resume=True, progress=False)
    assert record.read_text() == before
    steps = [
        [
            json.loads(line)["step"]
            for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()
        ]
        for n in ("straight", "broken")
    ]
    assert steps[0] == steps[1] == [2, 4, 6, 8]


def trained_in(folder, tokens, resume):
    """What a process of its own does, which signals can reach at any step."""
    model = tiny_bridge()
    run = config(steps=40, log_every=1)
    train(model, tokens, run, output=folder / "run", resume=resume, progress=False)
    torch.save(state(model.vpd), folder / "result.pt")


def stopped_with(number, folder, tokens):
    """Train, send the signal once five steps are logged, and return what was printed."""
    process = start(trained_in, folder, tokens, False, folder=folder)
    metrics = folder / "run" / "metrics.jsonl"
    status, printed = signalled(
        number,
        process,
        folder,
        once=lambda: metrics.exists() and metrics.read_text().count("\n") >= 5,
    )
    assert status == 1
    return printed


def stopped_at(folder):
    return checkpoint_of(folder / "run").step


def checkpoint_of(run):
    return storage.read(run / "checkpoint", CheckpointRecord).record


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_killed_process_resumes_bit_identically(tokens, tmp_path):
    error = stopped_with(signal.SIGTERM, tmp_path, tokens)
    assert "TrainingInterrupted: stopped by SIGTERM" in error
    assert "resume=True" in error
    assert 5 <= stopped_at(tmp_path) < 40
    status, printed = ended(start(trained_in, tmp_path, tokens, True, folder=tmp_path), tmp_path)
    assert status == 0, printed
    straight = tiny_bridge()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(
            straight,
            tokens,
            config(steps=40, log_every=1),
            output=tmp_path / "straight",
            progress=False,
        )
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, state(straight.vpd), torch.load(tmp_path / "result.pt")))


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_ctrl_c_writes_a_checkpoint(tokens, tmp_path):
    error = stopped_with(signal.SIGINT, tmp_path, tokens)
    assert "TrainingInterrupted: stopped by SIGINT" in error
    assert 5 <= stopped_at(tmp_path) < 40


@pytest.mark.slow
def test_checkpoint_of_another_configuration_or_model_is_refused(tokens, tmp_path):
    train(tiny_bridge(), tokens, config(), output=tmp_path / "run", progress=False)
    options = {"output": tmp_path / "run", "resume": True, "progress": False}
    with pytest.raises(ArtefactError, match="optimiser"):
        train(tiny_bridge(), tokens, config(optimiser={"lr": 0.1}), **options)
    with pytest.raises(ArtefactError, match="differ from those"):
        train(tiny_bridge(seed=5), tokens, config(), **options)
    damaged = tmp_path / "run" / "checkpoint" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(ArtefactError, match="checksum"):
        train(tiny_bridge(), tokens, config(), **options)


@pytest.mark.slow
def test_a_non_finite_loss_stops_the_run_and_names_the_term(tokens, tmp_path):
    run = config(checkpoint_every=2)
    model = tiny_bridge()
    original = Stepper.step

    def poisoned(self, batch, step, *rest):
        if step == 5:
            self.vpd.subcomponents.u[0].data[0, 0] = float("inf")
        return original(self, batch, step, *rest)

    Stepper.step = poisoned
    try:
        with pytest.raises(NonFiniteLossError, match=r"stochastic, .*faithfulness"):
            train(model, tokens, run, output=tmp_path / "run", progress=False)
    finally:
        Stepper.step = original
    assert checkpoint_of(tmp_path / "run").step == 4
    resumed = tiny_bridge()
    train(resumed, tokens, run, output=tmp_path / "run", resume=True, progress=False)
    assert all(torch.isfinite(p).all() for p in resumed.vpd.parameters())


class TestWarnings:
    def look(self, step, **changes):
        healthy = {"l0": 10.0, "ci_max": 1.0, "grad_norm/importance": 1.0}
        self.diagnostics.look(step, {**healthy, **changes})

    @pytest.fixture(autouse=True)
    def _fresh(self):
        self.diagnostics = Diagnostics(100, 1000)

    def test_healthy_runs_are_silent(self, recwarn):
        for step in range(100, 1001, 100):
            self.look(step, l0=60.0 if step < 500 else 20.0)
        assert not recwarn

    def test_collapse(self):
        with pytest.warns(TrainingWarning, match="collapsed"):
            self.look(200, ci_max=0.2)

    def test_dense(self):
        with pytest.warns(TrainingWarning, match="60 of 100"):
            self.look(700, l0=60.0)

    def test_diverging_gradient_warns_once(self, recwarn):
        for step in range(6):
            self.look(step)
        with pytest.warns(TrainingWarning, match="50 times"):
            self.look(7, **{"grad_norm/importance": 50.0})
        self.look(8, **{"grad_norm/importance": 80.0})
        assert len([w for w in recwarn if w.category is TrainingWarning]) == 0

    def collapsing(self, growth=20.0, l0=5.0, lost=2.0):
        for step in range(8):
            self.look(step, adversarial=1.0, stochastic=0.5)
        self.look(8, adversarial=lost, stochastic=0.5, l0=l0, **{"grad_norm/importance": growth})

    def test_a_collapse_is_all_three_signs_together(self, recwarn):
        with pytest.warns(TrainingWarning, match="20 times its usual size, L0 fell from 10 to 5"):
            self.collapsing()
        assert self.diagnostics.collapsed
        for one in ({"growth": 5.0}, {"l0": 9.5}, {"lost": 1.1}):
            self.diagnostics = Diagnostics(100, 1000)
            self.collapsing(**one)
            assert not self.diagnostics.collapsed
            assert self.diagnostics.suspicious  # from three times the usual size on
        assert not recwarn

    def test_what_is_still_lost_at_the_end(self, recwarn):
        self.look(1000, adversarial=0.5, stochastic=0.09, worst=1.0)
        self.look(999, stochastic=0.5, worst=1.0)
        assert not recwarn
        with pytest.warns(TrainingWarning, match="still 50% of what knowing nothing"):
            self.look(1000, stochastic=0.5, worst=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_a_collapse_ends_a_run_that_asked_for_it(tokens, tmp_path, monkeypatch, stop):
    """Brought about by a price that rises a thousandfold in the middle of the run."""
    see = Price.see

    def dearer(self, divergence, step, steps):
        see(self, divergence, step, steps)
        if step == 60:
            self.state = self.state + torch.tensor([math.log(3000.0), 0.0, 0.0])

    monkeypatch.setattr(Price, "see", dearer)
    run = VPDConfig.small(steps=100, batch_size=4, seq_len=8, log_every=5, checkpoint_every=10)
    changes = {"minimality.coefficient": 1e-4, "stop_on_collapse": stop, "n_subcomponents": 12}
    rates = {"kind": "adamw", "lr": 1e-2, "schedule": "constant", "clip_importance": None}
    run = run.replaced({**changes, "importance": IMPORTANCE.model_dump(), "optimiser": rates})
    ends = pytest.raises(CollapseError, match="after step 60 is in") if stop else nullcontext()
    with pytest.warns(TrainingWarning, match="is collapsing"), ends:
        train(tiny_bridge(), tokens, run, output=tmp_path / "run", progress=False)
    assert checkpoint_of(tmp_path / "run").step == (60 if stop else 100)


@pytest.mark.slow
def test_too_high_a_coefficient_really_warns(tokens, tmp_path):
    run = config(
        steps=40, minimality={"coefficient": 3.0}, optimiser={"lr": 1e-2}, log_every=10, seed=4
    )
    with pytest.warns(TrainingWarning, match="collapsed"):
        train(tiny_bridge(), tokens, run, output=tmp_path / "run", progress=False)


@pytest.mark.slow
def test_wandb_offline_writes_a_run(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(
        tiny_bridge(),
        tokens,
        config(steps=4),
        output=tmp_path / "run",
        progress=False,
        wandb={"project": "vpd-test", "mode": "offline"},
    )
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    assert checkpoint_of(tmp_path / "run").extra["wandb_id"] in file.name


def test_cuda_asked_for_and_absent(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        train(tiny_bridge(), tokens, config(device="cuda"), output=tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_with_bf16_autocast(tokens, tmp_path):
    model = tiny_bridge()
    result = train(model, tokens, config(device="cuda", steps=20), output=tmp_path / "run")
    assert model.vpd.device.type == "cuda"
    assert all(torch.isfinite(torch.tensor(list(m.values()))).all() for m in result.history)


def test_bf16_autocast_losses_are_close_to_fp32(tokens, monkeypatch):
    """The autocast path, on the CPU's bf16: losses agree to its precision, parameters stay fp32."""
    results = []
    for on in (False, True):
        stepper = fresh_stepper({"adversary": {"inner_steps": 1}})
        monkeypatch.setattr(
            Stepper,
            "_autocast",
            lambda self, on=on: torch.autocast("cpu", dtype=torch.bfloat16, enabled=on),
        )
        losses, _ = stepper.step(tokens[:4], 0)
        results.append(losses)
        assert all(p.dtype == torch.float32 for p in stepper.vpd.parameters())
    for name in ("stochastic", "adversarial", "minimality"):
        assert float(results[1][name]) == pytest.approx(float(results[0][name]), rel=0.08)
        assert float(results[1][name]) != float(results[0][name])
    assert float(results[1]["faithfulness"]) == float(results[0]["faithfulness"])


def test_bf16_masks_follow_the_fp32_step(tokens):
    """The same draws, rounded: the same losses to bf16's precision."""
    results = []
    for dtype in ("float32", "bfloat16"):
        stepper = fresh_stepper({"mask_dtype": dtype})
        losses, importance = stepper.step(tokens[:4], 0)
        results.append(losses)
        assert importance.whole().dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in stepper.vpd.parameters())
        for leaf in stepper.adversary.leaves():
            moment = stepper.adversary.optimiser.state[leaf]["exp_avg_sq"]
            assert leaf.dtype == moment.dtype == getattr(torch, dtype)
    full, narrow = results
    for name in ("stochastic", "adversarial"):
        assert float(narrow[name]) == pytest.approx(float(full[name]), rel=0.02)
        assert float(narrow[name]) != float(full[name])
    for name in ("minimality", "faithfulness"):
        assert float(narrow[name]) == float(full[name])


@pytest.mark.slow
def test_bf16_sources_attack_as_well(tokens):
    gains = []
    for dtype in ("float32", "bfloat16"):
        adversary = {"inner_steps": 1, "lr": 0.05, "lr_warmup": 0.0}
        stepper = fresh_stepper({"mask_dtype": dtype, "adversary": adversary})
        part = looked_at(stepper, tokens[:4])
        g = part.z.detach().clamp(0, 1).to(stepper.mask_dtype)
        reached = []
        for _ in range(40):
            stepper._refine_adversary([part], 4, 0)
            loss = stepper._divergence(part, stepper.adversary.masks(g))
            reached.append(float(loss.detach()))
        assert all(leaf.min() >= 0 and leaf.max() <= 1 for leaf in stepper.adversary.leaves())
        assert reached[-1] > 2 * reached[0]
        gains.append(reached[-1] - reached[0])
    assert gains[1] == pytest.approx(gains[0], rel=0.05)


@pytest.mark.slow
def test_decompose_with_data_trains_and_remove_restores(tokens, tmp_path):
    model = decompose(tiny_bridge(), tokens, config(), output=tmp_path / "run", progress=False)
    assert model.vpd.trained_steps == 8
    assert set(model.vpd.layout.sizes) == {12}
    remove(model)
    assert "vpd" not in model.__dict__
    with pytest.raises(ConfigError, match="data"):
        decompose(model, output=tmp_path / "x")


def test_what_decompose_is_told_is_recorded(tokens, tmp_path):
    options = {"output": tmp_path / "run", "progress": False}
    told = {"sites": ["blocks.0.mlp.in"], "n_subcomponents": 9, "seed": 4}
    model = decompose(tiny_bridge(), tokens, config(), **told, **options)
    recorded = VPDConfig(**model.vpd.training_config)
    assert (recorded.sites, recorded.n_subcomponents, recorded.seed) == (("blocks.0.mlp.in",), 9, 4)
    assert model.vpd.layout.sizes == (9,)


def test_presets_state_the_papers_values():
    paper = VPDConfig.paper()
    assert (paper.steps, paper.batch_size, paper.seq_len) == (400_000, 64, 512)
    assert (paper.stochastic.coefficient, paper.stochastic.routing) == (0.5, "subset")
    a = paper.adversary
    assert (a.coefficient, a.inner_steps, a.lr, a.lr_warmup) == (0.5, 2, 0.01, 0.025)
    assert (a.beta1, a.beta2, a.eps, a.routing, a.scope) == (0.5, 0.99, 1e-8, "all", "position")
    m = paper.minimality
    assert (m.coefficient, m.frequency, m.p_start, m.p_end, m.eps) == (2e-4, 0.5, 2.0, 0.4, 1e-12)
    f = paper.faithfulness
    assert (f.coefficient, f.warmup_steps, f.warmup_lr, f.warmup_weight_decay) == (
        1e7,
        400,
        1e-3,
        0,
    )
    o = paper.optimiser
    assert (o.lr, o.final_fraction, o.clip_subcomponents, o.clip_importance) == (
        5e-5,
        0.1,
        0.01,
        None,
    )
    i = paper.importance
    assert (i.d_model, i.n_blocks, i.n_heads, i.d_ffn, i.rope_base) == (2048, 8, 16, 8192, 10_000)
    spd = VPDConfig.spd()
    assert spd.adversary.coefficient == 0
    assert spd.minimality.frequency == 0
    assert (spd.stochastic.routing, spd.stochastic.coefficient) == ("all", 1.0)
    assert spd.stochastic.layerwise_coefficient == 1.0
    control = VPDConfig.small().without_adversary()
    assert control == VPDConfig.small(adversary=control.adversary)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 3}, "stepz: there is no such field"),
        ({"optimiser": {"lrr": 1}}, "optimiser.lrr: there is no such field"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 5, "micro_batches": 2}, "multiple of micro_batches"),
        ({"stochastic": {"coefficient": 0}, "adversary": {"coefficient": 0}}, "no reconstruction"),
        ({"adversary": {"scope": "batch"}, "micro_batches": 2}, "micro_batches"),
        ({"adversary": {"beta1": 1.5}}, "adversary.beta1"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        VPDConfig(**fields)


def test_config_files(tmp_path):
    file = tmp_path / "run.yaml"
    VPDConfig.small(steps=7).to_yaml(file)
    assert VPDConfig.from_yaml(file) == VPDConfig.small(steps=7)
    file.write_text("preset: spd\noptimiser:\n  lr: 0.001\n")
    mixed = VPDConfig.from_yaml(file)
    assert mixed.optimiser.lr == 0.001
    assert mixed.optimiser.clip_importance == VPDConfig.spd().optimiser.clip_importance
    assert mixed.stochastic == VPDConfig.spd().stochastic
    for text, message in (("[1, 2]", "mapping"), ("preset: huge", "preset"), ("a: [", "YAML")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            VPDConfig.from_yaml(file)
    with pytest.raises(ConfigError, match="no such field"):
        VPDConfig().replaced({"optimiser.speed": 1})
