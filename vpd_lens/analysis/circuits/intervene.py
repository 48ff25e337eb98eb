"""`intervene`: what edits of subcomponents do to a prompt's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from vpd_lens.analysis.circuits import targets
from vpd_lens.analysis.circuits.behaviour import kl_divergence
from vpd_lens.analysis.circuits.edits import Edit, applied, both
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.decomposition.adversary import ascend
from vpd_lens.decomposition.masks import AnyMasks, uniform_sources
from vpd_lens.decomposition.modes import masks_of
from vpd_lens.errors import InputError
from vpd_lens.rendering import Shown

Regime = Literal["ablated", "ci", "stochastic", "adversarial"]


@dataclass(repr=False)
class InterventionResult(Shown):
    """Predictions of the target model, of a regime of masks, and of the edited regime.

    Attributes:
        target: The target model's logits.
        base: Logits under the regime's masks without the edits; the target's in `"ablated"`.
        edited: Logits with the edits.
        position: The position that probabilities are of.
        tokens: Tokens that were asked for.
        model: The model, for its tokenizer.
    """

    target: Float[Tensor, "pos vocab"]
    base: Float[Tensor, "pos vocab"]
    edited: Float[Tensor, "pos vocab"]
    position: int
    tokens: tuple[int, ...]
    model: nn.Module

    def probabilities(self, token: str | int) -> dict[str, float]:
        """Probability of a token by the target model, the regime, and the edited regime.

        Raises:
            InputError: If the text is not one token.
        """
        number = targets.token_id(self.model, token, self.target.shape[-1])
        return {name: float(p[number]) for name, p in self._distributions().items()}

    def top(self, k: int = 5) -> list[tuple[str, float, float]]:
        """The likeliest tokens after the edits: text, probability, and that of the base."""
        p = self._distributions()
        values, best = p["edited"].topk(k)
        texts = (targets.token_text(self.model, token) for token in best.tolist())
        return list(zip(texts, values.tolist(), p["base"][best].tolist(), strict=True))

    @property
    def kl(self) -> Float[Tensor, " pos"]:
        """KL of the edited predictions from the target model's, in nats, at each position."""
        return kl_divergence(self.edited, self.target)

    def table(self) -> Table:
        """As a rich table: tokens asked for, and the likeliest after the edits."""
        p, kl = self._distributions(), float(self.kl[self.position])
        title = f"after position {self.position}; KL from the target {kl:.3f}"
        table = Table("token", *p, title=title)
        best = p["edited"].topk(5).indices.tolist()
        for token in dict.fromkeys([*self.tokens, *best]):
            figures = (f"{q[token]:.3f}" for q in p.values())
            table.add_row(Text(repr(targets.token_text(self.model, token))), *figures)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        token, p, before = self.top(1)[0]
        return (
            f"InterventionResult(position {self.position}: {token!r} {before:.3f} -> {p:.3f}, "
            f"KL from the target {float(self.kl[self.position]):.3f})"
        )

    def _distributions(self) -> dict[str, Float[Tensor, " vocab"]]:
        logits = {"target": self.target, "base": self.base, "edited": self.edited}
        return {name: value[self.position].float().softmax(-1) for name, value in logits.items()}


@torch.inference_mode(False)
def intervene(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor | AttributionGraph,
    edits: Edit | Sequence[Edit] = (),
    *,
    regime: Regime = "ablated",
    importance: Float[Tensor, "pos C_total"] | None = None,
    target: str | int | Sequence[str | int] = (),
    position: int | None = None,
    steps: int = 4,
    step_size: float = 1.0,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> InterventionResult:
    """Ablate, scale or patch subcomponents on a prompt, and compare predictions.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        prompt: A prompt, or a graph: then its prompt, and its nodes' importances with 0 for
            everything else.
        edits: `Ablate`, `Scale`, `Patch`, `Rescale`, `Rewrite`, `Swap`, or several; with none,
            `"ablated"` is the target model, bit for bit.
        regime: What the rest is: `"ablated"`, the target model minus what the edits take away;
            `"ci"`, only what is important; `"stochastic"`, random masks above the importances;
            `"adversarial"`, the same with the sources of what the importance function calls
            important on this prompt chosen to raise the KL at `position`.
        importance: Importances for these regimes; by default those of the importance function, or
            of the graph.
        target: Tokens to show in the table.
        position: Whose predictions are compared; by default the last, of a graph that of its last
            output, since nothing after it is in the graph.
        steps: Sign steps of the adversary, who does not know the edits.
        step_size: Their size.
        seed: Seed of random masks.
        prepend_bos: Whether text gets a BOS token; `None`: the model's own default.

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If the prompt, a subcomponent, a position or the regime cannot be used.

    Examples:
        >>> result = intervene(model, graph, Ablate("blocks.1.attn.o:12@7"))  # doctest: +SKIP
        >>> result.table()  # doctest: +SKIP
    """
    vpd = targets.explained_decomposition(model)
    if regime not in get_args(Regime):
        raise InputError(f"regime={regime!r}; expected one of {', '.join(get_args(Regime))}.")
    end = -1
    if isinstance(prompt, AttributionGraph):
        if importance is None:
            importance = prompt.importance(vpd)
            end = max(output.position for output in prompt.outputs)
        prompt = list(prompt.tokens)
    tokens = targets.prompt_tokens(model, prompt, prepend_bos)[None]
    n_positions, n_vocab = tokens.shape[1], int(model.cfg.d_vocab)  # type: ignore[arg-type]
    position = targets.in_prompt(end if position is None else position, n_positions)
    if 0 <= end < position:
        raise InputError(
            f"position={position}, but the graph ends at its last output, position {end}; what "
            "comes after has no importances. Give importance=..., or a position in the graph."
        )
    parts, writes = both(vpd, edits, prepend_bos, n_positions)
    asked = [target] if isinstance(target, str | int) else target
    ids = tuple(targets.token_id(model, token, n_vocab) for token in asked)
    with torch.no_grad(), vpd.undisturbed(), vpd.kept_below():
        clean = vpd.run(None, tokens)
        conditional = any(change.above is not None for change in writes)
        own = vpd.causal_importance(tokens) if conditional or regime != "ablated" else None
        masks = None
        if own is not None and regime != "ablated":
            g = own
            if importance is not None:
                g = targets.checked_importance(vpd, importance, n_positions)[None].to(own)
            generator = torch.Generator(device=g.device).manual_seed(seed)
            sources = uniform_sources(g, vpd.layout, generator)
            if regime == "adversarial":

                def divergence(masks: AnyMasks) -> Float[Tensor, ""]:
                    return kl_divergence(vpd.run(masks, tokens)[0], clean[0])[position]

                with torch.enable_grad(), vpd.frozen_subcomponents():
                    sources, _ = ascend(divergence, g, sources, steps, step_size, moves=own > 0)
            masks = masks_of("ci", g, vpd.layout) if regime == "ci" else sources.over(g)
        base = vpd.run(masks, tokens)
        with applied(vpd, parts, writes, own):
            changed = vpd.run(masks, tokens)
    return InterventionResult(clean[0], base[0], changed[0], position, ids, model)
