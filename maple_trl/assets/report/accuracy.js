// Accuracies: before and after training, or of evaluations with their intervals; and how evaluations differ.

function accuracy() {
  const body = bodyOf("accuracy");
  const there = REPORT.runs.map((run, index) => [run, index]).filter(([run]) => !run.accuracy.missing);
  eachRun("accuracy", () => {});
  if (!there.length) return;
  const trained = there.filter(([run]) => run.accuracy.before);
  const measured = there.filter(([run]) => run.accuracy.accesses);
  if (trained.length) beforeAfter(body, trained);
  if (measured.length) evaluations(body, measured);
}

function beforeAfter(body, runs) {
  const grid = node("div", { class: "grid" });
  body.append(node("p", { class: "what", text: "Sampled accuracy on the test rows, before and after training." }), grid);
  for (const [run] of runs) {
    const names = [...REPORT.tags, "all"].filter((tag) => run.accuracy.after[tag] !== undefined);
    const bars = (phase, marker) => ({ type: "bar", name: phase, x: names, y: names.map((tag) => run.accuracy[phase][tag]), marker,
      text: names.map((tag) => number(run.accuracy[phase][tag], 2)), textposition: "outside", textangle: 0, cliponaxis: false, textfont: { size: 11 }, hovertemplate: "%{y:.3f}" });
    chart(grid, [bars("before", { color: "var(--pale)", line: { color: "var(--pale-edge)", width: 1 } }),
      bars("after", { color: names.map((tag) => TAG_STYLE[tag].color) })],
      { title: plain(run.name), x: "tag", y: "accuracy", barmode: "group", yaxis: { range: [0, 1.1] } });
    const questions = run.accuracy.questions;
    if (questions) body.append(node("p", { class: "what", text: `${run.name}: ${questions.all} questions (${names.filter((n) => n !== "all").map((n) => `${n} ${questions[n]}`).join(", ")}).` }));
  }
}

function evaluations(body, runs) {
  const accesses = [...new Set(runs.flatMap(([run]) => Object.keys(run.accuracy.accesses)))];
  let access = accesses[0];
  const estimates = (run) => {
    const found = run.accuracy.accesses[access];
    return found ? { ...found.accuracy.per_tag, ...(found.accuracy.sample_mean && !found.accuracy.sample_mean.undefined ? { all: found.accuracy.sample_mean } : {}) } : {};
  };
  const confidence = runs[0][0].accuracy.confidence;
  const told = confidence ? `, ${Math.round(100 * confidence)} % intervals` : "";
  const made = () => {
    const traces = runs.map(([run, index]) => {
      const all = estimates(run);
      const names = [...REPORT.tags, "all"].filter((tag) => all[tag]);
      const side = (end, sign) => names.map((tag) => (all[tag][end] === null ? 0 : sign * (all[tag][end] - all[tag].value)));
      return { type: "bar", name: plain(run.name), x: names, y: names.map((tag) => all[tag].value), customdata: names.map((tag) => all[tag].count),
        error_y: { type: "data", symmetric: false, array: side("high", 1), arrayminus: side("low", -1), color: "var(--ink)", thickness: 1.2, width: 4 },
        marker: MANY ? { color: RUN_STYLE[index].color } : { color: names.map((tag) => TAG_STYLE[tag].color), opacity: index ? 0.55 : 1,
          line: { color: RUN_STYLE[index].color, width: runs.length > 1 ? 2 : 0 }, pattern: index ? { shape: "/", size: 6, solidity: 0.25 } : undefined },
        hovertemplate: "%{y:.3f}, %{customdata} questions" };
    });
    return [traces, { title: `Accuracy (pass@1), access ${plain(access)}${told}`, x: "tag", y: "accuracy", barmode: "group", height: 380,
      legend: runs.length > 1, yaxis: { range: [0, 1.05] } }];
  };
  const numbers = node("div", { id: "intervals" });
  const fill = () => numbers.replaceChildren(intervals(runs, estimates, access, told));
  if (accesses.length > 1) {
    body.append(node("div", { class: "controls" }, chooser("accuracy-access", "Access (what the model was fed):", accesses.map((a) => [a, a]), access,
      (value) => { access = value; redraw(place, ...made()); fill(); })));
  }
  const place = chart(body, ...made());
  body.append(numbers);
  fill();
  if (accesses.length > 1) ablation(body, runs);
  for (const [run, index] of runs) measures(body, run, index);
  compared(body);
}

