// Saving a graph, and its groups.

const graphInfo = explorer.graph;
const saveForm = make("form", "", undefined, { id: "save" });
const saveName = make("input", "", undefined, { "aria-label": "Name of the graph", placeholder: "name", required: "", pattern: "[A-Za-z0-9][A-Za-z0-9_\\-]{0,63}", title: "Letters, digits, - and _", autocomplete: "off" });
saveName.value = graphInfo.name;
const saveButton = make("button", "", graphInfo.name ? "Saved" : "Save");
const back = make("a", "quiet", "← text", { href: `/?${new URLSearchParams(asked)}` });
saveForm.append(back, saveName, saveButton);
byId("top").querySelector(".heading").append(saveForm);

saveName.addEventListener("input", () => (saveButton.textContent = "Save"));
saveForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const { name, folder } = await ask("POST", `/api/graphs/${encodeURIComponent(graphInfo.key)}/save`, { name: saveName.value });
    saveButton.textContent = "Saved";
    say(`Saved as ${name} in ${folder}.`);
  } catch (error) {
    complain(error);
  }
});

server.keepGroups = (groups) => ask("PUT", `/api/graphs/${encodeURIComponent(graphInfo.key)}/groups`, { groups }).catch(complain);

if (graphInfo.circuit) {
  const shown = ["target", "ci", "stochastic", "ablated"].filter((kind) => kind in graphInfo.circuit);
  const pairs = shown.map((kind) => `${kind} ${shortPercent(graphInfo.circuit[kind])}`);
  const pair = make("div", "", undefined, { title: "Probability of the target by what is kept: the model, importances as masks, random masks, all but the circuit" });
  pair.append(make("dt", "", "circuit"), make("dd", "", pairs.join("  ")));
  byId("figures").append(pair);
}
