"""What the model writes under each kind of mask."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from claims.laboratory import Laboratory
from recorded.section import Section
from vpd_lens.decomposition.modes import MODES

N_PROMPTS, PROMPT_LENGTH, N_NEW = 2, 24, 24


def section(laboratory: Laboratory) -> Section:
    """Greedy continuations of two held-out prompts, side by side."""
    record = laboratory.run()
    model = laboratory.model(record)
    prompts = laboratory.target.held_out[:N_PROMPTS, :PROMPT_LENGTH].to(model.vpd.device)
    written = [{"masks": "(the prompt)"} | _columns([repr(model.to_string(p)) for p in prompts])]
    for mode in MODES:
        texts = [repr(continuation(model, prompt[None], mode)) for prompt in prompts]
        written.append({"masks": mode} | _columns(texts))
    return Section(
        name="generations",
        title="Text under masks",
        question="What does the model write when only what is important is left (ci, rounded), and "
        "when the rest is ablated at random (stochastic) or by an adversary?",
        rows=written,
        reading="Greedy continuations of held-out text, up to "
        f"{N_NEW} tokens. target: the model itself; unmasked: all subcomponents, no delta; random "
        "and zero ignore the importances and show what bad looks like.",
        records=[record.name],
    )


def continuation(model: nn.Module, prompt: Int[Tensor, "1 pos"], mode: str) -> str:
    """What a decomposed model writes after `prompt` under one kind of mask, greedily."""
    with model.vpd.masked(mode, seed=0):
        out = model.generate(
            prompt, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False
        )
    return model.to_string(out[0, prompt.shape[1] :])


def _columns(texts: list[str]) -> dict[str, str]:
    return {f"prompt {index}": text for index, text in enumerate(texts, start=1)}
