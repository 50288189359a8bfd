// The sections of the page but the last.

const STEP = "optimizer step";
const LABELS = {
  reward: "mean reward (weighted sum)", accuracy: "share of right answers", zero_variance: "share of groups with equal rewards",
  zero_variance_mixed: "the same, with replayed completions", unscorable: "share of completions without a reward",
  advantage_mean: "mean advantage", advantage_std: "deviation of advantages", weight: "weight in the loss",
  priority: "priority (nats)", kl: "difficulty (KL, nats)", kept: "groups kept per rollout", dropped: "groups dropped per rollout",
  clip_fraction: "share of clipped tokens", entropy: "entropy (nats per token)", completion_length: "completion length (tokens)",
  media_tokens: "media tokens per prompt", prompt_tokens: "prompt tokens, mean over prompts",
  reward_kept: "mean reward of what is trained on", seconds: "seconds per optimizer step", grad_norm: "gradient norm",
  grad_variance: "variance of the gradient", grad_mean_norm: "norm of the mean gradient",
};
const FIRST = ["reward", "accuracy", "completion_length", "entropy", "zero_variance", "clip_fraction", "grad_norm"];

function chooser(label, options, chosen, act) {
  const select = node("select", { onchange: () => act(select.value) },
    ...options.map(([value, text]) => node("option", { value, text })));
  select.value = chosen;
  return node("label", {}, label, select);
}

function tagLegend() {
  const place = document.getElementById("tag-legend");
  for (const tag of REPORT.tags) {
    place.append(node("div", {}, tagBadge(tag), node("span", { text: TAG_STYLE[tag].says })));
  }
  if (REPORT.runs.length > 1) {
    REPORT.runs.forEach((run, i) => {
      place.append(node("div", {}, node("span", { class: `run run-${i}`, text: `${run.name}: ${i ? "dashed" : "solid"} lines` })));
    });
  }
}

// Curves

function curves() {
  const body = bodyOf("curves");
  const names = new Set();
  REPORT.runs.forEach((run, index) => {
    if (run.curves.missing) { body.append(missing(index, run.curves.missing)); return; }
    Object.keys(run.curves.metrics).forEach((name) => names.add(name));
    const per = run.curves.entries_per_point;
    const long = per > 1 ? ` Each point is the mean of up to ${per} log entries.` : "";
    body.append(node("p", { class: "what", text: `${run.name}: log of ${run.curves.source}.${long}` }));
  });
  if (!names.size) { markAbsent("curves"); return; }
  const state = { metric: "reward", span: 1 };
  const kinds = new Set();
  for (const name of names) {
    const match = /^((?:eval_)?tag\/)([^/]+)\/(.+)$/.exec(name);
    if (match && TAG_STYLE[match[2]]) kinds.add(match[1] + "\n" + match[3]);
  }
  const label = (kind) => (kind.startsWith("eval_") ? "evaluation: " : "") + (LABELS[kind.split("\n")[1]] || kind.split("\n")[1]);
  const order = (kind) => { const at = FIRST.indexOf(kind.split("\n")[1]); return (kind.startsWith("eval_") ? 100 : 0) + (at < 0 ? 50 : at); };
  const metrics = [...kinds].sort((a, b) => order(a) - order(b) || a.localeCompare(b));
  const controls = node("div", { class: "controls" });
  body.append(controls);
  let byTag = null;
  const tagOptions = () => [tagTraces((tag) => state.metric.replace("\n", `${tag}/`), state.span),
    { title: `${label(state.metric)}, by tag`, x: STEP, y: label(state.metric), height: 420 }];
  const others = [];
  const again = () => { if (byTag) redraw(byTag, ...tagOptions()); others.forEach((draw) => draw()); };
  if (metrics.length) {
    state.metric = metrics[0];
    controls.append(chooser("By tag:", metrics.map((kind) => [kind, label(kind)]), state.metric, (value) => { state.metric = value; again(); }));
    byTag = chart(body, ...tagOptions());
    byTag.id = "curves-by-tag";
  } else {
    body.append(node("p", { class: "missing", text: "No data by tag: the trainer logs it for rows that have tags." }));
  }
  controls.append(chooser("Smoothing:", [["1", "none"], ["5", "mean of about 5 points"], ["20", "of about 20"]], "1",
    (value) => { state.span = Number(value); again(); }));

  const everyone = (name) => REPORT.runs.every((run) => run.curves.missing || run.curves.metrics[name]);
  const rewards = [...names].filter((name) => /^rewards\/.+\/mean$/.test(name));
  const panels = [
    ["Rewards", "mean reward", ["reward", ...rewards], Object.fromEntries([["reward", "weighted sum"], ...rewards.map((n) => [n, n.slice(8, -5)])])],
    ["Loss", "loss", ["loss"]], ["Gradient norm", "norm", ["grad_norm"]], ["Entropy", "nats per token", ["entropy"]],
    ["Completion length", "tokens", ["completions/mean_length", "completions/max_length"], { "completions/mean_length": "mean", "completions/max_length": "longest" }],
    // TRL's own count holds rows that stand in for dropped ones: it is drawn of runs alone that have no other.
    ["Clipped tokens", "share", everyone("tag/all/clip_fraction") ? ["tag/all/clip_fraction"] : ["tag/all/clip_fraction", "clip_ratio/region_mean"],
      { "tag/all/clip_fraction": "share of clipped tokens", "clip_ratio/region_mean": "the same, as TRL counts" }],
    ["Divergence from the reference", "nats", ["kl"]],
    ["Time", "seconds per step", ["step_time"]],
    ["Media tokens", "tokens per rollout", ["media_tokens/image", "media_tokens/video", "media_tokens/audio", "media_tokens/subtitle"],
      { "media_tokens/image": "pictures", "media_tokens/video": "video", "media_tokens/audio": "audio", "media_tokens/subtitle": "subtitles" }],
    ["Prompt length", "mean tokens", ["tag/all/prompt_tokens"]],
  ];
  const grid = node("div", { class: "grid small" });
  body.append(node("h3", { text: "Over all tags" }));
  if (names.has("tag/all/reward_kept")) {
    const options = { title: "Rollout score", x: STEP, y: "mean reward", height: 340 };
    const place = chart(body, scoreTraces(state.span), options);
    others.push(() => redraw(place, scoreTraces(state.span), options));
  }
  body.append(grid);
  for (const [title, unit, wanted, labels] of panels) {
    const there = wanted.filter((name) => names.has(name));
    if (!there.length) continue;
    const options = { title, x: STEP, y: unit, height: 260, legend: there.length > 1 || REPORT.runs.length > 1 };
    const place = chart(grid, metricTraces(there, labels, state.span), options);
    others.push(() => redraw(place, metricTraces(there, labels, state.span), options));
  }
  const all = [...names].sort();
  let one = all.includes("reward") ? "reward" : all[0];
  const anyOptions = () => [metricTraces([one], {}, state.span), { title: plain(one), x: STEP, y: "value, as logged", legend: REPORT.runs.length > 1 }];
  const picker = node("div", { class: "controls", id: "any-metric" }, chooser("Any metric of the log:", all.map((name) => [name, name]), one,
    (value) => { one = value; redraw(any, ...anyOptions()); }));
  body.append(picker);
  const any = chart(body, ...anyOptions());
  others.push(() => redraw(any, ...anyOptions()));
}

