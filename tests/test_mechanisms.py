"""Transformers whose mechanisms are known: does their decomposition consist of them?

Each fixture decomposes a trained target, in about a minute on an idle core; `python
tests/test_mechanisms.py` trains the targets anew. `docs/tutorials` has the same on larger ones,
trained for longer.

Subcomponents start along neurons and head dimensions, so that a subcomponent of one frequency or
of one head is nothing that training has to find: neurons of such a target have one frequency from
the start. What it has to find is which few of them are needed, and it must not mix them up. So
every claim about what is live comes with its opposite: all the others can go, together.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vpd_lens
from toy_runs.frequencies import amplitudes_without, key_frequencies, site_frequencies
from vpd_lens.analysis.usage import head_shares
from vpd_lens.toys.fourier import logit_waves
from vpd_lens.toys.induction import RepeatedTokens, head_scores
from vpd_lens.toys.modular_addition import ModularAddition, last_position_kl
from vpd_lens.training import VPDConfig

pytestmark = pytest.mark.slow
TARGETS = Path(__file__).parent / "data" / "mechanisms.safetensors"


def trained(name, model):
    """A model with the weights that its task's `train_target` gave it."""
    stored = load_file(TARGETS).items()
    own = {key.removeprefix(f"{name}/"): t for key, t in stored if key.startswith(f"{name}/")}
    left = model.load_state_dict(own, strict=False)
    assert not left.unexpected_keys
    assert {n for n, _ in model.named_parameters()} == own.keys()
    return model


@pytest.mark.parametrize("task", ["addition", "induction"])
def test_targets_learn(task):
    """A few steps of what made the stored weights."""
    own = {"addition": ADDITION, "induction": REPEATED}[task]
    rows = own.all_rows() if task == "addition" else own(torch.Generator().manual_seed(7), 64)

    def loss(steps):
        model = own.train_target(steps=steps, progress=False)
        with torch.no_grad():
            output = model(rows)
            if task == "induction":
                return float(own.loss(output, rows))
            return float(F.cross_entropy(output[:, -1], own.answers(rows)))

    assert loss(60) < 0.97 * loss(1)


# ------------------------------------------------------------------------- modular addition

ADDITION = ModularAddition(31)
MATRICES = ("attn.k", "attn.v", "attn.o", "mlp.in", "mlp.out")


@pytest.fixture(scope="module")
def addition(tmp_path_factory):
    """A target that has understood addition, its key frequencies, and its live subcomponents."""
    model = trained("addition", ADDITION.transformer(0))
    logits = ADDITION.logits(model)
    config = VPDConfig.small(
        steps=500,
        batch_size=64,
        n_subcomponents={"attn": 64, "mlp": 256},
        importance={"d_model": 64, "n_blocks": 1, "n_heads": 4},
    ).replaced({"minimality.coefficient": 3e-3, "adversary.inner_steps": 1})
    output = tmp_path_factory.mktemp("addition")
    vpd_lens.decompose(
        model, ADDITION, config, divergence=last_position_kl, output=output, progress=False
    )
    live = {name: site_frequencies(model, ADDITION, f"blocks.0.{name}") for name in MATRICES}
    return model, logits, key_frequencies(logits), live


def test_addition_is_understood_and_decomposed(addition):
    """Else the tests below would say nothing."""
    model, _, keys, _ = addition
    assert ADDITION.accuracy(model) > 0.99
    assert 2 <= len(keys) <= 5
    report = vpd_lens.evaluate(
        model,
        ADDITION.all_rows(),
        batch_size=31**2,
        n_batches=1,
        pgd_steps=(20,),
        pgd_restarts=1,
        progress=False,
    )
    assert report.modes["zero"]["kl"] > 2
    assert report.modes["stochastic"]["kl"] < 0.01
    assert report.modes["ci"]["kl"] < 0.1
    assert report.pgd["20"]["max"] < 0.5
    assert report.l0["0"]["total"] < 0.1 * sum(report.n_subcomponents.values())


