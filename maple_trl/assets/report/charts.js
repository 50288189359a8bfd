// Charts. Each is drawn when it comes into view, at a place of its height: what is below it must not move under a click.

const AXIS = { gridcolor: "var(--grid)", linecolor: "var(--edge)", zerolinecolor: "var(--zero)", ticks: "outside", tickcolor: "var(--edge)",
  automargin: true, exponentformat: "e", minexponent: 6, separatethousands: true };
const FONT = { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 13, color: "var(--ink)" };
const CONFIG = { displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const charts = new Map(); // place: what it shows, and whether it is drawn
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting || !charts.has(entry.target)) continue;
    observer.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

// Colours

const probe = node("span", { hidden: "" });
document.body.append(probe);
const known = new Map();
// A colour of the style sheet as the theme has it now; Plotly knows no variables.
function resolved(color) {
  if (!color.startsWith("var(")) return color;
  if (!known.has(color)) {
    probe.style.color = color;
    known.set(color, getComputedStyle(probe).color);
  }
  return known.get(color);
}

// A copy of traces or of a layout with the theme's colours. Only keys of colours are looked at: texts of runs stay what they are.
function painted(value, isColor = false) {
  if (typeof value === "string") return isColor ? resolved(value) : value;
  if (Array.isArray(value)) return isColor || (value[0] && typeof value[0] === "object") ? value.map((item) => painted(item, isColor)) : value;
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, isColor || /color(scale)?$/.test(key))]));
}

const darkened = window.matchMedia("(prefers-color-scheme: dark)");
function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  repaint();
}

function repaint() {
  known.clear();
  for (const [place, spec] of charts) if (spec.drawn) draw(place);
}

function themeSwitch() {
  const select = document.getElementById("theme");
  try { select.value = localStorage.getItem("maple-trl-theme") || "auto"; } catch { /* pages of files may have no storage */ }
  if (select.value !== "auto") document.documentElement.dataset.theme = select.value;
  select.addEventListener("change", () => {
    try { localStorage.setItem("maple-trl-theme", select.value); } catch { /* then it holds for this page alone */ }
    applyTheme(select.value);
  });
  darkened.addEventListener("change", repaint);
}

// Paper: what nobody has scrolled to is drawn as well, light, and as wide as the paper.

function beforePrint() {
  document.documentElement.classList.add("printing");
  known.clear();
  for (const place of charts.keys()) { observer.unobserve(place); draw(place); }
}

function afterPrint() {
  document.documentElement.classList.remove("printing");
  repaint();
}

window.addEventListener("beforeprint", beforePrint);
window.addEventListener("afterprint", afterPrint);

// Drawing

// A title in lines that fit; Plotly writes one line, however narrow the chart.
function wrapped(title, width) {
  const lines = [""];
  for (const word of title.split(" ")) {
    if (lines[lines.length - 1].length + word.length > width / 8 && lines[lines.length - 1]) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] && " ") + word;
  }
  return lines;
}

// How many lines of a chart's width its legend takes, about.
function legendRows(traces, width) {
  const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name || "");
  const widest = Math.max(0, ...names.map((name) => 56 + 7.2 * name.length));
  return names.length ? Math.ceil(names.length / Math.max(1, Math.floor((width - 60) / widest))) : 0;
}

function layoutOf(options, traces, width) {
  const axis = (title, own) => ({ ...AXIS, title: { text: title, font: { size: 13 } }, ...own });
  const lines = wrapped(options.title, width - 70);
  const top = 24 + 19 * lines.length;
  const rows = options.legend === false ? 0 : legendRows(traces, width);
  return {
    title: { text: lines.join("<br>"), font: { size: 15 }, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container",
      yanchor: "top", pad: { t: 10 } },
    font: FONT, height: (options.height || 320) + 19 * (lines.length - 1) + 19 * Math.max(0, rows - 1), width,
    margin: { l: 56, r: 14, t: top, b: rows ? 64 + 20 * rows : 46, ...options.margin },
    paper_bgcolor: "var(--panel)", plot_bgcolor: "var(--panel)", hovermode: options.hovermode || "x unified", barmode: options.barmode,
    hoverlabel: { font: { size: 12 }, bgcolor: "var(--panel)", bordercolor: "var(--edge)" }, showlegend: options.legend !== false, uirevision: options.title,
    uniformtext: { mode: "hide", minsize: 9 },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 12 }, traceorder: "normal" },
    xaxis: axis(options.x, options.xaxis), yaxis: axis(options.y, { ...fromZero(traces, options), ...options.yaxis }), ...options.layout,
  };
}

