"""Transcoders against naive formulas, and on models where the answer is known."""

import json

import pytest
import torch
from compat.builders import make_tokenizer
from conftest import tiny_bridge
from safetensors.torch import save_file

import vpd_lens
from vpd_lens.baselines.transcoders import (
    MaskedMLPs,
    MLPs,
    Part,
    Transcoded,
    Transcoder,
    TranscoderConfig,
    alive_latents,
    batch_top_k,
    import_saelens,
    latent_responses,
    measure_replaced,
    train_transcoder,
)
from vpd_lens.baselines.transcoders.measuring import accountings
from vpd_lens.baselines.transcoders.training import (
    _Seen,
    auxiliary_loss,
    objective_loss,
    remove_along_rows,
)
from vpd_lens.baselines.transcoders.transcoder import TranscoderRecord
from vpd_lens.data import Batch
from vpd_lens.errors import ConfigError, DataError, InputError
from vpd_lens.rendering import as_text

D, LATENTS, K = 16, 10, 2


def tokens(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(29, (rows, 6), generator=torch.Generator().manual_seed(seed))


def drawn(cross_layer: bool = False, layers: tuple[int, ...] = (0, 1), **fields) -> Transcoder:
    """A transcoder with random weights, biases included."""
    sizes = {"n_latents": (LATENTS,) * len(layers), "d_in": D, "d_out": D}
    record = TranscoderRecord(layers=layers, cross_layer=cross_layer, **{"k": K, **sizes, **fields})
    made, generator = Transcoder(record), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made


def identity(model, cross_layer: bool = False) -> Transcoder:
    """One latent for every neuron of ReLU MLPs, all of which may be active."""
    mlps = MLPs(model)
    width = mlps.sites[0][1].shape[0]
    record = TranscoderRecord(
        layers=mlps.layers,
        n_latents=(width, width),
        d_in=D,
        d_out=D,
        k=width,
        cross_layer=cross_layer,
        weights=mlps.fingerprint(),
    )
    made = Transcoder(record)
    with torch.no_grad():
        for index, (into, out) in enumerate(mlps.sites):
            made.W_enc[index].copy_(into.weight)
            made.b_enc[index].copy_(into.bias)
            made.W_dec[index][0].copy_(out.weight)
            made.b_dec[index].copy_(out.bias)
    return made


def test_batch_top_k_keeps_k_times_the_positions():
    acts = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    kept = batch_top_k(acts, 3)
    assert int((kept > 0).sum()) == 3 * 20
    assert kept[kept > 0].min() >= acts[kept == 0].max()
    assert torch.equal(kept[kept > 0], acts[kept > 0])


def test_padding_takes_no_places():
    acts = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    real = torch.tensor([[True, True, True], [True, False, False]])
    kept = drawn(layers=(0,), n_latents=(7,), k=2).select(0, acts, real)
    assert int((kept > 0).sum()) == 2 * 4
    assert not kept[~real].any()
    assert torch.equal(kept[real], batch_top_k(acts[real], 2))


def test_selections_differ_in_what_they_compare():
    made = drawn(layers=(0,), n_latents=(3,), k=1)
    with torch.no_grad():
        made.thresholds[0].copy_(torch.tensor([1.0, 2.5, 9.0]))
    acts = torch.tensor([[4.0, 3.0, 0.5], [2.0, 1.0, 0.5]])
    assert made.select(0, acts).tolist() == [[4, 3, 0], [0, 0, 0]]
    assert made.select(0, acts, selection="topk").tolist() == [[4, 0, 0], [2, 0, 0]]
    assert made.select(0, acts, selection="threshold").tolist() == [[4, 3, 0], [2, 0, 0]]


def test_a_cross_layer_transcoder_writes_to_all_later_layers():
    made = drawn(cross_layer=True, layers=(0, 1, 2))
    acts = [torch.rand(4, LATENTS) for _ in range(3)]
    for j in range(3):
        naive = made.b_dec[j] + sum(acts[i] @ made.W_dec[i][j - i] for i in range(j + 1))
        torch.testing.assert_close(made.decode(j, acts), naive)


@pytest.mark.parametrize("objective", ["local", "cascading", "parallel", "single"])
def test_of_one_layer_both_kinds_are_the_same(objective):
    model, sizes = tiny_bridge(), {"n_latents": LATENTS, "k": K, "steps": 3, "layers": (1,)}
    found = [
        train_transcoder(
            model,
            tokens(8),
            TranscoderConfig(kind=kind, objective=objective, batch_size=2, **sizes),
            progress=False,
        )
        for kind in ("per_layer", "cross_layer")
    ]
    for one, other in zip(*(made.state_dict().values() for made in found), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("objective", ["local", "cascading", "parallel", "single"])
def test_gradients_are_those_of_a_naive_formula(objective, cross_layer):
    """MLPs are replaced in the modules themselves, and the selection is a mask of its own."""
    model, made = tiny_bridge().requires_grad_(False), drawn(cross_layer)
    mlps, batch = MLPs(model), Batch(tokens())
    clean = mlps.clean(batch)
    objective_loss(mlps, _Seen(made, clean), objective).backward()
    got = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    _naive_loss(model, made, batch.tokens, objective).backward()
    expected = [p.grad for p in made.parameters() if p.grad is not None]
    assert len(got) == len(expected) == 8
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def _naive_loss(model, made: Transcoder, x: torch.Tensor, objective: str) -> torch.Tensor:
    def encode(i, read):
        pre = (read @ made.W_enc[i] + made.b_enc[i]).clamp(min=0)
        n_kept = K * read.shape[0] * read.shape[1]
        return pre * (pre >= pre.flatten().sort(descending=True).values[n_kept - 1])

    def write(j, acts):
        first = 0 if made.record.cross_layer else j
        return made.b_dec[j] + sum(acts[i] @ made.W_dec[i][j - i] for i in range(first, j + 1))

    def logits_with(writers):
        names = {f"blocks.{j}.mlp.hook_out": writer for j, writer in writers.items()}
        return model.run_with_hooks(x, fwd_hooks=list(names.items()))

    with torch.no_grad():
        target, cache = model.run_with_cache(x)
    reads = [cache[f"blocks.{j}.mlp.hook_in"] for j in range(2)]
    wrote = [cache[f"blocks.{j}.mlp.hook_out"] for j in range(2)]
    acts = [encode(i, read) for i, read in enumerate(reads)]
    outputs = [write(j, acts) for j in range(2)]
    if objective == "local":
        return sum(((a - b) ** 2).mean() for a, b in zip(outputs, wrote, strict=True)) / 2
    p = target.softmax(-1)

    def kl(logits):
        return (p * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()

    if objective == "parallel":
        return kl(logits_with({j: lambda _y, hook, j=j: outputs[j] for j in range(2)}))
    if objective == "single":
        return sum(kl(logits_with({j: lambda _y, hook, j=j: outputs[j]})) for j in range(2)) / 2
    streams, seen = {}, []
    hooks = [
        (f"blocks.{j}.mlp.hook_in", lambda x, hook, j=j: streams.__setitem__(j, x))
        for j in range(2)
    ]

    def writer(j):
        def write_now(_y, hook):
            seen.append(encode(j, streams[j]))
            return write(j, seen)

        return write_now

    hooks += [(f"blocks.{j}.mlp.hook_out", writer(j)) for j in range(2)]
    return kl(model.run_with_hooks(x, fwd_hooks=hooks))


def test_the_gradient_is_orthogonal_to_a_latents_decoder():
    made = drawn(cross_layer=True)
    made.normalise()
    for w in made.W_dec:
        torch.testing.assert_close(w.square().sum((0, 2)), torch.ones(LATENTS))
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    before = [w.grad.clone() for w in made.W_dec]
    remove_along_rows(made)
    for w, was in zip(made.W_dec, before, strict=True):
        assert (w.grad * w).sum((0, 2)).abs().max() < 1e-5
        change = was - w.grad  # along the row alone
        torch.testing.assert_close(change, (change * w).sum((0, 2), keepdim=True) * w)


def test_only_dead_latents_learn_what_is_left_over():
    model, made = tiny_bridge().requires_grad_(False), drawn()
    mlps = MLPs(model)
    seen = _Seen(made, mlps.clean(Batch(tokens())))
    seen.of_clean()
    dead = [torch.arange(LATENTS) < 4, torch.arange(LATENTS) < 3]
    loss = auxiliary_loss(seen, dead, k=2)
    naive = 0
    for i in range(2):
        pre = seen.pre[i] * dead[i]
        kept = pre * (pre >= pre.topk(2, dim=-1).values[..., -1:])
        left = (seen.targets[i] - seen.outputs[i]).detach()
        naive = naive + (kept @ made.W_dec[i][0] - left).square().mean() / 2
    torch.testing.assert_close(loss, naive)
    loss.backward()
    for w, alone in zip(made.W_dec, dead, strict=True):
        assert w.grad[0][alone].any()
        assert not w.grad[0][~alone].any()


@pytest.mark.parametrize("cross_layer", [False, True])
def test_exact_weights_give_the_model_back(cross_layer):
    model = tiny_bridge(act_fn="relu")
    replaced = Transcoded(model, identity(model, cross_layer))
    report = measure_replaced(replaced, tokens())
    for protocol in ("cascading", "parallel", "single"):
        assert report.kl[protocol] == pytest.approx(0, abs=1e-5)
        assert report.cross_entropy[protocol] == pytest.approx(report.baseline, abs=1e-5)
    assert max(report.unexplained.values()) < 1e-10


def test_accountings_by_hand():
    """Two layers: 3 and 1 active latents, of which a cross-layer one writes to both outputs."""
    per_layer = [Part("0", (0,), 8), Part("1", (1,), 8)]
    assert accountings(per_layer, [3.0, 1.0]) == (2, 2, 32)
    across = [Part("0", (0, 1), 12), Part("1", (1,), 8)]
    assert accountings(across, [3.0, 1.0]) == (2, (3 + 4) / 2, 44)
    matrices = [Part("in", (0,), 28), Part("out", (0,), 28)]
    assert accountings(matrices, [3.0, 1.0]) == (2, 4, 112)


def test_a_masked_decomposition_with_all_of_it_is_the_model():
    """With a delta of zero and every importance above the threshold nothing changes."""
    model = vpd_lens.decompose(tiny_bridge(), sites=r"mlp\.(in|out)|attn\.q", n_subcomponents=40)
    vpd = model.vpd
    with torch.no_grad():
        for site, v, u in zip(vpd.sites, vpd.subcomponents.v, vpd.subcomponents.u, strict=True):
            v.zero_(), u.zero_()
            v[:, : site.shape[0]] = torch.eye(site.shape[0])
            u[: site.shape[0]] = site.weight
    # Importances are at least 0, so that a threshold below it keeps everything.
    report = measure_replaced(MaskedMLPs(model, -1.0), tokens())
    assert max(report.kl.values()) < 1e-5
    assert (report.per_module, report.per_output) == (40, 80)
    assert report.parameters == 4 * 40 * (16 + 24)


def test_masks_of_mlps_leave_attention_alone():
    """`single` by hand: the mask of one MLP's matrices is 0, and attention keeps its weights."""
    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=12)
    report = measure_replaced(MaskedMLPs(model, 1.0), tokens(), protocols=("single",))
    assert report.per_module == 0
    base = tiny_bridge()
    losses = []
    for layer in range(2):
        biases = base.blocks[layer].mlp.out.original_component.bias

        def only_bias(y, hook, b=biases):
            return b.expand_as(y)

        # A first matrix that is switched off leaves its bias, so the second reads what is not 0,
        # but is switched off itself.
        hooks = [(f"blocks.{layer}.mlp.out.hook_out", only_bias)]
        logits = base.run_with_hooks(tokens(), fwd_hooks=hooks).detach()
        losses.append(
            float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
                )
            )
        )
    assert report.cross_entropy["single"] == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    made = drawn(cross_layer=True)
    loaded = Transcoder.load(made.save(tmp_path / "clt"))
    assert loaded.record == made.record
    for one, other in zip(loaded.state_dict().values(), made.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert "cross-layer transcoder (batch_topk, k = 2), untrained" in str(loaded)


def test_directions_are_what_comparisons_take():
    from vpd_lens.analysis.comparison import compare, multiple_match_share

    made = drawn(cross_layer=True)
    same = compare(made.directions(), made.directions()).overall
    assert same.v == pytest.approx(1, abs=1e-5)
    assert same.u == pytest.approx(1, abs=1e-5)
    twice = {
        name: (torch.cat([v, v], 1), torch.cat([u, u]))
        for name, (v, u) in made.directions().items()
    }
    assert multiple_match_share(made.directions(), twice) == 1


def test_latents_have_passages_where_they_fire():
    """Against the activations themselves; latents that never fire have none."""
    model, made = tiny_bridge(), drawn()
    model.tokenizer = make_tokenizer()
    x = tokens(4)
    found = latent_responses(model, made, x, context=2, n_passages=3, batch_size=4)
    clean = MLPs(model).clean(Batch(x))
    _, fired = Transcoded(model, made).on_clean(clean)
    alive = alive_latents(model, made, x, batch_size=4)
    words = model.tokenizer.convert_ids_to_tokens(list(range(29)))
    for layer in range(2):
        times = fired[layer].flatten(0, 1).sum(0)
        assert alive[f"blocks.{layer}.mlp"].tolist() == times.nonzero().squeeze(1).tolist()
        for latent, n in enumerate(times.tolist()):
            mine = found.get(f"blocks.{layer}.mlp:{latent}")
            assert (mine is None) == (n == 0)
            if mine is not None:
                assert mine.density == pytest.approx(n / 24)
                assert len(mine.passages) == min(3, n)
    rows, positions = fired[1][..., alive["blocks.1.mlp"][0]].nonzero().T.tolist()
    texts = set()
    for row, pos in zip(rows, positions, strict=True):
        around = x[row, max(0, pos - 2) : pos + 3]
        texts.add(tuple(words[i] for i in around))
    for passage in found[f"blocks.1.mlp:{alive['blocks.1.mlp'][0]}"].passages:
        assert tuple(token.strip() for token in passage.tokens) in texts
        assert passage.focus in passage.fires


def saelens_folder(folder, **config):
    """What SAELens 6 saves of a transcoder or an autoencoder with random weights."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, D), "b_dec": (D,)}
    if "jumprelu" in config["architecture"]:
        shapes["threshold"] = (LATENTS,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    common = {"d_in": D, "d_sae": LATENTS, "metadata": {"sae_lens_version": "6.54.12"}}
    (folder / "cfg.json").write_text(json.dumps({**common, **config}))
    return tensors


def test_a_transcoder_of_saelens(tmp_path):
    config = {"architecture": "jumprelu_transcoder", "d_out": D, "apply_b_dec_to_input": False}
    w = saelens_folder(tmp_path / "0", **config)
    made = import_saelens({0: tmp_path / "0"})
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(6))
    hidden = x @ w["W_enc"] + w["b_enc"]
    acts = hidden.relu() * (hidden > w["threshold"])
    mine = made.select(0, made.pre(0, x))
    torch.testing.assert_close(mine, acts)
    torch.testing.assert_close(made.decode(0, [mine]), acts @ w["W_dec"] + w["b_dec"])
    model = tiny_bridge()
    report = measure_replaced(Transcoded(model, made), tokens())
    assert report.per_module > 0  # one MLP of two, on the same axes


def test_an_autoencoder_of_saelens_reads_outputs(tmp_path):
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    w = saelens_folder(tmp_path / "1", apply_b_dec_to_input=True, **config)
    made = import_saelens({1: tmp_path / "1"})
    model = tiny_bridge()
    clean = MLPs(model, (1,)).clean(Batch(tokens()))
    norms = w["W_dec"].norm(dim=-1)
    hidden = ((clean.outputs[0] - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    top = hidden.topk(3, dim=-1)
    acts = torch.zeros_like(hidden).scatter(-1, top.indices, top.values.relu())
    expected = (acts / norms) @ w["W_dec"] + w["b_dec"]
    (got,), _ = Transcoded(model, made).on_clean(clean)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused(tmp_path):
    model = tiny_bridge()
    with pytest.raises(ConfigError, match="k is 11, more than n_latents, 10"):
        TranscoderConfig(n_latents=10, k=11)
    with pytest.raises(InputError, match="k is 11, but there are 10 latents"):
        drawn(k=11)
    with pytest.raises(ConfigError, match="objective"):
        TranscoderConfig(objective="cascade")
    config = TranscoderConfig(n_latents=LATENTS, k=K, steps=1)
    with pytest.raises(DataError):
        train_transcoder(model, tokens(0), config, progress=False)
    with pytest.raises(InputError, match=r"'all', which is not one of cascading"):
        measure_replaced(Transcoded(model, drawn()), tokens(), protocols=["all"])
    with pytest.raises(InputError, match="selection='top' is not one of"):
        measure_replaced(Transcoded(model, drawn(), "top"), tokens())
    with pytest.raises(InputError, match=r"blocks \[0, 1, 2\].*blocks \[0, 1\]|there is none in"):
        Transcoded(model, drawn(layers=(0, 1, 2)))
    with pytest.raises(InputError, match="map 8 to 8"):
        Transcoded(model, drawn(d_in=8, d_out=8))
    with pytest.raises(InputError, match="4 of 4 MLP matrices differ"):
        Transcoded(tiny_bridge(seed=1, act_fn="relu"), identity(tiny_bridge(act_fn="relu")))
    config = {"architecture": "jumprelu", "normalize_activations": "layer_norm"}
    saelens_folder(tmp_path / "0", **config)
    with pytest.raises(InputError, match="normalize_activations is 'layer_norm'; fold it"):
        import_saelens({0: tmp_path / "0"})
    with pytest.raises(InputError, match="folders is empty"):
        import_saelens({})


@pytest.mark.slow
def test_the_comparison_records_each_row_once(tmp_path):
    """The example's own rows, table and figure, on a model of a few parameters."""
    import comparison

    model = vpd_lens.decompose(tiny_bridge(), n_subcomponents=12)
    on = comparison.Bench(model, tokens(8), tokens(4, seed=1), 1.0, tmp_path)
    rows = list(comparison.decomposition_rows(on))
    config = TranscoderConfig(n_latents=LATENTS, k=K, steps=2, batch_size=2)
    rows.append(comparison.transcoder_row(on, config))
    again = comparison.transcoder_row(on, config.replaced({"steps": 3}))
    assert again == rows[-1]  # found, not made
    assert len(list((tmp_path / "records").iterdir())) == 4
    assert rows[-1].report.per_module == pytest.approx(K, abs=0.5)
    printed = as_text(comparison.table_of(rows), 160)
    assert f"{rows[-1].report.difference['parallel']:.3f}" in printed
    comparison.draw(rows, tmp_path, "tiny")
    assert (tmp_path / "comparison_tiny_dark.svg").exists()
