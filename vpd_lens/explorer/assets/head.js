// The question, and the order for a graph of it.

const askForm = byId("ask");
const traceForm = byId("trace");

askForm.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
  event.preventDefault();
  askForm.requestSubmit();
});
// Loading a page can take as long as somebody else has the model.
askForm.addEventListener("submit", () => askForm.classList.add("asking"));
window.addEventListener("pageshow", () => askForm.classList.remove("asking"));

byId("open-trace").addEventListener("click", () => showTrace(traceForm.hidden));
traceForm.addEventListener("keydown", (event) => event.key === "Escape" && showTrace(false));

function showTrace(open) {
  traceForm.hidden = !open;
  byId("open-trace").setAttribute("aria-expanded", open);
  (open ? traceForm.elements.prune : byId("open-trace")).focus();
}

// Pruning to a prediction is small by itself.
traceForm.elements.prune.addEventListener("change", ({ target }) => {
  traceForm.elements.keep.value = target.value ? "" : "0.8";
});

function question() {
  const { text, target, position } = askForm.elements;
  return { text: text.value, target: target.value, position: position.value === "" ? -1 : Number(position.value) };
}

async function startJob(path, order) {
  notice("");
  try {
    const { key } = await ask("POST", path, order);
    follow(key);
    watchJobs();
    return true;
  } catch (error) {
    complain(error);
    return false;
  }
}

traceForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { prune, keep, frozen } = traceForm.elements;
  const how = { prune: prune.value || null, keep: keep.value ? Number(keep.value) : null, frozen: frozen.checked };
  if (await startJob("/api/graphs", { ...question(), ...how })) showTrace(false);
});

byId("gather")?.addEventListener("submit", (event) => {
  event.preventDefault();
  startJob("/api/harvest", { n_batches: Number(event.target.elements.n_batches.value) });
});