// Shares, counts and times are drawn from 0 where that costs little height; a line at 0 alone is drawn from 0 to 1.
function fromZero(traces, options) {
  if (traces.some((trace) => trace.type !== "scatter" || trace.stackgroup) || (options.yaxis && (options.yaxis.range || options.yaxis.type))) return {};
  let low = Infinity, high = -Infinity;
  for (const trace of traces) for (const value of trace.y) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  return low >= 0 && low < 0.6 * high + 1e-12 ? { rangemode: "tozero" } : {};
}

function chart(parent, traces, options) {
  const place = node("div", { class: "chart", role: "img", "aria-label": options.title.replace(/<[^>]*>/g, "") });
  parent.append(place);
  charts.set(place, { traces, options, drawn: false });
  place.style.height = `${layoutOf(options, traces, widthOf(place)).height}px`;
  if (traces.some((trace) => trace.meta)) place.classList.add("leads");
  observer.observe(place);
  return place;
}

function redraw(place, traces, options) {
  const spec = charts.get(place);
  Object.assign(spec, { traces, options });
  place.setAttribute("aria-label", options.title.replace(/<[^>]*>/g, ""));
  place.style.height = `${layoutOf(options, traces, widthOf(place)).height}px`;
  if (spec.drawn) draw(place);
}

function widthOf(place) {
  return Math.max(200, Math.floor(place.getBoundingClientRect().width) || 600);
}

function draw(place) {
  const spec = charts.get(place);
  const layout = layoutOf(spec.options, spec.traces, widthOf(place));
  place.style.height = `${layout.height}px`; // another width may need another number of lines
  Plotly.react(place, painted(spec.traces), painted(layout), CONFIG);
  if (!spec.drawn && place.classList.contains("leads")) place.on("plotly_click", (event) => follow(place, event));
  spec.drawn = true;
}

let resizing = null;
window.addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    if (document.documentElement.classList.contains("printing")) return;
    for (const [place, spec] of charts) {
      if (spec.drawn && place.layout.width !== widthOf(place)) draw(place);
      place.style.height = `${layoutOf(spec.options, spec.traces, widthOf(place)).height}px`;
    }
  }, 150);
});

// From a point of a curve to the completions of its steps: the curve nearest to the click counts.
function follow(place, { points, event }) {
  const top = place.getBoundingClientRect().top;
  const far = (point) => Math.abs(point.yaxis.l2p(point.yaxis.d2l(point.y)) + point.yaxis._offset + top - event.clientY);
  const led = points.filter((point) => point.data.meta && point.y !== null).sort((a, b) => far(a) - far(b))[0];
  if (!led) return;
  const { run, tag } = led.data.meta;
  const steps = [...new Set(led.data.x)].sort((a, b) => a - b);
  const before = steps[steps.indexOf(led.x) - 1];
  showSteps(run, before === undefined ? 0 : Math.floor(before), Math.max(Math.ceil(led.x) - 1, 0), tag);
}

// Smoothing

const SMOOTHING = [["0", "none"], ["0.02", "light"], ["0.06", "medium"], ["0.2", "strong"]];
const SMOOTHED = "0.06";

// Points over which a curve is smoothed: a share of them, but a few at least. Few points are too few to be smoothed at all.
function spanOf(share, count) {
  return count < 20 ? 1 : Math.max(1, share * Math.max(count, 100));
}

// Exponential moving average; the first values count no more than others.
function smooth(values, share) {
  const span = spanOf(share, values.length);
  if (span < 1.5) return values;
  const keep = 1 - 2 / (span + 1);
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value !== null) { sum = keep * sum + value; weight = keep * weight + 1; }
    return weight ? sum / weight : null;
  });
}

// A curve with a gap where nothing was logged for long, e.g. since another tag was trained.
function points(curve, share) {
  const x = [], y = [], value = smooth(curve.value, share);
  const steps = curve.step.slice(1).map((step, i) => step - curve.step[i]).sort((a, b) => a - b);
  const mean = steps.reduce((a, b) => a + b, 0) / (steps.length || 1); // of tags that take turns, several times the median
  const far = Math.max(6 * (steps[Math.floor(steps.length / 2)] || 0), 4 * mean);
  curve.step.forEach((step, i) => {
    if (i && step - curve.step[i - 1] > far) { x.push(step); y.push(null); }
    x.push(step);
    y.push(value[i]);
  });
  return { x, y };
}

// A curve, and below it faintly what was logged, where that is something else.
function curveTraces(curve, share, trace) {
  const smoothed = points(curve, share);
  if (spanOf(share, curve.step.length) < 1.5) return [{ type: "scatter", ...smoothed, ...trace }];
  const raw = { type: "scatter", mode: "lines", ...points(curve, 0), name: trace.name, legendgroup: trace.legendgroup, showlegend: false, hoverinfo: "skip",
    opacity: 0.28, line: { ...trace.line, width: 1, dash: "solid" } };
  return [raw, { type: "scatter", ...smoothed, ...trace, mode: "lines", line: { ...trace.line, width: trace.line.width + 0.4 } }];
}

