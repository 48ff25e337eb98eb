"""The explorer works on both model classes: what it writes, and its graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from vpd_lens.errors import InputError
from vpd_lens.explorer.orders import EditOrder, EditsOrder, GraphOrder, Question
from vpd_lens.explorer.workbench import Workbench

TEXT, NEW = "w7 w20 w33", 4


@pytest.mark.parametrize("case", ["bridge-llama-processed", "hooked-grouped"])
def test_texts_graphs_and_edits(
    case: str, build: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path
) -> None:
    from vpd_lens.decomposition.attach import attach

    model: Any = attach(build(case), n_subcomponents=5)
    if model.tokenizer is None:
        model.set_tokenizer(tokenizer)
    model.vpd.trained_steps = 1  # or there is a warning
    tokens = model.to_tokens(TEXT)
    bench = Workbench(model, None, tmp_path)
    found = bench.explained(Question(text=TEXT))
    assert len(found["tokens"]) == tokens.shape[1]

    how = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "return_type": "tokens"}
    expected = model.to_string(model.generate(tokens, **how)[0, tokens.shape[1] :])
    same = EditOrder(name="blocks.0.attn.o:1", factor=1.0)
    answer = bench.intervene(EditsOrder(text=TEXT, edits=[same], n_written=NEW))
    assert answer["written"] == {"before": expected, "after": expected}
    assert answer["kl"] == pytest.approx(0, abs=1e-6)

    job = bench.trace(GraphOrder(text=TEXT, prune=None, frozen=False))
    deadline = time.monotonic() + 60
    while not job.ended:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert job.state == "done", job.error
    assert bench.graph(job.key).loadings is not None
    bench.close()


def test_a_model_without_a_tokenizer_is_refused(decomposed: Callable[[str], Any]) -> None:
    model = decomposed("native-ln")
    with pytest.warns(UserWarning, match="untrained"), pytest.raises(InputError, match="tokenizer"):
        Workbench(model)