// Of what is trained on a solid line, of all that was sampled a dotted one.
function scoreTraces(span) {
  const kinds = [["tag/all/reward_kept", "trained on", "solid"], ["tag/all/reward", "all, with what was filtered out", "dot"]];
  return REPORT.runs.flatMap((run, index) => kinds.flatMap(([name, label, dash]) => {
    const curve = run.curves.metrics && run.curves.metrics[name];
    return curve ? [{ type: "scatter", x: curve.step, y: smooth(curve.value, span), name: label + runSuffix(index), mode: curve.step.length > 2 ? "lines" : "lines+markers",
      hovertemplate: `%{y:.4g}<extra>${label}${runSuffix(index)}</extra>`, line: { color: RUN_STYLE[index].color, width: 2, dash } }] : [];
  }));
}

// Rewards

function rewards() {
  eachRun("rewards", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const told = run.kind === "evaluation" ? "" : " The first and the last fifth are of the steps at which the tag was trained.";
    body.append(node("p", { class: "what", text: `Reward: ${part.reward}, of fresh completions, in ${part.bins} bins.${told}` }));
    const grid = node("div", { class: "grid small" });
    body.append(grid);
    const rows = [["tag", "", "steps", "completions", "mean reward", "difficulty, binary", "difficulty, continuous"]];
    for (const [tag, phases] of Object.entries(part.tags)) {
      const names = Object.keys(phases);
      for (const [phase, found] of Object.entries(phases)) {
        rows.push([tag, phase, found.steps ? [...new Set(found.steps)].join(" to ") : "–", String(found.count), number(found.mean), number(found.kl_binary), number(found.kl_continuous)]);
      }
      const x = REPORT.near_perfect.reward;
      // Of rewards with few values, such as 0 and 1, narrow bars could hardly be seen.
      const values = Math.max(...names.map((phase) => phases[phase].share.filter((share) => share > 0).length));
      const width = (values <= 6 ? 0.12 : 0.02) / names.length;
      const traces = names.map((phase, i) => ({
        type: "bar", x, y: phases[phase].share, name: plain(phase), hovertemplate: "%{y:.3f}", width, offset: (i - names.length / 2) * width,
        marker: i === names.length - 1 ? { color: TAG_STYLE[tag].color, line: { width: 0 } } : { color: "#d5dbe1", line: { color: "#57606a", width: 1 } },
      }));
      traces.push({ type: "scatter", mode: "lines", x, y: REPORT.near_perfect.share, name: "Beta(100, 1)", hovertemplate: "%{y:.3f}",
        line: { color: "#1b1f24", dash: "dot", width: 1.6, shape: "hvh" } });
      chart(grid, traces, { title: `${tag}: ${TAG_STYLE[tag].says}`, x: "reward", y: "share of completions", height: 280, barmode: "group",
        xaxis: { range: [-0.08, 1.08], zeroline: false }, yaxis: { range: [0, 1.05] } });
    }
    body.append(table("Mean reward and difficulty (KL to near-perfect rewards, nats)", rows));
  });
}

