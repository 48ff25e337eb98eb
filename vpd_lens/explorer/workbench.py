"""`Workbench`: one decomposed model, what is known of it, and one lock around it.

Nothing here knows of the web. Whoever needs a forward pass holds the lock: a job for as long as it
takes, anything else after waiting for `patience` seconds at most. Cards need only weights, and are
given meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_lens import storage
from vpd_lens.analysis.attention import head_loadings
from vpd_lens.analysis.cards import Cards
from vpd_lens.analysis.circuits import (
    Scale,
    Token,
    TopTokens,
    attribute,
    edited,
    intervene,
    targets,
)
from vpd_lens.analysis.circuits.graph import AttributionGraph
from vpd_lens.analysis.circuits.intervene import InterventionResult
from vpd_lens.analysis.explain import explain
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.analysis.harvest import harvest as harvest_of
from vpd_lens.decomposition.labels import FILE
from vpd_lens.errors import BusyError, InputError
from vpd_lens.explorer.jobs import Job, Jobs
from vpd_lens.explorer.orders import EditsOrder, GraphOrder, HarvestOrder, Question
from vpd_lens.explorer.saved import GraphNotes, Graphs, KeptGraph
from vpd_lens.rendering import unescaped
from vpd_lens.viz import explain_page
from vpd_lens.viz.graph_page import rounded

N_CARDS = 30  # that come with a page; the rest follow when they are looked at


class Workbench:
    """What the explorer works with.

    Args:
        model: A decomposed transformer with a tokenizer.
        harvest: What its subcomponents respond to; without it, and if none was gathered here
            before, cards say what the weights say.
        data: What a harvest can be gathered from, as for `vpd_lens.harvest`.
        folder: Where to save to; made when something is saved. Labels that are there are read.
        labels: The file that labels are written to, or the folder of the saved decomposition;
            `None`: `labels.json` in `folder`.
        title: What the model is called on the pages.
        texts: To offer on the first page.
        patience: Seconds to wait for the model while somebody else uses it.

    Raises:
        ArtefactError: If the harvest, or the labels, are of another decomposition.
        AttachError: If the model carries no decomposition.
        InputError: If the model has no tokenizer, or no known residual stream.
    """

    def __init__(
        self,
        model: nn.Module,
        harvest: Harvest | None = None,
        folder: Path = Path("explored"),
        *,
        data: Any = None,
        labels: Path | None = None,
        title: str = "",
        texts: Sequence[str] = (),
        patience: float = 10.0,
    ) -> None:
        self.vpd = targets.explained_decomposition(model)
        if getattr(model, "tokenizer", None) is None:
            raise InputError("the explorer takes text, and the model has no tokenizer.")
        self.model, self.title, self.texts, self.patience = model, title, texts, patience
        self.data, self.gathered = data, folder / "harvest"
        if harvest is None and storage.kind_of(self.gathered) == "harvest":
            harvest = Harvest.load(self.gathered, self.vpd)
        self.cards, self.harvest = Cards(model, harvest), harvest
        self.graphs, self.jobs = Graphs(folder), Jobs()
        self.labels, self.labels_place = self.vpd.labels, labels or folder / FILE
        if self.labels_place.is_file():
            self.labels.read(self.labels_place)
        self._model_lock, self._cards_lock = threading.Lock(), threading.Lock()
        self._labels_lock = threading.Lock()
        self.explained = lru_cache(16)(self._explained)

    @contextmanager
    def the_model(self, patience: float = -1.0) -> Iterator[None]:
        """Have the model alone; a `BusyError` if it is not free in so many seconds."""
        if not self._model_lock.acquire(timeout=patience):
            job = self.jobs.running
            what = f"{job.title!r}" if job else "another request"
            raise BusyError(f"the model is busy with {what}. Wait for its end, or cancel it.")
        try:
            yield
        finally:
            self._model_lock.release()

    # ------------------------------------------------------------- what a text needs

    def _explained(self, question: Question) -> dict[str, Any]:
        """What the page of a question shows (`explain_page.payload`)."""
        goal = question.goal
        with self.the_model(self.patience):
            found = explain(
                self.model,
                question.text,
                goal,
                position=question.position,
                harvest=self.harvest,
            )
        found.cards = self.cards
        with self._cards_lock:
            return explain_page.payload(found, N_CARDS)

    def card(self, name: str) -> dict[str, Any]:
        """What pages show of a subcomponent."""
        with self._cards_lock:
            return rounded(self.cards.for_page(name), 3)

    def label(self, name: str, text: str) -> dict[str, str]:
        """Call a subcomponent something, or with an empty text nothing, and save all labels."""
        with self._labels_lock:
            self.labels.check(name)
            if text.strip():
                self.labels[name] = text
            else:
                self.labels.pop(name, None)
            self.labels_place.parent.mkdir(parents=True, exist_ok=True)
            place = self.labels.save(self.labels_place)
        return {"text": self.labels.text(name), "file": str(place)}

    # ------------------------------------------------------------------------ graphs

    def trace(self, order: GraphOrder) -> Job:
        """Start a graph; an `InputError` if its prompt or target cannot be used.

        If the model is busy just now, the job itself fails of that.
        """
        with suppress(BusyError), self.the_model(0.0):
            targets.in_prompt(order.position, len(self._tokens(order.text)))
            if order.target:
                n_vocab = int(self.model.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
                targets.token_id(self.model, unescaped(order.target), n_vocab)
        what = f"Circuit ({order.prune})" if order.prune else "Graph"
        about = f" of {order.target!r}" if order.target else ""
        title = f"{what}{about} after {order.text[-40:]!r}"
        return self.jobs.start(title, lambda job: self._traced(order, job))

    def _traced(self, order: GraphOrder, job: Job) -> dict[str, Any]:
        with self.the_model():
            how: Any = {"prune": order.prune, "frozen": order.frozen, "progress": False}
            graph = attribute(self.model, order.text, self._target(order), **how)
            if order.keep is not None:
                graph = graph.pruned(order.keep)
            kept = KeptGraph(graph, GraphNotes(question=Question(**_asked(order))))
            kept.loadings = self._loadings(graph)
        self.graphs.add(job.key, kept)
        found = {"graph": job.key, "nodes": graph.n_nodes, "edges": graph.n_edges}
        if graph.circuit is not None:
            found["probability"] = {k: rounded(p, 3) for k, p in graph.circuit.mean.items()}
        return found

    def _target(self, order: GraphOrder) -> Token | TopTokens:
        """What the graph explains: the likeliest tokens, or the one that it is pruned to."""
        if order.goal is not None:
            return order.goal
        if order.prune is None:
            return TopTokens(position=order.position)
        with torch.no_grad():
            logits = self.vpd.target(self._tokens(order.text)[None])[0]
        return Token(int(logits[0, order.position].argmax()), order.position)

    def _loadings(self, graph: AttributionGraph) -> Any:
        with suppress(InputError):  # no layer has both v and o decomposed
            return head_loadings(self.model, graph)

    def graph(self, key: str) -> KeptGraph:
        """A graph of this session or from disk; an `ArtefactError` if it is of another model."""
        kept = self.graphs[key]
        self.cards.check(kept.graph.settings.get("decomposition", ""))
        if kept.loadings is None:
            with self.the_model(self.patience):
                kept.loadings = self._loadings(kept.graph)
        return kept

    # ----------------------------------------------------------------------- harvest

    def gather(self, order: HarvestOrder) -> Job:
        """Start a harvest of the data, or go on with one; an `InputError` if there is no data."""
        if self.data is None:
            raise InputError("this explorer has no data to gather from. Start it with --data DATA.")
        return self.jobs.start(f"Harvest of {self.data}", lambda _: self._gather(order.n_batches))

    def _gather(self, n_batches: int) -> dict[str, Any]:
        resume = storage.kind_of(self.gathered) == "harvest"
        how: Any = {"output": self.gathered, "resume": resume, "progress": False}
        with self.the_model():
            self.gathered.parent.mkdir(parents=True, exist_ok=True)
            found = harvest_of(self.model, self.data, n_batches=n_batches, **how)
            with self._cards_lock:
                self.cards, self.harvest = Cards(self.model, found), found
                self.explained.cache_clear()
        return {"harvest": found.n_positions}

    # ----------------------------------------------------------------- interventions

    def intervene(self, order: EditsOrder) -> dict[str, Any]:
        """What edits do to a prediction, and to what the model writes."""
        edits = [Scale(edit.name, edit.factor, edit.position) for edit in order.edits]
        asked = [unescaped(order.target)] if order.target else []
        with self.the_model(self.patience):
            tokens = self._tokens(order.text)
            how: Any = {"target": asked, "position": order.position}
            result = intervene(self.model, tokens, edits, **how)
            written = {
                "before": self._written(tokens, [], order.n_written),
                "after": self._written(tokens, edits, order.n_written),
            }
        kl = float(result.kl[result.position])
        found = {"rows": self._compared(result), "kl": kl, "position": result.position}
        return rounded(found, 4) | {"written": written}

    def _compared(self, result: InterventionResult, k: int = 6) -> list[list[Any]]:
        """Tokens with their probability before and after: those asked for, and the likeliest."""
        logits = (result.target, result.edited)
        before, after = (x[result.position].float().softmax(-1) for x in logits)
        best = [p.topk(min(k, len(p))).indices.tolist() for p in (after, before)]
        ids = dict.fromkeys([*result.tokens, *best[0], *best[1]])
        names = {token: targets.token_text(self.model, token) for token in ids}
        return [[names[token], float(before[token]), float(after[token])] for token in ids]

    def _written(self, tokens: Tensor, edits: list[Scale], n: int) -> str:
        """What the model writes next, always its likeliest token."""
        n = min(n, int(self.model.cfg.n_ctx) - len(tokens))  # type: ignore[union-attr, arg-type]
        if n < 1:
            return ""
        with edited(self.model, edits):
            ids = self.model.generate(  # type: ignore[operator]
                tokens[None],
                max_new_tokens=n,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        return str(self.model.to_string(ids[0, len(tokens) :]))  # type: ignore[operator]

    # ------------------------------------------------------------------------- small

    def _tokens(self, text: str) -> Tensor:
        return targets.prompt_tokens(self.model, text)

    def close(self) -> None:
        """End all jobs."""
        self.jobs.close()


def _asked(order: Question) -> dict[str, Any]:
    return order.model_dump(include=set(Question.model_fields))
