// Tokens by sites; a cell's needs; the card of one of them.

const data = JSON.parse(document.getElementById("explain-data").textContent);
const { tokens, sites, target } = data;
const [SITE, INDEX, IMPORTANCE, ACTIVATION, EFFECT] = [0, 1, 2, 3, 4];
const state = { position: target.position, site: null, card: null, measure: "count", order: "effect" };
const SHOWN = 60;

const nameOf = (need) => `${sites[need[SITE]]}:${need[INDEX]}`;
const shortSite = (site) => site.replace(/^blocks\.(\d+)\.(attn\.|mlp\.)?/, (_, block, part) => `${block} ${part === "mlp." ? "mlp " : ""}`);
const blockOf = (site) => site?.match(/^blocks\.(\d+)/)?.[1];
const beginsBlock = (number) => (number && blockOf(sites[number]) !== blockOf(sites[number - 1]) ? "begins" : "");
const ORDERS = {
  effect: (need) => Math.abs(need[EFFECT]),
  importance: (need) => need[IMPORTANCE],
  size: (need) => Math.abs(need[IMPORTANCE] * need[ACTIVATION]),
};

function cellsOf(position) {
  const cells = sites.map(() => ({ count: 0, effect: 0 }));
  for (const need of data.needs[position]) {
    cells[need[SITE]].count += 1;
    cells[need[SITE]].effect += need[EFFECT];
  }
  return cells;
}

const table = tokens.map((_, position) => cellsOf(position));
const largest = Object.fromEntries(
  ["count", "effect"].map((measure) => [measure, Math.max(1e-12, ...table.flat().map((cell) => Math.abs(cell[measure])))]),
);

// ------------------------------------------------------------------------ map

function drawMap() {
  const head = make("tr");
  for (const title of ["token", "predicts"]) head.append(make("th", "", title, { scope: "col" }));
  sites.forEach((site, number) => {
    const label = make("th", beginsBlock(number), undefined, { scope: "col", title: site });
    label.append(make("span", "site", shortSite(site)));
    head.append(label);
  });
  byId("map").tHead.replaceChildren(head);
  byId("map").tBodies[0].replaceChildren(...tokens.map(rowOf));
  mark();
}

function rowOf(token, position) {
  const row = make("tr");
  const first = make("th", "word", undefined, { scope: "row" });
  first.append(cellButton(visibleText(token), position, null, `token ${position}, ${visibleText(token)}`));
  const [[next, p]] = data.predictions[position];
  row.append(first, make("td", "next", `${visibleText(next)} ${shortPercent(p)}`));
  table[position].forEach((cell, site) => {
    const value = cell[state.measure];
    const kind = value < 0 ? "minus" : state.measure === "effect" ? "plus" : "count";
    const shown = make("td", `${kind} ${beginsBlock(site)}`);
    shown.style.setProperty("--share", Math.sqrt(Math.abs(value) / largest[state.measure]));
    const words = `${sites[site]} at ${visibleText(token)}: ${cell.count} needed, effect ${signed(cell.effect)}`;
    shown.append(cellButton(state.measure === "count" ? String(value) : "", position, site, words));
    row.append(shown);
  });
  return row;
}

function cellButton(text, position, site, words) {
  const button = make("button", "cell", text, { type: "button", title: words, "aria-label": words });
  button.dataset.at = `${position},${site ?? ""}`;
  button.addEventListener("click", () => choose(position, site));
  return button;
}

function choose(position, site) {
  Object.assign(state, { position, site, card: null });
  mark();
  showPanel();
}

function mark() {
  for (const button of byId("map").querySelectorAll(".cell")) {
    button.setAttribute("aria-pressed", button.dataset.at === `${state.position},${state.site ?? ""}`);
  }
}

// Arrows walk over the cells.
function walk(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !event.target.classList.contains("cell")) return;
  event.preventDefault();
  const position = Math.min(Math.max(state.position + step[0], 0), tokens.length - 1);
  const column = Math.min(Math.max((state.site ?? -1) + step[1], -1), sites.length - 1);
  choose(position, column < 0 ? null : column);
  byId("map").querySelector(`[data-at="${position},${column < 0 ? "" : column}"]`).focus();
}

// ---------------------------------------------------------------------- panel

function showPanel() {
  byId("panel").replaceChildren(...(state.card === null ? needList() : cardOf(state.card)));
  byId("panel").scrollTop = 0;
}

