"""What a language model is told of a subcomponent, to name it.

Evidence and layout follow the paper's section on automatic interpretation: what the decomposition
is, how importance and activation differ, what a sign means; then matrix, density, tokens, and
examples in which firing tokens carry both figures.
"""

from __future__ import annotations

import re

from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.harvest import Example, Harvest
from vpd_lens.analysis.interpretation.endpoint import Prompt

WORDS = 8

SYSTEM = f"""\
You name parts of a neural network. Every weight matrix of a language model has been written as a \
sum of rank-one matrices, its subcomponents. Each reads one direction of the matrix' input and \
writes one direction of its output. At every token of a text a causal importance between 0 and 1 \
says whether the model needs the subcomponent there: at 1 removing it would change what the model \
predicts, at 0 it can be removed without harm, alone or together with others.

You see one subcomponent: how often it fires (importance above a threshold), the tokens at which \
it fires, the tokens that the model predicts there, and examples of text. In an example a token \
at which it fires looks like [[token (ci 0.92, act -1.3)]]: ci is the importance, act the \
activation, how much it writes. Trust ci: a large act with no ci does nothing that the model \
needs. The sign of act means nothing by itself, but two signs within one subcomponent are two \
opposite directions, which may be two meanings. Examples are cut out of longer texts, and all \
white space is part of the text. Recall is the share of firings at that token; PMI, in nats, \
compares that with the token's share in all text.

Say what the subcomponent does: what it responds to, and if that is clearer, what it makes the \
model predict. Be specific about what the examples share, and do not describe what all text has. \
If nothing holds them together, say so with the label "unclear". Answer in JSON: "reasoning", two \
or three sentences, and "label", at most {WORDS} words, lower case, no full stop."""

_PARTS = {
    "q": "the queries of attention",
    "k": "the keys of attention",
    "v": "the values of attention",
    "o": "the output matrix of attention",
    "in": "the input matrix of the MLP",
    "gate": "the gate matrix of the MLP",
    "out": "the output matrix of the MLP",
}


def prompt(
    harvest: Harvest, name: str, cards: Cards | None = None, n_examples: int = 30, k: int = 10
) -> Prompt:
    """The prompt for one subcomponent: top examples first, then random ones.

    With `cards`, it also says which tokens the weights promote and are excited by.
    """
    site, _, number = name.rpartition(":")
    card = harvest.card(site, int(number), k) or {}
    lines = [
        f"Subcomponent {number} of {_place(harvest, site)} ({site}).",
        f"It fires at {card['density']:.2%} of the tokens; its mean importance over all tokens is "
        f"{card['mean_importance']:.2g}.",
    ]
    for title, side in (
        ("Tokens at which it fires", "input"),
        ("Tokens predicted there", "output"),
    ):
        rows = (
            f"{t['token']!r} (recall {t['recall']:.0%}, PMI {t['pmi']:+.1f})"
            for t in card[f"{side}_tokens"]
        )
        lines.append(f"{title}: {', '.join(rows)}.")
    if cards is not None:
        for title, kind, entries in cards[name].lists():
            if kind == "token":
                words = ", ".join(f"{token!r} {value:+.2f}" for token, value in entries)
                lines.append(f"By its weights, {title}: {words}.")
    examples = [harvest.examples(site, int(number), kind) for kind in ("top", "random")]
    n_top = min(len(examples[0]), n_examples)
    for title, chosen in (
        ("Examples where it is most important", examples[0][:n_top]),
        ("Random examples", examples[1][: n_examples - n_top]),
    ):
        if chosen:
            lines += [f"\n{title}:", *(_annotated(harvest, example) for example in chosen)]
    return Prompt(SYSTEM, "\n".join(lines))


def _annotated(harvest: Harvest, example: Example) -> str:
    columns = zip(example.tokens, example.importance, example.activation, strict=True)
    shown = [
        f"[[{harvest.strings[t]} (ci {g:.2f}, act {a:+.1f})]]"
        if g > harvest.settings.threshold
        else harvest.strings[t]
        for t, g, a in columns
    ]
    return f"<example>{''.join(shown)}</example>"


def _place(harvest: Harvest, site: str) -> str:
    """`the output matrix of the MLP in block 2 of 4`."""
    blocks = [
        int(m[1]) for name in harvest.labels.sizes if (m := re.match(r"blocks\.(\d+)\.", name))
    ]
    found = re.match(r"blocks\.(\d+)\.", site)
    where = f" in block {int(found[1]) + 1} of {max(blocks) + 1}" if found else ""
    return f"{_PARTS.get(site.rpartition('.')[2], 'the matrix ' + site)}{where}"
