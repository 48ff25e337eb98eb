"""The induction toy: its task, head scores and head shares, on cases worked out by hand."""

import pytest
import torch
from conftest import tiny_bridge

import vpd_lens
from vpd_lens.analysis.usage import head_shares
from vpd_lens.errors import InputError
from vpd_lens.native import native_transformer
from vpd_lens.toys.induction import RepeatedTokens, head_scores

TASK = RepeatedTokens(d_vocab=7, length=12, periods=(3, 5))


@pytest.fixture(scope="module")
def tokens():
    return TASK(torch.Generator().manual_seed(0), 200)


def test_rows_repeat_after_their_period(tokens):
    periods = torch.stack([(tokens[:, p:] == tokens[:, :-p]).all(1) for p in (3, 4, 5)])
    assert periods.any(0).all()
    assert (periods.sum(1) > 30).all()  # each of the periods occurs
    assert tokens.max() == 6
    again = TASK(torch.Generator().manual_seed(0), 200)
    assert torch.equal(tokens, again)


def test_matches_are_the_positions_after_the_same_token():
    row = torch.tensor([[4, 1, 2, 1, 3, 1]])
    found = [pair[1:] for pair in TASK.matches(row).nonzero().tolist()]
    # Token 1 at 3 was seen at 1, so 2 matches; at 5 also what followed 3.
    assert found == [[3, 2], [5, 2], [5, 4]]


def test_loss_is_that_of_predictable_positions():
    row = torch.tensor([[4, 1, 2, 1, 2, 0]])
    logits = torch.zeros(1, 6, 7)
    logits[0, 3, 2] = 100.0  # after the second 1: right
    logits[0, 4, 1] = 100.0  # after the second 2: wrong
    assert TASK.loss(logits, row).item() == pytest.approx(50.0)


class Attends(torch.nn.Module):
    """Stands in for a transformer whose two heads attend as they should."""

    class cfg:
        n_layers = 1

    def run_with_cache(self, tokens):
        n = tokens.shape[1]
        previous = torch.eye(n).roll(-1, 1).tril()[None].expand(len(tokens), n, n)
        matches = TASK.matches(tokens).float()
        uniform = matches / matches.sum(-1, keepdim=True).clamp(min=1)
        return None, {("pattern", 0): torch.stack([previous, uniform], 1)}


def test_head_scores(tokens):
    scores = head_scores(Attends(), TASK, tokens)
    assert scores.previous[0, 0].item() == pytest.approx(1)
    assert scores.induction[0, 1].item() == pytest.approx(1)
    assert scores.induction[0, 0] < 0.4


@pytest.fixture(scope="module")
def model():
    made = native_transformer(
        n_layers=2,
        d_model=16,
        n_ctx=12,
        d_head=8,
        n_heads=2,
        attn_only=True,
        d_vocab=7,
        normalization_type=None,
        seed=0,
    )
    return vpd_lens.decompose(made, n_subcomponents=10)


@pytest.mark.compat
def test_head_shares_are_those_of_the_vectors(model):
    for name, vectors in (
        ("blocks.0.attn.q", model.vpd.u("blocks.0.attn.q")),
        ("blocks.1.attn.o", model.vpd.v("blocks.1.attn.o").T),
    ):
        shares = head_shares(model.vpd, name)
        assert shares.shape == (10, 2)
        torch.testing.assert_close(shares.sum(1), torch.ones(10))
        first = vectors[:, :8].square().sum(1) / vectors.square().sum(1)
        torch.testing.assert_close(shares[:, 0], first)


def test_a_zero_direction_is_in_no_head(model):
    u = model.vpd.u("blocks.1.attn.v")
    before = u.detach().clone()
    with torch.no_grad():
        u[2:4] = torch.tensor([0.0, 1e-30])[:, None]
    shares = head_shares(model.vpd, "blocks.1.attn.v")
    assert shares[2:4].tolist() == [[0, 0], [0.5, 0.5]]
    with torch.no_grad():
        u.copy_(before)


def test_heads_of_keys_are_the_key_value_heads():
    model = vpd_lens.decompose(tiny_bridge(n_key_value_heads=1), sites="attn", n_subcomponents=3)
    for part, heads in (("q", 2), ("k", 1), ("v", 1), ("o", 2)):
        shares = head_shares(model.vpd, f"blocks.0.attn.{part}")
        torch.testing.assert_close(shares.sum(1), torch.ones(3))
        assert shares.shape == (3, heads)


def test_head_shares_need_an_attention_matrix(model):
    with pytest.raises(InputError, match="not the q, k, v or o"):
        head_shares(model.vpd, "blocks.0.mlp.in")


@pytest.mark.compat
def test_a_subcomponent_of_one_head_moves_that_head_alone(model, tokens):
    """The share means what it says: writing to head 1 only leaves head 0's pattern alone."""
    vpd = model.vpd
    before = [x.detach().clone() for x in (vpd.u("blocks.0.attn.q"), vpd.v("blocks.0.attn.q"))]
    with torch.no_grad():
        vpd.u("blocks.0.attn.q")[3, :8] = 0
        vpd.u("blocks.0.attn.q")[3, 8:] = 2
        vpd.v("blocks.0.attn.q")[:, 3] = 1
    assert head_shares(vpd, "blocks.0.attn.q")[3].tolist() == [0, 1]
    mask = torch.ones(10)
    mask[3] = 0
    _, clean = model.run_with_cache(tokens[:4])
    with vpd.masked({"blocks.0.attn.q": mask}):
        _, masked = model.run_with_cache(tokens[:4])
    change = (clean["pattern", 0] - masked["pattern", 0]).abs().amax(dim=(0, 2, 3))
    assert change[0] < 1e-6
    assert change[1] > 1e-3
    with torch.no_grad():
        vpd.u("blocks.0.attn.q").copy_(before[0])
        vpd.v("blocks.0.attn.q").copy_(before[1])
