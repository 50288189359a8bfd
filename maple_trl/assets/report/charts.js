// Charts. Each is drawn when it comes into view, at a place of its height: what is below it must not move under a click.

const AXIS = { gridcolor: "#e7ebef", linecolor: "#8c959f", zerolinecolor: "#c6cdd4", ticks: "outside", tickcolor: "#8c959f",
  automargin: true };
const FONT = { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 13, color: "#1b1f24" };
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const waiting = new Map();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && waiting.has(entry.target)) {
      const draw = waiting.get(entry.target);
      waiting.delete(entry.target);
      observer.unobserve(entry.target);
      draw();
    }
  }
}, { rootMargin: "300px" });

function layoutOf(options) {
  const axis = (title, own) => ({ ...AXIS, title: { text: title, font: { size: 13 } }, ...own });
  return {
    title: { text: options.title, font: { size: 15 }, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container",
      yanchor: "top", pad: { t: 10 } },
    font: FONT, height: options.height || 320, margin: { l: 56, r: 14, t: 42, b: options.legend === false ? 46 : 84, ...options.margin },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: options.hovermode || "x unified", barmode: options.barmode,
    hoverlabel: { font: { size: 12 } }, showlegend: options.legend !== false,
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 12 }, traceorder: "normal" },
    xaxis: axis(options.x, options.xaxis), yaxis: axis(options.y, options.yaxis), ...options.layout,
  };
}

function chart(parent, traces, options) {
  const place = node("div", { class: "chart", role: "img", "aria-label": options.title.replace(/<[^>]*>/g, "") });
  place.style.height = `${layoutOf(options).height}px`;
  parent.append(place);
  waiting.set(place, () => Plotly.newPlot(place, traces, layoutOf(options), CONFIG));
  observer.observe(place);
  return place;
}

function redraw(place, traces, options) {
  if (waiting.has(place)) waiting.set(place, () => Plotly.newPlot(place, traces, layoutOf(options), CONFIG));
  else Plotly.react(place, traces, layoutOf(options), CONFIG);
}

// Exponential moving average over so many points.
function smooth(values, span) {
  if (span <= 1) return values;
  const share = 2 / (span + 1);
  let mean = null;
  return values.map((value) => (mean = value === null ? mean : mean === null ? value : mean + share * (value - mean)));
}

// A curve with a gap where nothing was logged for long, e.g. since another tag was trained.
function points(curve, span) {
  const x = [], y = [], value = smooth(curve.value, span);
  const steps = curve.step.slice(1).map((step, i) => step - curve.step[i]).sort((a, b) => a - b);
  const far = 6 * (steps[Math.floor(steps.length / 2)] || 0);
  curve.step.forEach((step, i) => {
    if (i && step - curve.step[i - 1] > far) { x.push(step); y.push(null); }
    x.push(step);
    y.push(value[i]);
  });
  return { x, y };
}

function runSuffix(index) {
  return REPORT.runs.length > 1 ? ` · ${plain(REPORT.runs[index].name)}` : "";
}

function marker(points, symbol) {
  return points > 60 ? { mode: "lines" } : { mode: "lines+markers", marker: { size: 5.5, symbol } };
}

// A metric of each tag, of all runs: the tag is the colour, the run is the dash.
function tagTraces(nameOf, span = 1) {
  const traces = [], legends = new Set();
  for (const tag of ["all", ...REPORT.tags]) { // below the others
    REPORT.runs.forEach((run, index) => {
      const curve = run.curves.metrics && run.curves.metrics[nameOf(tag, run)];
      if (!curve) return;
      traces.push({
        type: "scatter", ...points(curve, span), name: tag, legendgroup: tag, showlegend: !legends.has(tag),
        ...(tag === "all" ? { mode: "lines" } : marker(curve.step.length, TAG_STYLE[tag].symbol)),
        hovertemplate: `%{y:.4g}<extra>${tag}${runSuffix(index)}</extra>`,
        opacity: tag === "all" ? 0.4 : 1, line: { color: TAG_STYLE[tag].color, width: tag === "all" ? 5 : 1.8, dash: RUN_STYLE[index].dash },
      });
      legends.add(tag);
    });
  }
  return traces;
}

// Metrics of a single run or of all, one colour a metric or, with one metric, a run.
const PLAIN_COLORS = ["#1b365d", "#a04a00", "#2f6f4f", "#8a1c4a", "#5b5b5b", "#4f7cac"];
function metricTraces(names, labels = {}, span = 1, runs = REPORT.runs.map((_, index) => index)) {
  const traces = [], legends = new Set();
  const several = names.length > 1;
  names.forEach((name, i) => {
    for (const index of runs) {
      const curve = REPORT.runs[index].curves.metrics && REPORT.runs[index].curves.metrics[name];
      if (!curve) continue;
      const label = plain(labels[name] || name);
      const legend = several ? label : plain(REPORT.runs[index].name);
      traces.push({
        type: "scatter", x: curve.step, y: smooth(curve.value, span), name: legend, legendgroup: legend,
        showlegend: !legends.has(legend), ...marker(curve.step.length),
        hovertemplate: `%{y:.4g}<extra>${label}${runs.length > 1 ? runSuffix(index) : ""}</extra>`,
        line: { color: several ? PLAIN_COLORS[i % 6] : RUN_STYLE[index].color, width: 1.8,
          dash: runs.length > 1 ? RUN_STYLE[index].dash : "solid" },
      });
      legends.add(legend);
    }
  });
  return traces;
}

function matrixChart(parent, panel, title, largest) {
  const text = panel.matrix.map((row) => row.map((value) => (value === null ? "" : value.toFixed(2))));
  const names = REPORT.tags;
  return chart(parent, [{
    type: "heatmap", x: names, y: names, z: panel.matrix, zmin: 0, zmax: largest, text, texttemplate: "%{text}",
    textfont: { size: 11 }, xgap: 2, ygap: 2, hoverongaps: false,
    colorscale: [[0, "#f4f8fc"], [0.5, "#7fb0dc"], [1, "#0d3f73"]],
    colorbar: { thickness: 10, outlinewidth: 0, title: { text: "|Δ|", side: "top" } },
    hovertemplate: "%{y} and %{x}: %{z:.3f}<extra></extra>",
  }], {
    title, x: "tag", y: "tag", legend: false, hovermode: "closest", height: 340,
    xaxis: { showgrid: false }, yaxis: { autorange: "reversed", showgrid: false },
  });
}
