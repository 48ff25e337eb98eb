"""Compaction: outputs under masks, importances, optimiser state, faithfulness, resuming, saving."""

import io
import json

import pytest
import torch
from conftest import tiny_bridge

from vpd_lens import load, storage
from vpd_lens.decomposition import CausalImportanceConfig, Divergence, Masks
from vpd_lens.decomposition.adversary import ascend, shared_sources
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.folding import Columns, fold, unfold
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import ArtefactError, ConfigError, InputError, TrainingInterrupted
from vpd_lens.evaluation.metrics import delta_sizes
from vpd_lens.native import native_transformer
from vpd_lens.training import VPDConfig, forwards, losses, train
from vpd_lens.training.checkpoint import CheckpointRecord
from vpd_lens.training.compaction import compact, compact_when_due, survivors
from vpd_lens.training.losses import StepImportance, faithfulness
from vpd_lens.training.step import Stepper, warm_up_faithfulness

IMPORTANCES = [
    CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32),
    CausalImportanceConfig(kind="mlp", hidden=4),
    CausalImportanceConfig(kind="mlp", hidden=0),
    CausalImportanceConfig(kind="shared_mlp", hidden=4),
    CausalImportanceConfig(kind="shared_mlp", hidden=0),
    CausalImportanceConfig(kind="mlp", hidden=(5, 4)),
    CausalImportanceConfig(kind="vector_mlp", hidden=(5, 4)),
    CausalImportanceConfig(kind="global_mlp", hidden=4),
]
NAMES = ["transformer", "mlp", "affine mlp", "shared mlp", "affine shared mlp"]
NAMES += ["deep mlp", "vector mlp", "global mlp"]


def transformer():
    """A HookedTransformer where there is one."""
    shape = {"n_layers": 1, "d_model": 16, "n_ctx": 12, "d_head": 8, "n_heads": 2, "d_mlp": 24}
    return native_transformer(**shape, d_vocab=29, act_fn="gelu", normalization_type="RMS", seed=0)


COUNTS = {r"\.[qk]$": 5, r"attn": 7, r"mlp": 9}


def decomposed(make=tiny_bridge, importance=IMPORTANCES[0]):
    model = make()
    attach(model, n_subcomponents=COUNTS, importance=importance)
    return model


def some(vpd, seed=0):
    """About half of every site's subcomponents, at least one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for size in vpd.layout.sizes:
        kept = (torch.rand(size, generator=generator) < 0.5).nonzero().flatten().tolist()
        chosen.append(kept or [size - 1])
    return Columns(vpd.layout.sizes, chosen, vpd.device)


def as_delta(masks, layout, keep):
    """The same masks with those of all but `keep` equal to their site's delta mask."""
    parts = []
    for index, part in enumerate(layout.split(masks.components)):
        folded = masks.delta[..., index : index + 1].expand(part.shape).clone()
        columns = keep.by_site[index]
        folded[..., columns] = part[..., columns]
        parts.append(folded)
    return Masks(torch.cat(parts, -1), masks.delta, masks.routed)


