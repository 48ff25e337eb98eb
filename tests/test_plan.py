"""What a step takes, counted on the real step without values; and warnings about memory."""

import functools
import json

import pytest
import torch
from conftest import save_0_1, save_tiny, tiny_bridge
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from typer.testing import CliRunner

from vpd_lens import VPDConfig, train
from vpd_lens.cli import app
from vpd_lens.config import CausalImportanceConfig
from vpd_lens.decomposition.attach import attach
from vpd_lens.decomposition.ranks import site_sizes
from vpd_lens.errors import OutOfMemoryError
from vpd_lens.models import load_model
from vpd_lens.training import budget as budgets
from vpd_lens.training.budget import MemoryWarning, available_memory, budget
from vpd_lens.training.plan import plan_step
from vpd_lens.training.step import Stepper

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("plan")]  # they share plans

IMPORTANCE = CausalImportanceConfig(d_model=16, n_blocks=1, n_heads=2, d_ffn=32)
BATCH, POS = 4, 8


def config_of(**changes):
    config = VPDConfig.small(steps=4, batch_size=BATCH, n_subcomponents=8, importance=IMPORTANCE)
    few = {"initialisation": "random", "faithfulness.warmup_steps": 0, "adversary.inner_steps": 1}
    return config.replaced({**few, **changes})


def tiny():
    return tiny_bridge(n_layers=1)


def plan(model, **changes):
    return plan_step(model, config_of(**changes), BATCH, POS, autocast=False)


@functools.cache
def planned(**changes):
    """A tiny model that was planned, and what a step of it takes."""
    model = tiny()
    return model, plan(model, **changes)


def plan_of_tiny(**changes):
    return planned(**changes)[1]


@pytest.mark.parametrize("changes", [{}, {"recompute": True, "optimiser.kind": "adamw"}])
def test_the_flop_are_those_of_the_real_step(changes):
    model, config = tiny(), config_of(**changes)
    attach(model, "all", 8, IMPORTANCE)
    stepper = Stepper(model.vpd, config)
    tokens = torch.zeros(BATCH, POS, dtype=torch.long)
    stepper.step(tokens, 0)
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    for formula in attention.values():
        formula._get_raw = True
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        stepper.step(tokens, 1)
    cost = plan_of_tiny(**changes)
    assert cost.total_flop == counter.get_total_flops()
    phases = {"target", "importance", "adversary", "losses", "backward"}
    assert set(cost.flop) - {"update"} == phases  # AdamW has no products


def test_what_stays_is_weights_moments_and_sources():
    def lasting(**changes):
        return plan_of_tiny(**changes).lasting

    model = tiny()
    attach(model, "all", 8, IMPORTANCE)
    trained = sum(p.nbytes for p in model.vpd.parameters())
    adamw = {"optimiser.kind": "adamw", "adversary.coefficient": 0}
    # AdamW has a moment more than Muon, but for the biases, which it updates in both cases.
    biases = sum(p.nbytes for p in model.vpd.parameters() if p.ndim != 2)
    more = lasting(**adamw) - lasting(**{**adamw, "optimiser.kind": "muon"})
    assert more == pytest.approx(trained - biases, abs=4 * 100)  # counts of steps
    # One source and two moments per subcomponent, delta and position.
    n_masks = BATCH * POS * (model.vpd.layout.total + len(model.vpd.sites))
    sources = lasting(**{"optimiser.kind": "adamw"}) - lasting(**adamw)
    assert sources == pytest.approx(3 * 4 * n_masks, abs=64)


def test_less_is_kept_by_smaller_parts():
    adamw = {"optimiser.kind": "adamw"}
    assert plan_of_tiny(recompute=True, **adamw).peak < plan_of_tiny(**adamw).peak
    assert plan_of_tiny(**{"adversary.scope": "single"}).peak < plan_of_tiny().peak


def test_a_hugging_face_model_is_planned_without_its_weights(tmp_path):
    folder = save_tiny(tmp_path, n_layers=1)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    cost = plan(load_model(folder, weights=False))
    assert 0 < cost.lasting < cost.peak


def test_the_command_counts_and_measures(tmp_path):
    save_0_1(tiny(), tmp_path / "model")
    arguments = ["--preset", "small", "--set", "batch_size=4", "--set", "seq_len=8"]
    arguments += ["--set", "n_subcomponents=8", "--set", "importance={d_model: 16, n_blocks: 1}"]
    arguments += ["--model", str(tmp_path / "model"), "--device", "cpu", "--processes", "2"]
    arguments += ["--measure", "2", "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    assert "A step of 2 x 8 tokens in each process" in result.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["seconds"] == pytest.approx(figures["measured_seconds"])
    assert f"{sum(figures['flop'].values()) / 1e12:.4g} TFLOP" in result.stdout
    for site in figures["sites"].values():  # whose weights `--measure` loads
        assert site["C"] == 8
        assert 0 < site["rank99"] <= site["rank"] == min(site["shape"])
    assert "rank99" in result.stdout
    assert "2x-rank" in result.stdout


def test_without_weights_there_is_no_rank():
    model, _ = planned()
    assert {row["rank"] for row in site_sizes(model.vpd).values()} == {None}
    assert all(row["shape"] for row in site_sizes(model.vpd).values())


# ---------------------------------------------------------------------------- memory


def test_a_run_that_may_not_fit_is_warned_of_and_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "available_memory", lambda device: 1000.0)
    tokens = torch.zeros(8, POS, dtype=torch.long)
    config = config_of(steps=1, seq_len=POS)
    with pytest.warns(MemoryWarning, match="may not fit.*\n.*masked passes|V, U"):
        result = train(tiny_bridge(), tokens, config, output=tmp_path, progress=False)
    assert result.folder == tmp_path


def test_the_budget_is_below_what_the_step_takes_but_not_far():
    model, config = tiny(), config_of()
    attach(model, "all", 8, IMPORTANCE)
    counted = sum(budget(model.vpd, config, BATCH, POS).values())
    assert 0.4 < counted / plan_of_tiny().peak < 1.1


def test_running_out_of_memory_is_explained(tmp_path, monkeypatch):
    def step(self, batch, index, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(OutOfMemoryError) as caught:
        train(
            tiny_bridge(),
            torch.zeros(8, POS, dtype=torch.long),
            config_of(seq_len=POS),
            output=tmp_path,
            progress=False,
        )
    for words in ("Tried to allocate 20.00 GiB", "micro_batches=", "masked passes"):
        assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_an_allocation_that_fails_on_a_cpu_is_explained_and_other_errors_are_not():
    cpu = torch.device("cpu")
    with (
        pytest.raises(OutOfMemoryError, match="out of memory on cpu"),
        budgets.explained_out_of_memory({"all": 1e9}, cpu),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"), budgets.explained_out_of_memory({}, cpu):
        torch.ones(2) + torch.ones(3)


def test_available_memory_is_positive_or_unknown():
    free = available_memory(torch.device("cpu"))
    assert free is None or free > 0
