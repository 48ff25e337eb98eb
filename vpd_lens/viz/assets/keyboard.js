// Keys, and what the pointer does on the board.

const KEYS = {
  ArrowLeft: () => walkAlong(-1),
  ArrowRight: () => walkAlong(1),
  ArrowUp: () => walkAcross(-1),
  ArrowDown: () => walkAcross(1),
  Enter: () => focused() !== null && pin(focused()),
  " ": () => focused() !== null && select(focused()),
  Escape: () => (state.selected.size ? clearSelection() : letGo()),
  g: groupSelected,
  "/": () => byId("search").focus(),
  "?": () => byId("help").showModal(),
  "+": () => setZoom(state.zoom * 1.2),
  "=": () => setZoom(state.zoom * 1.2),
  "-": () => setZoom(state.zoom / 1.2),
  0: fitOrReset,
};
const ON_NODES = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Enter", " "]);

const itemAt = (element) => {
  const node = element?.closest?.("#nodes .node");
  return node ? Number(node.dataset.item) : null;
};
const focused = () => itemAt(document.activeElement);

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !KEYS[key]) return;
    if (target.matches("input, textarea, select") && key !== "Escape") return;
    const onBody = target === document.body || target === viewport;
    if (ON_NODES.has(key) && itemAt(target) === null && !(onBody && key.startsWith("Arrow"))) return;
    event.preventDefault();
    KEYS[key]();
  });
}

function letGo() {
  state.hovered = null;
  pin(null);
}

function focusItem(item) {
  if (item === undefined) return;
  keepOneTabStop(item);
  const element = elements.get(item);
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest", inline: "nearest" });
}

const here = () => focused() ?? state.pinned ?? view.tabStop;
const rowAt = (item) => view.rows.findIndex(({ items }) => items.includes(item));

function walkAlong(step) {
  const row = view.rows[rowAt(here())];
  if (row) focusItem(row.items[row.items.indexOf(here()) + step]);
}

function walkAcross(step) {
  const row = view.rows[rowAt(here()) + step];
  if (!row) return;
  const { x } = view.box[here()];
  const away = (item) => Math.abs(view.box[item].x - x);
  focusItem(row.items.reduce((best, item) => (away(item) < away(best) ? item : best)));
}

// -------------------------------------------------------------------- pointer

function hover(item) {
  if (item === state.hovered) return;
  state.hovered = item;
  once(highlight);
}

function select(item) {
  // As in a list of files: what was clicked first belongs to it.
  const { selected, pinned } = state;
  if (!selected.size && pinned !== null && pinned !== item) selected.add(pinned);
  if (!selected.delete(item)) selected.add(item);
  highlight();
}

function clearSelection() {
  state.selected.clear();
  refresh();
}

function listenToBoard() {
  board.addEventListener("pointerover", (event) => hover(itemAt(event.target)));
  board.addEventListener("pointerleave", () => hover(null));
  board.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && hover(itemAt(event.target)));
  board.addEventListener("focusout", () => hover(null));
  board.addEventListener("click", (event) => {
    const item = itemAt(event.target);
    if (item !== null && (event.shiftKey || event.ctrlKey || event.metaKey)) return select(item);
    if (item === null) clearSelection();
    pin(item);
  });
  viewport.addEventListener("scroll", () => once(drawEdges));
  viewport.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const { left, top } = viewport.getBoundingClientRect();
    setZoom(state.zoom * Math.exp(-event.deltaY / 400), { x: event.clientX - left, y: event.clientY - top });
  }, { passive: false });
}
