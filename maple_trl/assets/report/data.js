"use strict";

// What the page is made of: the data, colours, and helpers that put text into the page as text.

const REPORT = JSON.parse(document.getElementById("report-data").textContent);
const ROLLOUTS = JSON.parse(document.getElementById("report-rollouts").textContent);

// One colour and one marker a tag, in every chart. At least 3:1 against white; told apart with each kind of colour blindness.
const TAG_STYLE = {
  V: { color: "#1259a8", symbol: "circle", says: "video" },
  A: { color: "#e06000", symbol: "square", says: "audio" },
  S: { color: "#009a72", symbol: "diamond", says: "subtitles" },
  VA: { color: "#4b1f6f", symbol: "triangle-up", says: "video, audio" },
  VS: { color: "#3a9bdc", symbol: "cross", says: "video, subtitles" },
  AS: { color: "#7a5c00", symbol: "x", says: "audio, subtitles" },
  VAS: { color: "#e0559b", symbol: "star", says: "all three" },
  all: { color: "#6e7781", symbol: "hexagon", says: "all tags" },
};
const RUN_STYLE = [
  { color: "#1b365d", dash: "solid" },
  { color: "#a04a00", dash: "dash" },
];

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

function tagBadge(tag) {
  const style = TAG_STYLE[tag];
  const badge = node("span", { class: "tag", text: tag || "no tag" });
  badge.style.background = style ? style.color : "#57606a";
  return badge;
}

function runTitle(index) {
  return node("h3", {}, node("span", { class: `run run-${index}`, text: REPORT.runs[index].name }));
}

// A table of texts; the first row is its head.
function table(caption, rows, options = {}) {
  const head = node("tr", {}, ...rows[0].map((text) => node("th", { scope: "col", text })));
  const lines = rows.slice(1).map((row) =>
    node("tr", { class: options.differs && options.differs(row) ? "differs" : undefined },
      ...row.map((text, i) => node("td", { text, class: options.text && i > 0 ? "text" : undefined }))));
  const made = node("table", { class: "numbers" }, node("thead", {}, head), node("tbody", {}, ...lines));
  if (caption) made.prepend(node("caption", { text: caption }));
  return node("div", { class: "scroll" }, made);
}

// For each run that has it, draws a part of the report; for the others says why there is nothing.
function eachRun(section, draw) {
  const body = bodyOf(section);
  let drawn = 0;
  REPORT.runs.forEach((run, index) => {
    const part = run[section];
    if (part.missing) body.append(missing(index, part.missing));
    else { drawn += 1; draw(part, run, index, body); }
  });
  if (!drawn) markAbsent(section);
}

function missing(index, why) {
  const text = REPORT.runs.length > 1 ? `${REPORT.runs[index].name}: ${why}` : why;
  return node("p", { class: "missing", text: `No data. ${text}` });
}

function markAbsent(section) {
  const link = document.querySelector(`nav a[href="#${section}"]`);
  link.classList.add("absent");
  link.append(" (no data)");
}

// JSON that was compressed and written in base64.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}
