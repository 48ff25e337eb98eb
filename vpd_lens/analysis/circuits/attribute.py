"""`attribute`: from a prompt to a graph of subcomponents.

1. Causal importances: those of a circuit (`prune`), those given, or the importance function's.
2. The targets: which logits, differences or directions are explained (`targets`).
3. One forward of the target model on copies of the prompt, cut at its matrices (`cut_forward`).
4. Nodes: what every matrix writes at every position, taken apart (`build`, `tables`).
5. Edges: backward passes, each for many targets, that stop at the cuts before them (`build`).

Source: VPD, attribution graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpd_lens.analysis.circuits import targets
from vpd_lens.analysis.circuits.behaviour import Method, PruneConfig, behaviour_of
from vpd_lens.analysis.circuits.build import GraphBuilder
from vpd_lens.analysis.circuits.cut_forward import CutForward
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.prune import Circuit
from vpd_lens.analysis.circuits.prune import prune as find_circuit
from vpd_lens.decomposition.idle import IDLE, contributing
from vpd_lens.decomposition.importance import lower_leaky
from vpd_lens.decomposition.saving import fingerprint
from vpd_lens.errors import InputError
from vpd_lens.sites import find_sites

DeltaPath = Literal["node", "through"]


@torch.inference_mode(False)
@torch.enable_grad()
def attribute(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    target: targets.Target | Sequence[targets.Target] | None = None,
    *,
    prune: str | PruneConfig | Circuit | None = None,
    importance: Float[Tensor, "pos C_total"] | None = None,
    threshold: float = 0.0,
    idle: float = IDLE,
    frozen: bool = False,
    delta: DeltaPath = "node",
    batch_size: int = 32,
    max_edges: int = 50_000_000,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> AttributionGraph:
    """The attribution graph of a prompt: which subcomponents act on which, and on the outputs.

    Nodes are the subcomponents with a causal importance above `threshold` at each position, token
    embeddings, outputs, and what is left at each matrix: its delta, its bias, and an error (what
    subcomponents do beyond their importance). The edge from `s` to `n` is

        (d a_n / d a_s) a_s g_s

    where the gradient is stopped at every subcomponent except `s`: a direct effect on the
    activation `a_n = x V_n`, or on an output. Within a layer's attention, k and v act on later
    positions. The sum of the edges into a node is its activation up to what is not linear between
    two matrices; `graph.completeness()` tells how far they add up.

    Args:
        model: A decomposed HookedTransformer or TransformerBridge.
        prompt: Text or token ids of one prompt.
        target: What to explain: a token (text or id) after the last position, `Token`,
            `LogitDifference`, `Direction`, `TopTokens`, or several of them. `None`: the
            likeliest next tokens. Logits are those before a soft cap.
        prune: Keep what the behaviour `target` needs: `"adversarial"` (the robust choice),
            `"stochastic"`, `"ci"` (for contrast), a `PruneConfig`, or a `Circuit` that
            `vpd_lens.prune` found on prompts of which this is one. Its report is
            `graph.circuit`, and its target is the graph's.
        importance: Causal importances to use instead of the importance function's.
        threshold: Importance above which a subcomponent is a node.
        idle: A subcomponent is no node where it writes at most this share of its matrix' output
            (see `vpd_lens.decomposition.idle`); the error has what it does. 0 leaves out only what
            writes nothing at all. `graph.settings["n_idle"]` is how many were left out.
        frozen: Hold norm scales, attention patterns and neurons' gains (activation over
            pre-activation; with a gated MLP, what the gate multiplies by) at their values on the
            prompt. Edges into a node then add up to its activation to float error, but q, k and
            gate have no outgoing edges. `False` follows the gradients, as the paper does.
        delta: `"node"`: a delta is cut like a subcomponent, and is a node. `"through"`: gradients
            pass through the deltas, so an edge includes paths through them (the paper's code).
        batch_size: Most copies of the prompt per backward pass; there are never more than targets.
        max_edges: Refuse to begin a graph that may have more edges.
        prepend_bos: Whether text gets a BOS token; `None`: the model's own default.
        progress: Show a progress bar.

    Returns:
        The graph: `print(graph.summary())`, `graph.to_html(path)`, `graph.incoming(node)`, ...

    Raises:
        AttachError: If the model carries no decomposition.
        InputError: If the prompt or a target cannot be used, or the graph is too large.

    Examples:
        >>> graph = vpd_lens.attribute(model, "for i in", target=" range")  # doctest: +SKIP
    """
    vpd = targets.explained_decomposition(model)
    tokens = targets.prompt_tokens(model, prompt, prepend_bos)
    if delta not in get_args(DeltaPath):
        raise InputError(f"delta={delta!r}; expected 'node' or 'through'.")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; expected at least 1.")
    if prune is not None and importance is not None:
        raise InputError("prune and importance both say what is important; give one of them.")
    report = None
    if prune is not None:
        if isinstance(target, list | tuple) and len(target) == 1:
            target = target[0]
        circuit = prune
        if not isinstance(prune, Circuit):
            circuit = _found(model, tokens, target, prune, progress)
        row = _row(model, circuit, tokens, target)
        report, importance = circuit.report, circuit.of_prompt(row)
        target = circuit.behaviour.goal(row)
    logits, inputs = vpd.target(tokens[None])
    if importance is None:
        with torch.no_grad():
            g = lower_leaky(vpd.pre_importance(inputs))[0]
    else:
        g = targets.checked_importance(vpd, importance, len(tokens))
    unembed = find_sites(model, ["unembed"])[0]
    outputs = targets.resolve_targets(model, target, logits[0], (unembed.weight, unembed.bias))
    last = max(output.position for output in outputs)
    useless = (g > threshold) & ~contributing(vpd, inputs, idle)[0]
    g = g.masked_fill(useless, 0)
    forward = CutForward(vpd, frozen, through_delta=delta == "through")
    builder = GraphBuilder(forward, tokens, g, threshold, outputs, batch_size, max_edges)
    nodes, edges = builder.build(progress)
    settings: dict[str, Any] = {"frozen": frozen, "delta": delta, "threshold": threshold}
    settings |= {"idle": idle, "n_idle": int(useless[: last + 1].sum())}
    settings["decomposition"] = fingerprint(vpd)
    ids = tuple(tokens.tolist())
    strings = tuple(targets.token_text(model, token) for token in ids)
    found = ids, strings, nodes, edges, tuple(outputs), settings, report
    return AttributionGraph(*found, labels=vpd.labels)


def _found(
    model: nn.Module, tokens: Tensor, target: Any, prune: str | PruneConfig, progress: bool
) -> Circuit:
    """The circuit of the behaviour on this prompt."""
    if isinstance(target, list | tuple | targets.Direction | targets.TopTokens):
        raise InputError(
            f"prune={prune!r} needs one behaviour, a token or a LogitDifference, not {target!r}."
        )
    if not isinstance(prune, PruneConfig):
        if prune not in get_args(Method):
            raise InputError(f"prune={prune!r}; expected one of {get_args(Method)}.")
        prune = PruneConfig.of_target(target, method=prune)
    return find_circuit(model, tokens, target, prune, progress=progress)


def _row(model: nn.Module, circuit: Circuit, tokens: Tensor, target: Any) -> int:
    """Which of a circuit's prompts this is; a target may only repeat the circuit's own."""
    behaviour = circuit.behaviour
    rows = range(len(behaviour.tokens))
    row = next((row for row in rows if torch.equal(behaviour.prompt(row), tokens)), None)
    if row is None:
        raise InputError("prune is a circuit of another prompt; this is none of its prompts.")
    if target is not None:
        named = behaviour_of(model, tokens, target, circuit.config.objective).goal(0)
        if named != (goal := behaviour.goal(row)):
            raise InputError(f"target={target!r}, but the circuit is of {goal}; leave target out.")
    return row