@pytest.mark.parametrize("make", [tiny_bridge, transformer], ids=["bridge", "transformer"])
def test_outputs_are_those_with_the_delta_s_mask_on_what_was_folded(make, tokens):
    """Under random masks, routed or not, and under an adversary's against the folded one."""
    model = decomposed(make)
    vpd, batch = model.vpd, tokens[:3]
    before, keep = vpd.layout, some(model.vpd)
    g = vpd.causal_importance(batch)
    u = torch.rand(3, 8, before.total + before.n_sites)
    masks = Masks(g + (1 - g) * u[..., : before.total], u[..., before.total :])
    masks = as_delta(masks, before, keep)
    routed = Masks(masks.components, masks.delta, torch.rand(3, 8, before.n_sites) < 0.5)
    expected = [vpd.run(m, batch).detach() for m in (masks, routed)]
    target = model(batch)
    fold(vpd, keep)
    assert vpd.layout.sizes == tuple(map(len, keep.by_site))
    small = [Masks(m.components[..., keep.joined], m.delta, m.routed) for m in (masks, routed)]
    for got, want in zip([vpd.run(m, batch) for m in small], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert (want - target).abs().max() > 1e-2
    survivors = vpd.causal_importance(batch)
    torch.testing.assert_close(survivors, g[..., keep.joined], rtol=1e-5, atol=1e-6)

    divergence = Divergence(target)
    start = shared_sources(survivors, vpd.layout)
    sources, curve = ascend(
        lambda m: divergence(vpd.run(m, batch)), survivors, start, 5, 0.2, checkpoints=(5,)
    )
    worst = sources.masks(survivors)
    unfold(vpd)
    wide = worst.components.new_zeros(3, 8, before.total)
    wide[..., keep.joined] = worst.components
    again = divergence(vpd.run(as_delta(Masks(wide, worst.delta), before, keep), batch)).detach()
    assert again.item() == pytest.approx(curve[5], rel=1e-3)


@pytest.mark.parametrize("importance", IMPORTANCES, ids=NAMES)
def test_folding_twice_and_unfolding_gives_the_decomposition_back(importance, tokens):
    """V, U and outputs as before; the importances of what stayed too, of the rest 0."""
    model = decomposed(importance=importance)
    vpd, batch = model.vpd, tokens[:2]
    factors = [p.detach().clone() for p in vpd.subcomponents.parameters()]
    g, sizes = vpd.causal_importance(batch), vpd.layout.sizes
    masks = Masks(torch.rand(2, 8, vpd.layout.total), torch.rand(2, 8, vpd.layout.n_sites))
    expected = vpd.run(masks, batch)
    alive = torch.arange(vpd.layout.total)
    for seed in (1, 2):
        keep = some(vpd, seed)
        alive = alive[keep.joined]
        fold(vpd, keep)
        torch.testing.assert_close(vpd.causal_importance(batch), g[..., alive])
    starts = dict(zip(vpd.layout.names, torch.tensor((0, *sizes)).cumsum(0).tolist(), strict=False))
    numbers = [starts[name] + i for name in vpd.layout.names for i in vpd.original_indices(name)]
    assert numbers == alive.tolist()
    assert len(alive) < 0.5 * sum(sizes)
    unfold(vpd)
    assert vpd.layout.sizes == sizes == vpd.subcomponents.original_sizes
    assert all(map(torch.equal, factors, vpd.subcomponents.parameters()))
    assert torch.equal(vpd.run(masks, batch), expected)
    back = torch.zeros_like(g)
    back[..., alive] = g[..., alive]
    torch.testing.assert_close(vpd.causal_importance(batch), back)


def test_what_is_folded_can_be_seen_by_hooks_of_the_new_width(tokens):
    model = decomposed()
    fold(model.vpd, some(model.vpd))
    widths = {}
    hooks = [
        (name, lambda value, hook: widths.update({hook.name: value.shape[-1]}))
        for name in model.hook_dict
        if name.endswith("vpd.hook_acts")
    ]
    with model.vpd.masked("ci"):
        model.run_with_hooks(tokens[:2], fwd_hooks=hooks)
    assert tuple(widths.values()) == model.vpd.layout.sizes


def test_columns_that_cannot_be_kept_are_refused():
    for wrong in ([], [3, 1], [1, 1], [0, 4]):
        with pytest.raises(InputError, match="site 1"):
            Columns((2, 4), [[0], wrong], torch.device("cpu"))


# ------------------------------------------------------------------------ training


def config(**changes):
    base = {
        "initialisation": "random",
        "n_subcomponents": COUNTS,
        "importance": IMPORTANCES[0],
        "steps": 8,
        "batch_size": 4,
        "log_every": 1,
        "faithfulness": {"coefficient": 1e3, "warmup_steps": 5},
    }
    return VPDConfig.small(**{**base, **changes})


def stepper(**changes):
    run = config(**changes)
    return Stepper(decomposed(importance=run.importance).vpd, run)


def moments(trained):
    """All optimiser tensors by parameter and name, those of the sources included."""
    found = [*trained.optimisers, *([trained.adversary.optimiser] if trained.adversary else [])]
    return {
        (parameter, name): value.clone()
        for optimiser in found
        for parameter, values in optimiser.state.items()
        for name, value in values.items()
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("importance", IMPORTANCES, ids=NAMES)
def test_the_state_of_what_stays_is_untouched(kind, importance, tokens):
    """Parameters, moments and sources are selected and nothing else; the next step runs."""
    trained = stepper(importance=importance, optimiser={"kind": kind})
    for step in range(2):
        trained.step(tokens[4 * step :][:4], step)
    vpd, before, old = trained.vpd, moments(trained), trained.vpd.layout
    parameters = {p: p.detach().clone() for p in (*vpd.parameters(), *trained.adversary.leaves())}
    keep = some(vpd)
    compact(trained, keep)
    rows = {r.parameter: (r.dim, keep.of(r.site)) for r in vpd.importance.per_subcomponent()}
    for index, (v, u) in enumerate(zip(vpd.subcomponents.v, vpd.subcomponents.u, strict=True)):
        rows |= {v: (1, keep.by_site[index]), u: (0, keep.by_site[index])}
    rows[trained.adversary.sources.components] = (-1, keep.joined)
    now = moments(trained)
    assert now.keys() == before.keys()
    assert {parameter for parameter, _ in now} == parameters.keys()
    for (parameter, _), value in now.items():
        if value.ndim:
            assert value.shape == parameter.shape
    for parameter, values in parameters.items():
        pairs = [(values, parameter)] + [(before[k], now[k]) for k in before if k[0] is parameter]
        for was, is_now in pairs:
            if parameter in rows and was.ndim:
                was = was.index_select(*rows[parameter])
            assert torch.equal(is_now, was)
    assert trained.window.shape == (vpd.layout.total,) != (old.total,)
    losses, importance = trained.step(tokens[8:12], 2)
    assert importance.whole().shape[-1] == vpd.layout.total
    assert torch.isfinite(losses["total"])


@pytest.mark.parametrize(
    "changes",
    [
        {"adversary": {"scope": "position"}, "micro_batches": 2},
        {"adversary": {"scope": "sequence", "routing": "subset"}},
        {"adversary": {"scope": "batch"}},
        {"adversary": {"scope": "single"}, "stochastic": {"layerwise_coefficient": 0.5}},
    ],
    ids=["position, micro-batches", "sequence, routed", "batch", "single, layer-wise"],
)
def test_a_step_after_compaction_is_the_step_before_it(changes, tokens, monkeypatch):
    """Two steppers, one compacted, whose dead subcomponents' masks are the deltas'.

    Losses and the moments of all that stays are equal after a step; the gradient of a delta's
    source is the sum of its own and those of the sources of what was folded.
    """
    changes["adversary"] |= {"inner_steps": 0, "lr_warmup": 0.0}
    changes["optimiser"] = {"lr": 1e-3, "clip_subcomponents": None}
    wide, narrow = stepper(**changes), stepper(**changes)
    layout, keep = wide.vpd.layout, some(wide.vpd)
    dead = torch.ones(layout.total, dtype=torch.bool)
    dead[keep.joined] = False
    site_of = torch.repeat_interleave(torch.arange(layout.n_sites), torch.tensor(layout.sizes))
    table = torch.rand(4, 8, layout.total, generator=torch.Generator().manual_seed(0))
    table[..., dead] = table[..., [0]].expand_as(table)[..., dead]  # the deltas' masks
    monkeypatch.setattr(
        losses,
        "uniform_sources",
        lambda g, now, _: losses_sources(table, g, now, layout, keep),
    )
    for trained in (wide, narrow):
        trained.step(tokens[:4], 0)
        head = trained.vpd.importance.project_out
        head.weight.data[dead], head.bias.data[dead] = 0, -1
    with torch.no_grad():
        sources = wide.adversary.sources
        sources.components[..., dead] = sources.delta[..., site_of[dead]]
        for name in ("exp_avg", "exp_avg_sq"):
            wide.adversary.optimiser.state[sources.components][name][..., dead] = 0
    compact(narrow, keep)
    expected, _ = wide.step(tokens[4:8], 1)
    got, _ = narrow.step(tokens[4:8], 1)
    for name in ("stochastic", "adversarial", "minimality", "faithfulness", "total"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7)
    rows = zip(wide.vpd.parameters(), narrow.vpd.parameters(), strict=True)
    whose = {r.parameter: r for r in all_rows(wide.vpd)}
    for large, small in rows:
        for name in ("exp_avg", "exp_avg_sq"):
            was, now = (t.optimisers[0].state[p][name] for t, p in ((wide, large), (narrow, small)))
            if large in whose:
                was = was.index_select(whose[large].dim, keep.of(whose[large].site))
            assert (was - now).norm() < 1e-3 * was.norm()
    state = wide.adversary.optimiser.state
    large, delta = (state[leaf]["exp_avg"] for leaf in wide.adversary.leaves())
    state = narrow.adversary.optimiser.state
    small, all_delta = (state[leaf]["exp_avg"] for leaf in narrow.adversary.leaves())
    torch.testing.assert_close(small, large[..., keep.joined], rtol=1e-3, atol=1e-9)
    folded = torch.zeros_like(delta).index_add(-1, site_of[dead], large[..., dead])
    torch.testing.assert_close(all_delta, delta + folded, rtol=1e-3, atol=1e-9)
    assert folded.norm() > 0.01 * delta.norm()


def losses_sources(table, g, now, layout, keep):
    from vpd_lens.decomposition.masks import Sources

    columns = table if now.total == layout.total else table[..., keep.joined]
    delta = table[..., [0]].expand(*table.shape[:-1], layout.n_sites)
    return Sources(columns[: g.shape[0]], delta[: g.shape[0]])


def all_rows(vpd):
    from vpd_lens.decomposition.folding import per_subcomponent

    return per_subcomponent(vpd)


def test_faithfulness_does_not_jump_and_the_delta_takes_what_was_folded():
    trained = stepper(faithfulness={"warmup_steps": 100, "warmup_lr": 1e-2})
    warm_up_faithfulness(trained)
    vpd = trained.vpd
    weights = [site.weight for site in vpd.sites]
    for seed in (0, 1):
        loss = faithfulness(vpd.subcomponents.deltas(trained.weights))
        deltas = vpd.subcomponents.deltas(weights)
        v, u = ([p.clone() for p in part] for part in (vpd.subcomponents.v, vpd.subcomponents.u))
        keep = some(vpd, seed)
        compact(trained, keep)
        after = faithfulness(vpd.subcomponents.deltas(trained.weights))
        torch.testing.assert_close(after, loss, rtol=1e-5, atol=0)
        for i, name in enumerate(vpd.layout.names):
            gone = [c for c in range(v[i].shape[1]) if c not in keep.by_site[i].tolist()]
            expected = deltas[i] + v[i][:, gone] @ u[i][gone]
            torch.testing.assert_close(vpd.delta(name), expected.detach(), rtol=1e-4, atol=1e-5)
    grown = faithfulness(vpd.subcomponents.deltas(weights))
    assert grown > 1.5 * after


def test_who_survives_follows_from_the_means():
    vpd = decomposed().vpd
    means = torch.rand(vpd.layout.total, generator=torch.Generator().manual_seed(3)) * 1e-3
    parts = vpd.layout.split(means)
    parts[1].zero_()  # a site of which nothing is left
    parts[2].copy_(torch.tensor([1e-9, 3e-9, 3e-9, 0, 0, 0, 0]))
    kept = survivors(means, vpd.layout, 5e-4)
    assert kept[1:3] == [[0], [1]]
    for part, columns in list(zip(parts, kept, strict=True))[3:]:
        assert columns == [c for c, mean in enumerate(part) if mean > 5e-4]


def test_the_window_is_the_mean_over_positions_and_steps(tokens):
    trained = stepper(compaction={"window": 3, "threshold": 0.0})
    seen = torch.rand(6, 4, 8, trained.vpd.layout.total)
    seen[..., 5] = 0
    seen[:3, ..., 6] = 0
    seen[0, 0, 0, 6] = 0.1

    def due(g, done):
        return compact_when_due(trained, StepImportance([(g, None)]), done)

    assert [due(g, 1 + i) for i, g in enumerate(seen[:2])] == [0, 0]
    torch.testing.assert_close(trained.window / 3, seen[:2].sum((0, 1, 2)) / (3 * 4 * 8))
    assert due(seen[2], 3) == 1
    columns = [c for c in range(seen.shape[-1]) if c != 5]
    assert trained.vpd.subcomponents.original[1] == [1, 2, 3, 4]
    assert trained.window.count_nonzero() == 0
    # In the second window column 6 of before is active, column 7 no more.
    seen[3:, ..., 7] = 0
    assert [due(g[..., columns], 4 + i) for i, g in enumerate(seen[3:])] == [0, 0, 1]
    assert trained.vpd.original_indices(trained.vpd.layout.names[1]) == [1, 3, 4]


def test_nothing_is_folded_before_the_start_or_without_a_window():
    for compaction, expected in (
        ({"window": 2, "start": 0.5}, [0, 0, 0, 1]),
        ({"window": 0}, [0, 0, 0, 0]),
    ):
        trained = stepper(compaction=compaction)
        g = torch.ones(4, 8, trained.vpd.layout.total)
        g[..., 0] = 0
        g = StepImportance([(g, None)])
        assert [compact_when_due(trained, g, done) for done in (1, 2, 3, 4)] == expected


@pytest.mark.slow
def test_a_site_without_a_living_subcomponent_keeps_one_and_training_goes_on(tokens, tmp_path):
    model = decomposed()
    dead, head = model.vpd.layout.columns("blocks.0.mlp.in"), model.vpd.importance.project_out
    head.bias.data[:] = 2  # all others are alive
    head.weight.data[dead], head.bias.data[dead] = 0, -1
    run = config(compaction={"window": 4}, optimiser={"lr": 1e-5})
    result = train(model, tokens, run, output=tmp_path / "run", progress=False)
    assert model.vpd.layout.sizes == (5, 5, 7, 7, 1, 9, 5, 5, 7, 7, 9, 9)
    counts = [line["n_subcomponents"] for line in result.history]
    assert counts == [84.0] * 3 + [76.0] * 5
    assert result.history[-1]["n_subcomponents/blocks.0.mlp.in"] == 1.0
    assert (
        "n_subcomponents"
        not in train(
            tiny_bridge(), tokens, config(steps=1), output=tmp_path / "off", progress=False
        ).metrics
    )


RUN = {"compaction": {"window": 3, "threshold": 0.4}, "steps": 9, "seed": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stop"), [("adamw", 2), ("muon", 3), ("adamw", 4)])
def test_resuming_across_a_compaction_is_bit_identical(kind, stop, tokens, tmp_path, monkeypatch):
    """Interrupted before, at and after the first compaction; two more follow."""
    run = config(optimiser={"kind": kind, "lr": 3e-3}, **RUN)
    straight = tiny_bridge()
    result = train(straight, tokens, run, output=tmp_path / "straight", progress=False)
    counts = [line["n_subcomponents"] for line in result.history]
    assert counts[1] == 84 > counts[2] > counts[5] > 12
    interrupt(monkeypatch, stop)
    broken = tiny_bridge()
    with pytest.raises(TrainingInterrupted):
        train(broken, tokens, run, output=tmp_path / "broken", progress=False)
    monkeypatch.undo()
    for resumed in (tiny_bridge(), broken):  # a new process, and the same one
        folder = tmp_path / "broken"
        train(resumed, tokens, run, output=folder, resume=True, progress=False)
        assert resumed.vpd.layout == straight.vpd.layout
        assert resumed.vpd.subcomponents.original == straight.vpd.subcomponents.original
        assert all(map(torch.equal, straight.vpd.parameters(), resumed.vpd.parameters()))
        assert all(map(torch.equal, straight.vpd.buffers(), resumed.vpd.buffers()))
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["n_subcomponents"] for line in lines] == counts


def interrupt(monkeypatch, after):
    """SIGTERM after so many steps."""
    import os
    import signal

    original = Stepper.step

    def step(self, batch, number, *rest):
        if number == after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, number, *rest)

    monkeypatch.setattr(Stepper, "step", step)


@pytest.mark.slow
def test_a_crash_after_a_compaction_resumes_from_before_it(tokens, tmp_path, monkeypatch):
    """The decomposition at hand has lost subcomponents that the checkpoint still has."""
    run = config(checkpoint_every=2, **RUN)
    straight, broken = tiny_bridge(), tiny_bridge()
    train(straight, tokens, run, output=tmp_path / "straight", progress=False)
    original = Stepper.step

    def step(self, batch, number, *rest):
        if number == 3:
            raise ZeroDivisionError
        return original(self, batch, number, *rest)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(ZeroDivisionError):
        train(broken, tokens, run, output=tmp_path / "broken", progress=False)
    monkeypatch.undo()
    assert broken.vpd.layout.total < 84
    assert checkpoint(tmp_path / "broken").n_subcomponents == (5, 5, 7, 7, 9, 9) * 2
    train(broken, tokens, run, output=tmp_path / "broken", resume=True, progress=False)
    assert all(map(torch.equal, straight.vpd.parameters(), broken.vpd.parameters()))
    assert all(map(torch.equal, straight.vpd.buffers(), broken.vpd.buffers()))


def checkpoint(folder):
    return storage.read(folder / "checkpoint", CheckpointRecord).record


@pytest.mark.slow
def test_a_checkpoint_of_other_sizes_is_refused(tokens, tmp_path):
    run = config(**RUN)
    train(tiny_bridge(), tokens, run, output=tmp_path / "run", progress=False)
    other = tiny_bridge()
    attach(other, n_subcomponents=4, importance=IMPORTANCES[0])
    with pytest.raises(ArtefactError, match="sizes differ"):
        train(other, tokens, run, output=tmp_path / "run", resume=True, progress=False)
    assert other.vpd.layout.sizes == (4,) * 12


def test_a_checkpoint_older_than_a_field_of_the_configuration_is_resumed(tokens, tmp_path):
    folder = tmp_path / "run"
    model = tiny_bridge()
    train(model, tokens, config(), output=folder, progress=False)
    path = folder / "checkpoint" / "record.json"
    content = json.loads(path.read_text())
    del content["record"]["config"]["compaction"], content["sha256"]
    path.write_text(json.dumps(content | {"sha256": storage._digest(content)}))
    resumed = tiny_bridge()
    train(resumed, tokens, config(), output=folder, resume=True, progress=False)
    assert all(map(torch.equal, model.vpd.parameters(), resumed.vpd.parameters()))


@pytest.mark.parametrize(
    ("compaction", "message"),
    [
        ({"window": -1}, "compaction.window"),
        ({"window": 9}, "never ends"),
        ({"window": 3, "start": 0.9}, "never ends"),
        ({"window": 2, "threshold": 1.0}, "compaction.threshold"),
        ({"window": 2, "start": 1.5}, "compaction.start"),
        ({"widow": 2}, "no such field"),
    ],
)
def test_a_compaction_that_makes_no_sense_is_refused(compaction, message):
    with pytest.raises(ConfigError, match=message):
        config(compaction=compaction)


@pytest.mark.slow
def test_recorded_steps_after_a_compaction_are_the_steps(tokens, monkeypatch):
    """The record of a forward, as it is: what compiles it knows nothing of subcomponents."""
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)
    steppers = [stepper(compile=fuse, optimiser={"lr": 1e-4}) for fuse in (False, True)]
    for step in range(3):
        batch = tokens[4 * step :][:4]
        plain, fused = (trained.step(batch, step)[0] for trained in steppers)
        for name, loss in plain.items():
            torch.testing.assert_close(fused[name], loss, rtol=1e-3, atol=1e-6)
        if step == 0:
            for trained in steppers:
                compact(trained, some(trained.vpd))
    # Those of the sizes before are gone: one with U and V frozen and one for both losses are left.
    graphs = steppers[1].run.__self__._graphs
    assert len(graphs) == 2
    assert not any(graph == steppers[1].run.__self__._plain for graph in graphs.values())


