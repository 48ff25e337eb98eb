// What the explorer adds to cards: a label, edits, all examples.

function labelEditor(name) {
  const form = make("form", "label-editor");
  const input = make("input", "", undefined, { "aria-label": `Label of ${name}`, placeholder: "label", maxlength: "200", autocomplete: "off" });
  const state = make("small", "muted", "", { role: "status" });
  input.value = labelOf(name);
  const save = async () => {
    if (input.value === labelOf(name)) return;
    try {
      const { text, file } = await ask("PUT", `/api/labels/${encodeURIComponent(name)}`, { text: input.value });
      if (text) data.labels[name] = text;
      else delete data.labels[name];
      input.value = text;
      state.textContent = "saved";
      state.title = file;
    } catch (error) {
      state.textContent = error.message;
    }
  };
  input.addEventListener("change", save);
  input.addEventListener("input", () => (state.textContent = ""));
  // Escape here is of the field, not of the card.
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || input.value === labelOf(name)) return;
    event.stopPropagation();
    input.value = labelOf(name);
  });
  form.addEventListener("submit", (event) => event.preventDefault() ?? save());
  form.append(input, state);
  return form;
}

function editTools(name, position) {
  const box = make("p", "edit-tools buttons", undefined, { role: "group", "aria-label": `Edit ${name}` });
  const offer = (text, edit) => {
    const button = make("button", "", text, { type: "button" });
    button.addEventListener("click", () => setEdit(edit));
    box.append(button);
  };
  offer("Ablate here", { name, position, factor: 0 });
  offer("Ablate everywhere", { name, position: null, factor: 0 });
  offer("Double here", { name, position, factor: 2 });
  return box;
}

function responses(name) {
  const [site, index] = name.split(/:(?=\d+$)/);
  if (!explorer.harvested.includes(site)) return [];
  const page = encodeURIComponent(`${encodeURIComponent(site)}.html`);
  return [make("a", "responses", "All examples", { href: `/harvest/${page}#c${index}` })];
}

server.getCard = (name) => ask("GET", subcomponentPath(name));
server.addTo = (name, position) => [labelEditor(name), editTools(name, position), ...responses(name)];