// Weights and curriculum

function weights() {
  const body = bodyOf("weights");
  const grid = node("div", { class: "grid" });
  const names = new Set();
  REPORT.runs.forEach((run, index) => {
    if (run.weights.missing) body.append(missing(index, run.weights.missing));
    else Object.keys(run.weights).forEach((name) => names.add(name));
  });
  if (!names.size) { markAbsent("weights"); return; }
  body.append(grid);
  const titles = { weight: ["Weight of each tag", "weight in the loss"], priority: ["Priority in the curriculum", "mean of the last difficulties (nats)"],
    kl: ["Difficulty", "KL to near-perfect rewards (nats)"] };
  for (const name of ["weight", "priority", "kl"]) {
    if (!names.has(name)) continue;
    chart(grid, tagTraces((tag) => (tag === "all" ? "" : `tag/${tag}/${name}`)), { title: titles[name][0], x: STEP, y: titles[name][1], height: 360,
      yaxis: { rangemode: "tozero" } });
  }
}

function curriculum() {
  eachRun("curriculum", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const traces = part.tags.map((tag, row) => ({
      type: "heatmap", x: part.step, y0: row, dy: 1, z: [part.share[row]], zmin: 0, zmax: 1, showscale: false, ygap: 3,
      colorscale: [[0, "#f3f5f7"], [1, TAG_STYLE[tag].color]], hovertemplate: `step %{x}, ${tag}: %{z:.0%}<extra></extra>`,
    }));
    chart(body, traces, { title: "Tags over the steps", x: STEP, y: "tag", legend: false, hovermode: "closest", height: 90 + 32 * part.tags.length,
      yaxis: { range: [part.tags.length - 0.5, -0.5], tickvals: part.tags.map((_, row) => row), ticktext: part.tags, showgrid: false, zeroline: false },
      xaxis: { showgrid: false } });
    body.append(node("p", { class: "what", text: `From ${part.source}.` }));
  });
}

// Disparity

function disparity() {
  const found = REPORT.runs.flatMap((run) => (run.disparity.panels || []).flatMap((panel) => panel.matrix.flat()));
  const largest = Math.max(0.1, ...found.filter((value) => value !== null));
  eachRun("disparity", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    body.append(node("p", { class: "what", text: `From ${part.source}. Cells of tags without a question are left blank.` }));
    const grid = node("div", { class: "grid small" });
    body.append(grid);
    for (const panel of part.panels) {
      const known = Object.keys(panel.accuracy).length;
      const pairs = panel.matrix.flatMap((row, i) => row.slice(i + 1)).filter((value) => value !== null);
      const mean = pairs.length ? `, mean ${number(pairs.reduce((a, b) => a + b, 0) / pairs.length)}` : "";
      matrixChart(grid, panel, `${plain(panel.title)} (${known} tags${mean})`, largest);
    }
  });
}

// Advantages, critical steps, lengths

// Two histograms over each other, of two runs: filled, and as steps of a line.
function overlaid(parent, parts, options) {
  const traces = parts.map(({ x, y, width, name, index }) => ({
    type: "bar", x, y, width, name, hovertemplate: "%{y:.3f}", opacity: 0.6,
    marker: { color: RUN_STYLE[index].color, line: { color: RUN_STYLE[index].color, width: 1 }, pattern: index ? { shape: "/", size: 6, solidity: 0.3 } : undefined },
  }));
  return chart(parent, traces, { barmode: "overlay", yaxis: { rangemode: "tozero" }, height: 360, ...options });
}

function advantages() {
  const body = bodyOf("advantages");
  const grid = node("div", { class: "grid" });
  const kinds = { fresh: [], replayed: [] };
  const rows = [["run", "completions", "number", "mean", "deviation", "share that is 0"]];
  eachRun("advantages", (part, run, index) => {
    for (const [kind, found] of Object.entries(part.kinds)) {
      const width = part.centres[1] - part.centres[0];
      kinds[kind].push({ x: part.centres, y: found.share, width, name: plain(run.name), index });
      rows.push([run.name, kind, String(found.count), number(found.mean), number(found.std), number(found.zero)]);
    }
  });
  if (rows.length < 2) return;
  body.append(grid);
  for (const [kind, parts] of Object.entries(kinds)) {
    if (parts.length) overlaid(grid, parts, { title: `Advantages of ${kind} completions`, x: "advantage", y: "share of completions" });
  }
  body.append(table("Advantages before shaping", rows, { text: false }));
}

