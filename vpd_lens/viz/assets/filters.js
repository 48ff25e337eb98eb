// Which items and edges are shown.

// What a browser draws without a stutter, and more than anybody reads.
const MAX_DRAWN = 4000;

function passes(node) {
  const kind = kindOf(node);
  if (kind === "subcomponent") {
    return nodes.importance[node] >= state.importance && rankOf.get(node) < state.ranked;
  }
  if (LEFT_OVER.has(kind)) {
    return state.leftovers && nodes.cumulative[node] <= influenceLimit();
  }
  return true;
}

// Cumulative influence of the last subcomponent shown; everything if none is left out.
function influenceLimit() {
  if (state.ranked >= byInfluence.length) return Infinity;
  return state.ranked > 0 ? nodes.cumulative[byInfluence[state.ranked - 1]] : 0;
}

function filterItems() {
  const shown = new Uint8Array(nNodes + groups.length);
  for (let node = 0; node < nNodes; node++) {
    if (derived.owner[node] === node && passes(node)) shown[node] = 1;
  }
  shown.fill(1, nNodes);
  for (const item of state.selected) shown[item] = 1;
  if (state.pinned !== null) shown[state.pinned] = 1;
  view.shown = shown;
}

function filterEdges() {
  const { source, target, weight } = derived;
  view.edges = [];
  view.above = 0;
  for (let e = 0; e < weight.length && Math.abs(weight[e]) >= state.strength; e++) {
    if (!view.shown[source[e]] || !view.shown[target[e]]) continue;
    view.above++;
    if (view.edges.length < MAX_DRAWN) view.edges.push(e);
  }
}

// Weights spread over many magnitudes: the slider is logarithmic, and all the way left is "all".
const strongest = Math.abs(data.edges.weight[0] ?? 1);
const weakest = Math.max(Math.abs(data.edges.weight.at(-1) ?? 1), strongest * 1e-6);
const span = Math.log(strongest / weakest) || 1;
const strengthAt = (slide) => (slide <= 0 ? 0 : weakest * Math.exp(span * slide));
const slideOf = (strength) => (strength <= weakest ? 0 : Math.log(strength / weakest) / span);

function chooseFirstView() {
  state.ranked = Math.min(byInfluence.length, MANY_NODES);
  filterItems();
  filterEdges();
  const last = view.edges[FIRST_EDGES - 1];
  state.strength = last === undefined ? 0 : Math.abs(derived.weight[last]);
}
