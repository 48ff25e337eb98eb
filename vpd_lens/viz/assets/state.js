// What the reader has chosen (`state`), and what follows from it (`view`).
// An item is a node, or beyond the nodes' numbers a group of them.

const MANY_NODES = 400;
const FIRST_EDGES = 300;

const state = {
  strength: 0, // edges of a smaller |weight| are hidden
  importance: 0, // subcomponents of a smaller importance are hidden
  ranked: 0, // so many of the most influential subcomponents are shown
  leftovers: false,
  zoom: 1,
  pinned: null,
  hovered: null,
  selected: new Set(),
  hits: [],
};

const view = {
  shown: new Uint8Array(0), // per item
  edges: [], // numbers of `derived` edges that are drawn
  above: 0, // how many there would be without a limit
  box: [], // per item {x, y, w, h}: centre and size
  rows: [], // from the top: {row, items}
  columns: [], // per token {x, w}
  width: 0,
  height: 0,
};

const subcomponents = [...nodes.kind.keys()].filter((node) => kindOf(node) === "subcomponent");
// Rank among subcomponents: nodes far down share a rounded cumulative influence.
const byInfluence = [...subcomponents].sort((a, b) => nodes.influence[b] - nodes.influence[a]);
const rankOf = new Map(byInfluence.map((node, rank) => [node, rank]));

function stored(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // storage may be forbidden, or hold what another program wrote
  }
}

function store(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    say("This browser does not let the page remember anything.");
  }
}

// A message, read out and shown for a while.
function say(text) {
  byId("status").textContent = text;
  clearTimeout(say.ending);
  say.ending = setTimeout(() => (byId("status").textContent = ""), 7000);
}
