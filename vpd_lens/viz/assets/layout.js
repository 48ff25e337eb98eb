// Where everything is: columns are tokens, rows are places, cells hold their items side by side.

const GUTTER = 112; // row labels
const HEAD = 46; // tokens
const SLOT = 24; // a round node and its share of the space between nodes
const MAX_CHIP = 118;

const measuring = document.createElement("canvas").getContext("2d");
measuring.font = "600 12px system-ui, sans-serif";
const widths = new Map();

function textWidth(text) {
  if (!widths.has(text)) widths.set(text, measuring.measureText(text).width);
  return widths.get(text);
}

// What is written on an item: a text that may be cut short, and one that may not.
function chipTexts(item) {
  if (isGroup(item)) return [groupOf(item).name];
  if (kindOf(item) === "embedding") return [visibleText(tokenOf(item))];
  if (kindOf(item) !== "output") return [];
  const { text, probability } = outputs.get(item);
  return [visibleText(text), ...(probability === null ? [] : [shortPercent(probability)])];
}

function sizeOf(item) {
  const texts = chipTexts(item);
  if (!texts.length) return [SLOT, SLOT];
  const width = texts.reduce((sum, text) => sum + textWidth(text) + 6, 22);
  return [Math.min(Math.max(width, 38), MAX_CHIP), isGroup(item) ? 32 : 28];
}

// A group stands where the middle one of its members would.
function cellOf(item) {
  const middle = (values) => values.sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];
  const members = membersOf(item);
  return [
    middle(members.map((node) => nodes.row[node])),
    middle(members.map((node) => nodes.position[node])),
  ];
}

const influenceOf = (item) => (isGroup(item) ? Infinity : nodes.influence[item]);

function shownCells() {
  const cells = new Map(); // row -> column -> items
  view.shown.forEach((shown, item) => {
    if (!shown) return;
    const [row, column] = cellOf(item);
    if (!cells.has(row)) cells.set(row, new Map());
    if (!cells.get(row).has(column)) cells.get(row).set(column, []);
    cells.get(row).get(column).push(item);
  });
  for (const row of cells.values()) {
    for (const items of row.values()) items.sort((a, b) => influenceOf(b) - influenceOf(a));
  }
  return cells;
}

// Lines of a cell, each as wide as the column at most.
function lines(items, room) {
  const found = [];
  for (const item of items) {
    const [w, h] = sizeOf(item).map((size) => size * state.zoom);
    let line = found.at(-1);
    if (!line || line.w + w > room) found.push((line = { items: [], w: 0, h: 0 }));
    line.items.push([item, w]);
    line.w += w;
    line.h = Math.max(line.h, h);
  }
  return found;
}

function columnWidth(cells, column) {
  let width = 54;
  for (const row of cells.values()) {
    const items = row.get(column) ?? [];
    const sizes = items.map((item) => sizeOf(item)[0]);
    const square = Math.ceil(Math.sqrt(1.6 * items.length)) * SLOT;
    const plain = items.every((item) => sizeOf(item)[1] === SLOT);
    width = Math.max(width, plain ? square : Math.max(...sizes), ...sizes);
  }
  return width * state.zoom + 14;
}

const crowd = (cells, column) =>
  Math.max(...[...cells.values()].map((row) => row.get(column)?.length ?? 0));

function layOut(available) {
  const cells = shownCells();
  const own = tokens.map((_, column) => columnWidth(cells, column));
  const free = Math.max(0, available.width - GUTTER - own.reduce((a, b) => a + b, 0));
  // Where the most is going on there is the most room.
  const crowds = tokens.map((_, column) => 1 + crowd(cells, column) ** 2);
  const share = free / crowds.reduce((a, b) => a + b, 0);
  let x = GUTTER;
  view.columns = own.map((least, column) => {
    const w = least + share * crowds[column];
    x += w;
    return { x: x - w, w };
  });
  view.width = Math.max(x, available.width);
  placeRows(cells, available.height);
}

function placeRows(cells, room) {
  const rows = [...cells.keys()].sort((a, b) => b - a).map((row) => {
    const filled = new Map();
    cells.get(row).forEach((items, c) => filled.set(c, lines(items, view.columns[c].w - 10)));
    const heights = [...filled.values()].map((found) => found.reduce((sum, l) => sum + l.h, 0));
    return { row, filled, h: Math.max(...heights) };
  });
  const needed = rows.reduce((sum, row) => sum + row.h, HEAD + 8);
  const least = 16 * state.zoom, most = 64 * state.zoom;
  const gap = Math.min(Math.max((room - needed) / (rows.length || 1), least), most);
  let y = HEAD;
  view.box = [];
  view.rows = rows.map(({ row, filled, h }) => {
    const top = y;
    y += h + gap;
    for (const [column, found] of filled) placeCell(found, view.columns[column], top + (h + gap) / 2);
    const inOrder = [...filled.entries()].sort((a, b) => a[0] - b[0]);
    const items = inOrder.flatMap(([, found]) => found.flatMap((l) => l.items.map((i) => i[0])));
    return { row, items, y: top, h: h + gap };
  });
  view.height = y + 8;
}

function placeCell(found, column, middle) {
  let y = middle - found.reduce((sum, line) => sum + line.h, 0) / 2;
  for (const line of found) {
    const gap = Math.min(18 * state.zoom, (column.w - 10 - line.w) / line.items.length);
    let x = column.x + (column.w - line.w - gap * line.items.length) / 2;
    for (const [item, w] of line.items) {
      view.box[item] = { x: x + (w + gap) / 2, y: y + line.h / 2, w, h: line.h };
      x += w + gap;
    }
    y += line.h;
  }
}
