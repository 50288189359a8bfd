// What the trainer logged, over its steps.

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

// A choice of one of several; by its id it is found again when the page has been written anew.
function chooser(id, label, options, chosen, act) {
  const select = node("select", { id, onchange: () => act(select.value) }, ...options.map(([value, text]) => node("option", { value, text })));
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
      place.append(node("div", {}, node("span", { class: `run run-${i}`, text: `${run.name}: ${LINES[i]} lines` })));
    });
  }
}

function curves() {
  const body = bodyOf("curves");
  const names = new Set();
  if (REPORT.runs.every((run) => run.curves.missing)) { leaveOut("curves", REPORT.runs.map((run) => run.curves.missing)); return; }
  REPORT.runs.forEach((run, index) => {
    if (run.curves.missing) { body.append(missing(index, run.curves.missing)); return; }
    Object.keys(run.curves.metrics).forEach((name) => names.add(name));
    const per = run.curves.entries_per_point;
    const long = per > 1 ? ` Each point is the mean of up to ${per} log entries.` : "";
    body.append(node("p", { class: "what", text: `${run.name}: log of ${run.curves.source}.${long}` }));
  });
  body.append(node("p", { class: "hint", text: "Click a point to see the completions of its steps. Faint lines are what was logged, before smoothing." }));
  const state = { metric: "reward", share: Number(SMOOTHED) };
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
  const drawn = []; // what is drawn anew when the smoothing changes
  const add = (parent, made, height) => {
    const place = chart(parent, ...made(height));
    const again = () => redraw(place, ...made(height));
    drawn.push(again);
    return [place, again];
  };
  if (metrics.length) {
    state.metric = metrics[0];
    const ofTag = (tag) => state.metric.replace("\n", `${tag}/`);
    const byTag = [];
    controls.append(chooser("curves-metric", "By tag:", metrics.map((kind) => [kind, label(kind)]), state.metric,
      (value) => { state.metric = value; byTag.forEach((again) => again()); }));
    if (MANY) { // lines of many tags and many runs in one chart could not be told apart
      const grid = node("div", { class: "grid small", id: "curves-by-tag" });
      body.append(grid);
      for (const tag of [...REPORT.tags, "all"].filter((tag) => metrics.some((kind) => names.has(kind.replace("\n", `${tag}/`))))) {
        byTag.push(add(grid, () => [runTraces(ofTag(tag), tag === "all" ? null : tag, state.share),
          { title: `${tag}: ${label(state.metric)}`, x: STEP, y: label(state.metric), height: 300 }])[1]);
      }
    } else {
      const [place, again] = add(body, () => [tagTraces(ofTag, state.share), { title: `${label(state.metric)}, by tag`, x: STEP, y: label(state.metric), height: 420 }]);
      place.id = "curves-by-tag";
      byTag.push(again);
    }
  } else {
    body.append(node("p", { class: "missing", text: "No data by tag: the trainer logs it for rows that have tags." }));
  }
  controls.append(chooser("curves-smoothing", "Smoothing:", SMOOTHING, SMOOTHED, (value) => { state.share = Number(value); drawn.forEach((again) => again()); }));

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
  if (names.has("tag/all/reward_kept")) add(body, () => [scoreTraces(state.share), { title: "Rollout score", x: STEP, y: "mean reward", height: 340 }]);
  body.append(grid);
  for (const [title, unit, wanted, labels] of panels) {
    const there = wanted.filter((name) => names.has(name) && !isEmpty(name));
    if (!there.length) continue;
    // Of many runs each metric has a chart of its own, in which a colour is a run.
    for (const some of MANY ? there.map((name) => [name]) : [there]) {
      const own = MANY && there.length > 1 ? `${title}: ${labels[some[0]]}` : title;
      add(grid, () => [metricTraces(some, labels, state.share), { title: plain(own), x: STEP, y: unit, height: 260, legend: some.length > 1 || REPORT.runs.length > 1 }]);
    }
  }
  const all = [...names].sort();
  let one = all.includes("reward") ? "reward" : all[0];
  const picker = node("div", { class: "controls", id: "any-metric" }, chooser("curves-any", "Any metric of the log:", all.map((name) => [name, name]), one,
    (value) => { one = value; again(); }));
  body.append(picker);
  const [, again] = add(body, () => [metricTraces([one], {}, state.share), { title: plain(one), x: STEP, y: "value, as logged", legend: REPORT.runs.length > 1 }]);
}

// Of modalities that no row has, a line at 0 says nothing.
function isEmpty(name) {
  return name.startsWith("media_tokens/") && REPORT.runs.every((run) => !run.curves.metrics || !run.curves.metrics[name] || run.curves.metrics[name].value.every((value) => !value));
}

// Of what is trained on a solid line, of all that was sampled a dotted one.
function scoreTraces(share) {
  const kinds = [["tag/all/reward_kept", "trained on", "solid"], ["tag/all/reward", "all, with what was filtered out", "dot"]];
  return REPORT.runs.flatMap((run, index) => kinds.flatMap(([name, label, dash]) => {
    const curve = run.curves.metrics && run.curves.metrics[name];
    return curve ? curveTraces(curve, share, { name: label + runSuffix(index), mode: curve.step.length > 2 ? "lines" : "lines+markers", meta: { run: index, tag: null },
      hovertemplate: `%{y:.4g}<extra>${label}${runSuffix(index)}</extra>`, line: { color: RUN_STYLE[index].color, width: 2, dash } }) : [];
  }));
}