function runSuffix(index) {
  return REPORT.runs.length > 1 ? ` · ${plain(REPORT.runs[index].name)}` : "";
}

function marker(points, symbol) {
  return points > 60 ? { mode: "lines" } : { mode: "lines+markers", marker: { size: 5.5, symbol } };
}

// A metric of each tag, of all runs: the tag is the colour, the run is the dash.
function tagTraces(nameOf, share = 0) {
  const traces = [], legends = new Set();
  for (const tag of ["all", ...REPORT.tags]) { // below the others
    REPORT.runs.forEach((run, index) => {
      const curve = run.curves.metrics && run.curves.metrics[nameOf(tag, run)];
      if (!curve) return;
      traces.push(...curveTraces(curve, share, {
        name: tag, legendgroup: tag, showlegend: !legends.has(tag), meta: { run: index, tag: tag === "all" ? null : tag },
        ...(tag === "all" ? { mode: "lines" } : marker(curve.step.length, TAG_STYLE[tag].symbol)),
        hovertemplate: `%{y:.4g}<extra>${tag}${runSuffix(index)}</extra>`,
        opacity: tag === "all" ? 0.4 : 1, line: { color: TAG_STYLE[tag].color, width: tag === "all" ? 5 : 1.8, dash: RUN_STYLE[index].dash },
      }));
      legends.add(tag);
    });
  }
  return traces;
}

// A metric of one tag, of many runs: the run is the colour.
function runTraces(name, tag, share = 0) {
  return REPORT.runs.flatMap((run, index) => {
    const curve = run.curves.metrics && run.curves.metrics[name];
    return curve ? curveTraces(curve, share, { name: plain(run.name), meta: { run: index, tag }, ...marker(curve.step.length),
      hovertemplate: `%{y:.4g}<extra>${plain(run.name)}</extra>`, line: { color: RUN_STYLE[index].color, width: 1.8, dash: RUN_STYLE[index].dash } }) : [];
  });
}

// Metrics of a single run or of all, one colour a metric or, with one metric, a run.
const PLAIN_COLORS = [0, 1, 2, 3, 7, 5].map((i) => `var(--run-${i})`);
function metricTraces(names, labels = {}, share = 0, runs = REPORT.runs.map((_, index) => index)) {
  const traces = [], legends = new Set();
  const several = names.length > 1;
  names.forEach((name, i) => {
    for (const index of runs) {
      const curve = REPORT.runs[index].curves.metrics && REPORT.runs[index].curves.metrics[name];
      if (!curve) continue;
      const label = plain(labels[name] || name);
      const legend = several ? label : plain(REPORT.runs[index].name);
      traces.push(...curveTraces(curve, share, {
        name: legend, legendgroup: legend, showlegend: !legends.has(legend), ...marker(curve.step.length), meta: { run: index, tag: null },
        hovertemplate: `%{y:.4g}<extra>${label}${runs.length > 1 ? runSuffix(index) : ""}</extra>`,
        line: { color: several ? PLAIN_COLORS[i % 6] : RUN_STYLE[index].color, width: 1.8,
          dash: runs.length > 1 ? RUN_STYLE[index].dash : "solid" },
      }));
      legends.add(legend);
    }
  });
  return traces;
}

// Differences of every two tags, of those tags alone that have a number.
function matrixChart(parent, panel, title, largest) {
  const at = REPORT.tags.map((_, i) => i).filter((i) => panel.matrix[i].some((value) => value !== null));
  const z = at.map((i) => at.map((j) => panel.matrix[i][j]));
  const names = at.map((i) => REPORT.tags[i]);
  return chart(parent, [{
    type: "heatmap", x: names, y: names, z, zmin: 0, zmax: largest, text: z.map((row) => row.map((value) => (value === null ? "" : value.toFixed(2)))), texttemplate: "%{text}",
    textfont: { size: 11 }, xgap: 2, ygap: 2, hoverongaps: false,
    colorscale: [[0, "var(--blue-0)"], [0.5, "var(--blue-1)"], [1, "var(--blue-2)"]],
    colorbar: { thickness: 10, outlinewidth: 0, title: { text: "|Δ|", side: "top" } },
    hovertemplate: "%{y} and %{x}: %{z:.3f}<extra></extra>",
  }], {
    title, x: "tag", y: "tag", legend: false, hovermode: "closest", height: 340,
    xaxis: { type: "category", showgrid: false }, yaxis: { type: "category", autorange: "reversed", showgrid: false },
  });
}
