// Edits of subcomponents, and what they do to the prediction and to what the model writes.

const EDITS_KEY = "vpd-explorer:edits";
const WRITTEN = 24; // tokens
const RETRY = 2000; // ms, while the model is busy
const RARE = 0.01; // a probability that is not worth a line
const edits = editsOf(asked.text);

// They belong to a text, and go along from its importances to its graphs.
function editsOf(text) {
  try {
    const kept = JSON.parse(sessionStorage.getItem(EDITS_KEY));
    return kept?.text === text ? kept.edits : [];
  } catch {
    return [];
  }
}

const where = ({ position }) => (position === null ? "everywhere" : `at ${position} ${visibleText(tokens[position])}`);
const sameEdit = (a, b) => a.name === b.name && a.position === b.position;

function setEdit(edit) {
  const at = edits.findIndex((other) => sameEdit(other, edit));
  if (at < 0) edits.push(edit);
  else edits[at] = edit;
  editsChanged();
}

function dropEdit(edit) {
  edits.splice(edits.findIndex((other) => sameEdit(other, edit)), 1);
  editsChanged();
}

function editsChanged() {
  sessionStorage.setItem(EDITS_KEY, JSON.stringify({ text: asked.text, edits }));
  showEdits();
  clearTimeout(editsChanged.waiting);
  editsChanged.waiting = setTimeout(tryEdits, 250);
}

function showEdits() {
  byId("edits").hidden = edits.length === 0;
  byId("edit-list").replaceChildren(...edits.map(editRow));
}

function editRow(edit) {
  const row = make("li");
  const factor = make("input", "factor", undefined, { type: "number", step: "0.5", min: "-100", max: "100", "aria-label": `Factor of ${edit.name} ${where(edit)}` });
  factor.value = edit.factor;
  factor.addEventListener("change", () => setEdit({ ...edit, factor: Number(factor.value) }));
  const drop = make("button", "quiet", "✕", { type: "button", "aria-label": `Undo ${edit.name} ${where(edit)}` });
  drop.addEventListener("click", () => dropEdit(edit));
  row.append(make("span", "times", "×"), factor, make("code", "", edit.name), make("small", "", where(edit)), drop);
  return row;
}

async function tryEdits() {
  const place = byId("edit-result");
  if (!edits.length) return place.replaceChildren();
  place.classList.add("asking");
  const turn = (tryEdits.turn = (tryEdits.turn ?? 0) + 1);
  try {
    const found = await ask("POST", "/api/edits", { ...asked, edits, n_written: WRITTEN });
    if (turn === tryEdits.turn) place.replaceChildren(predictions(found), writing(found.written));
  } catch (error) {
    if (turn !== tryEdits.turn) return;
    place.replaceChildren(make("p", "failed", error.message));
    if (error.busy) editsChanged.waiting = setTimeout(tryEdits, RETRY);
  }
  if (turn === tryEdits.turn) place.classList.remove("asking");
}

// The tokens asked for and those that are likely, before or after.
function predictions({ rows, kl, position }) {
  const list = make("ul", "predictions", undefined, { "aria-label": `Predictions after ${visibleText(tokens[position])}` });
  rows.forEach(([text, before, after], n) => {
    if (n && Math.max(before, after) < RARE) return;
    const row = make("li", after > before ? "more" : "less");
    row.append(make("b", "", visibleText(text)), make("span", "", `${share(before)} → `), make("span", "after", share(after)));
    list.append(row);
  });
  byId("edit-summary").textContent = `after ${visibleText(tokens[position])}: KL ${number(kl)} nats`;
  return list;
}

const share = (p) => (p < RARE ? "< 1 %" : percent(p));

function writing({ before, after }) {
  const list = make("dl", "writing");
  for (const [title, text] of [["The model writes", before], ["Edited, it writes", after]]) {
    list.append(make("dt", "", title), make("dd", "", text === "" ? "nothing: the context is full" : text));
  }
  return list;
}

showEdits();
if (edits.length) tryEdits();
