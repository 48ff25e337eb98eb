// Groups of nodes: clusters that Python found, or what the reader made of them. A group stands for its members; its edges are sums of theirs.

const GROUPS_KEY = `vpd-graph:${data.hash}`;
const numberOf = new Map(nodes.name.map((name, node) => [name, node]));
const groups = []; // {name, members: node numbers}
const derived = { owner: [], source: [], target: [], weight: [], heads: [] };

const isGroup = (item) => item >= nNodes;
const groupOf = (item) => groups[item - nNodes];
const membersOf = (item) => (isGroup(item) ? groupOf(item).members : [item]);
const itemName = (item) => (isGroup(item) ? groupOf(item).name : nodes.name[item]);

function deriveEdges() {
  const owner = (derived.owner = nodes.name.map((_, node) => node));
  groups.forEach((group, g) => group.members.forEach((node) => (owner[node] = nNodes + g)));
  const { source, target, weight } = data.edges;
  const nItems = nNodes + groups.length;
  const sums = new Map();
  const merged = []; // [source, target, weight, what each head carries of it]
  for (let e = 0; e < weight.length; e++) {
    const from = owner[source[e]], to = owner[target[e]];
    if (from === to) continue;
    if (from < nNodes && to < nNodes) merged.push([from, to, weight[e], data.heads[e]]);
    else sums.set(from * nItems + to, (sums.get(from * nItems + to) ?? 0) + weight[e]);
  }
  if (sums.size) {
    for (const [key, sum] of sums) merged.push([Math.floor(key / nItems), key % nItems, sum]);
    merged.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  }
  derived.source = merged.map((edge) => edge[0]);
  derived.target = merged.map((edge) => edge[1]);
  derived.weight = merged.map((edge) => edge[2]);
  derived.heads = merged.map((edge) => edge[3]);
}

// All edges into or out of an item, the strongest first.
function edgesAt(item, end) {
  const here = end === "in" ? derived.target : derived.source;
  const there = end === "in" ? derived.source : derived.target;
  const found = [];
  for (let e = 0; e < here.length; e++) {
    if (here[e] === item) found.push({ item: there[e], weight: derived.weight[e], heads: derived.heads[e], edge: e });
  }
  return found;
}

function groupSelected() {
  const items = [...state.selected];
  const members = items.flatMap(membersOf).sort((a, b) => a - b);
  if (members.length < 2) return say("Select at least two nodes to group: Shift + click them.");
  const taken = items.filter(isGroup).map(groupOf);
  const name = taken[0]?.name ?? `group ${groups.length + 1}`;
  setGroups([...groups.filter((group) => !taken.includes(group)), { name, members }]);
  pin(nNodes + groups.length - 1);
  byId("group-name").select();
}

function ungroup(item) {
  setGroups(groups.filter((group) => group !== groupOf(item)));
}

function rename(item, name) {
  groupOf(item).name = name.trim() || groupOf(item).name;
  setGroups([...groups], item);
}

function setGroups(wanted, pinned = null) {
  groups.splice(0, groups.length, ...wanted);
  Object.assign(state, { pinned, hovered: null, selected: new Set(), hits: [] });
  keepGroups(namedGroups());
  deriveEdges();
  forgetGroupElements();
  refresh();
  showPanel();
}

const namedGroups = () =>
  groups.map(({ name, members }) => ({ name, members: members.map((node) => nodes.name[node]) }));

// Each node in at most one group; members that this graph does not have are left out.
function groupsFrom(named) {
  const taken = new Set();
  const free = (node) => node !== undefined && !taken.has(node) && taken.add(node);
  return named
    .map(({ name, members }) => ({
      name: String(name),
      members: members.map((member) => numberOf.get(member)).filter(free),
    }))
    .filter((group) => group.members.length > 1);
}

function keepGroups(named) {
  store(GROUPS_KEY, named);
  server.keepGroups?.(named);
}

function loadGroups() {
  const saved = data.keepsGroups ? null : stored(GROUPS_KEY); // a server keeps them, or this browser
  groups.push(...groupsFrom(Array.isArray(saved) ? saved : data.groups));
  deriveEdges();
}

function exportGroups() {
  const text = JSON.stringify({ graph: data.hash, groups: namedGroups() }, null, 2);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", "", "", { href: url, download: "groups.json" }).click();
  URL.revokeObjectURL(url);
}

async function importGroups(file) {
  try {
    const wanted = groupsFrom(JSON.parse(await file.text()).groups);
    setGroups(wanted);
    say(`${wanted.length} groups read from ${file.name}.`);
  } catch {
    say(`${file.name} is not a file of groups that this page wrote.`);
  }
}
