"use strict";

// What the page is made of: the data, colours, and helpers that put text into the page as text.

const REPORT = JSON.parse(document.getElementById("report-data").textContent);
const ROLLOUTS = JSON.parse(document.getElementById("report-rollouts").textContent);

// One colour and one marker a tag, in every chart; told apart with each kind of colour blindness. Colours are named here and
// set by the style sheet, light and dark.
const TAG_STYLE = {
  V: { color: "var(--tag-V)", symbol: "circle", says: "video" },
  A: { color: "var(--tag-A)", symbol: "square", says: "audio" },
  S: { color: "var(--tag-S)", symbol: "diamond", says: "subtitles" },
  VA: { color: "var(--tag-VA)", symbol: "triangle-up", says: "video, audio" },
  VS: { color: "var(--tag-VS)", symbol: "cross", says: "video, subtitles" },
  AS: { color: "var(--tag-AS)", symbol: "x", says: "audio, subtitles" },
  VAS: { color: "var(--tag-VAS)", symbol: "star", says: "all three" },
  all: { color: "var(--tag-all)", symbol: "hexagon", says: "all tags" },
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "8px,2px", "2px,6px"];
const LINES = ["solid", "dashed", "dotted", "dash-dotted", "long-dashed", "long-dash-dotted", "close-dashed", "wide-dotted"];
const RUN_STYLE = DASHES.map((dash, i) => ({ color: `var(--run-${i})`, dash }));
const MANY = REPORT.runs.length > 2; // runs are told apart by their colour rather than by their dashes

function node(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") made.className = value;
    else if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function bodyOf(section) {
  return document.querySelector(`#${section} .body`);
}

// Plotly reads a few HTML tags in its texts: these become plain characters.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(2)
    : Number(value.toFixed(digits)).toString();
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
}

function tagBadge(tag) {
  const style = TAG_STYLE[tag];
  const badge = node("span", { class: "tag", text: tag || "no tag" });
  badge.style.background = style ? style.color : "var(--tag-all)";
  return badge;
}

function runTitle(index) {
  return node("h3", {}, node("span", { class: `run run-${index}`, text: REPORT.runs[index].name }));
}

// A table of texts or of nodes; the first row is its head.
function table(caption, rows, options = {}) {
  const head = node("tr", {}, ...rows[0].map((text, i) => node("th", { scope: "col", text, class: options.text && i > 0 ? "text" : undefined })));
  const cell = (content, i) => {
    const made = node("td", { class: options.text && i > 0 ? "text" : undefined });
    made.append(content);
    return made;
  };
  const lines = rows.slice(1).map((row) => node("tr", { class: options.differs && options.differs(row) ? "differs" : undefined }, ...row.map(cell)));
  const made = node("table", { class: options.left ? "numbers left" : "numbers" }, node("thead", {}, head), node("tbody", {}, ...lines));
  if (caption) made.prepend(node("caption", { text: caption }));
  return node("div", { class: "scroll" }, made);
}

// A number with its interval, as text and as a bar from one end of a scale to the other.
function intervalNode({ value, low, high }, { from = 0, to = 1, zero = null, signed = false } = {}) {
  const told = (x) => (signed && x > 0 ? "+" : "") + (100 * x).toFixed(1);
  const known = low !== null && low !== undefined;
  const text = node("span", {}, node("b", { text: signed ? told(value) : `${told(value)} %` }), node("span", { class: "low", text: known ? `  (${told(low)} to ${told(high)})` : "" }));
  const at = (x) => `${Math.min(Math.max((100 * (x - from)) / (to - from), 0), 100)}%`;
  const bar = node("span", { class: "span", "aria-hidden": "true" });
  if (known) {
    const range = node("i");
    range.style.left = at(low);
    range.style.right = `calc(100% - ${at(high)})`;
    bar.append(range);
  }
  if (zero !== null) { const line = node("s"); line.style.left = at(zero); bar.append(line); }
  const point = node("u");
  point.style.left = at(value);
  bar.append(point);
  return node("div", { class: "interval" }, text, bar);
}

// For each run that has it, draws a part of the report; for the others says why there is nothing. Where no run has it, there is
// no card: the list at the end says why.
function eachRun(section, draw) {
  const body = bodyOf(section);
  if (REPORT.runs.every((run) => run[section].missing)) { leaveOut(section, REPORT.runs.map((run) => run[section].missing)); return; }
  REPORT.runs.forEach((run, index) => {
    const part = run[section];
    if (part.missing) body.append(missing(index, part.missing));
    else draw(part, run, index, body);
  });
}

function missing(index, why) {
  const text = REPORT.runs.length > 1 ? `${REPORT.runs[index].name}: ${why}` : why;
  return node("p", { class: "missing", text: `No data. ${text}` });
}

// Moves a section without data from its place into the list at the end of the page.
function leaveOut(section, reasons) {
  const card = document.getElementById(section);
  const list = document.querySelector("#absent dl");
  const title = document.querySelector(`nav a[href="#${section}"]`);
  list.append(node("dt", { text: card.querySelector("h2").textContent }));
  for (const why of new Set(reasons)) list.append(node("dd", { text: why }));
  list.lastChild.dataset.section = section;
  title.parentNode.remove();
  card.remove();
  document.getElementById("absent").hidden = false;
  document.querySelector('nav a[href="#absent"]').parentNode.hidden = false;
}

// JSON that was compressed and written in base64.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// The curves of all runs: many metrics share their steps, which are there once.
async function unpackCurves() {
  for (const [index, run] of REPORT.runs.entries()) {
    if (run.curves.missing) continue;
    const { steps, metrics } = await unpack(document.getElementById(`curves-${index}`).textContent);
    run.curves.metrics = Object.fromEntries(Object.entries(metrics).map(([name, [at, value]]) => [name, { step: steps[at], value }]));
  }
}