function critical() {
  const parts = [], lines = [];
  const body = bodyOf("critical");
  eachRun("critical", (part, run, index) => {
    const width = 1 / part.share.length;
    const x = part.share.map((_, i) => (i + 0.5) * width);
    parts.push({ x, y: part.share, width, name: plain(run.name), index });
    if (part.shaped) lines.push({ type: "scatter", mode: "lines+markers", x, y: part.shaped.share, hovertemplate: "%{y:.3f}",
      name: `weight by TAS (${plain(part.shaped.shape.replace(/_/g, " "))}, λ ${part.shaped.lambda})${runSuffix(index)}`, line: { color: "#e06000", width: 2.4, dash: RUN_STYLE[index].dash } });
    const counts = (found) => Object.entries(found).map(([why, count]) => `${count} ${why}`).join(", ");
    const left = [counts(part.left_out), counts(part.failed)].filter(Boolean).join("; ");
    body.append(node("p", { class: "what", text: `${run.name}: ${part.count} completions, by ${part.judge}, mean position ${number(part.mean)}${left ? `; not counted: ${left}` : ""}.` }));
  });
  if (!parts.length) return;
  const place = overlaid(body, parts, { title: "Positions of critical steps", x: "position in the reasoning (0: beginning, 1: end)", y: "share of completions",
    xaxis: { range: [0, 1], dtick: 0.1 } });
  if (lines.length) {
    const draw = waiting.get(place);
    waiting.set(place, () => { draw(); Plotly.addTraces(place, lines); });
  }
}

function span(bin) { return bin.from === bin.to ? String(bin.from) : `${bin.from}–${bin.to}`; }

function whiskers(bins, value) {
  const side = (end, sign) => bins.map((bin) => (bin[end] === null ? null : sign * (bin[end] - bin[value])));
  return { type: "data", symmetric: false, array: side("high", 1), arrayminus: side("low", -1), color: "#1b1f24", thickness: 1.2, width: 4 };
}

function lengths() {
  const body = bodyOf("lengths");
  const grid = node("div", { class: "grid" });
  const traces = [], rewards = new Set(), names = new Map();
  eachRun("lengths", (part, run, index) => {
    rewards.add(part.reward);
    part.bins.forEach((bin) => { const known = names.get(bin.from); if (!known || bin.to > known.to) names.set(bin.from, bin); });
    traces.push({ index, name: plain(run.name), bins: part.bins });
  });
  if (!traces.length) return;
  body.append(grid);
  const order = [...names.values()].sort((a, b) => a.from - b.from);
  chart(grid, traces.map(({ index, name, bins }) => ({ type: "bar", name, x: bins.map((bin) => span(names.get(bin.from))), y: bins.map((bin) => bin.value),
    customdata: bins.map((bin) => bin.count), error_y: whiskers(bins, "value"), hovertemplate: "%{y:.3f}, %{customdata} completions",
    marker: { color: RUN_STYLE[index].color, opacity: 0.75, pattern: index ? { shape: "/", size: 6, solidity: 0.25 } : undefined } })),
  { title: "Accuracy by completion length", x: "completion tokens", y: plain([...rewards].join(", ")), barmode: "group", height: 360,
    xaxis: { type: "category", categoryorder: "array", categoryarray: order.map(span) }, yaxis: { rangemode: "tozero" } });
  const gains = REPORT.length_gains;
  if (gains.missing) {
    if (REPORT.runs.length > 1) body.append(node("p", { class: "missing", text: gains.missing }));
    return;
  }
  const { bins } = gains;
  chart(grid, [{ type: "bar", x: bins.map(span), y: bins.map((bin) => bin.difference), error_y: whiskers(bins, "difference"), customdata: bins.map((bin) => bin.count),
    hovertemplate: "%{y:.3f}, %{customdata} questions<extra></extra>", marker: { color: bins.map((bin) => (bin.difference < 0 ? "#b5494b" : "#2f6f4f")), opacity: 0.8 } }],
  { title: "Accuracy gain by length", x: "completion tokens of the question, mean of both runs", y: `accuracy of ${plain(REPORT.runs[1].name)} − ${plain(REPORT.runs[0].name)}`,
    legend: false, height: 360, xaxis: { type: "category" } });
  const rows = [["tokens", "gain", "interval", "p", "questions", "clips"], ...bins.map((bin) => [span(bin), (bin.difference > 0 ? "+" : "") + bin.difference.toFixed(3),
    bin.low === null ? "–" : `[${bin.low.toFixed(3)}, ${bin.high.toFixed(3)}]`, number(bin.p_value, 4), String(bin.count), String(bin.clips || "–")])];
  body.append(table(`Gain by length, access ${gains.access}; p is not corrected for several bins`, rows));
}

// Positions, replay, ratios