def test_compiled_graphs_of_before_a_compaction_are_forgotten(tokens, monkeypatch):
    monkeypatch.setattr(forwards, "make_fx", lambda function: lambda *_: function)
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)
    trained = stepper(compile=True)
    for step, total in enumerate((84, 12)):
        trained.step(tokens[4 * step :][:4], step)
        # A key begins: frozen, autocast, (shape, dtype) of the importances.
        assert {key[2][0][-1] for key in trained.run.__self__._graphs} == {total}
        compact(trained, Columns(trained.vpd.layout.sizes, [[0]] * 12, trained.device))


# -------------------------------------------------------------------------- saving


def test_saving_keeps_what_was_folded_and_where_it_was(tokens, tmp_path):
    model = decomposed()
    vpd = model.vpd
    for seed in (0, 1):
        fold(vpd, some(vpd, seed))
    folder = vpd.save(tmp_path / "saved")
    again = load(folder, tiny_bridge()).vpd
    assert again.layout == vpd.layout
    for name in vpd.layout.names:
        assert again.original_indices(name) == vpd.original_indices(name)
    assert [f.indices for f in again.subcomponents.folded] == [
        f.indices for f in vpd.subcomponents.folded
    ]
    for one in (vpd, again):
        unfold(one)
    assert all(map(torch.equal, vpd.parameters(), again.parameters()))
    assert not storage.read(vpd.save(folder), DecompositionRecord).record.original_indices


