"""What the attention on one prompt is made of, pair by pair of q and k subcomponents.

With what q and k write at two positions, each a sum over subcomponents, delta and bias, the score

    s[t, t'] = q_t^T M_(t - t') k_t' = sum_c,c' a_q[t, c] (U_q[c]^T M U_k[c']) a_k[t', c'] + ...

is a sum over pairs. Here the sum is complete, and what follows from it is compared with the pattern
that the model shows.

Source: VPD, attention (data-dependent interaction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import einsum
from jaxtyping import Float, Int
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vpd_lens.analysis.attention.form import ScoreForm
from vpd_lens.analysis.attention.parts import Side, parse_name, sides
from vpd_lens.analysis.circuits.cut_forward import keep_in
from vpd_lens.analysis.circuits.edits import Ablate, applied, resolved
from vpd_lens.analysis.circuits.tables import AttentionPair
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.labels import Labels
from vpd_lens.decomposition.masks import NEEDED
from vpd_lens.errors import InputError, VPDError
from vpd_lens.rendering import Shown, titled


@dataclass(repr=False)
class Contributions(Shown):
    """What every pair adds to one score: subcomponents, then the delta, then the bias, of either.

    Attributes:
        layer: The block.
        head: The query head.
        query: Position that attends.
        key: Position that is attended to.
        values: Contributions, before any soft cap, scale included.
        names: Names of rows and of columns.
        relative: Whether this is the score over the mean of all scores of the query.
        labels: What subcomponents are called.
    """

    layer: int
    head: int
    query: int
    key: int
    values: Float[Tensor, "C_q_and_2 C_k_and_2"]
    names: tuple[list[str], list[str]]
    relative: bool = False
    labels: Labels = field(default_factory=Labels)

    @property
    def score(self) -> float:
        """Their sum."""
        return float(self.values.double().sum())

    def top(self, n: int = 10) -> list[AttentionPair]:
        """The `n` pairs that contribute most, of either sign."""
        best = self.values.abs().flatten().topk(min(n, self.values.numel())).indices
        place = self.layer, self.head, self.query, self.key
        found = []
        for q, k in torch.stack(torch.unravel_index(best, self.values.shape), 1).tolist():
            ends = f"{self.names[0][q]}@{self.query}", f"{self.names[1][k]}@{self.key}"
            found.append(AttentionPair(*place, *ends, float(self.values[q, k])))
        return found

    def __rich__(self) -> Group:
        kind = "score over the query's mean" if self.relative else "score"
        title = f"Layer {self.layer}, head {self.head}, {self.query} to {self.key}: {kind}"
        return titled(f"{title} {self.score:+.3f}", pairs_table(self.top(), self.labels))


class PromptAttention:
    """The attention of some layers on one prompt; made by `Attention.on`.

    Attributes:
        tokens: The prompt.
        layers: Blocks whose q and k are decomposed.
        forms: How each of them attends.
        patterns: The model's patterns, `[head, query, key]`.
        importance: Causal importances.
    """

    def __init__(
        self, vpd: Decomposition, tokens: Int[Tensor, " pos"], forms: dict[int, ScoreForm]
    ) -> None:
        self.vpd, self.tokens, self.forms, self.layers = vpd, tokens, forms, tuple(forms)
        patterns, inputs = patterns_of(vpd, self.layers, tokens[None]), vpd.inputs(tokens[None])
        self.patterns = {layer: pattern[0] for layer, pattern in patterns.items()}
        with torch.no_grad():
            self.importance = lower_leaky(vpd.pre_importance(inputs))[0]
        by_name = {n: x[0] for n, x in zip(vpd.layout.names, inputs, strict=True)}
        self._sides = {layer: sides(vpd, form, by_name) for layer, form in forms.items()}
        for layer in self.layers:
            self._check(layer)

    def sides(self, layer: int) -> tuple[Side, Side]:
        """What q and k of a layer are made of."""
        if layer not in self._sides:
            raise InputError(f"layer is {layer!r}; q and k are decomposed in {list(self.layers)}.")
        return self._sides[layer]

    @torch.no_grad()
    def scores(self, layer: int) -> Float[Tensor, "head pos pos"]:
        """The attention scores, `[head, query, key]`: the sum of all contributions.

        As they enter the softmax, but before a soft cap and without what depends on neither q nor k
        (`forms[layer].prior`); 0 where the key is the later.
        """
        q, k = (side.by_part().sum(0) for side in self.sides(layer))
        return self.forms[layer].scores(q, k)

    @torch.no_grad()
    def parts(self, layer: int) -> Float[Tensor, "3 3 head pos pos"]:
        """The scores by what of q meets what of k: subcomponents, delta, bias of either."""
        q, k = (side.by_part() for side in self.sides(layer))
        form = self.forms[layer]
        return torch.stack([torch.stack([form.scores(a, b) for b in k]) for a in q])

    @torch.no_grad()
    def pair(self, query: str, key: str) -> Float[Tensor, "head pos pos"]:
        """What one pair adds to all scores of its layer, `[head, query, key]`.

        `query` and `key` are names such as `"blocks.1.attn.q:316"` and `"blocks.1.attn.k:329"`.

        Raises:
            InputError: If they are no q and k subcomponents of one layer.
        """
        layer, _, c = parse_name(self.vpd, query, "q")
        other, _, d = parse_name(self.vpd, key, "k")
        if layer != other:
            raise InputError(f"{query} and {key} are of different layers, and never meet.")
        q, k = self.sides(layer)
        return self.forms[layer].scores(q.of(c), k.of(d))

    @torch.no_grad()
    def contributions(
        self, layer: int, head: int, query: int, key: int, relative: bool = False
    ) -> Contributions:
        """What every pair adds to the score of one head between two positions.

        What raises all scores of a query alike does not change where it looks. If `relative`, they
        are contributions to the score less the mean of all scores of this query, each weighted with
        its attention: what makes the head look there rather than where it looks anyhow.

        Raises:
            InputError: If there is no such score.
        """
        q, k = self.sides(layer)
        n, heads = len(self.tokens), q.vectors.shape[1]
        query, key = (p + n if p < 0 else p for p in (query, key))
        if not (0 <= head < heads and 0 <= key <= query < n):
            raise InputError(
                f"head {head}, query {query}, key {key}: block {layer} has {heads} heads on {n} "
                "positions, and a key is not after its query."
            )
        of_k = head // (heads // k.vectors.shape[1])
        matrices, rows = self.forms[layer].matrices, q.at(query)[:, head]
        seen = k.at(key)[:, of_k] @ matrices[query - key].T
        if relative:
            weights = self.patterns[layer][head, query].float()
            for position in range(query + 1):
                there = k.at(position)[:, of_k] @ matrices[query - position].T
                seen = seen - weights[position] * there
        names = q.names, k.names
        return Contributions(
            layer, head, query, key, rows @ seen.T, names, relative, self.vpd.labels
        )

    @torch.no_grad()
    def top(
        self, layer: int, n: int = 10, head: int | None = None, threshold: float = NEEDED
    ) -> list[AttentionPair]:
        """The pairs that add most to any score of a layer, of either sign.

        Among subcomponents whose causal importance exceeds `threshold` where they are, in all heads
        or one.
        """
        if n < 1:
            raise InputError(f"n={n}; expected at least 1 pair.")
        q, k = self.sides(layer)
        heads, group = q.vectors.shape[1], q.vectors.shape[1] // k.vectors.shape[1]
        needed = [self._needed(side.site, threshold) for side in (q, k)]
        pairs: list[AttentionPair] = []
        for query in range(len(self.tokens)):
            rows = needed[0][query].nonzero()[:, 0]
            keys, columns = needed[1][: query + 1].nonzero().unbind(1)
            of_q = q.at(query)[rows]
            matrices = self.forms[layer].matrices[query - keys]
            of_k = (k.activations[keys, columns][:, None, None] * k.vectors[columns]) * (
                k.inverse_rms[keys]
            )
            for h in range(heads) if head is None else [head]:
                seen = einsum(matrices, of_k[:, h // group], "m i j, m j -> i m")
                values = of_q[:, h] @ seen
                best = values.abs().flatten().topk(min(n, values.numel())).indices
                for row, m in torch.stack(torch.unravel_index(best, values.shape), 1).tolist():
                    ends = f"{q.site}:{rows[row]}@{query}", f"{k.site}:{columns[m]}@{keys[m]}"
                    place = layer, h, query, int(keys[m])
                    pairs.append(AttentionPair(*place, *ends, float(values[row, m])))
            pairs = sorted(pairs, key=lambda pair: -abs(pair.weight))[:n]
        return pairs

    @torch.no_grad()
    def without(
        self, subcomponents: str | Sequence[str]
    ) -> dict[int, Float[Tensor, "head pos pos"]]:
        """The patterns with some subcomponents ablated everywhere, and everything else as it is.

        Compare with `patterns`. Names may be of any matrix, with positions or without
        (`vpd_lens.Ablate`).
        """
        found = patterns_of(self.vpd, self.layers, self.tokens[None], ablated=subcomponents)
        return {layer: pattern[0] for layer, pattern in found.items()}

    def _needed(self, site: str, threshold: float) -> Tensor:
        return self.importance[:, self.vpd.layout.columns(site)] > threshold

    def _check(self, layer: int) -> None:
        """Refuse a layer whose pattern does not follow from the sum of the contributions."""
        scores, pattern = self.scores(layer), self.patterns[layer].float()
        error = float((self.forms[layer].pattern(scores) - pattern).abs().max())
        # Scores are rounded to their own size; in half precision that is much.
        rounding = torch.finfo(self.vpd.sites[0].weight.dtype).eps * float(scores.abs().max())
        if not error <= max(1e-3, rounding):
            raise VPDError(
                f"the attention of block {layer} is not a softmax of scores that are bilinear in "
                f"the outputs of its q and k: patterns computed from them differ by {error:.1e} "
                "(an attention sink, a clamp, or a transformation of q and k that no norm is?)."
            )


@torch.no_grad()
def patterns_of(
    vpd: Decomposition,
    layers: Sequence[int],
    tokens: Int[Tensor, "batch pos"],
    ablated: str | Sequence[str] = (),
    **mask: Tensor,
) -> dict[int, Float[Tensor, "batch head pos pos"]]:
    """Attention patterns of some layers in one forward, without the hooks of a user."""
    patterns: dict[int, Tensor] = {}
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep_in(patterns, layer)) for layer in layers]
    edits = resolved(vpd, Ablate(ablated), None, tokens.shape[1])
    with vpd.undisturbed(), applied(vpd, edits), vpd.model.hooks(fwd_hooks=hooks):
        vpd.run(None, tokens, **mask)
    return patterns


def pairs_table(pairs: Sequence[AttentionPair], labels: Labels) -> Table:
    """Pairs, and what each contributes."""
    table = Table()
    for heading in ("head", "query", "key", "contribution"):
        table.add_column(heading, justify="left" if heading in ("query", "key") else "right")
    for pair in pairs:
        ends = (Text(labels.named(end)) for end in (pair.query, pair.key))
        table.add_row(str(pair.head), *ends, f"{pair.weight:+.3f}")
    return table