function positions() {
  const traces = [];
  eachRun("positions", (part, run, index) => {
    Object.entries(part.profiles).forEach(([phase, profile], i) => {
      traces.push({ type: "scatter", mode: "lines+markers", x: part.position, y: profile, name: plain(phase) + runSuffix(index),
        hovertemplate: "%{y:.3f}", marker: { size: 6 },
        line: { color: i === 0 ? RUN_STYLE[index].color : PLAIN_COLORS[2 + i], width: i === 0 ? 3 : 1.6, dash: RUN_STYLE[index].dash } });
    });
  });
  if (!traces.length) return;
  chart(bodyOf("positions"), traces, { title: "Signal over the positions in a completion", x: "position in the completion (0: first token, 1: last)",
    y: "signal / mean signal", height: 360, yaxis: { rangemode: "tozero" },
    layout: { shapes: [{ type: "line", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: "#8c959f", width: 1, dash: "dot" } }] } });
}

function replay() {
  eachRun("replay", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const grid = node("div", { class: "grid" });
    body.append(grid);
    const tierColors = { "replay/size/easy": "#8cc7a1", "replay/size/medium": "#e5b454", "replay/size/hard": "#b5494b" };
    const tiers = part.tiers.map((name) => {
      const curve = run.curves.metrics[name];
      return { type: "scatter", mode: "lines", stackgroup: "tiers", x: curve.step, y: curve.value, name: name.slice(12),
        hovertemplate: "%{y:.0f}", line: { color: "#1b1f24", width: 0.8 }, fillcolor: tierColors[name] };
    });
    chart(grid, tiers, { title: "Completions in the buffer, by tier", x: STEP, y: "completions" });
    chart(grid, metricTraces(part.ages, { "replay/age_mean": "mean", "replay/age_max": "oldest" }, 1, [index]),
      { title: "Age of what is stored", x: STEP, y: "optimizer steps", yaxis: { rangemode: "tozero" } });
    const labels = { "replay/share": "replayed, of all completions", "replay/hit_rate": "served, of what was asked for",
      "replay/of_other_prompts": "replayed of other prompts", "replay/zero_variance_fresh": "groups of equal rewards, fresh alone",
      "replay/zero_variance_mixed": "the same, with replayed", "hint/rate": "groups shown with a hint" };
    chart(grid, metricTraces(part.shares, labels, 1, [index]), { title: "What replay brings", x: STEP, y: "share", height: 420, yaxis: { range: [-0.02, 1.05] } });
    const drawn = { "replay/drawn/easy": "easy", "replay/drawn/medium": "medium", "replay/drawn/hard": "hard" };
    if (part.drawn.length) chart(grid, metricTraces(part.drawn, drawn, 1, [index]), { title: "What is drawn, by tier", x: STEP, y: "share", yaxis: { range: [-0.02, 1.05] } });
    const terms = { "replay/gradient_on": "of fresh completions", "replay/gradient_off": "of replayed completions" };
    if (part.gradients.length) chart(grid, metricTraces(part.gradients, terms, 1, [index]), { title: "Gradients of both terms, before clipping", x: STEP, y: "norm", yaxis: { rangemode: "tozero" } });
  });
}

function ratios() {
  eachRun("ratios", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const grid = node("div", { class: "grid" });
    body.append(grid);
    const curve = (name) => run.curves.metrics[name];
    const line = { p05: ["5 %", 1], p50: ["median", 2.6], p95: ["95 %", 1], max: ["largest", 1] };
    const traces = part.quantiles.map((name) => {
      const key = name.slice("replay/ratio_".length);
      return { type: "scatter", mode: "lines", x: curve(name).step, y: curve(name).value, name: line[key][0], hovertemplate: "%{y:.3f}",
        line: { color: key === "max" ? "#b5494b" : RUN_STYLE[index].color, width: line[key][1], dash: key === "max" ? "dot" : "solid" },
        fill: key === "p95" || key === "p50" ? "tonexty" : undefined, fillcolor: "rgba(27, 54, 93, 0.12)" };
    });
    if (part.histogram) ratioHistogram(grid, part.histogram, index);
    chart(grid, traces, { title: "Quantiles of the ratios", x: STEP, y: "ratio (logarithmic)", height: 360, yaxis: { type: "log", dtick: "D2" } });
    if (part.effective.length) {
      chart(grid, metricTraces(part.effective, { "replay/effective_share": "effective sample size" }, 1, [index]), { title: "Effective sample size", x: STEP,
        y: "share of the replayed tokens", height: 360, legend: false, yaxis: { range: [0, 1.05] } });
    }
  });
}

function ratioHistogram(grid, { edges, phases }, index) {
  const told = edges.map((edge) => number(edge, 2));
  const bins = [`< ${told[0]}`, ...told.slice(1).map((edge, i) => `${told[i]}–${edge}`), `≥ ${told[told.length - 1]}`];
  const marker = [{ color: "#d5dbe1", line: { color: "#57606a", width: 1 } }, { color: RUN_STYLE[index].color }];
  const traces = Object.entries(phases).map(([phase, y], i) => ({ type: "bar", x: bins, y, name: phase, marker: marker[i], hovertemplate: "%{y:.3f}" }));
  chart(grid, traces, { title: "Histogram of the ratios", x: "ratio", y: "share of the replayed tokens", height: 360, barmode: "group",
    xaxis: { type: "category" }, yaxis: { rangemode: "tozero" } });
}

// Projection

