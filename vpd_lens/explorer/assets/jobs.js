// Jobs: how far they are, and where their results are.

const POLL = 400; // ms
const FOLLOWED = "vpd-explorer:jobs"; // those that this tab saw at work, until they are dismissed
const followed = new Set(JSON.parse(sessionStorage.getItem(FOLLOWED) ?? "[]"));
const ended = (job) => ["done", "failed", "cancelled"].includes(job.state);

function follow(key, wanted = true) {
  if (wanted) followed.add(key);
  else followed.delete(key);
  sessionStorage.setItem(FOLLOWED, JSON.stringify([...followed]));
}

async function watchJobs() {
  clearTimeout(watchJobs.next);
  try {
    const jobs = await ask("GET", "/api/jobs");
    const atWork = jobs.filter((job) => !ended(job));
    atWork.forEach(({ key }) => follow(key));
    showJobs(jobs.filter(({ key }) => followed.has(key)));
    if (atWork.length) watchJobs.next = setTimeout(watchJobs, POLL);
  } catch (error) {
    complain(error);
  }
}

// Rows stay where they are while they change, so that the focus does too.
const jobRows = new Map();

function showJobs(jobs) {
  const known = new Set(jobs.map(({ key }) => key));
  for (const [key, row] of jobRows) {
    if (known.has(key)) continue;
    row.remove();
    jobRows.delete(key);
  }
  for (const job of jobs) {
    const signature = `${job.state} ${job.phase} ${job.done}`;
    let row = jobRows.get(job.key);
    if (!row) {
      row = make("li", "job");
      row.append(make("span", "what"), make("span", "how"), make("button", "quiet", "", { type: "button" }));
      row.lastElementChild.addEventListener("click", () => endOrDismiss(row.job));
      jobRows.set(job.key, row);
      byId("jobs").prepend(row);
    }
    row.job = job;
    if (row.dataset.signature === signature) continue;
    row.dataset.signature = signature;
    row.dataset.state = job.state;
    showJob(row, job);
  }
}

function showJob(row, job) {
  const [what, how, button] = row.children;
  what.textContent = job.title;
  button.textContent = ended(job) ? "✕" : "Cancel";
  button.setAttribute("aria-label", ended(job) ? `Dismiss ${job.title}` : `Cancel ${job.title}`);
  how.replaceChildren(...jobState(job));
}

function jobState(job) {
  if (job.state === "running") {
    const bar = make("progress", "", undefined, { max: job.total || 1, "aria-label": job.title });
    if (job.total) bar.value = job.done;
    const left = job.left === null ? "" : `, about ${Math.ceil(job.left)} s left`;
    return [bar, make("small", "", job.total ? `${job.phase}: ${job.done} of ${job.total}${left}` : "starting")];
  }
  if (job.state === "done") {
    const { graph, nodes, edges, harvest } = job.result;
    const [text, href] = graph ? [`Open: ${count(nodes)} nodes, ${count(edges)} edges`, `/graph/${graph}`] : [`Open: ${count(harvest)} tokens`, "/harvest/index.html"];
    const link = make("a", "", text, { href });
    link.addEventListener("click", () => follow(job.key, false));
    return [link];
  }
  return [make("small", job.state, { waiting: "waiting", cancelled: "cancelled", failed: job.error }[job.state])];
}

async function endOrDismiss(job) {
  try {
    if (!ended(job)) await ask("DELETE", `/api/jobs/${job.key}`);
    else follow(job.key, false);
    watchJobs();
  } catch (error) {
    complain(error);
  }
}

watchJobs();
