// What is known of a subcomponent: examples and tokens of a harvest, and what its weights say.

// Kinds of entries: names of other subcomponents, and shares.
const NAMED = new Set(["name", "friend"]);
const SHARES = new Set(["part", "friend"]);
// A server behind the page has the cards that the page does not hold, and may add to all of them.
const server = { getCard: null, addTo: () => [] };

function cardParts(name, position) {
  const added = server.addTo(name, position);
  const known = data.cards[name];
  if (known) return [...added, subcomponentCard(known)];
  return server.getCard ? [...added, fetchedCard(name)] : [];
}

function fetchedCard(name) {
  const place = make("section", "card-section muted", "…");
  server.getCard(name).then(
    (card) => place.replaceWith(subcomponentCard((data.cards[name] = card))),
    (error) => (place.textContent = error.message),
  );
  return place;
}

function subcomponentCard(card) {
  const section = make("section", "card-section");
  if (card.density !== undefined) section.append(...harvested(card));
  if (card.weights?.length) section.append(make("h3", "", "By its weights"), weightLists(card.weights));
  return section;
}

function weightLists(lists) {
  const box = make("dl", "weights");
  for (const [title, kind, entries] of lists) {
    const row = make("dd");
    for (const [text, value] of entries) {
      const entry = make(NAMED.has(kind) ? "button" : "span", `entry ${value < 0 ? "minus" : "plus"}`);
      const shown = kind === "token" ? visibleText(text) : text;
      const label = NAMED.has(kind) ? labelOf(text) : "";
      entry.append(make("b", "", shown), ...(label ? [make("q", "", visibleText(label, true))] : []), make("small", "", SHARES.has(kind) ? percent(value) : signed(value)));
      if (entry.tagName === "BUTTON") {
        entry.type = "button";
        entry.addEventListener("click", () => openCard(text));
      }
      row.append(entry);
    }
    box.append(make("dt", "", title), row);
  }
  return box;
}

function harvested(card) {
  const figures = make("dl", "facts");
  addFact(figures, "density", percent(card.density));
  addFact(figures, "mean importance", number(card.mean_importance));
  const parts = [make("h3", "", "Over the data set"), figures];
  if (card.examples.length) parts.push(exampleList(card.examples));
  const tables = make("div", "token-tables");
  for (const [title, rows] of [["Input tokens", card.input_tokens], ["Output tokens", card.output_tokens]]) {
    if (rows.length) tables.append(tokenTable(title, rows));
  }
  return [...parts, tables];
}

function exampleList(examples) {
  const list = make("ul", "examples", undefined, { "aria-label": "Examples" });
  for (const { tokens: words, importance, activation, focus } of examples) {
    const strip = make("li");
    words.forEach((word, i) => {
      const token = make("span", i === focus ? "focus" : "", visibleText(word, true));
      token.style.setProperty("--g", importance[i]);
      token.title = `importance ${number(importance[i])}, activation ${signed(activation[i])}`;
      strip.append(token);
    });
    list.append(strip);
  }
  return list;
}

function tokenTable(title, rows) {
  const table = make("table");
  const head = make("tr");
  for (const text of [title, "recall", "PMI"]) head.append(make("th", "", text, { scope: "col" }));
  table.append(head);
  for (const { token, recall, pmi } of rows) {
    const row = make("tr");
    row.append(make("td", "", visibleText(token)), make("td", "", percent(recall)), make("td", "", number(pmi)));
    table.append(row);
  }
  return table;
}

function addFact(list, term, value) {
  const pair = make("div");
  pair.append(make("dt", "", term), make("dd", "", value));
  list.append(pair);
}
