// Search in names, tokens and examples. What is hidden is found too, and shown when stepped to.

const haystacks = new Map();

function haystack(node) {
  if (!haystacks.has(node)) {
    const own = [nodes.name[node], labelOf(nodes.name[node]), tokenOf(node), outputs.get(node)?.text ?? ""];
    const card = cardOf(node);
    const words = (rows) => rows.map((row) => row.token);
    const seen = card
      ? [...card.examples.map((example) => example.tokens.join("")), ...words(card.input_tokens), ...words(card.output_tokens)]
      : [];
    haystacks.set(node, [own, seen].map((texts) => texts.join("\n").toLowerCase()));
  }
  return haystacks.get(node);
}

// Matches of the name or token come before those of the examples.
function search(text) {
  const wanted = text.toLowerCase();
  const found = [new Set(), new Set()];
  for (let node = 0; wanted.trim() && node < nNodes; node++) {
    const where = haystack(node).findIndex((texts) => texts.includes(wanted));
    if (where >= 0) found[where].add(derived.owner[node]);
  }
  state.hits = [...new Set([...found[0], ...found[1]])];
  highlight();
  showHits(text);
}

function showHits(text) {
  const at = state.hits.indexOf(state.pinned) + 1;
  const { length } = state.hits;
  const counted = length ? `${at || "–"} / ${length}` : "none";
  byId("search-value").textContent = text.trim() ? counted : "";
}

function stepHits(step) {
  const { length } = state.hits;
  if (!length) return;
  const at = state.hits.indexOf(state.pinned);
  jumpTo(state.hits[at < 0 ? 0 : (at + step + length) % length]);
  showHits(byId("search").value);
}

function listenToSearch() {
  const box = byId("search");
  box.addEventListener("input", () => search(box.value));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") stepHits(event.shiftKey ? -1 : 1);
    if (event.key !== "Escape") return;
    event.stopPropagation();
    box.value = "";
    search("");
    box.blur();
  });
}
