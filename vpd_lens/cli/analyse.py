"""`vpd-lens eval`, `info`, `graph`, `explain`, `harvest`, `cluster`: using what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from vpd_lens.cli import options
from vpd_lens.cli.options import load_decomposed, readable_errors, require_folder, say
from vpd_lens.errors import ConfigError, InputError
from vpd_lens.rendering import unescaped


def eval_command(
    decomposition: options.Decomposed,
    data: Annotated[str, Option(help="Held-out data: path, or hf:NAME.")],
    model: options.Model = None,
    base: options.Base = None,
    n_batches: Annotated[int, Option(min=1, help="Batches.")] = 8,
    batch_size: options.BatchSize = 16,
    seq_len: options.SeqLen = None,
    pgd_steps: Annotated[
        str, Option(help="Steps of the adversary, separated by commas; `none` skips it.")
    ] = "20,40,80,160,320",
    audit: Annotated[
        bool, Option("--audit", help="Also try what needs no gradient: about sixty forwards.")
    ] = False,
    html: Annotated[Path | None, Option(help="Write the report as one HTML page.")] = None,
    json: Annotated[Path | None, Option(help="Write all figures as JSON.")] = None,
    beside: Annotated[
        Path | None, Option(help="JSON of another report, shown next to this one.")
    ] = None,
    beside_name: Annotated[str, Option(help="What to call it.")] = "beside",
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    seed: Annotated[int, Option(help="Seed of masks and adversary.")] = 0,
    device: options.Device = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure a saved decomposition and print the tables."""
    with readable_errors(debug):
        steps = _step_counts(pgd_steps)
        require_folder(decomposition)
        from vpd_lens.evaluation import EvalReport, evaluate

        other = EvalReport.from_json(beside) if beside else None
        report = evaluate(
            load_decomposed(decomposition, model, model_class, device, processing, base),
            data,
            n_batches=n_batches,
            batch_size=batch_size,
            seq_len=seq_len,
            pgd_steps=steps,
            audit=audit,
            seed=seed,
            progress=not quiet,
        )
        say(report.tables(other, beside_name), quiet)
        for path in filter(None, (json, html)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if json is not None:
            report.to_json(json)
        if html is not None:
            report.to_html(html, f"VPD evaluation of {decomposition}", other, beside_name)


def _step_counts(text: str) -> tuple[int, ...]:
    if text.strip().lower() in ("", "none"):
        return ()
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"--pgd-steps {text!r}: expected numbers separated by commas, or none.")
    return tuple(map(int, text.split(",")))


def info_command(decomposition: options.Decomposed, debug: options.Debug = False) -> None:
    """Say what a saved decomposition is, without loading its model."""
    with readable_errors(debug):
        require_folder(decomposition)
        from vpd_lens.description import describe
        from vpd_lens.interop.hub import find

        say(describe(find(decomposition)), quiet=False)