def test_what_is_not_live_can_go(addition):
    """All of it at once, most of every MLP matrix; as many drawn at random may not go."""
    model, logits, keys, live = addition
    generator = torch.Generator().manual_seed(0)
    others, at_random = {}, {}
    for name in MATRICES:
        site = f"blocks.0.{name}"
        count = model.vpd.u(site).shape[0]
        others[site] = torch.tensor(sorted(set(range(count)) - set(live[name].index.tolist())))
        at_random[site] = torch.randperm(count, generator=generator)[: len(others[site])]
        if name.startswith("mlp"):
            assert len(others[site]) > 0.5 * count
    after, accuracy = amplitudes_without(model, ADDITION, others)
    left = after / logit_waves(logits)
    assert accuracy > 0.98
    assert min(left[k - 1] for k in keys) > 0.6
    after, accuracy = amplitudes_without(model, ADDITION, at_random)
    assert accuracy < 0.3


def test_live_subcomponents_compute_with_key_frequencies(addition):
    """With chance, 12 of 15 frequencies would be wrong, and the largest share far below a half."""
    _, _, keys, live = addition
    for name in MATRICES:
        assert set(live[name].frequency.tolist()) <= set(keys), name
    on_keys = [k - 1 for k in keys]
    for name, least in (("mlp.in", 0.75), ("mlp.out", 0.65)):
        assert set(live[name].frequency.tolist()) == set(keys)
        assert live[name].share.mean() > least
        assert live[name].activation[:, on_keys].sum(1).mean() > 0.8
    written = live["mlp.out"].write
    assert written.amax(1).mean() > 0.8
    # What a subcomponent reads is what it writes.
    agree = written.argmax(1) + 1 == live["mlp.out"].frequency
    assert agree.float().mean() > 0.85


def left_without(addition, labels, key):
    """Shares of the key frequencies that are left without what `labels` calls of one's."""
    model, logits, keys, live = addition
    ablated = {f"blocks.0.{n}": live[n].index[label == key] for n, label in labels.items()}
    after, _ = amplitudes_without(model, ADDITION, ablated)
    share = after / logit_waves(logits)
    return {k: float(share[k - 1]) for k in keys}


@pytest.mark.parametrize("names", [("mlp.in",), ("mlp.out",), ("mlp.in", "mlp.out")])
def test_ablating_a_frequency_removes_it_and_no_other(addition, names):
    _, _, keys, live = addition
    generator = torch.Generator().manual_seed(0)
    for key in keys:
        left = left_without(addition, {n: live[n].frequency for n in names}, key)
        assert left.pop(key) < 0.4, (key, left)
        assert min(left.values()) > 0.9, (key, left)
        # The same labels, dealt out anew: no frequency is spared.
        dealt = {n: live[n].frequency for n in names}
        dealt = {n: f[torch.randperm(len(f), generator=generator)] for n, f in dealt.items()}
        left = left_without(addition, dealt, key)
        assert min(share for k, share in left.items() if k != key) < 0.9, (key, left)


# -------------------------------------------------------------------------------- induction

REPEATED = RepeatedTokens(d_vocab=32, length=24, periods=(6, 12))


class Circuit:
    """An induction transformer and its decomposition; loss and attention under ablations."""

    def __init__(self, output):
        self.model = trained("induction", REPEATED.transformer(0, n_heads=2))
        self.tokens = REPEATED(torch.Generator().manual_seed(10**6), 256)
        config = VPDConfig.small(
            steps=300, n_subcomponents=64, importance={"d_model": 64, "n_blocks": 1, "n_heads": 4}
        ).replaced({"minimality.coefficient": 1e-3, "adversary.inner_steps": 1})
        vpd_lens.decompose(self.model, REPEATED, config, output=output, progress=False)
        self.loss, self.scores = self.measured()
        self.previous = int(self.scores.previous[0].argmax())
        self.importance = self.model.vpd.causal_importance(self.tokens).mean((0, 1))

    def measured(self):
        with torch.no_grad():
            loss = float(REPEATED.loss(self.model(self.tokens), self.tokens))
        return loss, head_scores(self.model, REPEATED, self.tokens)

    def without(self, kind, layer, head, important):
        """Rise of the loss and head scores without a head's important subcomponents, or others."""
        name, vpd = f"blocks.{layer}.attn.{kind}", self.model.vpd
        often = self.importance[vpd.layout.columns(name)] > 0.1
        own = head_shares(vpd, name).argmax(1) == head
        ablated = own & (often == important)
        assert ablated.any()
        with vpd.masked({name: (~ablated).float()}):
            loss, scores = self.measured()
        return loss - self.loss, scores


