// The side panel: what is pinned, or else how to read the graph and where to begin.

const FIRST_ROWS = 8;

function pin(item) {
  const hidden = item !== null && !view.shown[item];
  const moved = state.pinned !== null && isForced(state.pinned);
  state.pinned = item;
  if (hidden || moved) refresh();
  else highlight();
  if (item !== null) keepOneTabStop(item);
  showPanel();
}

// Shown only because it is pinned.
const isForced = (item) => !isGroup(item) && !passes(item);

function jumpTo(item) {
  state.hovered = null;
  pin(item);
  const { x, y } = view.box[item];
  const { clientWidth: w, clientHeight: h, scrollLeft, scrollTop } = viewport;
  const inside = x > scrollLeft + GUTTER && x < scrollLeft + w - 40 && y > scrollTop + HEAD && y < scrollTop + h - 40;
  if (!inside) viewport.scrollTo({ left: x - w / 2, top: y - h / 2 });
}

// A subcomponent that a card names, at the token that is looked at or else at any.
function openCard(name) {
  const found = nodes.name.flatMap((node, item) => (node.replace(/@\d+$/, "") === name ? [item] : []));
  const here = state.pinned === null ? undefined : found.find((item) => nodes.position[item] === nodes.position[state.pinned]);
  if (found.length) jumpTo(here ?? found[0]);
  else say(`${name} is no node of this graph.`);
}

function showPanel() {
  const panel = byId("panel");
  panel.classList.toggle("open", state.pinned !== null);
  panel.replaceChildren(...(state.pinned === null ? overview() : details(state.pinned)));
  panel.scrollTop = 0;
}

function details(item) {
  const parts = isGroup(item) ? groupHead(item) : nodeHead(item);
  parts.push(edgeList("Incoming", item, "in"), edgeList("Outgoing", item, "out"));
  const card = isGroup(item) ? undefined : cardOf(item);
  if (card) parts.push(subcomponentCard(card));
  const close = make("button", "quiet close", "✕", { type: "button", "aria-label": "Unpin", title: "Unpin (Esc)" });
  close.addEventListener("click", () => pin(null));
  return [close, ...parts];
}

function nodeHead(node) {
  const kind = kindOf(node);
  const context = make("p", "context", undefined, { "aria-label": "Token in context" });
  tokens.forEach((token, position) => {
    context.append(make(position === nodes.position[node] ? "mark" : "span", "", visibleText(token)));
  });
  const facts = make("dl", "facts");
  if (kind === "subcomponent") addFact(facts, "importance", number(nodes.importance[node]));
  addFact(facts, activationWord(kind), number(nodes.activation[node]));
  addFact(facts, "influence", number(nodes.influence[node]));
  const { probability = null, text } = outputs.get(node) ?? {};
  if (probability !== null) addFact(facts, "probability", percent(probability));
  const title = make("h2", "name", nodes.name[node]);
  const what = make("p", "muted kind", text === undefined ? kind : `${kind} ${visibleText(text)}`);
  return [title, ...labelLine(nodes.name[node]), what, context, facts];
}

function groupHead(item) {
  const name = make("input", "name", undefined, { id: "group-name", "aria-label": "Name of the group" });
  name.value = itemName(item);
  name.addEventListener("change", () => rename(item, name.value));
  const undo = make("button", "", "Ungroup", { type: "button", id: "ungroup" });
  undo.addEventListener("click", () => ungroup(item));
  const members = make("ul", "members");
  for (const node of groupOf(item).members) members.append(make("li", "", [nodes.name[node], labelOf(nodes.name[node])].join("  ").trim()));
  const head = make("p", "muted kind", `group of ${groupOf(item).members.length} nodes; edges are sums`);
  return [name, head, members, undo];
}

function edgeList(title, item, end) {
  const found = edgesAt(item, end);
  const section = make("section", "edge-list", undefined, { "data-end": end });
  const heading = make("h3", "", title);
  const sum = found.reduce((total, { weight }) => total + weight, 0);
  const note = found.length ? `${count(found.length)}, sum ${signed(sum)}` : "none";
  heading.append(make("small", "", note));
  const list = make("ol");
  const largest = Math.abs(found[0]?.weight ?? 1);
  const add = (edges) => list.append(...edges.map((edge) => edgeRow(edge, largest)));
  add(found.slice(0, FIRST_ROWS));
  section.append(heading, list);
  if (found.length > FIRST_ROWS) {
    const more = make("button", "quiet more", `Show all ${count(found.length)}`, { type: "button" });
    more.addEventListener("click", () => {
      add(found.slice(FIRST_ROWS));
      more.remove();
    });
    section.append(more);
  }
  return section;
}

