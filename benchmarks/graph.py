"""Attribution graphs: time and memory, and agreement with one backward pass per node.

```
python benchmarks/graph.py RUN --model MODEL --output benchmarks/results/graph.json
```

`RUN` is a saved decomposition, for example `runs/quickstart/vpd/decomposition`. `literal_graph` is
the definition written down: for each node one backward pass on activations that were detached and
attached again, its edges read one by one.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

import vpd_lens
from vpd_lens.models import load_model

Literal = dict[tuple[str, str], float]


def literal_graph(model: nn.Module, tokens: Tensor, g: Tensor, outputs: list[int]) -> Literal:
    """Edges between subcomponents and into output tokens, one backward pass per node."""
    vpd = model.vpd
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def edit(name: str, y: Tensor) -> Tensor:
        a = seen[name] @ vpd.v(name).detach()
        u = vpd.u(name).detach()
        before[name], after[name] = a, a.detach().requires_grad_()
        return (y - a @ u).detach() + after[name] @ u

    for site in vpd.sites:
        handles += site.attach(
            lambda x, n=site.name: seen.__setitem__(n, x), lambda y, n=site.name: edit(n, y)
        )
    try:
        start = [("blocks.0.hook_resid_pre", lambda x, hook: x.detach().requires_grad_())]
        with model.hooks(fwd_hooks=start):
            logits = model(tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    parts = dict(zip(vpd.layout.names, vpd.layout.split(g), strict=True))
    leaves = list(after.values())
    edges: Literal = {}

    def note(name: str, scalar: Tensor) -> None:
        found = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True)
        for source, gradient in zip(after, found, strict=True):
            if gradient is None:
                continue
            weight = (gradient * after[source]).detach()[0] * parts[source]
            for t, c in weight.nonzero().tolist():
                edges[f"{source}:{c}@{t}", name] = weight[t, c].item()

    for name in vpd.layout.names:
        for t, c in parts[name].nonzero().tolist():
            note(f"{name}:{c}@{t}", before[name][0, t, c])
    last = len(tokens) - 1
    for token in outputs:
        note(f"output:{token}@{last}", logits[0, last, token])
    return edges


def compare(model: nn.Module, tokens: Tensor, repeats: int) -> dict[str, Any]:
    """The same graph both ways: seconds of each, their ratio, and the largest difference."""
    g = model.vpd.causal_importance(tokens[None])[0]
    outputs = model(tokens[None])[0, -1].topk(5).indices.tolist()
    fast, slow = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        graph = vpd_lens.attribute(model, tokens, outputs, importance=g, progress=False)
        fast.append(time.perf_counter() - start)
        start = time.perf_counter()
        literal = literal_graph(model, tokens, g, outputs)
        slow.append(time.perf_counter() - start)
    names = graph.nodes.names()
    inner = graph.nodes.of_kind("subcomponent")
    columns = (
        graph.edges.source.tolist(),
        graph.edges.target.tolist(),
        graph.edges.weight.tolist(),
    )
    got = {(names[s], names[t]): w for s, t, w in zip(*columns, strict=True) if bool(inner[s])}
    pairs = got.keys() | literal.keys()
    return {
        "tokens": len(tokens),
        "subcomponents": int(inner.sum()),
        "edges": graph.n_edges,
        "seconds": statistics.median(fast),
        "literal_seconds": statistics.median(slow),
        "ratio": statistics.median(b / a for a, b in zip(fast, slow, strict=True)),
        "largest_difference": max(abs(got.get(p, 0) - literal.get(p, 0)) for p in pairs),
        "largest_edge": max(abs(w) for w in literal.values()),
    }


def ablations(model: nn.Module, tokens: Tensor, n_nodes: int = 60) -> dict[str, Any]:
    """Total effects against the logit's drop when a node is really ablated.

    The nodes are the same for every kind of graph: those with the largest effects by gradients.
    """
    clean = vpd_lens.intervene(model, tokens)
    token = int(clean.target[-1].argmax())
    everything = torch.ones(len(tokens), model.vpd.layout.total)
    graphs = {
        name: vpd_lens.attribute(model, tokens, token, progress=False, **settings)
        for name, settings in (
            ("gradients", {}),
            ("frozen", {"frozen": True}),
            ("gradients_all_nodes", {"importance": everything}),
        )
    }
    first = graphs["gradients"]
    largest = first.total_effects().abs().nan_to_num().argsort(descending=True)[:n_nodes]
    names = [first.nodes.name(node) for node in largest.tolist()]
    drops = []
    for name in names:
        after = vpd_lens.intervene(model, tokens, vpd_lens.Ablate(name)).edited
        drops.append(float(clean.target[-1, token] - after[-1, token]))
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "token": model.to_string([token]),
        "nodes": len(names),
    }
    for name, graph in graphs.items():
        effects = graph.total_effects()
        predicted = [float(effects[graph.nodes.find(node)]) for node in names]
        found[name] = {
            "pearson": float(pearsonr(predicted, drops).statistic),
            "spearman": float(spearmanr(predicted, drops).statistic),
        }
    return found


def scaling(model: nn.Module, tokens: Tensor, **settings: Any) -> dict[str, Any]:
    """Seconds and sizes of one graph, and the process' peak memory until then."""
    start = time.perf_counter()
    graph = vpd_lens.attribute(model, tokens, progress=False, **settings)
    return {
        "tokens": len(tokens),
        **settings,
        "subcomponents": int(graph.nodes.of_kind("subcomponent").sum()),
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "seconds": time.perf_counter() - start,
        "completeness": graph.completeness(),
        "peak_memory_so_far_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("decomposition", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    model = vpd_lens.load(arguments.decomposition, load_model(arguments.model))
    context = model.cfg.n_ctx
    text = Path(json.__file__).read_text()
    tokens = model.to_tokens(text[:20_000])[0][:context]
    result: dict[str, Any] = {"literal": compare(model, tokens[:30], arguments.repeats)}
    lengths = [n for n in (8, 16, 32, 64, 128, 256, 512) if n < len(tokens)] + [len(tokens)]
    result["by_length"] = [scaling(model, tokens[:n]) for n in lengths]
    result["frozen"] = [scaling(model, tokens[:n], frozen=True) for n in lengths]
    result["through_delta"] = [scaling(model, tokens[:n], delta="through") for n in lengths[:3]]
    result["by_threshold"] = [
        scaling(model, tokens[:30], threshold=value) for value in (0.0, 0.01, 0.1, 0.5)
    ]
    starts = range(0, len(tokens) - 20, 20)
    result["ablations"] = [ablations(model, tokens[i : i + 20]) for i in starts]
    result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result["torch"] = torch.__version__
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