function needList() {
  const { position, site } = state;
  const rank = ORDERS[state.order];
  const needs = data.needs[position].filter((need) => site === null || need[SITE] === site);
  needs.sort((a, b) => rank(b) - rank(a));
  const bold = Math.max(1e-12, ...needs.map((need) => Math.abs(need[EFFECT])));
  const list = make("ol");
  needs.slice(0, SHOWN).forEach((need) => list.append(needRow(need, bold)));
  const parts = [make("h2", "name", site === null ? visibleText(tokens[position]) : sites[site]), context(position)];
  const next = data.predictions[position].map(([text, p]) => `${visibleText(text)} ${shortPercent(p)}`);
  parts.push(make("p", "muted", `${needs.length} needed; the model predicts ${next.join("  ")}`), list);
  if (needs.length > SHOWN) parts.push(make("p", "muted", `The first ${SHOWN} of ${needs.length}.`));
  return parts;
}

function context(position) {
  const line = make("p", "context", undefined, { "aria-label": "Token in context" });
  tokens.forEach((token, at) => line.append(make(at === position ? "mark" : "span", "", visibleText(token))));
  return line;
}

function needRow(need, bold) {
  const name = nameOf(need);
  const card = data.cards[name];
  const seen = (card?.input_tokens ?? []).slice(0, 3).map(({ token }) => visibleText(token));
  const words = labelOf(name) ? visibleText(labelOf(name), true) : seen.join(" ");
  const row = make("li");
  const hint = `importance ${number(need[IMPORTANCE])}, activation ${signed(need[ACTIVATION])}, effect ${signed(need[EFFECT])}`;
  const button = make("button", "edge need", undefined, { type: "button", title: hint });
  const bar = make("span", `bar ${need[EFFECT] < 0 ? "minus" : "plus"}`);
  bar.style.setProperty("--share", Math.abs(need[EFFECT]) / bold);
  button.append(bar, make("span", "who", name), make("span", labelOf(name) ? "token label" : "token", words), make("span", "weight", signed(need[EFFECT])));
  button.addEventListener("click", () => openCard(name));
  row.append(button);
  return row;
}

function openCard(name) {
  state.card = name;
  showPanel();
}

function cardOf(name) {
  const back = make("button", "quiet", "← needs", { type: "button" });
  back.addEventListener("click", () => openCard(null));
  const parts = [back, make("h2", "name", name), ...labelLine(name), whereNeeded(name)];
  const card = data.cards[name];
  if (card) parts.push(subcomponentCard(card));
  else parts.push(make("p", "muted", "This page has no card of it; vpd_lens.card(model, name) makes one."));
  return parts;
}

// The text, shaded by the importance of one subcomponent.
function whereNeeded(name) {
  const strip = make("ul", "examples", undefined, { "aria-label": "Importance on this text" });
  const line = make("li");
  tokens.forEach((token, position) => {
    const need = data.needs[position].find((other) => nameOf(other) === name);
    const span = make("span", "", visibleText(token, true));
    if (need) {
      span.style.setProperty("--g", need[IMPORTANCE]);
      span.title = `importance ${number(need[IMPORTANCE])}, activation ${signed(need[ACTIVATION])}, effect ${signed(need[EFFECT])}`;
    }
    line.append(span);
  });
  strip.append(line);
  return strip;
}

// ---------------------------------------------------------------------- start

function switchTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? system;
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

byId("target").textContent = `${visibleText(target.token)} ${shortPercent(target.probability)} after ${visibleText(tokens[target.position])}`;
byId("how").textContent =
  `A cell is what one token needs of one matrix: subcomponents of an importance above ${data.threshold}. Their effect is the fall of the ` +
  `target's log-odds, in nats, without them, to first order. Promoted tokens are for a final norm's scale of ${number(data.final_scale)}.`;
byId("theme").addEventListener("click", switchTheme);
byId("map").addEventListener("keydown", walk);
byId("panel").addEventListener("keydown", (event) => event.key === "Escape" && state.card && openCard(null));
for (const [id, redraw] of [["measure", drawMap], ["order", showPanel]]) {
  byId(id).addEventListener("change", ({ target: { value } }) => {
    state[id] = value;
    redraw();
  });
}
drawMap();
showPanel();
