"use strict";
// Tokens are arbitrary text: they are only ever set as textContent, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 12;
const state = { cards: [], page: 0 };
const byId = (id) => document.getElementById(id);

// ------------------------------------------------------------------ small things

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const minus = (text) => text.replace("-", "−");
const number = (x) => minus(x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(3));
const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toPrecision(2)) + " %";
const signed = (x) => (x > 0 ? "+" : "") + minus(x.toFixed(2));

const power = (n) => "10" + [...String(n)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] || "⁻").join("");

const INVISIBLE = /[\s\p{Cc}\p{Cf}\p{Zs}]/u;
const SHOWN = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

function showInvisible(character) {
  return SHOWN[character] || "\\u{" + character.codePointAt(0).toString(16) + "}";
}

// A token with its whitespace and control characters made visible.
function fill(element, text) {
  let plain = "";
  const flush = () => { if (plain) element.append(plain); plain = ""; };
  for (const character of text) {
    if (INVISIBLE.test(character)) {
      flush();
      element.append(make("i", "", showInvisible(character)));
    } else plain += character;
  }
  flush();
  return element;
}

const visible = (text) => [...text].map((c) => (INVISIBLE.test(c) ? showInvisible(c) : c)).join("");

// ------------------------------------------------------------------------- cards

function strip([focus, tokens, importance, activation]) {
  const row = make("div", "strip");
  const parts = [make("div"), make("div"), make("div")];
  tokens.forEach((token, at) => {
    const span = fill(make("span", at === focus ? "focus" : ""), data.tokens[token]);
    if (importance[at]) span.style.setProperty("--g", importance[at]);
    span.tip = `${visible(data.tokens[token])}\nimportance ${(importance[at] / 100).toFixed(2)}\nactivation ${number(activation[at])}`;
    parts[Math.sign(at - focus) + 1].append(span);
  });
  row.append(...parts);
  return row;
}

function examples(card) {
  const box = make("div", "examples");
  const tabs = make("div", "tabs");
  const list = make("div");
  const show = (kind) => {
    list.replaceChildren(...card[kind].map(strip));
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", tab.kind === kind);
  };
  for (const [kind, label] of [["top", "Top examples"], ["random", "Random examples"]]) {
    const tab = make("button", "", `${label} (${card[kind].length})`);
    tab.kind = kind;
    tab.onclick = () => show(kind);
    tabs.append(tab);
  }
  show("top");
  box.append(tabs, list);
  return box;
}

function tokenTable(title, rows) {
  const table = make("table", "tokens");
  const head = table.createTHead().insertRow();
  for (const label of [title, "recall", "PMI"]) head.append(make("th", "", label));
  const body = table.createTBody();
  for (const [token, recall, precision, pmi] of rows) {
    const row = body.insertRow();
    row.tip = `${visible(data.tokens[token])}\nrecall ${percent(recall)}\nprecision ${percent(precision)}\nPMI ${signed(pmi)} nats`;
    const share = make("td", "bar", percent(recall));
    share.style.setProperty("--share", `${100 * Math.min(recall, 1)}%`);
    row.append(fill(make("td", "token"), data.tokens[token]), share, make("td", "", signed(pmi)));
  }
  const box = make("div");
  box.append(table);
  return box;
}

// Kinds of entries: names of other subcomponents, and shares.
const NAMED = new Set(["name", "friend"]);
const SHARES = new Set(["part", "friend"]);

// What the weights read and write; other subcomponents are links to their cards.
function weightLists(lists) {
  const box = make("dl", "weights");
  for (const [title, kind, entries] of lists) {
    const row = make("dd");
    for (const [text, value] of entries) {
      const entry = make(NAMED.has(kind) ? "a" : "span", value < 0 ? "minus" : "plus");
      if (NAMED.has(kind)) {
        const [, site, index] = text.match(/^(.*):(\d+)$/) ?? [];
        if (data.pages[site]) entry.href = `${data.pages[site]}#c${index}`;
      }
      if (kind === "token") fill(entry, text);
      else entry.append(text);
      if (NAMED.has(kind) && data.labels[text]) entry.append(make("q", "", visibleLabel(text)));
      entry.append(make("small", "", SHARES.has(kind) ? percent(Math.abs(value)) : signed(value)));
      row.append(entry);
    }
    box.append(make("dt", "", title), row);
  }
  return box;
}

// Of a subcomponent, empty if it has none.
const visibleLabel = (name) => [...(data.labels[name] ?? "")].map((c) => (c === " " ? c : visible(c))).join("");

const along = (density) => 1 - Math.log10(density) / data.lowest;

function densityAxis(density) {
  const axis = make("span", "density");
  axis.tip = `fires at ${percent(density)} of the tokens\naxis from ${power(data.lowest)} to 1`;
  for (let decade = data.lowest; decade <= 0; decade++) {
    const tick = make("i");
    tick.style.left = `${100 * (1 - decade / data.lowest)}%`;
    axis.append(tick);
  }
  const mark = make("em");
  mark.style.left = `${100 * along(density)}%`;
  axis.append(mark);
  return axis;
}

function cardOf(card) {
  const article = make("article", "sub");
  article.id = `c${card.i}`;
  const header = make("header");
  const link = make("a", "", `#${card.i}`);
  link.href = `#c${card.i}`;
  header.append(link);
  const label = visibleLabel(`${data.site}:${card.i}`);
  if (label) header.append(make("strong", "label", label));
  for (const [label, value] of [
    ["fires at", percent(card.density)],
    ["mean importance", number(card.importance)],
    ["mean |activation|", number(card.size)],
    ["activation where it fires", (card.activation > 0 ? "+" : "") + number(card.activation)],
  ]) {
    const item = make("span", "", label + " ");
    item.append(make("b", "", value));
    header.append(item);
  }
  header.append(densityAxis(card.density));
  const body = make("div", "body");
  body.append(
    examples(card),
    tokenTable("Fires on", card.input),
    tokenTable("Model predicts", card.output),
  );
  article.append(header, body);
  if (card.weights.length) article.append(weightLists(card.weights));
  return article;
}