def test_column_numbers_that_do_not_fit_are_refused(tmp_path):
    model = decomposed()
    fold(model.vpd, some(model.vpd))
    folder = model.vpd.save(tmp_path / "saved")
    record = storage.read(folder, DecompositionRecord).record
    record.original_indices["blocks.0.attn.q"].kept[0] += 1
    storage.write(folder, record, {})
    other = tiny_bridge()
    with pytest.raises(ArtefactError, match=r"original_indices of blocks\.0\.attn\.q"):
        load(folder, other)
    assert "vpd" not in other.__dict__


def test_the_description_says_which_columns_are_left(tmp_path):
    from rich.console import Console

    from vpd_lens.description import describe

    vpd = decomposed().vpd
    chosen = [[0, 1, 3], [2], *([[0]] * 10)]
    fold(vpd, Columns(vpd.layout.sizes, chosen, vpd.device))
    console = Console(width=200, file=io.StringIO())
    console.print(describe(vpd.save(tmp_path / "saved")))
    lines = console.file.getvalue().splitlines()
    words = {name: next(x for x in lines if name in x).split("│")[2:5] for name in vpd.layout.names}
    assert [w.strip() for w in words["blocks.0.attn.q"]] == ["3", "2", "0-1, 3"]
    assert [w.strip() for w in words["blocks.0.attn.k"]] == ["1", "4", "2"]


def test_the_evaluation_counts_what_was_folded_as_explained():
    trained = stepper(faithfulness={"warmup_steps": 100, "warmup_lr": 1e-2})
    warm_up_faithfulness(trained)
    vpd, before = trained.vpd, delta_sizes(trained.vpd)
    keep, name = some(vpd), "blocks.0.mlp.out"
    index = vpd.layout.names.index(name)
    gone = [c for c in range(vpd.layout.sizes[index]) if c not in keep.by_site[index].tolist()]
    part = vpd.v(name)[:, gone] @ vpd.u(name)[gone]
    expected = float(part.detach().norm() / vpd.site(name).weight.norm())
    fold(vpd, keep)
    after = delta_sizes(vpd)
    for site in (name, "total"):
        assert after[site]["mse"] == pytest.approx(before[site]["mse"], rel=1e-4)
        assert after[site]["relative"] == pytest.approx(before[site]["relative"], rel=1e-4)
    assert after[name]["folded"] == pytest.approx(expected, rel=1e-4)
    assert before["total"]["folded"] == 0 < after["total"]["folded"]