function edgeRow({ item, weight, heads, edge }, largest) {
  const row = make("button", "edge", undefined, { type: "button", "data-name": itemName(item) });
  const bar = make("span", `bar ${weight < 0 ? "minus" : "plus"}`);
  bar.style.setProperty("--share", Math.abs(weight) / largest);
  const token = isGroup(item) ? "" : outputs.get(item)?.text ?? tokenOf(item);
  row.append(bar, make("span", "who", itemName(item)), what(item, token), make("span", "weight", signed(weight)));
  row.addEventListener("click", () => jumpTo(item));
  row.addEventListener("pointerenter", () => drawLitEdges([edge]));
  row.addEventListener("pointerleave", () => drawLitEdges());
  const line = make("li");
  line.append(row);
  if (heads) line.append(headStrip(heads));
  return line;
}

// In a list, an item's label, or else its token.
function what(item, token) {
  const label = isGroup(item) ? "" : labelOf(nodes.name[item]);
  return make("span", label ? "token label" : "token", label ? visibleText(label, true) : token && visibleText(token));
}

// What every head carries of an edge from v to o; the shares add up to it.
function headStrip(heads) {
  const strip = make("span", "heads", undefined, { title: heads.map((weight, head) => `head ${head}: ${signed(weight)}`).join(", ") });
  const total = heads.reduce((sum, weight) => sum + Math.abs(weight), 0) || 1;
  heads.forEach((weight, head) => {
    const part = make("i", weight < 0 ? "minus" : "plus", head);
    part.style.setProperty("--share", Math.abs(weight) / total);
    strip.append(part);
  });
  return strip;
}

// ------------------------------------------------------------------ overview

function overview() {
  return [...legend(), ...mostInfluential(), ...groupList()];
}

function legend() {
  const keys = make("ul", "legend");
  const add = (shape, text) => {
    const line = make("li");
    line.append(shape, make("span", "", text));
    keys.append(line);
  };
  add(make("span", "line plus"), "edge that raises its target");
  add(make("span", "line minus"), "edge that lowers it");
  add(make("span", "ramp"), "subcomponent: causal importance 0 to 1");
  for (const kind of LEFT_OVER) {
    if (!nodes.kind.some((_, node) => kindOf(node) === kind)) continue;
    const shape = make("span", `node ${kind}`);
    shape.append(make("span", "shape"));
    add(shape, kind === "position" ? "position embedding (left over)" : `${kind} (left over)`);
  }
  const hint = make("p", "muted", "Hover a node for its edges; click it for details. Press ? for help.");
  return [make("h3", "", "How to read it"), keys, hint];
}

function mostInfluential() {
  if (!byInfluence.length) return [];
  const list = make("ol", "ranking");
  for (const node of byInfluence.slice(0, FIRST_ROWS)) {
    const row = make("button", "edge", undefined, { type: "button", "data-name": nodes.name[node] });
    const bar = make("span", "bar plain");
    bar.style.setProperty("--share", nodes.influence[node] / (nodes.influence[byInfluence[0]] || 1));
    row.append(bar, make("span", "who", nodes.name[node]), what(node, tokenOf(node)), make("span", "weight", number(nodes.influence[node])));
    row.addEventListener("click", () => jumpTo(derived.owner[node]));
    const line = make("li");
    line.append(row);
    list.append(line);
  }
  return [make("h3", "", "Most influential"), list];
}

function groupList() {
  const list = make("ul", "group-names");
  groups.forEach((group, g) => {
    const row = make("button", "quiet", `${group.name} (${group.members.length})`, { type: "button" });
    row.addEventListener("click", () => jumpTo(nNodes + g));
    const line = make("li");
    line.append(row);
    list.append(line);
  });
  const save = make("button", "", "Export", { type: "button", id: "export-groups" });
  save.disabled = groups.length === 0;
  save.addEventListener("click", exportGroups);
  const file = make("input", "", undefined, { type: "file", accept: ".json,application/json", id: "import-groups" });
  file.addEventListener("change", async () => {
    await importGroups(file.files[0]);
    file.value = ""; // or the same file could not be read again
  });
  const open = make("label", "button", "Import");
  open.append(file);
  const hint = groups.length ? [] : [make("p", "muted", "Shift + click nodes, then press g.")];
  const buttons = make("p", "buttons");
  buttons.append(save, open);
  return [make("h3", "", "Groups"), ...hint, list, buttons];
}
