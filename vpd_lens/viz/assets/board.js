// The nodes, row labels and tokens as elements over the edges.

const board = byId("board");
const elements = new Map(); // item -> button

function elementOf(item) {
  if (!elements.has(item)) {
    const kind = isGroup(item) ? "group" : kindOf(item);
    const element = make("button", `node ${kind}`, undefined, { type: "button", tabindex: "-1", "aria-pressed": "false" });
    element.dataset.item = item;
    element.dataset.name = itemName(item);
    element.setAttribute("aria-label", description(item).join(", "));
    const shape = make("span", "shape");
    shape.append(...chipTexts(item).map((text) => make("span", "", text)));
    element.append(shape);
    if (!isGroup(item)) element.style.setProperty("--g", nodes.importance[item]);
    elements.set(item, element);
    byId("nodes").append(element);
  }
  return elements.get(item);
}

function forgetGroupElements() {
  for (const [item, element] of elements) {
    if (isGroup(item)) {
      element.remove();
      elements.delete(item);
    }
  }
}

function description(item) {
  if (isGroup(item)) return [itemName(item), `${groupOf(item).members.length} nodes`];
  const kind = kindOf(item);
  const label = labelOf(nodes.name[item]);
  const lines = [itemName(item), ...(label ? [visibleText(label, true)] : []), `token ${visibleText(tokenOf(item))}`];
  if (kind === "output") lines.push(`${visibleText(outputs.get(item).text)}`);
  if (kind === "subcomponent") lines.push(`importance ${number(nodes.importance[item])}`);
  lines.push(`${activationWord(kind)} ${number(nodes.activation[item])}`);
  lines.push(`influence ${number(nodes.influence[item])}`);
  return lines;
}

const activationWord = (kind) =>
  ({ subcomponent: "activation", output: "value" })[kind] ?? "norm";

function placeNodes() {
  for (const [item, element] of elements) element.hidden = !view.shown[item];
  view.shown.forEach((shown, item) => {
    if (!shown) return;
    const { x, y, w, h } = view.box[item];
    const { style } = elementOf(item);
    style.transform = `translate(${x - w / 2}px, ${y - h / 2}px)`;
    style.width = `${w}px`;
    style.height = `${h}px`;
  });
  board.style.width = `${view.width}px`;
  board.style.height = `${view.height}px`;
  board.style.setProperty("--zoom", state.zoom);
  keepOneTabStop();
}

// One node is in the tab order; arrows move from there.
function keepOneTabStop(wanted = null) {
  const first = view.rows.at(-1)?.items[0];
  const stop = wanted ?? (view.shown[view.tabStop] ? view.tabStop : (state.pinned ?? first));
  elements.get(view.tabStop)?.setAttribute("tabindex", "-1");
  elements.get(stop)?.setAttribute("tabindex", "0");
  view.tabStop = stop;
}

function placeLabels() {
  byId("columns").replaceChildren(
    ...tokens.map((token, position) => {
      const head = make("div", "token", undefined, { title: visibleText(token) });
      head.append(make("b", "", visibleText(token)), make("small", "", position));
      const { x, w } = view.columns[position];
      Object.assign(head.style, { left: `${x}px`, width: `${w}px` });
      return head;
    }),
  );
  byId("bands").replaceChildren(...view.rows.map(bandOf), ...blockSpans().map(blockLabel));
}

function bandOf({ row, y, h }) {
  const { block, label } = data.rows[row];
  const band = make("div", `band ${block === "" ? "end" : block % 2 ? "odd" : "even"}`);
  Object.assign(band.style, { top: `${y}px`, height: `${h}px`, width: `${view.width}px` });
  band.append(make("div", "row-label", label, { title: data.rows[row].place }));
  return band;
}

function blockSpans() {
  const spans = new Map();
  for (const { row, y, h } of view.rows) {
    const { block } = data.rows[row];
    if (block !== "") spans.set(block, { y: spans.get(block)?.y ?? y, end: y + h });
  }
  return [...spans];
}

function blockLabel([block, { y, end }]) {
  const label = make("div", "block-label", block, { title: `block ${block}` });
  Object.assign(label.style, { top: `${y + 2}px`, height: `${end - y - 4}px` });
  const holder = make("div", "block-holder");
  holder.append(label);
  return holder;
}

// ---------------------------------------------------------------- highlights

function highlight() {
  const lit = litItem();
  const near = new Set(lit === null ? [] : [lit]);
  const joined = new Set();
  for (const e of view.edges) {
    joined.add(derived.source[e]).add(derived.target[e]);
    if (lit !== null && touches(e, lit)) near.add(derived.source[e]).add(derived.target[e]);
  }
  const hits = new Set(state.hits);
  byId("stage").classList.toggle("focusing", lit !== null);
  const column = lit === null ? -1 : cellOf(lit)[1];
  [...byId("columns").children].forEach((head, c) => head.classList.toggle("here", c === column));
  for (const [item, element] of elements) {
    const { classList } = element;
    classList.toggle("lit", near.has(item));
    classList.toggle("idle", !joined.has(item));
    classList.toggle("selected", state.selected.has(item));
    classList.toggle("hit", hits.has(item));
    if (classList.contains("pinned") === (item === state.pinned)) continue;
    classList.toggle("pinned");
    element.setAttribute("aria-pressed", item === state.pinned);
  }
  drawLitEdges();
  showTip();
  showSelection();
}

function showTip() {
  const tip = byId("tip");
  tip.hidden = state.hovered === null;
  if (tip.hidden) return;
  const [name, ...rest] = description(state.hovered);
  tip.replaceChildren(make("b", "", name), ...rest.map((line) => make("span", "", line)));
  const { x, y, w, h } = view.box[state.hovered];
  const left = x - viewport.scrollLeft + w / 2 + 8;
  const turned = left + tip.offsetWidth > viewport.clientWidth;
  // Edges come from below on the left and leave upwards on the right.
  const top = y - viewport.scrollTop + (turned ? h / 2 - tip.offsetHeight : -h / 2);
  tip.style.left = `${turned ? left - w - 16 - tip.offsetWidth : left}px`;
  tip.style.top = `${Math.min(Math.max(top, HEAD), viewport.clientHeight - tip.offsetHeight - 8)}px`;
}

function showSelection() {
  byId("selection").hidden = state.selected.size === 0;
  byId("selection").firstElementChild.textContent = `${state.selected.size} selected`;
}
