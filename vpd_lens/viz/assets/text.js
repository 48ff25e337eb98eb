// Small things that every page needs: elements, and text and numbers as they are shown.

const byId = (id) => document.getElementById(id);

// Text only ever enters the page as text: tokens may be "<script>".
function make(tag, className, text, attributes = {}) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const SIGNS = { " ": "·", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽" };
// Controls, and marks that would turn the direction of the text around them.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visibleText(text, keepSpaces = false) {
  const spaces = keepSpaces ? /[\n\t\r\u00a0]/g : /[ \n\t\r\u00a0]/g;
  const shown = text
    .replace(spaces, (sign) => SIGNS[sign])
    .replace(UNSEEN, (sign) => `⟨${sign.codePointAt(0).toString(16)}⟩`);
  return shown === "" ? "∅" : shown;
}

const count = (value) => value.toLocaleString("en");
const percent = (value) => (value === null ? "–" : `${trimmed(100 * value)} %`);
const shortPercent = (share) => `${Math.round(100 * share)}%`;
const trimmed = (value) => String(Number(value.toPrecision(3))).replace("-", "−");

function number(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : trimmed(value);
  return text.replace(/-/g, "−");
}

// What a subcomponent is called, or a node of it.
const labelOf = (name) => data.labels[name.replace(/@\d+$/, "")] ?? "";

function labelLine(name) {
  return labelOf(name) ? [make("p", "label", visibleText(labelOf(name), true))] : [];
}

const signed = (value) => (value > 0 ? "+" : "") + number(value);
