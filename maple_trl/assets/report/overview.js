// What the runs were told to do, and what they left out.

// Options of all runs; where they differ, they are marked and stand first.
function configuration() {
  const body = bodyOf("configuration");
  eachRun("configuration", () => {});
  const there = REPORT.runs.map((run, index) => [run, index]).filter(([run]) => !run.configuration.missing);
  if (!there.length) return;
  const maps = there.map(([run]) => new Map(run.configuration.options));
  const keys = [...new Set(maps.flatMap((map) => [...map.keys()]))];
  const differing = new Set(keys.filter((key) => new Set(maps.map((map) => map.get(key) ?? "–")).size > 1));
  const head = ["option", ...there.map(([run]) => run.name)];
  const row = (key) => [key, ...maps.map((map) => map.get(key) ?? "–")];
  const marked = { text: true, differs: (cells) => differing.has(cells[0]) };
  if (there.length > 1) {
    body.append(differing.size ? table(`Where the runs differ (${differing.size} of ${keys.length})`, [head, ...[...differing].map(row)], { text: true })
      : node("p", { class: "what", text: "The runs have the same options." }));
  }
  const groups = new Map();
  there.forEach(([run]) => Object.entries(run.configuration.groups).forEach(([name, own]) => groups.set(name, [...new Set([...(groups.get(name) || []), ...own])])));
  const grid = node("div", { class: "grid" });
  for (const [name, own] of groups) grid.append(table(name, [head, ...own.map(row)], marked));
  body.append(grid);
  const list = node("div", {});
  const show = (wanted) => list.replaceChildren(table(null, [head, ...keys.filter((key) => key.includes(wanted.trim())).map(row)], marked));
  const search = node("input", { type: "search", id: "option-search", "aria-label": "Options whose name contains", placeholder: "name contains …", oninput: () => show(search.value) });
  const rest = node("details", { id: "all-options" }, node("summary", { text: `All ${keys.length} options` }), node("div", { class: "controls" }, search), list);
  rest.addEventListener("toggle", () => { if (rest.open && !list.firstChild) show(search.value); });
  body.append(rest);
}

// Quarantined prompts, and whatever else a run says that it left out.
function leftOut() {
  const body = bodyOf("left-out");
  REPORT.runs.forEach((run) => { run["left-out"] = run.left_out; });
  eachRun("left-out", (part, run, index) => {
    if (REPORT.runs.length > 1) body.append(runTitle(index));
    if (part.notes.length) body.append(node("ul", {}, ...part.notes.map((text) => node("li", { text }))));
    const { quarantine } = part;
    if (!quarantine.total) return;
    body.append(table(`${quarantine.total.toLocaleString("en")} prompts in quarantine`, [["reason", "prompts", "rows"], ...quarantine.reasons.map(([reason, prompts, rows]) => [reason, String(prompts), String(rows)])]));
    const more = quarantine.total > quarantine.shown.length ? `, the first ${quarantine.shown.length} of ${quarantine.total.toLocaleString("en")}; quarantine.json names all` : "";
    body.append(node("details", { id: `quarantine-${index}` }, node("summary", { text: `Prompts in quarantine${more}` }),
      table(null, [["data set", "rows", "reason", "file", "why"], ...quarantine.shown.map((entry) => [entry.dataset, entry.rows, entry.reason, entry.path, entry.detail])], { text: true })));
  });
}