function projection() {
  const range = (axis) => {
    const values = REPORT.runs.flatMap((run) => run.projection[axis] || []);
    const low = Math.min(...values), high = Math.max(...values), space = 0.06 * (high - low || 1);
    return [low - space, high + space];
  };
  const body = bodyOf("projection");
  const grid = node("div", { class: "grid" });
  eachRun("projection", (part, run, index) => {
    const drawn = part.kind === "tsne" ? "A t-SNE" : "The first two principal components";
    if (!grid.parentNode) {
      body.append(node("p", { class: "what", text: `${drawn}${REPORT.runs.length > 1 ? ", the same for both runs" : ""}, of ${part.method}.` }), grid);
    }
    const traces = REPORT.tags.filter((tag) => part.tag.includes(tag)).map((tag) => {
      const at = part.tag.map((own, i) => (own === tag ? i : -1)).filter((i) => i >= 0);
      const clips = at.map((i) => part.clip[i]);
      const numbered = clips.some((clip) => clip !== null);
      return { type: "scatter", mode: "markers", name: tag, x: at.map((i) => part.x[i]), y: at.map((i) => part.y[i]),
        customdata: at.map((i) => plain(part.text[i]).replace(/\n/g, " ").slice(0, 120)),
        hovertemplate: `${tag}${numbered ? ", clip %{text}" : ""}: %{customdata}<extra></extra>`,
        ...(numbered ? { mode: "markers+text", text: clips.map(String), textposition: "top center", textfont: { size: 10, color: TAG_STYLE[tag].color } } : {}),
        marker: { color: TAG_STYLE[tag].color, symbol: TAG_STYLE[tag].symbol, size: 7, opacity: 0.65 } };
    });
    const share = (part.explained || []).map((value) => `${(100 * value).toFixed(0)} %`);
    const axes = part.explained ? [`first component (${share[0]} of the variance)`, `second (${share[1]})`] : ["t-SNE, first axis (no unit)", "second axis (no unit)"];
    chart(part.explained ? grid : body, traces, { title: plain(run.name), x: axes[0], y: axes[1], height: part.explained ? 440 : 520,
      hovermode: "closest", xaxis: { range: range("x"), zeroline: false }, yaxis: { range: range("y"), zeroline: false } });
    if (part.clips.length && index === REPORT.runs.findIndex((other) => other.projection.clips)) {
      body.append(node("p", { class: "what", id: "clip-numbers", text: `Clips: ${part.clips.map((clip, i) => `${i + 1} ${clip}`).join(", ")}.` }));
    }
    const spread = part.spread;
    body.append(node("p", { class: "what", text: spread.undefined ? `${run.name}: ${spread.undefined}`
      : `${run.name}: mean cosine distance within a tag ${number(spread.dispersion)}, between tags ${number(spread.separation)}.` }));
  });
}

function distances() {
  const body = bodyOf("distances");
  const parts = [];
  const rows = [["run", "clips", "pairs", "mean distance", "median", "within a clip (mean of clips)", "between clips"]];
  eachRun("distances", (part, run, index) => {
    const centres = part.edges.slice(1).map((edge, i) => (edge + part.edges[i]) / 2);
    parts.push({ x: centres, y: part.share, width: part.edges[1] - part.edges[0], name: plain(run.name), index });
    rows.push([run.name, part.clips, part.pairs, part.mean, part.median, part.dispersion, part.separation].map((value) => (typeof value === "string" ? value : number(value))));
  });
  if (!parts.length) return;
  const method = REPORT.runs.map((run) => run.distances.method).find(Boolean);
  body.append(node("p", { class: "what", text: `By ${method}. Of at most 100 clips; of a training run the newest completions of each tag, at most 4.` }));
  overlaid(body, parts, { title: "Distances between completions of one clip", x: "cosine distance (0: the same)", y: "share of pairs" });
  body.append(table("Cosine distances where the completions of a clip are a group", rows));
}

// Accuracy

function accuracy() {
  const body = bodyOf("accuracy");
  REPORT.runs.forEach((run, index) => { if (run.accuracy.missing) body.append(missing(index, run.accuracy.missing)); });
  const there = REPORT.runs.map((run, index) => [run, index]).filter(([run]) => !run.accuracy.missing);
  if (!there.length) { markAbsent("accuracy"); return; }
  const trained = there.filter(([run]) => run.accuracy.before);
  const measured = there.filter(([run]) => run.accuracy.accesses);
  if (trained.length) beforeAfter(body, trained);
  if (measured.length) evaluations(body, measured);
}

