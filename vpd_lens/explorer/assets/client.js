// Requests to the explorer, and what went wrong with them.

const explorer = JSON.parse(byId("explorer-data").textContent);
const asked = explorer.question;

// The token has become a cookie; it need not stay where it can be seen.
const address = new URL(location.href);
if (address.searchParams.has("token")) {
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

async function ask(method, path, body) {
  const how = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { method, ...how });
  } catch {
    throw new Error("The explorer does not answer; has it been ended?");
  }
  const answer = await response.json().catch(() => ({ error: `${response.status} ${response.statusText}` }));
  if (!response.ok) throw Object.assign(new Error(answer.error), { busy: response.status === 503 });
  return answer;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

const complain = (error) => notice(error.message);
const subcomponentPath = (name) => `/api/cards/${encodeURIComponent(name)}`;
