// Puts the parts together.

function refresh() {
  filterItems();
  if (!view.shown[state.hovered]) state.hovered = null;
  layOut({ width: viewport.clientWidth, height: viewport.clientHeight });
  placeNodes();
  placeLabels();
  refreshEdges();
}

function refreshEdges() {
  filterEdges();
  strokeEdges(clearedCanvas(byId("edges")), view.edges, false);
  highlight();
  showCounts();
}

// Several events between two frames are drawn once.
const waiting = new Set();

function once(draw) {
  if (waiting.has(draw)) return;
  waiting.add(draw);
  requestAnimationFrame(() => {
    waiting.delete(draw);
    draw();
  });
}

// All of the graph if that can be read, and else what is explained, in the last columns.
function beginAtOutputs() {
  setZoom(Math.max(fittingZoom(), 0.8));
  const { x } = view.box[derived.owner[data.outputs[0].node]];
  viewport.scrollTo({ left: x - viewport.clientWidth + 100, top: 0, behavior: "instant" });
}

loadGroups();
chooseFirstView();
showHeader();
showPanel();
setTheme(stored(THEME_KEY));
listenToTools();
listenToSearch();
listenToKeys();
listenToBoard();
new ResizeObserver(() => once(refresh)).observe(viewport);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  drawEdges();
});
refresh();
beginAtOutputs();

// For tests, and for the curious.
window.vpdGraph = {
  get visibleNodes() {
    return [...view.shown.keys()].filter((item) => view.shown[item]).map(itemName);
  },
  get visibleEdges() {
    const { source, target, weight } = derived;
    return view.edges.map((e) => [itemName(source[e]), itemName(target[e]), weight[e]]);
  },
  get pinned() {
    return state.pinned === null ? null : itemName(state.pinned);
  },
  get hovered() {
    return state.hovered === null ? null : itemName(state.hovered);
  },
  get groups() {
    return namedGroups();
  },
};