function beforeAfter(body, runs) {
  const grid = node("div", { class: "grid" });
  body.append(node("p", { class: "what", text: "Sampled accuracy on the test rows, before and after training." }), grid);
  for (const [run, index] of runs) {
    const names = [...REPORT.tags, "all"].filter((tag) => run.accuracy.after[tag] !== undefined);
    const bars = (phase, marker) => ({ type: "bar", name: phase, x: names, y: names.map((tag) => run.accuracy[phase][tag]), marker,
      text: names.map((tag) => number(run.accuracy[phase][tag], 2)), textposition: "outside", cliponaxis: false, textfont: { size: 11 }, hovertemplate: "%{y:.3f}" });
    chart(grid, [bars("before", { color: "#c6cdd4", line: { color: "#57606a", width: 1 } }),
      bars("after", { color: names.map((tag) => TAG_STYLE[tag].color) })],
      { title: plain(run.name), x: "tag", y: "accuracy", barmode: "group", yaxis: { range: [0, 1.1] } });
    const questions = run.accuracy.questions;
    if (questions) body.append(node("p", { class: "what", text: `${run.name}: ${questions.all} questions (${names.filter((n) => n !== "all").map((n) => `${n} ${questions[n]}`).join(", ")}).` }));
  }
}

function evaluations(body, runs) {
  const accesses = [...new Set(runs.flatMap(([run]) => Object.keys(run.accuracy.accesses)))];
  let access = accesses[0];
  const estimates = (run) => { const found = run.accuracy.accesses[access]; return (found && found.accuracy.per_tag) || {}; };
  const made = () => {
    const traces = runs.map(([run, index]) => {
      const found = run.accuracy.accesses[access];
      const all = { ...estimates(run), ...(found && found.accuracy.sample_mean ? { all: found.accuracy.sample_mean } : {}) };
      const names = [...REPORT.tags, "all"].filter((tag) => all[tag]);
      const side = (end, sign) => names.map((tag) => (all[tag][end] === null ? 0 : sign * (all[tag][end] - all[tag].value)));
      return { type: "bar", name: plain(run.name), x: names, y: names.map((tag) => all[tag].value), customdata: names.map((tag) => all[tag].count),
        error_y: { type: "data", symmetric: false, array: side("high", 1), arrayminus: side("low", -1), color: "#1b1f24", thickness: 1.2, width: 4 },
        marker: { color: names.map((tag) => TAG_STYLE[tag].color), opacity: index ? 0.55 : 1, line: { color: RUN_STYLE[index].color, width: runs.length > 1 ? 2 : 0 },
          pattern: index ? { shape: "/", size: 6, solidity: 0.25 } : undefined },
        hovertemplate: "%{y:.3f}, %{customdata} questions" };
    });
    const confidence = runs[0][0].accuracy.confidence;
    const told = confidence ? `, ${Math.round(100 * confidence)} % intervals` : "";
    return [traces, { title: `Accuracy (pass@1), access ${plain(access)}${told}`, x: "tag", y: "accuracy", barmode: "group", height: 380,
      legend: runs.length > 1, yaxis: { range: [0, 1.05] } }];
  };
  if (accesses.length > 1) {
    body.append(node("div", { class: "controls" }, chooser("Access (what the model was fed):", accesses.map((a) => [a, a]), access,
      (value) => { access = value; redraw(place, ...made()); })));
  }
  const place = chart(body, ...made());
  if (accesses.length > 1) ablation(body, runs);
  for (const [run, index] of runs) numbers(body, run, index);
  compared(body);
  decided(body, runs);
}

function ablation(body, runs) {
  const grid = node("div", { class: "grid" });
  body.append(node("h3", { text: "Accuracy by what was fed" }), grid);
  for (const [run] of runs) {
    const accesses = Object.keys(run.accuracy.accesses);
    const value = (access, tag) => { const found = run.accuracy.accesses[access].accuracy.per_tag; return found && found[tag] ? found[tag].value : null; };
    const z = REPORT.tags.map((tag) => accesses.map((access) => value(access, tag)));
    chart(grid, [{ type: "heatmap", x: accesses, y: REPORT.tags, z, zmin: 0, zmax: 1, xgap: 2, ygap: 2, hoverongaps: false,
      text: z.map((row) => row.map((v) => (v === null ? "" : v.toFixed(2)))), texttemplate: "%{text}", textfont: { size: 11 },
      colorscale: [[0, "#fbf7ef"], [0.5, "#7fbf9b"], [1, "#0b4f38"]], colorbar: { thickness: 10, outlinewidth: 0 },
      hovertemplate: "questions of tag %{y}, fed %{x}: %{z:.3f}<extra></extra>" }],
      { title: plain(run.name), x: "access", y: "tag of the question", legend: false, hovermode: "closest", height: 360,
        xaxis: { type: "category", showgrid: false }, yaxis: { autorange: "reversed", showgrid: false } });
  }
}

function withInterval(estimate) {
  if (!estimate) return "–";
  if (estimate.undefined) return "undefined";
  const known = estimate.low !== null && estimate.low !== undefined;
  return estimate.value.toFixed(3) + (known ? ` [${estimate.low.toFixed(3)}, ${estimate.high.toFixed(3)}]` : "");
}