// --------------------------------------------------------- searching, ordering, paging

function haystack(card) {
  if (card.text === undefined) {
    const text = (tokens) => tokens.map((token) => data.tokens[token]).join("");
    const windows = [...card.top, ...card.random].map((example) => text(example[1]));
    const tokens = [...card.input, ...card.output].map((row) => data.tokens[row[0]]);
    card.text = [data.labels[`${data.site}:${card.i}`] ?? "", ...windows, ...tokens].join("\0").toLowerCase();
  }
  return card.text;
}

const ORDERS = {
  importance: (a, b) => b.importance - a.importance,
  density: (a, b) => b.density - a.density,
  rare: (a, b) => a.density - b.density,
  i: (a, b) => a.i - b.i,
};

function select() {
  const wanted = byId("search").value.toLowerCase();
  const exact = /^#\d+$/.test(wanted) ? Number(wanted.slice(1)) : null;
  state.cards = data.cards
    .filter((card) => (exact === null ? haystack(card).includes(wanted) : card.i === exact))
    .sort(ORDERS[byId("order").value]);
  state.page = 0;
  dimOthers();
  show();
}

function dimOthers() {
  const chosen = new Set(state.cards);
  for (const dot of document.querySelectorAll("#map circle")) {
    dot.classList.toggle("other", !chosen.has(dot.card));
  }
}

function show() {
  const first = state.page * PER_PAGE;
  const cards = state.cards.slice(first, first + PER_PAGE).map(cardOf);
  const none = data.cards.length ? "Nothing found." : "No subcomponent of this site fired.";
  byId("cards").replaceChildren(...(cards.length ? cards : [make("p", "empty", none)]));
  const last = Math.min(first + PER_PAGE, state.cards.length);
  for (const pager of document.querySelectorAll(".pager")) {
    const turn = (label, by, possible) => {
      const button = make("button", "", label);
      button.disabled = !possible;
      button.onclick = () => { state.page += by; show(); byId("search").scrollIntoView(); };
      return button;
    };
    pager.replaceChildren(
      turn("←", -1, first > 0),
      make("span", "", cards.length ? `${first + 1}–${last} of ${state.cards.length}` : "0"),
      turn("→", 1, last < state.cards.length),
    );
  }
}

// The address page.html#c17 shows subcomponent 17.
function follow() {
  const match = /^#c(\d+)$/.exec(location.hash);
  if (!match) return;
  let at = state.cards.findIndex((card) => card.i === Number(match[1]));
  if (at < 0) {
    byId("search").value = "";
    select();
    at = state.cards.findIndex((card) => card.i === Number(match[1]));
  }
  if (at < 0) return;
  state.page = Math.floor(at / PER_PAGE);
  show();
  const card = byId(match[0].slice(1));
  card.classList.add("found");
  card.scrollIntoView();
}

// --------------------------------------------------------------------------- the map

function drawMap() {
  const map = byId("map");
  const [left, bottom, height] = [46, 150, 138];
  const width = map.clientWidth - left - 14;
  const x = (density) => left + width * along(density);
  const y = (share) => bottom - height * share;
  map.replaceChildren();
  for (let decade = data.lowest; decade <= 0; decade++) {
    const at = x(10 ** decade);
    const label = decade > -3 ? `${10 ** (decade + 2)} %` : power(decade);
    map.append(drawn("line", { x1: at, x2: at, y1: y(1), y2: bottom }));
    map.append(drawn("text", { x: at, y: bottom + 17, "text-anchor": "middle" }, label));
  }
  for (const share of [0, 0.5, 1]) {
    map.append(drawn("line", { x1: left, x2: left + width, y1: y(share), y2: y(share) }));
    map.append(drawn("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
  }
  for (const card of data.cards) {
    const [token, recall] = card.commonest;
    const dot = drawn("circle", { cx: x(card.density), cy: y(recall), r: 4.5 });
    dot.card = card;
    dot.tip = `#${card.i} ${visibleLabel(`${data.site}:${card.i}`)}\nfires at ${percent(card.density)} of the tokens\n${percent(recall)} of them ${visible(data.tokens[token])}`;
    dot.onclick = () => { location.hash = `#c${card.i}`; follow(); };
    map.append(dot);
  }
}

// --------------------------------------------------------------------------- tooltip

document.addEventListener("pointermove", (event) => {
  let element = event.target;
  while (element && element.tip === undefined) element = element.parentElement;
  const tip = byId("tip");
  tip.hidden = !element;
  if (!element) return;
  tip.textContent = element.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 10}px`;
});

byId("facts").textContent =
  `${data.cards.length} of ${data.count} subcomponents fired on ${data.positions.toLocaleString("en")} tokens · ` +
  `${data.cards.reduce((sum, card) => sum + card.density, 0).toFixed(1)} at once · threshold ${data.threshold}`;
byId("search").oninput = select;
byId("order").onchange = select;
byId("whole").onchange = (event) => document.body.classList.toggle("whole", event.target.checked);
addEventListener("hashchange", follow);
addEventListener("resize", () => { drawMap(); dimOthers(); });
drawMap();
select();
follow();
