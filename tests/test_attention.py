"""Attention by subcomponents, on models whose attention is known because it was built in."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_bridge
from matplotlib.text import Text

import vpd_lens
from vpd_lens import plots
from vpd_lens.analysis.attention import Overlap, Together, head_cosines
from vpd_lens.analysis.attention.heads import HeadSpread, ov_overlap
from vpd_lens.errors import DataError, InputError, VPDError
from vpd_lens.sites import find_sites

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:this decomposition is untrained"),
]


def built(subcomponents, embedding, positions=None, **shape):
    """A model with nothing but the subcomponents `{site: (V, U)}` in its attention."""
    sizes = {"d_vocab": embedding.shape[0], "d_model": embedding.shape[1], "attn_only": True}
    model = tiny_bridge(normalization_type=None, **sizes, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.startswith("tok_embed"):
                parameter.copy_(embedding)
            elif positions is not None and name.startswith("pos."):
                parameter.copy_(positions)
        weights = {site.name: site.weight for site in find_sites(model)}
        for name, (v, u) in subcomponents.items():
            weights[name].copy_(v @ u)
        n = max(v.shape[1] for v, _ in subcomponents.values())
        vpd = vpd_lens.decompose(model, sites="attn", n_subcomponents=n).vpd
        for name in vpd.layout.names:
            vpd.v(name).zero_()
            vpd.u(name).zero_()
            if name in subcomponents:
                v, u = subcomponents[name]
                vpd.v(name)[:, : v.shape[1]], vpd.u(name)[: u.shape[0]] = v, u
    return model


@pytest.fixture(scope="module")
def previous():
    """Head 0 of the only layer attends to the position before, by one pair; head 1 does not.

    What q writes is turned so that it meets what k writes at a distance of 1.
    """
    frequency = torch.tensor([1.0, 0.1])
    key, query = torch.zeros(16), torch.zeros(16)
    key[[0, 2]] = 12.0  # this model turns each dimension with its neighbour
    query[[0, 2]], query[[1, 3]] = 12 * frequency.cos(), -12 * frequency.sin()
    generator = torch.Generator().manual_seed(0)
    v, noise = torch.eye(16)[:, [4, 0, 7]], torch.randn(2, 3, 16, generator=generator)
    noise[:, :, :8] = 0  # in head 1 alone
    u_q, u_k = noise[0], noise[1]
    u_q[1], u_k[1] = query, key
    embedding = torch.randn(9, 16, generator=generator)
    embedding[:, 0] = 1
    sites = {"blocks.0.attn.q": (v, u_q), "blocks.0.attn.k": (v, u_k)}
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8, "n_ctx": 12, "n_layers": 1}
    return built(sites, embedding, n_heads=2, d_head=8, **rotary)


PAIR = "blocks.0.attn.q:1", "blocks.0.attn.k:1"


def test_the_pair_of_a_previous_token_head_comes_out_on_top(previous):
    heads = vpd_lens.attention(previous)
    static = heads.static(0, offsets=8)
    best = static.top(1)[0]
    assert best[:4] == (*PAIR, 0, 1)
    assert best.value == pytest.approx(144 * 2 / math.sqrt(8), rel=1e-5)
    assert static.standardised().top(1)[0][:4] == (*PAIR, 0, 1)
    assert static.relative().top(1, head=0, offset=1)[0][:4] == (*PAIR, 0, 1)
    # As a sum of cosines of the angle that is left.
    tau = torch.arange(8.0)
    expected = 144 / math.sqrt(8) * ((tau - 1).cos() + (0.1 * (tau - 1)).cos())
    torch.testing.assert_close(static.of(*PAIR)[0], expected, atol=1e-3, rtol=1e-4)
    assert heads.spread("blocks.0.attn.q").n_heads[1] == 1


def test_its_profile_and_scores_are_those_of_the_pair(previous):
    heads = vpd_lens.attention(previous)
    rows = torch.randint(9, (6, 10), generator=torch.Generator().manual_seed(2))
    prompt = heads.on(rows[0])
    torch.testing.assert_close(prompt.pair(*PAIR)[0], prompt.scores(0)[0], atol=1e-4, rtol=1e-4)
    top = prompt.contributions(0, 0, 6, 5, relative=True).top(1)[0]
    assert (top.query, top.key) == (f"{PAIR[0]}@6", f"{PAIR[1]}@5")
    assert prompt.top(0, 1, threshold=-1.0)[0].head == 0
    found = heads.over(rows, offsets=8)
    assert found.profiles[0].attention[0, 1] > 0.9
    static, mean = heads.static(0, offsets=8), found.contributions[0]
    torch.testing.assert_close(mean.of(*PAIR)[0], static.of(*PAIR)[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", PAIR)
def test_without_one_of_the_pair_the_head_looks_everywhere(previous, name):
    heads = vpd_lens.attention(previous)
    rows = torch.randint(9, (4, 10), generator=torch.Generator().manual_seed(2))
    found = heads.ablate(name, rows, offsets=4)
    uniform = sum(1 / (t + 1) for t in range(1, 10)) / 9
    assert found.after[0].attention[0, 1] == pytest.approx(uniform, abs=1e-5)
    assert found.change(0)[0].argmin() == 1
    # The other head has nothing of it.
    torch.testing.assert_close(found.after[0].attention[1], found.before[0].attention[1])


VOCABULARY, LENGTH, SHARP = 5, 8, 60.0


@pytest.fixture(scope="module")
def induction():
    """Two layers that continue repeated tokens; one subcomponent per position, or per token.

    The stream holds a token, the position, and the token before, which layer 0 writes there.
    """
    width = 2 * VOCABULARY + LENGTH
    axes = torch.eye(width)
    token, position, before = axes.split([VOCABULARY, LENGTH, VOCABULARY])
    head = torch.eye(LENGTH)
    of_tokens = head[:VOCABULARY]
    sites = {
        "blocks.0.attn.q": (position.T, SHARP * head),
        "blocks.0.attn.k": (position[:-1].T, head[1:]),
        "blocks.0.attn.v": (token.T, of_tokens),
        "blocks.0.attn.o": (of_tokens.T, before),
        "blocks.1.attn.q": (token.T, SHARP * of_tokens),
        "blocks.1.attn.k": (before.T, of_tokens),
        "blocks.1.attn.v": (token.T, of_tokens),
        "blocks.1.attn.o": (of_tokens.T, 9 * token),
    }
    return built(sites, token, position, n_heads=1, d_head=LENGTH, n_ctx=LENGTH, n_layers=2)


def test_pairs_of_an_induction_head_are_those_of_the_same_token(induction):
    heads = vpd_lens.attention(induction)
    static = heads.static(1, offsets=2)
    found = {(p.first.split(":")[1], p.second.split(":")[1]) for p in static.top(VOCABULARY)}
    assert found == {(str(c), str(c)) for c in range(VOCABULARY)}
    assert not static.sees_offsets
    moved = heads.value_output(1).top(VOCABULARY)
    assert all(p.first[-1] == p.second[-1] for p in moved)
    # 4 1 2 3 1: the last token looks at what followed its kind, by the pair of token 1.
    prompt = heads.on([4, 1, 2, 3, 1])
    assert prompt.patterns[1][0, 4, 2] > 0.99
    best = prompt.contributions(1, 0, 4, 2).top(1)[0]
    assert (best.query, best.key) == ("blocks.1.attn.q:1@4", "blocks.1.attn.k:1@2")
    assert best.weight == pytest.approx(float(prompt.scores(1)[0, 4, 2]), rel=1e-5)
    without = prompt.without("blocks.1.attn.q:1")
    torch.testing.assert_close(without[1][0, 4], torch.full((5,), 0.2))


def test_contributions_relative_to_the_mean_are_what_the_softmax_sees(previous):
    prompt = vpd_lens.attention(previous).on([1, 2, 3, 4, 5])
    scores, pattern = prompt.scores(0)[1, 4], prompt.patterns[0][1, 4]
    for key in (0, 2, 4):
        found = prompt.contributions(0, 1, 4, key, relative=True)
        assert found.score == pytest.approx(float(scores[key] - pattern @ scores), abs=1e-5)


# ---------------------------------------------------------------- heads


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_overlaps_are_those_of_the_matrices_written_out():
    w_v, w_o, inputs = drawn(3, 10, 4), drawn(3, 4, 7, seed=1), drawn(50, 10, seed=2)
    root = torch.linalg.cholesky(inputs.T.cov()).T
    for weight in (None, root):
        found = head_cosines(w_v, w_o, weight)
        whole = w_v @ w_o if weight is None else weight @ w_v @ w_o
        grams = {
            "raw": whole,
            "read": whole @ whole.mT,
            "write": whole.mT @ whole,
        }
        for kind, matrices in grams.items():
            flat = torch.nn.functional.normalize(matrices.flatten(1), dim=1)
            torch.testing.assert_close(found[kind], flat @ flat.T, atol=1e-5, rtol=1e-4)


def test_baselines_are_those_of_random_heads():
    n, m, pairs = 24, 6, 150
    model = vpd_lens.decompose(
        tiny_bridge(d_model=n, d_head=m, n_heads=2, n_layers=1), sites="attn", n_subcomponents=2
    )
    found = ov_overlap(model.vpd, 0, n_random=pairs)
    # Expected products of Wishart matrices, for W_V W_O of Gaussian entries.
    expected = n * m / ((n + 1) * (n + m + 1) + n * m + 2)
    for kind in ("read", "write"):
        mean, deviation = found.random[kind]
        assert mean == pytest.approx(expected, abs=4 * deviation / pairs**0.5 + 0.02 * expected)
    mean, deviation = found.random["raw"]
    assert abs(mean) < 4 * deviation / pairs**0.5
    # The paper's, for projections: W_O with orthonormal rows leaves those of W_V alone.
    w_v, w_o = drawn(2 * pairs, n, m), torch.eye(n)[:m].expand(2 * pairs, m, n)
    cosines = [float(head_cosines(w_v[i : i + 2], w_o[:2])["read"][0, 1]) for i in range(pairs)]
    assert sum(cosines) / pairs == pytest.approx(found.analytic, rel=0.05)
    assert found.analytic == pytest.approx(m / (n + m + 1))


def test_weighting_by_inputs_of_one_kind_leaves_only_those(previous):
    """Inputs that vary along one axis: every head reads that, whatever else it could read."""
    model = vpd_lens.decompose(tiny_bridge(), sites="attn", n_subcomponents=2)
    inputs = torch.outer(drawn(30), drawn(16, seed=3)) + 2.0
    found = ov_overlap(model.vpd, 0, inputs, n_random=4)
    torch.testing.assert_close(found.cosines["read"], torch.ones(2, 2), atol=1e-4, rtol=0)
    assert found.random["read"][0] == pytest.approx(1, abs=1e-4)
    assert found.n_inputs == 30


def test_spread_counts_heads():
    norms = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0], [2, 2, 0]])
    assert HeadSpread("s", norms).n_heads.tolist() == pytest.approx([1, 3, 0, 2])
    assert HeadSpread("s", norms).top(1)[0] == ("s:3", [2, 2, 0])


def test_conditional_probabilities():
    both = torch.tensor([[6.0, 0], [2, 4]])
    found = Together("k", "v", both, torch.tensor([8.0, 4]), torch.tensor([6.0, 8]), 20)
    assert found.k_given_v.flatten().tolist() == pytest.approx([1, 0, 1 / 3, 0.5])
    assert found.v_given_k.flatten().tolist() == pytest.approx([0.75, 0, 0.5, 1])
    k, v, *figures = found.top(1, at_least=4)[0]
    assert (k, v) == ("k:0", "v:0")
    assert figures == pytest.approx([1, 0.75, (0.3 - 0.12) / (0.24 * 0.21) ** 0.5])


def test_an_overlap_of_one_head_is_printed():
    one = Overlap(0, {"raw": torch.ones(1, 1)}, 0.1, {"raw": (0.0, 0.1)})
    assert "nan" in str(one)


# ---------------------------------------------------------------- refusals


def test_what_is_not_there_is_refused(previous):
    heads = vpd_lens.attention(previous)
    prompt = heads.on([1, 2, 3])
    with pytest.raises(InputError, match="layer is 1; q and k are decomposed in"):
        prompt.scores(1)
    with pytest.raises(InputError, match="a key is not after its query"):
        prompt.contributions(0, 0, 1, 2)
    with pytest.raises(InputError, match="names no subcomponent of a decomposed attention matrix"):
        prompt.pair(PAIR[1], PAIR[0])
    with pytest.raises(InputError, match="has 3 subcomponents, numbered from 0"):
        prompt.pair(PAIR[0], "blocks.0.attn.k:3")
    with pytest.raises(InputError, match="is not among the 3"):
        heads.static(0).of("blocks.0.attn.q:7", PAIR[1])
    with pytest.raises(InputError, match=r"offset is 40; there are \[0, 1"):
        heads.static(0, 12).top(offset=40)
    with pytest.raises(InputError, match="13 positions: the model has between 1 and 12"):
        heads.static(0, offsets=13)
    with pytest.raises(InputError, match="so needs data="):
        heads.overlap(0, where=PAIR[1])
    with pytest.raises(InputError, match=r"layer=3: blocks.3.attn.v and blocks.3.attn.o are not"):
        heads.value_output(3)
    with pytest.raises(DataError, match="no batch of data"):
        heads.over(torch.zeros(2, 4).long(), n_batches=0)


def test_layers_need_q_and_k():
    model = vpd_lens.decompose(tiny_bridge(), sites=r"mlp|0.attn.q", n_subcomponents=2)
    with pytest.raises(InputError, match="no layer has both q and k decomposed"):
        vpd_lens.attention(model)


def test_attention_of_another_form_is_refused(previous, monkeypatch):
    """A pattern that does not follow from scores, such as that of an attention sink."""
    from vpd_lens.analysis.attention.form import ScoreForm

    heads = vpd_lens.attention(previous)
    pattern = ScoreForm.pattern
    monkeypatch.setattr(ScoreForm, "pattern", lambda form, s: 0.9 * pattern(form, s))
    with pytest.raises(VPDError, match="is not a softmax of scores that are bilinear"):
        heads.on([1, 2, 3])


def test_signs_and_use_come_from_the_harvest(previous):
    from vpd_lens.analysis.harvest import harvest

    rows = torch.randint(9, (6, 10), generator=torch.Generator().manual_seed(2))
    found = harvest(previous, rows, n_batches=1, progress=False)
    signed = vpd_lens.attention(previous, found, threshold=-1.0)
    columns = found.layout.columns("blocks.0.attn.q")
    sign = torch.where(found.usage.signed[columns] < 0, -1.0, 1.0)
    k_sign = torch.where(found.usage.signed[found.layout.columns("blocks.0.attn.k")] < 0, -1.0, 1.0)
    plain = vpd_lens.attention(previous).static(0).values
    torch.testing.assert_close(signed.static(0).values, plain * sign[:, None] * k_sign)
    assert signed.static(0).signed
    used = vpd_lens.attention(previous, found, threshold=2.0)
    assert used.static(0).values.shape[2:] == (0, 0)
    with pytest.raises(InputError, match="of another decomposition"):
        vpd_lens.attention(vpd_lens.decompose(tiny_bridge(), n_subcomponents=2), found)


def test_figures_name_what_they_show(previous):
    heads = vpd_lens.attention(previous)
    rows = torch.randint(9, (2, 10), generator=torch.Generator().manual_seed(2))
    found, static, prompt = heads.over(rows, offsets=4), heads.static(0, 4), heads.on(rows[0])
    pair = "q:1 \N{MULTIPLICATION SIGN} k:1"
    texts = [f"token {i}" for i in range(10)]
    drawn = {
        pair: plots.qk_offsets(found.contributions[0], static.top(2)),
        f"{pair}, static": plots.qk_pair(static, *PAIR),
        "static, 1 back": plots.qk_matrix(static, 1),
        "token 9": plots.attention_patterns([("all", prompt.patterns[0][0])], texts),
        "without q:1": plots.attention_ablation([heads.ablate(PAIR[0], rows, offsets=4)], 0),
        "subcomponents of blocks.0.attn.q": plots.head_spread(heads.spread("blocks.0.attn.q")),
        "write; random": plots.head_overlap(heads.overlap(0, n_random=2)),
        "P(k | v)": plots.used_together(found.together[0]),
    }
    for text, figure in drawn.items():
        assert any(text in shown.get_text() for shown in figure.findobj(Text)), text
    lines = drawn[pair].axes[1].lines[1:]  # of head 1, after that at 0
    assert list(lines[0].get_ydata()) == found.contributions[0].of(*PAIR)[1].tolist()
    shown = drawn["token 9"].axes[0].images[0].get_array()
    torch.testing.assert_close(torch.from_numpy(shown.data), prompt.patterns[0][0])