def graph_command(
    prompt: Annotated[str, Argument(help="The prompt.")],
    decomposition: options.DecomposedOrExample = None,
    model: options.Model = None,
    target: Annotated[
        list[str] | None,
        Option(metavar="TOKEN", help="Token to explain; may be repeated. Default: the likeliest."),
    ] = None,
    position: Annotated[int, Option(help="After which token of the prompt.")] = -1,
    prune: Annotated[
        str | None, Option(help="adversarial, stochastic or ci: keep what the one target needs.")
    ] = None,
    frozen: Annotated[
        bool, Option("--frozen", help="Hold norms, patterns and gains: edges add up.")
    ] = False,
    keep: Annotated[
        float | None, Option(min=0.0, max=1.0, help="Keep nodes that hold this share of influence.")
    ] = None,
    html: Annotated[Path | None, Option(help="Write a page to explore.")] = None,
    save: Annotated[Path | None, Option(help="Write a directory to load again.")] = None,
    harvest: options.Responses = None,
    clusters: Annotated[
        Path | None, Option(help="What `vpd-lens cluster` wrote: groups of nodes for the page.")
    ] = None,
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    device: options.Device = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    r"""Trace which subcomponents make a model predict a token.

    In PROMPT and TOKEN, \n and \t stand for a newline and a tab.
    """
    with readable_errors(debug):
        if keep == 0:
            raise InputError("--keep 0 keeps nothing; give a share above 0.")
        loaded, examples = with_examples(
            decomposition, model, model_class, device, processing, harvest
        )
        from vpd_lens.analysis.circuits import Token, TopTokens, attribute

        prompt, *tokens = map(unescaped, (prompt, *(target or [])))
        targets: Any = [Token(token, position) for token in tokens]
        if not targets and prune is None:
            targets = [TopTokens(position=position)]
        how: dict[str, Any] = {"prune": prune, "frozen": frozen, "progress": not quiet}
        graph = attribute(loaded, prompt, targets or None, **how)
        if keep is not None:
            graph = graph.pruned(keep)
        if graph.circuit is not None:
            say(graph.circuit.table(), quiet)
        say(graph.summary(), quiet)
        if save is not None:
            say(f"Graph: {graph.save(save)}", quiet)
        if html is not None:
            known = _known(loaded, graph, examples, clusters)
            say(f"Page: {graph.to_html(html, **known)}", quiet)


def _known(model: Any, graph: Any, examples: Any, clusters: Path | None) -> dict[str, Any]:
    """What a graph's page says beside the graph."""
    from vpd_lens.analysis.attention import head_loadings
    from vpd_lens.analysis.cards import Cards
    from vpd_lens.analysis.clustering import Clusters

    names = model.vpd.layout.names
    split = any(name.endswith("attn.v") and f"{name[:-1]}o" in names for name in names)
    loadings = head_loadings(model, graph) if split else None
    groups = None if clusters is None else Clusters.load(clusters, model.vpd)
    cards = Cards(model, examples, clusters=groups)
    return {"cards": cards, "loadings": loadings, "clusters": groups}


def explain_command(
    text: Annotated[str, Argument(help="The text.")],
    decomposition: options.DecomposedOrExample = None,
    model: options.Model = None,
    target: Annotated[
        str | None, Option(metavar="TOKEN", help="Whose probability; default: the likeliest.")
    ] = None,
    position: Annotated[int, Option(help="After which token of the text.")] = -1,
    top: Annotated[int, Option(min=1, help="Subcomponents to show.")] = 8,
    html: Annotated[Path | None, Option(help="Write a page to explore.")] = None,
    harvest: options.Responses = None,
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    device: options.Device = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    r"""Show which subcomponents a text needs, and which of them matter for a prediction.

    In TEXT and TOKEN, \n and \t stand for a newline and a tab.
    """
    with readable_errors(debug):
        loaded, examples = with_examples(
            decomposition, model, model_class, device, processing, harvest
        )
        from vpd_lens.analysis.explain import explain

        goal = None if target is None else unescaped(target)
        found = explain(loaded, unescaped(text), goal, position=position, harvest=examples)
        say(found.summary(top), quiet)
        if html is not None:
            say(f"Page: {found.to_html(html)}", quiet)


def with_examples(
    decomposition: Path | None,
    model: str | None,
    model_class: str,
    device: str | None,
    processing: str,
    harvest: Path | None,
) -> tuple[Any, Any]:
    """A decomposed model, without a name the example, and what its subcomponents respond to."""
    if decomposition is not None:
        loaded, examples = (
            load_decomposed(decomposition, model, model_class, device, processing),
            None,
        )
    elif model is not None:
        raise InputError("--model is the base model of a --decomposition; give both.")
    else:
        from vpd_lens.example import example_harvest, load_example

        loaded = load_example(device=device or "auto")
        examples = example_harvest(loaded.vpd)
    if harvest is None:
        return loaded, examples
    from vpd_lens.analysis.harvest import Harvest

    return loaded, Harvest.load(harvest, loaded.vpd)


def harvest_command(
    decomposition: options.Decomposed,
    data: Annotated[str, Option(help="Text or tokens: path, or hf:NAME.")],
    output: Annotated[Path, Option(help="Directory of the results.")],
    model: options.Model = None,
    base: options.Base = None,
    n_batches: Annotated[int, Option(min=1, help="Batches in all.")] = 500,
    batch_size: options.BatchSize = 16,
    seq_len: options.SeqLen = None,
    sites: Annotated[
        str | None, Option(metavar="A,B,...", help="Names of the sites; default: all.")
    ] = None,
    threshold: Annotated[
        float, Option(min=0, max=1, help="Importance above which a subcomponent fires.")
    ] = 0.1,
    n_top: Annotated[int, Option(min=1, help="Top examples of each.")] = 10,
    n_random: Annotated[int, Option(min=1, help="Random examples of each.")] = 20,
    context: Annotated[int, Option(min=0, help="Tokens on either side.")] = 20,
    memory_limit: Annotated[float, Option(help="Largest size of the tables, in GiB.")] = 4.0,
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    seed: Annotated[int, Option(min=0, help="Seed of the random examples.")] = 0,
    resume: Annotated[
        bool, Option("--resume", help="Go on from what is in the output directory.")
    ] = False,
    device: options.Device = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Gather what every subcomponent responds to, and show it.

    The output directory receives harvest/ (the data) and dashboard/ (HTML pages; open
    index.html). The state is written about once a minute; after an interruption repeat the
    command with --resume.
    """
    with readable_errors(debug):
        loaded = load_decomposed(decomposition, model, model_class, device, processing, base)
        from vpd_lens.analysis.cards import Cards
        from vpd_lens.analysis.harvest import harvest
        from vpd_lens.viz.harvest_page import write

        result = harvest(
            loaded,
            data,
            n_batches=n_batches,
            batch_size=batch_size,
            seq_len=seq_len,
            sites=None if sites is None else [part.strip() for part in sites.split(",")],
            threshold=threshold,
            n_top=n_top,
            n_random=n_random,
            context=context,
            seed=seed,
            output=output / "harvest",
            resume=resume,
            memory_limit=memory_limit,
            progress=not quiet,
        )
        say(repr(result), quiet)
        cards = Cards(loaded, result)
        index = write(result, output / "dashboard", f"Harvest of {decomposition}", cards)
        say(f"Dashboard: {index}", quiet)


def cluster_command(
    decomposition: options.Decomposed,
    data: Annotated[str, Option(help="Text or tokens: path, or hf:NAME.")],
    output: Annotated[Path, Option(help="Directory of the clusters.")],
    model: options.Model = None,
    base: options.Base = None,
    alpha: Annotated[
        float, Option(min=0, help="Bits to describe one subcomponent of an active group.")
    ] = 1.0,
    best: Annotated[
        bool, Option("--best", help="Always merge the cheapest pair, and draw none by rank.")
    ] = False,
    until_one: Annotated[
        bool, Option("--until-one", help="Go on to a single group, and keep the whole history.")
    ] = False,
    threshold: Annotated[
        float, Option(help="Importance above which a subcomponent is active.")
    ] = 0.01,
    n_batches: Annotated[int, Option(min=1, help="Batches at most.")] = 32,
    batch_size: options.BatchSize = 16,
    seq_len: options.SeqLen = None,
    per_sequence: Annotated[
        int | None, Option(min=1, help="Positions drawn of each sequence; default: all.")
    ] = None,
    model_class: options.ModelClassName = "auto",
    processing: options.ProcessingName = "default",
    seed: Annotated[int, Option(min=0, help="Seed of pairs and positions.")] = 0,
    device: options.Device = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Group subcomponents that are active together, print the groups, and store them."""
    with readable_errors(debug):
        loaded = load_decomposed(decomposition, model, model_class, device, processing, base)
        from vpd_lens.analysis.clustering import Best, Rank, cluster

        found = cluster(
            loaded,
            data,
            alpha=alpha,
            sampler=Best() if best else Rank(),
            until_one=until_one,
            threshold=threshold,
            n_batches=n_batches,
            batch_size=batch_size,
            seq_len=seq_len,
            per_sequence=per_sequence,
            seed=seed,
            progress=not quiet,
        )
        say(found, quiet)
        say(f"Clusters: {found.save(output)}", quiet)
