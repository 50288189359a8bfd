// The sections of the page between the curves and the completions.

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
        marker: i === names.length - 1 ? { color: TAG_STYLE[tag].color, line: { width: 0 } } : { color: "var(--pale)", line: { color: "var(--pale-edge)", width: 1 } },
      }));
      traces.push({ type: "scatter", mode: "lines", x, y: REPORT.near_perfect.share, name: "Beta(100, 1)", hovertemplate: "%{y:.3f}",
        line: { color: "var(--ink)", dash: "dot", width: 1.6, shape: "hvh" } });
      chart(grid, traces, { title: `${tag}: ${TAG_STYLE[tag].says}`, x: "reward", y: "share of completions", height: 280, barmode: "group",
        xaxis: { range: [-0.08, 1.08], zeroline: false }, yaxis: { range: [0, 1.05] } });
    }
    body.append(table("Mean reward and difficulty (KL to near-perfect rewards, nats)", rows));
  });
}

// Weights and curriculum

function weights() {
  const body = bodyOf("weights");
  const names = new Set(REPORT.runs.flatMap((run) => (run.weights.missing ? [] : Object.keys(run.weights))));
  eachRun("weights", () => {});
  if (!names.size) return;
  const grid = node("div", { class: MANY ? "grid small" : "grid" });
  body.append(grid);
  const titles = { weight: ["Weight of each tag", "weight in the loss"], priority: ["Priority in the curriculum", "mean of the last difficulties (nats)"],
    kl: ["Difficulty", "KL to near-perfect rewards (nats)"] };
  for (const name of ["weight", "priority", "kl"]) {
    if (!names.has(name)) continue;
    const ofTag = (tag) => `tag/${tag}/${name}`;
    const [title, y] = titles[name];
    const options = { x: STEP, y, height: MANY ? 280 : 360, yaxis: { rangemode: "tozero" } };
    if (!MANY) chart(grid, tagTraces((tag) => (tag === "all" ? "" : ofTag(tag)), Number(SMOOTHED)), { title, ...options });
    else for (const tag of REPORT.tags) {
      const traces = runTraces(ofTag(tag), tag, Number(SMOOTHED));
      if (traces.length) chart(grid, traces, { title: `${title}: ${tag}`, ...options });
    }
  }
}

function curriculum() {
  eachRun("curriculum", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const traces = part.tags.map((tag, row) => ({
      type: "heatmap", x: part.step, y0: row, dy: 1, z: [part.share[row]], zmin: 0, zmax: 1, showscale: false, ygap: 3,
      colorscale: [[0, "var(--dim)"], [1, TAG_STYLE[tag].color]], hovertemplate: `step %{x}, ${tag}: %{z:.0%}<extra></extra>`,
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

// Histograms over each other: of two runs filled, of more as steps of lines.
function overlaid(parent, parts, options, lines = []) {
  const traces = parts.map(({ x, y, width, name, index }) => (MANY ? {
    type: "scatter", mode: "lines", x, y, name, hovertemplate: "%{y:.3f}", line: { color: RUN_STYLE[index].color, width: 2, shape: "hvh", dash: RUN_STYLE[index].dash },
  } : {
    type: "bar", x, y, width, name, hovertemplate: "%{y:.3f}", opacity: 0.6,
    marker: { color: RUN_STYLE[index].color, line: { color: RUN_STYLE[index].color, width: 1 }, pattern: index ? { shape: "/", size: 6, solidity: 0.3 } : undefined },
  }));
  return chart(parent, [...traces, ...lines], { barmode: "overlay", yaxis: { rangemode: "tozero" }, height: 360, ...options });
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
      name: `weight by TAS (${plain(part.shaped.shape.replace(/_/g, " "))}, λ ${part.shaped.lambda})${runSuffix(index)}`, line: { color: "var(--tag-A)", width: 2.4, dash: RUN_STYLE[index].dash } });
    const counts = (found) => Object.entries(found).map(([why, count]) => `${count} ${why}`).join(", ");
    const left = [counts(part.left_out), counts(part.failed)].filter(Boolean).join("; ");
    body.append(node("p", { class: "what", text: `${run.name}: ${part.count} completions, by ${part.judge}, mean position ${number(part.mean)}${left ? `; not counted: ${left}` : ""}.` }));
  });
  if (!parts.length) return;
  overlaid(body, parts, { title: "Positions of critical steps", x: "position in the reasoning (0: beginning, 1: end)", y: "share of completions",
    xaxis: { range: [0, 1], dtick: 0.1 } }, lines);
}

function span(bin) { return bin.from === bin.to ? String(bin.from) : `${bin.from}–${bin.to}`; }

function whiskers(bins, value) {
  const side = (end, sign) => bins.map((bin) => (bin[end] === null ? null : sign * (bin[end] - bin[value])));
  return { type: "data", symmetric: false, array: side("high", 1), arrayminus: side("low", -1), color: "var(--ink)", thickness: 1.2, width: 4 };
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
    marker: { color: RUN_STYLE[index].color, opacity: 0.75, pattern: index && !MANY ? { shape: "/", size: 6, solidity: 0.25 } : undefined } })),
  { title: "Accuracy by completion length", x: "completion tokens", y: plain([...rewards].join(", ")), barmode: "group", height: 360,
    xaxis: { type: "category", categoryorder: "array", categoryarray: order.map(span) }, yaxis: { rangemode: "tozero" } });
  for (const gains of REPORT.length_gains) {
    const versus = `${plain(REPORT.runs[gains.run].name)} − ${plain(REPORT.runs[0].name)}`;
    if (gains.missing) { body.append(node("p", { class: "missing", text: MANY ? `${REPORT.runs[gains.run].name}: ${gains.missing}` : gains.missing })); continue; }
    const { bins } = gains;
    chart(grid, [{ type: "bar", x: bins.map(span), y: bins.map((bin) => bin.difference), error_y: whiskers(bins, "difference"), customdata: bins.map((bin) => bin.count),
      hovertemplate: "%{y:.3f}, %{customdata} questions<extra></extra>", marker: { color: bins.map((bin) => (bin.difference < 0 ? "var(--bad)" : "var(--good)")), opacity: 0.8 } }],
    { title: MANY ? `Accuracy gain by length: ${versus}` : "Accuracy gain by length", x: "completion tokens of the question, mean of both runs", y: `accuracy of ${versus}`,
      legend: false, height: 360, xaxis: { type: "category" } });
    const scale = scaleOf(bins);
    const rows = [["tokens", "gain in points (95 % interval)", "p", "questions", "clips"], ...bins.map((bin) => [span(bin),
      intervalNode({ ...bin, value: bin.difference }, scale), number(bin.p_value, 4), String(bin.count), String(bin.clips || "–")])];
    body.append(table(`Gain by length of ${REPORT.runs[gains.run].name} over ${REPORT.runs[0].name}, access ${gains.access}; p is not corrected for several bins`, rows, { left: true }));
  }
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
    layout: { shapes: [{ type: "line", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: "var(--edge)", width: 1, dash: "dot" } }] } });
}