function numbers(body, run, index) {
  body.append(runTitle(index));
  const rows = [["access", "all questions", "mean of tags", "if errors were wrong … right", "modality gap (by questions)", "gap (by tags)", "scored", "clips", "errors", "not gradable", "lacking a signal", "pass@k"]];
  for (const [access, found] of Object.entries(run.accuracy.accesses)) {
    const gap = (weighting) => { const g = found.modality_gap[weighting]; return g.undefined ? "undefined" : withInterval(g.mean); };
    const bounds = found.bounds.sample_mean;
    const passes = Object.entries(found.pass_at_k).map(([k, estimate]) => `${k}: ${estimate.undefined ? "–" : estimate.value.toFixed(3)}`).join(", ");
    rows.push([access, withInterval(found.accuracy.sample_mean || { undefined: true }), withInterval(found.accuracy.tag_mean),
      bounds ? `${bounds.low.toFixed(3)} … ${bounds.high.toFixed(3)}` : "–", gap("sample"), gap("tag"), String(found.counts.scored),
      String((found.accuracy.sample_mean || {}).clips || "–"), String(found.counts.errors), String(found.counts.unscored), String(found.counts.lacking), passes]);
  }
  body.append(table(null, rows));
  for (const [access, found] of Object.entries(run.accuracy.accesses)) {
    const grades = Object.entries(found.grades || {}).map(([name, value]) => `${name} ${number(value)}`);
    if (grades.length) body.append(node("p", { class: "what", text: `Mean grades, access ${access}: ${grades.join(", ")}.` }));
  }
  const macro = run.accuracy.superset_macro;
  if (macro && !macro.undefined) body.append(node("p", { class: "what", text: `Superset macro (of a question over the inputs that contain its tag, then of the tags): ${withInterval(macro)}.` }));
  const inputs = run.accuracy.over_inputs;
  if (inputs && !inputs.undefined) {
    const tags = Object.entries(inputs.per_tag).map(([tag, estimate]) => `${tag} ${withInterval(estimate)}`).join(", ");
    body.append(node("p", { class: "what", text: `By required tag over all inputs: ${tags}; all ${withInterval(inputs.sample_mean)}.` }));
  }
  const clipped = Object.values(run.accuracy.accesses).some((found) => (found.accuracy.sample_mean || {}).clips);
  body.append(node("p", { class: "what", text: clipped ? "Intervals are over clips: questions about one clip are right or wrong together." : "Intervals are over questions: no clip is named." }));
  const gain = run.accuracy.fusion_gain;
  if (gain) body.append(node("p", { class: "what", text: gain.undefined ? gain.undefined : `Fusion gain (questions that fused signals answer better than single ones): ${withInterval(gain)}.` }));
  const errors = run.accuracy.errors || [];
  if (errors.length) {
    const shown = errors.slice(0, 50).map((e) => [String(e.row), e.id || "", e.access, e.reason, e.path || "", (e.detail || "").slice(0, 500)]);
    const more = errors.length > 50 ? `, the first 50 of ${errors.length}` : "";
    body.append(node("details", {}, node("summary", { text: `Questions with errors${more}` }), table(null, [["row", "id", "access", "reason", "file", "why"], ...shown], { text: true })));
  }
}

function compared(body) {
  const found = REPORT.comparison;
  if (REPORT.runs.length < 2) return;
  body.append(node("h3", { text: `${REPORT.runs[1].name} compared with ${REPORT.runs[0].name}, question by question` }));
  if (found.missing) { body.append(node("p", { class: "missing", text: found.missing })); return; }
  if (!found.same_data) body.append(node("p", { class: "note", text: "The evaluations are not of the same rows: only questions with equal names and tags are compared." }));
  const rows = [["access", "difference", "interval", "p", "test", "better", "worse", "questions", "clips", "left out"]];
  for (const [access, c] of Object.entries(found.accesses)) {
    rows.push(c.missing ? [access, c.missing, "", "", "", "", "", "", "", ""] : [access, (c.difference > 0 ? "+" : "") + c.difference.toFixed(3),
      c.low === null ? "–" : `[${c.low.toFixed(3)}, ${c.high.toFixed(3)}]`, number(c.p_value, 4), c.test, String(c.better), String(c.worse), String(c.count), String(c.clips || "–"), String(c.left_out)]);
  }
  body.append(table("Paired test; p is not corrected for several accesses", rows));
}

function decided(body, runs) {
  const maps = runs.map(([run]) => new Map(run.accuracy.decided_by));
  const keys = [...new Set(maps.flatMap((map) => [...map.keys()]))];
  const rows = [["", ...runs.map(([run]) => run.name)], ...keys.map((key) => [key, ...maps.map((map) => map.get(key) || "–")])];
  const differing = rows.slice(1).filter((row) => new Set(row.slice(1)).size > 1).length;
  const told = runs.length > 1 ? ` (${differing} differences, marked)` : "";
  body.append(node("details", {}, node("summary", { text: `What decides these numbers${told}` }),
    table(null, rows, { text: true, differs: (row) => new Set(row.slice(1)).size > 1 })));
}

tagLegend();
accuracy();
curves();
rewards();
weights();
curriculum();
disparity();
advantages();
positions();
critical();
lengths();
replay();
ratios();
projection();
distances();