@pytest.fixture(scope="module")
def circuit(tmp_path_factory):
    return Circuit(tmp_path_factory.mktemp("induction") / "vpd")


def test_the_target_has_the_circuit(circuit):
    previous, other = circuit.scores.previous[0].sort(descending=True).values.tolist()
    assert previous > 0.5 > 0.25 > other
    assert circuit.scores.induction[1].min() > 0.7
    assert circuit.loss < 1 < 3.47  # nats; guessing among 32 tokens costs 3.47


@pytest.mark.parametrize("kind", ["q", "k"])
def test_queries_and_keys_of_the_previous_token_head_make_its_attention(circuit, kind):
    """Without them the induction heads, which read what it wrote, lose theirs."""
    rise, after = circuit.without(kind, 0, circuit.previous, important=True)
    head = circuit.previous
    assert after.previous[0, head] < 0.65 * circuit.scores.previous[0, head]
    assert (after.induction[1] < 0.75 * circuit.scores.induction[1]).all()
    assert rise > 0.4


@pytest.mark.parametrize("kind", ["v", "o"])
def test_values_and_outputs_of_the_previous_token_head_are_what_induction_reads(circuit, kind):
    rise, after = circuit.without(kind, 0, circuit.previous, important=True)
    torch.testing.assert_close(after.previous[0], circuit.scores.previous[0])
    assert (after.induction[1] < 0.4 * circuit.scores.induction[1]).all()
    assert rise > 1


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_queries_and_keys_of_an_induction_head_make_its_attention_alone(circuit, kind, head):
    rise, after = circuit.without(kind, 1, head, important=True)
    before = circuit.scores
    torch.testing.assert_close(after.previous[0], before.previous[0])
    assert after.induction[1, head] < 0.65 * before.induction[1, head]
    assert after.induction[1, 1 - head] > 0.85 * before.induction[1, 1 - head]
    assert rise > 0.1


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("kind", ["v", "o"])
def test_values_and_outputs_of_an_induction_head_copy(circuit, kind, head):
    """All attention stays as it is, and yet the answer is gone."""
    rise, after = circuit.without(kind, 1, head, important=True)
    torch.testing.assert_close(after.induction[1], circuit.scores.induction[1])
    assert rise > 0.3


@pytest.mark.parametrize("kind", ["q", "k", "v", "o"])
def test_what_is_not_important_can_go(circuit, kind):
    """The control: a head's other subcomponents cost a tenth of its important ones at most."""
    for layer, head in ((0, circuit.previous), (1, 0), (1, 1)):
        needed, _ = circuit.without(kind, layer, head, important=True)
        superfluous, after = circuit.without(kind, layer, head, important=False)
        assert superfluous < 0.06, (layer, head)
        assert superfluous < 0.15 * needed, (layer, head)
        assert (after.induction[1] > 0.85 * circuit.scores.induction[1]).all()


def test_the_head_without_a_part_is_told_apart(circuit):
    """Its queries and keys can go, although it has as many subcomponents as the others."""
    for kind in ("q", "k"):
        rise, after = circuit.without(kind, 0, 1 - circuit.previous, important=True)
        assert rise < 0.1
        assert (after.induction[1] > 0.95 * circuit.scores.induction[1]).all()


if __name__ == "__main__":
    made = {
        "addition": ADDITION.train_target(steps=800, progress=False),
        "induction": REPEATED.train_target(steps=1000, progress=False),
    }
    tensors = {f"{n}/{key}": p for n, model in made.items() for key, p in model.named_parameters()}
    save_file({key: p.detach().contiguous() for key, p in tensors.items()}, TARGETS)