// What the bars show, in numbers: a row a tag, a column a run.
function intervals(runs, estimates, access, told) {
  const of = runs.map(([run]) => estimates(run));
  const tags = [...REPORT.tags, "all"].filter((tag) => of.some((found) => found[tag]));
  const cell = (estimate) => (!estimate ? "–" : estimate.undefined ? "undefined" : intervalNode(estimate));
  const count = (tag) => [...new Set(of.map((found) => (found[tag] ? found[tag].count : "–")))].join(" / ");
  return table(`Accuracy in %${told}, access ${access}`, [["tag", ...runs.map(([run]) => run.name), "questions"],
    ...tags.map((tag) => [tagBadge(tag), ...of.map((found) => cell(found[tag])), count(tag)])], { left: true });
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
      colorscale: [[0, "var(--green-0)"], [0.5, "var(--green-1)"], [1, "var(--green-2)"]], colorbar: { thickness: 10, outlinewidth: 0 },
      hovertemplate: "questions of tag %{y}, fed %{x}: %{z:.3f}<extra></extra>" }],
      { title: plain(run.name), x: "access", y: "tag of the question", legend: false, hovermode: "closest", height: 360,
        xaxis: { type: "category", showgrid: false }, yaxis: { autorange: "reversed", showgrid: false } });
  }
}

function withInterval(estimate) {
  if (!estimate) return "–";
  if (estimate.undefined) return "undefined";
  const known = estimate.low !== null && estimate.low !== undefined;
  return percent(estimate.value) + (known ? ` (${(100 * estimate.low).toFixed(1)} to ${(100 * estimate.high).toFixed(1)})` : "");
}

// How many samples have no score, and why; results of older versions do not say.
function ungraded(one) {
  const reasons = Object.entries(one.ungraded_samples || {});
  if (!reasons.length) return "0";
  const all = reasons.reduce((sum, [, count]) => sum + count, 0);
  return `${all} of ${one.completions.all}: ${reasons.map(([reason, count]) => `${count} ${reason}`).join(", ")}`;
}