function replay() {
  eachRun("replay", (part, run, index, body) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    const grid = node("div", { class: "grid" });
    body.append(grid);
    const tierColors = { "replay/size/easy": "var(--tier-easy)", "replay/size/medium": "var(--tier-medium)", "replay/size/hard": "var(--tier-hard)" };
    const tiers = part.tiers.map((name) => {
      const curve = run.curves.metrics[name];
      return { type: "scatter", mode: "lines", stackgroup: "tiers", x: curve.step, y: curve.value, name: name.slice(12),
        hovertemplate: "%{y:.0f}", line: { color: "var(--ink)", width: 0.8 }, fillcolor: tierColors[name] };
    });
    chart(grid, tiers, { title: "Completions in the buffer, by tier", x: STEP, y: "completions" });
    chart(grid, metricTraces(part.ages, { "replay/age_mean": "mean", "replay/age_max": "oldest" }, Number(SMOOTHED), [index]),
      { title: "Age of what is stored", x: STEP, y: "optimizer steps", yaxis: { rangemode: "tozero" } });
    const labels = { "replay/share": "replayed, of all completions", "replay/hit_rate": "served, of what was asked for",
      "replay/of_other_prompts": "replayed of other prompts", "replay/zero_variance_fresh": "groups of equal rewards, fresh alone",
      "replay/zero_variance_mixed": "the same, with replayed", "hint/rate": "groups shown with a hint" };
    chart(grid, metricTraces(part.shares, labels, Number(SMOOTHED), [index]), { title: "What replay brings", x: STEP, y: "share", height: 420, yaxis: { range: [-0.02, 1.05] } });
    const drawn = { "replay/drawn/easy": "easy", "replay/drawn/medium": "medium", "replay/drawn/hard": "hard" };
    if (part.drawn.length) chart(grid, metricTraces(part.drawn, drawn, Number(SMOOTHED), [index]), { title: "What is drawn, by tier", x: STEP, y: "share", yaxis: { range: [-0.02, 1.05] } });
    const terms = { "replay/gradient_on": "of fresh completions", "replay/gradient_off": "of replayed completions" };
    if (part.gradients.length) chart(grid, metricTraces(part.gradients, terms, Number(SMOOTHED), [index]), { title: "Gradients of both terms, before clipping", x: STEP, y: "norm", yaxis: { rangemode: "tozero" } });
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
        line: { color: key === "max" ? "var(--bad)" : RUN_STYLE[index].color, width: line[key][1], dash: key === "max" ? "dot" : "solid" },
        fill: key === "p95" || key === "p50" ? "tonexty" : undefined, fillcolor: "var(--band)" };
    });
    if (part.histogram) ratioHistogram(grid, part.histogram, index);
    chart(grid, traces, { title: "Quantiles of the ratios", x: STEP, y: "ratio (logarithmic)", height: 360, yaxis: { type: "log", dtick: "D2" } });
    if (part.effective.length) {
      chart(grid, metricTraces(part.effective, { "replay/effective_share": "effective sample size" }, Number(SMOOTHED), [index]), { title: "Effective sample size", x: STEP,
        y: "share of the replayed tokens", height: 360, legend: false, yaxis: { range: [0, 1.05] } });
    }
  });
}

function ratioHistogram(grid, { edges, phases }, index) {
  const told = edges.map((edge) => number(edge, 2));
  const bins = [`< ${told[0]}`, ...told.slice(1).map((edge, i) => `${told[i]}–${edge}`), `≥ ${told[told.length - 1]}`];
  const marker = [{ color: "var(--pale)", line: { color: "var(--pale-edge)", width: 1 } }, { color: RUN_STYLE[index].color }];
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
      body.append(node("p", { class: "what", text: `${drawn}${REPORT.runs.length > 1 ? ", the same for all runs" : ""}, of ${part.method}.` }), grid);
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

