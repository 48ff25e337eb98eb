// The header and the tool bar.

function showHeader() {
  byId("prompt").textContent = visibleText(tokens.join("")).replaceAll("·", " ");
  const { scores, settings } = data;
  const list = byId("figures");
  const add = (term, value, hint, id) => {
    const pair = make("div", "", undefined, { title: hint });
    pair.append(make("dt", "", term), make("dd", "", value, id ? { id } : {}));
    list.append(pair);
  };
  const targets = data.outputs.map(({ text, probability }) =>
    visibleText(text) + (probability === null ? "" : ` ${shortPercent(probability)}`));
  add("targets", targets.slice(0, 6).join("  ") + (targets.length > 6 ? " …" : ""), "What the graph explains");
  add("nodes", "", "Shown, of all", "node-count");
  add("edges", "", "Shown, of all", "edge-count");
  add("edges add up", percent(scores.completeness), "1 − Σ |activation − Σ incoming edges| / Σ |activation|; lower when the graph was pruned");
  add("replacement", percent(scores.replacement), "Share of the outputs' influence that does not begin in errors or deltas");
  add("completeness", percent(scores.completeness_score), "Share of the nodes' inputs, weighted by influence, not from errors or deltas");
  const frozen = { true: "frozen", false: "gradients" }[settings.frozen];
  const named = ["delta", "threshold"].map((name) => settings[name] !== null && `${name} ${settings[name]}`);
  add("settings", [frozen, ...named].filter(Boolean).join(", "), "How the graph was made");
  notes().forEach((text) => byId("top").append(make("p", "note", text)));
}

function notes() {
  const found = [];
  if (data.settings.frozen === false) {
    found.push("Edges are gradients here: they follow the model's slope at this prompt and need not add up exactly to an activation. With frozen=True they do.");
  }
  if (data.edges.weight.length < data.n_edges) {
    found.push(`The graph has ${count(data.n_edges)} edges; this page holds the strongest ${count(data.edges.weight.length)}.`);
  }
  return found;
}

function showCounts() {
  const shown = view.shown.reduce((sum, one) => sum + one, 0);
  byId("node-count").textContent = `${count(shown)} of ${count(nNodes)}`;
  byId("edge-count").textContent = `${count(view.edges.length)} of ${count(data.n_edges)}`;
  const limited = view.above > view.edges.length ? ` of ${count(view.above)}` : "";
  byId("strength-value").textContent = `${state.strength ? `≥ ${number(state.strength)}` : "all"} · ${count(view.edges.length)}${limited} edges`;
  byId("importance-value").textContent = `≥ ${state.importance}`;
  const limit = influenceLimit();
  byId("influence-value").textContent = `${limit === Infinity ? "all" : `top ${count(state.ranked)} · ${percent(limit)}`}`;
  byId("zoom-fit").textContent = `${Math.round(100 * state.zoom)} %`;
}

function setZoom(zoom, at = { x: viewport.clientWidth / 2, y: viewport.clientHeight / 2 }) {
  const next = Math.min(Math.max(zoom, 0.4), 2.5);
  const ratio = next / state.zoom;
  const left = (viewport.scrollLeft + at.x - GUTTER) * ratio - at.x + GUTTER;
  const top = (viewport.scrollTop + at.y - HEAD) * ratio - at.y + HEAD;
  state.zoom = next;
  refresh();
  viewport.scrollTo({ left, top, behavior: "instant" });
}

// All of the graph in the window, or its own size if it is that already.
function fitOrReset() {
  const wanted = state.zoom === 1 ? fittingZoom() : 1;
  setZoom(wanted);
}

function fittingZoom() {
  const room = { width: viewport.clientWidth, height: viewport.clientHeight };
  const before = state.zoom;
  let zoom = 1;
  for (; zoom > 0.4; zoom = Math.round(100 * (zoom - 0.05)) / 100) {
    state.zoom = zoom;
    layOut(room);
    if (view.width <= room.width && view.height <= room.height) break;
  }
  state.zoom = before;
  return zoom;
}

function listenToTools() {
  const onSlide = (id, change, after) => {
    byId(id).addEventListener("input", (event) => {
      change(event.target);
      once(after);
    });
  };
  byId("strength").value = 1000 * slideOf(state.strength);
  byId("influence").max = byInfluence.length;
  byId("influence").value = state.ranked;
  onSlide("strength", ({ value }) => (state.strength = strengthAt(value / 1000)), refreshEdges);
  onSlide("importance", ({ value }) => (state.importance = Number(value)), refresh);
  onSlide("influence", ({ value }) => (state.ranked = Number(value)), refresh);
  onSlide("leftovers", ({ checked }) => (state.leftovers = checked), refresh);
  byId("zoom-in").addEventListener("click", () => setZoom(state.zoom * 1.2));
  byId("zoom-out").addEventListener("click", () => setZoom(state.zoom / 1.2));
  byId("zoom-fit").addEventListener("click", fitOrReset);
  byId("group").addEventListener("click", groupSelected);
  byId("clear-selection").addEventListener("click", clearSelection);
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  byId("theme").addEventListener("click", switchTheme);
}

// ---------------------------------------------------------------------- theme

const THEME_KEY = "vpd-graph:theme";

function setTheme(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  readColours();
}

function switchTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? system;
  setTheme(now === "dark" ? "light" : "dark");
  store(THEME_KEY, document.documentElement.dataset.theme);
  drawEdges();
}
