"""The slot of the graph JSON for what forms the attention scores behind a node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vpd_lens.analysis.attribution.pairs_record import AttentionPair

# The viewer lists all of them, for every node anew.
TOP = 20


def trace_pairs(
    nodes: dict[str, dict[str, Any]],
    pairs: Sequence[AttentionPair],
    absent: Callable[[str], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Give attention's nodes the pairs behind the scores that they depend on.

    A subcomponent of an o matrix depends on the scores of its position as query. Of layers whose o
    matrix has no nodes, those of the v matrix get the pairs of their position as key. Heads are
    summed, as a node may belong to several.

    Args:
        nodes: Records of the graph's nodes by name; gain `qk_tracing_results`.
        pairs: Contributions to attention scores.
        absent: Makes a record for the name of a node that is not in the graph.

    Returns:
        Records of nodes that only pairs refer to, by their id.
    """
    has_o = {_site(name) for name in nodes if _site(name).endswith(".attn.o")}
    groups: dict[tuple[str, int], list[AttentionPair]] = defaultdict(list)
    for pair in pairs:
        o, v = (f"blocks.{pair.layer}.attn.{letter}" for letter in "ov")
        groups[(o, pair.query_position) if o in has_o else (v, pair.key_position)].append(pair)
    only: dict[str, dict[str, Any]] = {}
    results: dict[tuple[str, int], dict[str, Any]] = {}

    def node_id(name: str) -> str:
        node = nodes[name] if name in nodes else absent(name)
        if name not in nodes:
            only[node["node_id"]] = node
        return node["node_id"]

    for name, node in nodes.items():
        key = _site(name), node["ctx_idx"]
        if key in groups:
            if key not in results:
                results[key] = _results(groups[key], node_id)
            node["qk_tracing_results"] = results[key]
    return only


def _site(name: str) -> str:
    """The site of a subcomponent's name; of other nodes, the name itself."""
    return name.rpartition(":")[0] or name


def _results(pairs: list[AttentionPair], node_id: Callable[[str], str]) -> dict[str, Any]:
    by_pair: dict[tuple[str, str], float] = defaultdict(float)
    by_query: dict[str, float] = defaultdict(float)
    by_key: dict[str, float] = defaultdict(float)
    for pair in pairs:
        by_pair[pair.query, pair.key] += pair.weight
        by_query[pair.query] += pair.weight
        by_key[pair.key] += pair.weight
    return {
        "pair_wise_contributors": [
            [node_id(query), node_id(key), weight] for (query, key), weight in _largest(by_pair)
        ],
        "top_q_marginal_contributors": [[node_id(n), weight] for n, weight in _largest(by_query)],
        "top_k_marginal_contributors": [[node_id(n), weight] for n, weight in _largest(by_key)],
    }


def _largest(weights: dict[Any, float]) -> list[tuple[Any, float]]:
    return sorted(weights.items(), key=lambda item: -abs(item[1]))[:TOP]
