// A page of a run that goes on: it is loaded anew where it was, while it is being rewritten. And what is remembered for that.

const LIVE = JSON.parse(document.getElementById("report-live").textContent);
const REMEMBERED = (history.state && history.state.mapleReport) || null;

let unchanged = 0; // how often the page was loaded anew and was the same

function remember() {
  const fields = {};
  document.querySelectorAll("main select, main input").forEach((field) => { if (field.id && !field.closest("#rollouts")) fields[field.id] = field.value; });
  const open = [...document.querySelectorAll("details[open]")].map((details) => details.id).filter(Boolean);
  const section = [...document.querySelectorAll("main section")].filter((one) => one.getBoundingClientRect().top <= 1).pop();
  const scroll = section && window.scrollY > 0 ? { id: section.id, by: -section.getBoundingClientRect().top } : null;
  const state = { fields, open, scroll, viewer: VIEWER ? VIEWER.remember() : REMEMBERED && REMEMBERED.viewer, made: REPORT.made, unchanged };
  history.replaceState({ mapleReport: state }, "");
}

// Sets what was chosen; charts that nobody has seen yet cost nothing.
function restore() {
  if (!REMEMBERED) return;
  for (const [id, value] of Object.entries(REMEMBERED.fields)) {
    const field = document.getElementById(id);
    if (!field || field.value === value) continue;
    const before = field.value;
    field.value = value;
    if (field.value === value) field.dispatchEvent(new Event(field.type === "search" ? "input" : "change"));
    else field.value = before; // a metric or an access that is no longer there
  }
  for (const id of REMEMBERED.open) { const details = document.getElementById(id); if (details) details.open = true; }
}

function scrollBack() {
  if (!REMEMBERED) return;
  history.scrollRestoration = "manual";
  const section = REMEMBERED.scroll && document.getElementById(REMEMBERED.scroll.id);
  if (section) window.scrollTo({ top: section.getBoundingClientRect().top + window.scrollY + REMEMBERED.scroll.by, behavior: "instant" });
}

let touched = 0;
for (const kind of ["pointerdown", "pointermove", "wheel", "keydown", "scroll", "input"]) {
  window.addEventListener(kind, () => { touched = Date.now(); }, { passive: true, capture: true });
}

// Whether a reader would be disturbed: in the middle of something, with a clip playing or a text selected.
function busy() {
  const playing = [...document.querySelectorAll("video, audio")].some((player) => !player.paused && !player.ended);
  const selected = !window.getSelection().isCollapsed;
  return document.hidden || playing || selected || Date.now() - touched < 4000 || document.documentElement.classList.contains("printing");
}

function live() {
  window.addEventListener("pagehide", remember);
  if (!LIVE) return;
  // A page that is not written anew for long is looked at less often, up to every ten minutes.
  unchanged = REMEMBERED && REMEMBERED.made === REPORT.made ? REMEMBERED.unchanged + 1 : 0;
  const wait = 1000 * Math.min(Math.max(LIVE.interval, 1) * (unchanged > 5 ? 2 ** Math.min(unchanged - 5, 8) : 1), Math.max(600, LIVE.interval));
  let due = Date.now() + wait, paused = false;
  const told = node("span");
  const pause = node("button", { type: "button", text: "Pause", onclick: () => { paused = !paused; pause.textContent = paused ? "Go on" : "Pause"; due = Date.now() + wait; tell(); } });
  document.getElementById("live").append(told, pause);
  document.getElementById("live").hidden = false;
  const tell = () => {
    const left = Math.max(0, Math.round((due - Date.now()) / 1000));
    told.textContent = paused ? "Live, paused." : `Live: this page follows the run. ${left > 0 ? `Looks again in ${left} s.` : "Looks again when you pause."}`;
  };
  tell();
  setInterval(() => {
    tell();
    if (paused || Date.now() < due || busy()) return;
    due = Infinity;
    remember();
    location.reload();
  }, 500);
}
