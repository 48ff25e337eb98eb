// Edges, on a canvas the size of the window that follows the scrolling.

const LEVELS = 8;
const viewport = byId("viewport");

function clearedCanvas(canvas) {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth: w, clientHeight: h } = viewport;
  if (canvas.width !== Math.round(w * scale) || canvas.height !== Math.round(h * scale)) {
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(h * scale);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, w, h);
  context.translate(-viewport.scrollLeft, -viewport.scrollTop);
  context.lineCap = "round";
  return context;
}

// The size that is drawn boldest. Not the very strongest edge: one outlier would thin the rest.
function boldWeight() {
  const edge = view.edges[Math.floor(view.edges.length * 0.03)];
  return edge === undefined ? strongest : Math.abs(derived.weight[edge]);
}

function levelOf(weight, bold) {
  return Math.min(LEVELS - 1, Math.floor(LEVELS * Math.sqrt(Math.abs(weight) / bold)));
}

// Every sign and strength is one path: few strokes, and crossings that do not add up to black.
function strokeEdges(context, edges, strong) {
  const paths = new Map();
  const bold = boldWeight();
  for (const e of edges) {
    const key = levelOf(derived.weight[e], bold) * 2 + (derived.weight[e] < 0 ? 1 : 0);
    if (!paths.has(key)) paths.set(key, new Path2D());
    addCurve(paths.get(key), view.box[derived.source[e]], view.box[derived.target[e]]);
  }
  for (const key of [...paths.keys()].sort((a, b) => a - b)) {
    const level = (key >> 1) / (LEVELS - 1);
    context.strokeStyle = key & 1 ? view.colours.negative : view.colours.positive;
    context.lineWidth = (strong ? 1.3 : 0.7) + 2.3 * level;
    context.globalAlpha = strong ? 0.7 + 0.3 * level : 0.2 + 0.5 * level;
    context.stroke(paths.get(key));
  }
}

function addCurve(path, from, to) {
  const { scrollLeft, scrollTop, clientWidth, clientHeight } = viewport;
  if (Math.max(from.x, to.x) < scrollLeft || Math.min(from.x, to.x) > scrollLeft + clientWidth) return;
  if (Math.max(from.y, to.y) < scrollTop || Math.min(from.y, to.y) > scrollTop + clientHeight) return;
  const up = Math.sign(from.y - to.y) || 1;
  const y0 = from.y - (up * from.h) / 2.6, y1 = to.y + (up * to.h) / 2.6;
  const bend = 0.45 * (y0 - y1);
  // Straight up a column, an edge would run through every node on its way.
  const aside = Math.abs(from.x - to.x) < 30 ? 0.16 * Math.min(Math.abs(y0 - y1) - 40, 260) : 0;
  const dx = Math.max(0, aside);
  path.moveTo(from.x, y0);
  path.bezierCurveTo(from.x + dx, y0 - bend, to.x + dx, y1 + bend, to.x, y1);
}

function readColours() {
  const colour = (id) => getComputedStyle(byId(id)).backgroundColor;
  view.colours = { positive: colour("positive"), negative: colour("negative") };
}

function drawEdges() {
  strokeEdges(clearedCanvas(byId("edges")), view.edges, false);
  drawLitEdges();
}

function drawLitEdges(also = []) {
  const context = clearedCanvas(byId("lit-edges"));
  const lit = litItem();
  const own = lit === null ? [] : view.edges.filter((e) => touches(e, lit));
  const seen = (e) => view.shown[derived.source[e]] && view.shown[derived.target[e]];
  strokeEdges(context, [...own, ...also.filter(seen)], true);
}

const touches = (edge, item) => derived.source[edge] === item || derived.target[edge] === item;
const litItem = () => state.hovered ?? state.pinned;