// A row a measure, a column an access: that is as wide as there are accesses, however many measures there are.
function measures(body, run, index) {
  body.append(runTitle(index));
  const found = Object.values(run.accuracy.accesses);
  const gap = (weighting) => (one) => { const g = one.modality_gap[weighting]; return g.undefined ? "undefined" : withInterval(g.mean); };
  const bounds = ({ bounds: { sample_mean: b } }) => (b ? `${percent(b.low)} to ${percent(b.high)}` : "–");
  const passes = [...new Set(found.flatMap((one) => Object.keys(one.pass_at_k)))];
  const rows = [
    ["all questions", (one) => withInterval(one.accuracy.sample_mean || { undefined: true })],
    ["mean of the tags", (one) => withInterval(one.accuracy.tag_mean)],
    ...passes.map((k) => [`pass@${k}`, (one) => { const e = one.pass_at_k[k]; return !e || e.undefined ? "–" : percent(e.value); }]),
    ["modality gap, by questions", gap("sample")], ["modality gap, by tags", gap("tag")],
    ["questions scored", (one) => String(one.counts.scored)], ["clips", (one) => String((one.accuracy.sample_mean || {}).clips || "–")],
  ];
  const count = (name) => (one) => String(one.counts[name]);
  const odd = [["errors", count("errors")], ["not gradable", count("unscored")], ["lacking a signal", count("lacking")], ["samples not gradable", ungraded]];
  const there = odd.filter(([, value]) => found.some((one) => value(one) !== "0"));
  rows.push(...there);
  if (there.length) rows.push(["all questions, were errors and what is not gradable wrong or right", bounds]);
  else rows.push(["errors, not gradable, lacking a signal", () => "none"]);
  body.append(table(null, [["access", ...Object.keys(run.accuracy.accesses)], ...rows.map(([name, value]) => [name, ...found.map(value)])]));
  for (const [access, one] of Object.entries(run.accuracy.accesses)) {
    const grades = Object.entries(one.grades || {}).map(([name, value]) => `${name} ${number(value)}`);
    if (grades.length) body.append(node("p", { class: "what", text: `Mean grades, access ${access}: ${grades.join(", ")}.` }));
  }
  const macro = run.accuracy.superset_macro;
  if (macro && !macro.undefined) body.append(node("p", { class: "what", text: `Superset macro (of a question over the inputs that contain its tag, then of the tags): ${withInterval(macro)}.` }));
  const inputs = run.accuracy.over_inputs;
  if (inputs && !inputs.undefined) {
    const all = { ...inputs.per_tag, ...(inputs.sample_mean && !inputs.sample_mean.undefined ? { all: inputs.sample_mean } : {}) };
    const cell = (estimate) => (estimate.undefined ? "undefined" : intervalNode(estimate));
    body.append(table("By required tag over all inputs, in %", [["tag", run.name], ...Object.entries(all).map(([tag, estimate]) => [tagBadge(tag), cell(estimate)])], { left: true }));
  }
  const clipped = found.some((one) => (one.accuracy.sample_mean || {}).clips);
  body.append(node("p", { class: "what", text: clipped ? "Intervals are over clips: questions about one clip are right or wrong together." : "Intervals are over questions: no clip is named." }));
  const gain = run.accuracy.fusion_gain;
  if (gain) body.append(node("p", { class: "what", text: gain.undefined ? gain.undefined : `Fusion gain (questions that fused signals answer better than single ones): ${withInterval(gain)}.` }));
  const errors = run.accuracy.errors || [];
  if (errors.length) {
    const shown = errors.slice(0, 50).map((e) => [String(e.row), e.id || "", e.access, e.reason, e.path || "", (e.detail || "").slice(0, 500)]);
    const more = errors.length > 50 ? `, the first 50 of ${errors.length}` : "";
    body.append(node("details", { id: `errors-${index}` }, node("summary", { text: `Questions with errors${more}` }), table(null, [["row", "id", "access", "reason", "file", "why"], ...shown], { text: true })));
  }
}

// A scale around 0 that holds all intervals.
function scaleOf(differences) {
  const most = Math.max(0.01, ...differences.flatMap((d) => [d.difference, d.low, d.high]).filter((v) => v !== null && v !== undefined).map(Math.abs));
  return { from: -most, to: most, zero: 0, signed: true };
}

function compared(body) {
  if (REPORT.runs.length < 2) return;
  const first = REPORT.runs[0].name;
  body.append(node("h3", { text: MANY ? `Compared with ${first}, question by question` : `${REPORT.runs[1].name} compared with ${first}, question by question` }));
  const rows = [];
  for (const found of REPORT.comparisons) {
    const { name } = REPORT.runs[found.run];
    if (found.missing) { body.append(node("p", { class: "missing", text: MANY ? `${name}: ${found.missing}` : found.missing })); continue; }
    if (!found.same_data) body.append(node("p", { class: "note", text: `${MANY ? `${name}: the` : "The"} evaluations are not of the same rows: only questions with equal ${found.by_name ? "names" : "prompts, media, solutions"} and tags are compared.` }));
    for (const [access, c] of Object.entries(found.accesses)) rows.push([name, access, c]);
  }
  const scale = scaleOf(rows.map(([, , c]) => c).filter((c) => !c.missing));
  const lines = rows.map(([name, access, c]) => [...(MANY ? [name] : []), access, ...(c.missing ? [c.missing, "", "", "", ""] : [
    intervalNode({ ...c, value: c.difference }, scale), `${number(c.p_value, 4)} (${c.test})`, `${c.better} better, ${c.worse} worse`,
    `${c.count}${c.clips ? ` on ${c.clips} clips` : ""}`, String(c.left_out)])]);
  if (lines.length) {
    body.append(table("Paired test; p is not corrected for several comparisons", [[...(MANY ? ["run"] : []), "access", "difference in points (95 % interval)", "p",
      `questions better and worse than ${first}`, "questions", "left out"], ...lines], { left: true }));
  }
}
