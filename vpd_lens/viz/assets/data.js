// The graph that Python wrote into the page, and words for what is in it.

const data = JSON.parse(document.getElementById("graph-data").textContent);
const { nodes, tokens } = data;
const nNodes = nodes.name.length;
const LEFT_OVER = new Set(["position", "error", "delta", "bias"]);
const outputs = new Map(data.outputs.map((output) => [output.node, output]));

const kindOf = (node) => data.kinds[nodes.kind[node]];
const tokenOf = (node) => tokens[nodes.position[node]];
const ownName = (node) => nodes.name[node].replace(/@\d+$/, ""); // without its position
const cardOf = (node) => data.cards[ownName(node)];
