// The viewer of completions. The index of all is in memory; texts are unpacked as they are shown.

const PER_PAGE = 8;
const REPLAYED = 1, HINTED = 2;

let VIEWER = null;

// `remembered` is what the viewer showed before the page was written anew.
async function viewer(remembered) {
  const body = bodyOf("rollouts");
  eachRun("rollouts", () => {});
  const runs = [];
  for (const [index, found] of ROLLOUTS.entries()) {
    if (!found) continue;
    const [data, questions, media] = await Promise.all([unpack(found.index), unpack(found.questions), unpack(found.media)]);
    runs.push({ run: index, ...found, data, questions, media, texts: new Map() });
    const left = found.count < found.total ? ` of ${found.total.toLocaleString("en")}, whole groups left out evenly over the run` : "";
    body.append(node("p", { class: "what", text: `${REPORT.runs[index].name}: ${found.count.toLocaleString("en")} completions${left}, in ${found.groups.toLocaleString("en")} groups.` }));
  }
  if (!runs.length) return;
  VIEWER = new Viewer(body, runs);
  await VIEWER.start(remembered);
}

// The completions of a run that were sampled from one step to another; where none of these was kept, of the nearest step before.
function showSteps(run, first, last, tag) {
  if (!VIEWER || !VIEWER.runs.some((one) => one.run === run)) return;
  VIEWER.lead(run, first, last, tag);
  document.getElementById("rollouts").scrollIntoView();
}

class Viewer {
  constructor(body, runs) {
    this.runs = runs;
    this.page = 0;
    this.asked = 0; // counts searches and pages, so that a slow one does not overwrite a newer one
    this.tags = new Set([...REPORT.tags, ""].filter((tag) => runs.some((run) => run.data.tag.includes(REPORT.tags.indexOf(tag)))));
    this.shownTags = new Set(this.tags);
    this.question = null;
    this.controls = node("div", { class: "controls", id: "rollout-filters" });
    this.slider = this.makeSlider();
    this.above = this.makePager(false);
    this.list = node("div", { id: "rollout-list" });
    this.below = this.makePager(true);
    this.told = node("p", { class: "note", hidden: "" });
    body.append(this.controls, ...(this.slider ? [this.slider] : []), this.told, this.above, this.list, this.below);
    this.makeControls();
  }

  async start(remembered) {
    if (remembered) this.restore(remembered);
    await this.filter();
    if (!remembered || !remembered.first) return;
    const at = this.keys().indexOf(remembered.first); // newer groups may stand before it now
    if (at >= PER_PAGE && at !== this.page * PER_PAGE) { this.page = Math.floor(at / PER_PAGE); await this.show(); }
  }

  // What a reader has chosen; the page that is written anew shows the same.
  remember() {
    const fields = {};
    this.controls.querySelectorAll("input, select").forEach((field) => { fields[field.id] = field.type === "checkbox" ? field.checked : field.value; });
    return { fields, question: this.question, page: this.page, first: this.page && this.found ? this.keys()[this.page * PER_PAGE] : null };
  }

  restore({ fields, question, page }) {
    for (const [id, value] of Object.entries(fields)) {
      const field = document.getElementById(id);
      if (!field) continue;
      if (field.type !== "checkbox") field.value = value;
      else { field.checked = value; if (!value) this.shownTags.delete(id === "tag-none" ? "" : id.slice(4)); }
    }
    Object.assign(this, { question, page });
  }

  // Names of the groups that fit, in order, by which they are found again.
  keys() {
    const seen = new Map();
    return this.found.map(({ run, group }) => {
      const key = [REPORT.runs[run.run].name, run.data.step[group], run.data.access[group], run.questions[run.data.question[group]]].join("\n");
      seen.set(key, (seen.get(key) || 0) + 1);
      return `${key}\n${seen.get(key)}`;
    });
  }

  // Steps

  makeSlider() {
    this.steps = [...new Set(this.runs.flatMap((run) => run.data.step))].filter((step) => step !== null).sort((a, b) => a - b);
    if (this.steps.length < 2) return null;
    const range = node("input", { type: "range", id: "step-slider", min: 0, max: this.steps.length, value: 0, "aria-label": "Step whose completions are shown; all at the left end",
      oninput: () => this.goTo(Number(range.value)) });
    const move = (by) => node("button", { type: "button", text: by < 0 ? "‹" : "›", "aria-label": by < 0 ? "The step before" : "The step after", "data-step": by,
      onclick: () => this.goTo(Math.min(Math.max(Number(range.value) + by, 0), this.steps.length)) });
    const told = node("output", { for: "step-slider" });
    const slider = node("div", { class: "steps" }, node("label", { for: "step-slider", text: "Step" }), move(-1), range, move(1), told);
    slider.update = (at, other) => {
      range.value = at;
      told.textContent = other || (at ? `step ${this.steps[at - 1]} (${at} of ${this.steps.length} kept)` : `all ${this.steps.length} steps kept`);
    };
    return slider;
  }

  goTo(at) {
    this.firstStep.value = this.lastStep.value = at ? this.steps[at - 1] : "";
    this.page = 0;
    this.filter();
  }

  lead(run, first, last, tag) {
    this.clearFields();
    if (this.inRun) this.inRun.value = String(run);
    const own = [...new Set(this.runs.find((one) => one.run === run).data.step)].filter((step) => step !== null).sort((a, b) => a - b);
    if (!own.some((step) => step >= first && step <= last)) {
      const near = own.filter((step) => step <= last).pop() ?? own[0];
      this.told.textContent = `No completions were kept of ${first === last ? `step ${first}` : `steps ${first} to ${last}`}; shown are those of step ${near}.`;
      this.told.hidden = false;
      first = last = near;
    }
    this.firstStep.value = first;
    this.lastStep.value = last;
    if (tag && this.tags.has(tag)) {
      this.shownTags = new Set([tag]);
      this.controls.querySelectorAll("input[type=checkbox]").forEach((box) => { box.checked = box.id === `tag-${tag}`; });
    }
    this.filter(true);
  }

  makeControls() {
    const act = () => { this.page = 0; this.filter(); };
    const field = (label, input, name) => { input.id = `filter-${name}`; this[name] = input; input.addEventListener("change", act); return node("label", {}, label, input); };
    const select = (options) => node("select", {}, ...options.map(([value, text]) => node("option", { value, text })));
    if (this.runs.length > 1) this.controls.append(field("Run", select([["", "all"], ...this.runs.map((run) => [String(run.run), REPORT.runs[run.run].name])]), "inRun"));
    const tags = node("fieldset", { class: "tags", "aria-label": "Tags" });
    for (const tag of this.tags) {
      const box = node("input", { type: "checkbox", id: `tag-${tag || "none"}` });
      box.checked = true;
      box.addEventListener("change", () => { if (box.checked) this.shownTags.add(tag); else this.shownTags.delete(tag); act(); });
      tags.append(node("label", {}, box, tagBadge(tag)));
    }
    this.controls.append(tags);
    const bound = (label, name, more) => field(label, node("input", { type: "number", step: "any", placeholder: "any", ...more }), name);
    this.controls.append(bound("Reward from", "least"), bound("to", "most"));
    const stepped = this.runs.some((run) => run.data.step.some((step) => step !== null));
    if (stepped) this.controls.append(bound("Step from", "firstStep"), bound("to", "lastStep"));
    const asked = REPORT.runs.flatMap((run) => Object.keys(run.accuracy.accesses || {}));
    const accesses = [...new Set([...asked, ...this.runs.flatMap((run) => run.accesses)])];
    if (accesses.length) {
      this.controls.append(field("Access", select([["", "any"], ...accesses.map((a) => [a, a])]), "access"));
      this.access.value = accesses[0];
    }
    const flagged = (flag) => this.runs.some((run) => run.data.flags.some((flags) => flags & flag));
    const kinds = [["", "all"]];
    if (flagged(REPLAYED)) kinds.push(["fresh", "fresh alone"], ["replayed", "replayed"]);
    if (flagged(HINTED)) kinds.push(["hinted", "with a hint"]);
    if (kinds.length > 1) this.controls.append(field("Completions", select(kinds), "kind"));
    this.controls.append(field("Groups", select([["", "all"], ["differ", "whose rewards differ"], ["alike", "whose rewards are equal"]]), "spread"));
    this.controls.append(field("Sort", select([...(stepped ? [["late", "latest first"], ["early", "earliest first"]] : [["early", "in order"]]),
      ["high", "highest mean reward"], ["low", "lowest mean reward"]]), "sort"));
    this.controls.append(field("Text contains", node("input", { type: "search" }), "text"));
    this.reset = node("button", { type: "button", text: "Show all", onclick: () => this.clear() });
    this.controls.append(this.reset);
  }

  clear() {
    this.clearFields();
    this.filter();
  }

  clearFields() {
    for (const name of ["inRun", "least", "most", "firstStep", "lastStep", "access", "kind", "spread", "text"]) if (this[name]) this[name].value = "";
    this.shownTags = new Set(this.tags);
    this.controls.querySelectorAll("input[type=checkbox]").forEach((box) => { box.checked = true; });
    this.question = null;
    this.page = 0;
  }

  // Which completions fit, by their index alone.
  fits(run, group, line) {
    const { data } = run;
    const tag = data.tag[line] < 0 ? "" : REPORT.tags[data.tag[line]];
    if (!this.shownTags.has(tag)) return false;
    const reward = data.reward[line];
    if (this.bounds.least !== null && !(reward !== null && reward >= this.bounds.least)) return false;
    if (this.bounds.most !== null && !(reward !== null && reward <= this.bounds.most)) return false;
    const kind = this.kind ? this.kind.value : "";
    if (kind === "fresh" && data.flags[line] & REPLAYED) return false;
    if (kind === "replayed" && !(data.flags[line] & REPLAYED)) return false;
    return !(kind === "hinted" && !(data.flags[line] & HINTED));
  }

  async filter(led = false) {
    const asked = ++this.asked;
    if (!led) this.told.hidden = true;
    const value = (input) => (input && input.value !== "" ? Number(input.value) : null);
    this.bounds = { least: value(this.least), most: value(this.most), first: value(this.firstStep), last: value(this.lastStep) };
    if (this.slider) {
      const { first, last } = this.bounds;
      const told = (step, otherwise) => (step === null ? otherwise : step);
      this.slider.update(first === last && first !== null ? this.steps.indexOf(first) + 1 : 0,
        first !== last ? `steps ${told(first, this.steps[0])} to ${told(last, this.steps[this.steps.length - 1])}` : null);
    }
    const found = [];
    let completions = 0;
    for (const run of this.runs) {
      if (this.inRun && this.inRun.value !== "" && Number(this.inRun.value) !== run.run) continue;
      const { data } = run;
      const access = this.access && this.access.value;
      for (let group = 0; group < data.first.length; group++) {
        const step = data.step[group];
        if (this.bounds.first !== null && !(step >= this.bounds.first)) continue;
        if (this.bounds.last !== null && !(step !== null && step <= this.bounds.last)) continue;
        if (access && run.accesses[data.access[group]] !== access) continue;
        if (this.question !== null && run.questions[data.question[group]] !== this.question) continue;
        const start = data.first[group], end = group + 1 < data.first.length ? data.first[group + 1] : data.tag.length;
        let fitting = 0, sum = 0, given = 0, low = Infinity, high = -Infinity;
        for (let line = start; line < end; line++) {
          if (this.fits(run, group, line)) fitting += 1;
          const reward = data.reward[line];
          if (reward !== null) { sum += reward; given += 1; low = Math.min(low, reward); high = Math.max(high, reward); }
        }
        if (!fitting) continue;
        if (this.spread.value === "differ" && !(high - low > 1e-6)) continue;
        if (this.spread.value === "alike" && !(given && high - low <= 1e-6)) continue;
        completions += fitting;
        found.push({ run, group, start, end, mean: given ? sum / given : null, order: found.length });
      }
    }
    const rank = { late: (a, b) => (b.run.data.step[b.group] - a.run.data.step[a.group]) || a.order - b.order,
      early: (a, b) => (a.run.data.step[a.group] - b.run.data.step[b.group]) || a.order - b.order,
      high: (a, b) => (b.mean ?? -Infinity) - (a.mean ?? -Infinity) || a.order - b.order,
      low: (a, b) => (a.mean ?? Infinity) - (b.mean ?? Infinity) || a.order - b.order };
    found.sort(rank[this.sort.value]);
    const wanted = this.text.value.toLowerCase();
    const kept = wanted ? await this.search(found, wanted, asked) : found;
    if (asked !== this.asked) return;
    this.found = kept;
    this.completions = wanted ? null : completions;
    await this.show();
  }

  async search(found, wanted, asked) {
    const kept = [];
    for (const [i, item] of found.entries()) {
      if (i % 2000 === 0) this.pagers(`Searching, ${Math.round((100 * i) / found.length)} % …`, true);
      const texts = await this.textsOf(item, found.length > 4000);
      if (asked !== this.asked) return [];
      const fitting = texts.completions.some((completion, k) => this.fits(item.run, item.group, item.start + k) && completion.text.toLowerCase().includes(wanted));
      if (fitting || (texts.prompt || "").toLowerCase().includes(wanted)) kept.push(item);
    }
    return kept;
  }

  async textsOf({ run, group }, many = false) {
    const number = run.data.chunk[group];
    if (!run.texts.has(number)) {
      if (run.texts.size >= (many ? 300 : 40)) run.texts.delete(run.texts.keys().next().value);
      run.texts.set(number, await unpack(document.getElementById(`chunk-${run.run}-${number}`).textContent));
    }
    const chunk = run.texts.get(number);
    return chunk.groups[group - chunk.first];
  }

  get pages() { return this.found ? Math.max(1, Math.ceil(this.found.length / PER_PAGE)) : 1; }

  // Made once and then changed: a button that is replaced while it is pressed gets no click.
  makePager(below) {
    const go = (page) => { this.page = Math.min(Math.max(page, 0), this.pages - 1); this.show(); if (below) this.above.scrollIntoView(); };
    const goals = { First: () => 0, Back: () => this.page - 1, Next: () => this.page + 1, Last: () => this.pages - 1 };
    const buttons = Object.entries(goals).map(([text, goal]) => node("button", { type: "button", text, onclick: () => go(goal()), "data-go": text.toLowerCase() }));
    const at = node("input", { type: "number", min: 1, "aria-label": "Page", onchange: () => go((Number(at.value) || 1) - 1) });
    const of = node("span"), status = node("span", { class: "status" });
    const question = node("button", { type: "button", class: "link", onclick: () => { this.question = null; this.page = 0; this.filter(); } });
    const pager = node("div", { class: "pager" }, ...buttons.slice(0, 2), node("label", {}, "page", at, of), ...buttons.slice(2), status, question);
    pager.update = (text, searching) => {
      const there = (page) => page >= 0 && page < this.pages && page !== this.page;
      Object.values(goals).forEach((goal, i) => { buttons[i].disabled = searching || !there(goal()); });
      Object.assign(at, { max: this.pages, value: this.page + 1, disabled: searching });
      of.textContent = `of ${this.pages.toLocaleString("en")}`;
      status.textContent = text;
      Object.assign(question, { hidden: this.question === null, textContent: `only question ${this.question}: show all questions` });
    };
    return pager;
  }

  // While a search runs no page can be turned: to show one would end the search.
  pagers(text, searching = false) { for (const pager of [this.above, this.below]) pager.update(text, searching); }

  async show() {
    const asked = ++this.asked;
    const items = this.found.slice(this.page * PER_PAGE, (this.page + 1) * PER_PAGE);
    const shown = [];
    for (const item of items) shown.push(this.groupNode(item, await this.textsOf(item)));
    if (asked !== this.asked) return;
    const count = this.completions === null ? "" : `, ${this.completions.toLocaleString("en")} completions`;
    this.pagers(`${this.found.length.toLocaleString("en")} groups${count} fit`);
    if (!shown.length) shown.push(node("p", { class: "missing", text: "No completion fits these filters." }));
    this.list.replaceChildren(...shown);
    this.list.dataset.drawn = Number(this.list.dataset.drawn || 0) + 1;
  }

  groupNode(item, texts) {
    const { run, group, start, end } = item;
    const tag = run.data.tag[start] < 0 ? "" : REPORT.tags[run.data.tag[start]];
    const question = run.questions[run.data.question[group]];
    const head = node("header", {});
    if (REPORT.runs.length > 1) head.append(node("span", { class: `run run-${run.run}`, text: REPORT.runs[run.run].name }));
    head.append(tagBadge(tag));
    const step = run.data.step[group];
    if (step !== null) head.append(node("span", { text: `step ${step}` }));
    if (run.data.visit[group] > 1) head.append(node("span", { class: "badge", text: `drawn again in this rollout (${run.data.visit[group]})` }));
    if (run.accesses.length) head.append(node("span", { text: `access ${run.accesses[run.data.access[group]]}` }));
    head.append(node("button", { type: "button", class: "link", text: question, title: "Show this question alone, at all steps and in all runs",
      onclick: () => { this.question = question; this.page = 0; this.filter(); } }));
    head.append(node("span", { text: `mean reward ${number(item.mean)}` }), node("span", { class: "status", text: `${end - start} completions` }));
    const asked = node("div", { class: "asked" });
    asked.append(node("div", { class: "prompt" }, texts.prompt === null ? node("p", { class: "what", text: "The prompt is not in the files of the run." }) : node("pre", { text: texts.prompt }),
      texts.solution !== null ? node("p", { class: "what", text: `Solution: ${texts.solution}` }) : null));
    if (texts.media.length) asked.append(node("div", { class: "media" }, ...texts.media.map((i) => mediaNode(run.media[i]))));
    const completions = node("div", { class: "completions" });
    texts.completions.forEach((completion, k) => completions.append(this.completionNode(item, completion, start + k)));
    return node("article", { class: "group" }, head, asked, completions);
  }

  completionNode(item, completion, line) {
    const { run, group } = item;
    const { data } = run;
    const scores = node("div", { class: "scores" }, node("span", { class: "reward", text: `reward ${number(data.reward[line])}` }));
    run.rewards.forEach((name, i) => scores.append(node("span", { text: `${name.replace(/_reward$/, "")} ${number(completion.rewards[i])}` })));
    if (completion.advantage !== undefined) scores.append(node("span", { text: `advantage ${number(completion.advantage)}` }));
    if (completion.tokens !== undefined) scores.append(node("span", { text: `${completion.tokens} tokens` }));
    if (completion.answer !== undefined) scores.append(node("span", { text: `answer ${completion.answer}` }));
    if (data.flags[line] & REPLAYED) scores.append(node("span", { class: "badge", text: completion.writtenAt === undefined ? "replayed" : `replayed, of step ${completion.writtenAt}` }));
    if (data.flags[line] & HINTED) scores.append(node("span", { class: "badge", text: "with a hint" }));
    if (completion.cut) scores.append(node("span", { class: "badge", text: "cut at the longest length" }));
    const made = node("div", { class: this.fits(run, group, line) ? "completion" : "completion dim" });
    const reward = data.reward[line];
    if (reward !== null) {
      const filled = node("span");
      filled.style.width = `${100 * Math.min(Math.max(reward, 0), 1)}%`;
      made.append(node("div", { class: "bar", title: `reward ${number(reward)}` }, filled));
    }
    made.append(scores, node("pre", { text: completion.text || "(empty)" }));
    return made;
  }
}

function mediaNode(entry) {
  const caption = node("figcaption", { text: entry.name });
  if (!entry.href && entry.kind !== "subtitle" && !(entry.kind === "image" && entry.thumb)) return node("figure", {}, node("figcaption", { text: `${entry.kind}: ${entry.name} (${entry.why})` }));
  if (entry.kind === "subtitle") {
    const text = entry.text === undefined ? `(${entry.why})` : entry.text;
    return node("figure", {}, node("pre", { text }), entry.href ? node("figcaption", {}, node("a", { href: entry.href, text: entry.name })) : caption);
  }
  if (entry.kind === "image") {
    const gone = () => { caption.textContent = `${entry.name} (cannot be shown: the file has moved, or this browser does not know its format)`; };
    const picture = node("img", { src: entry.thumb || entry.href, alt: entry.name, loading: "lazy", onerror: gone });
    return node("figure", {}, entry.href ? node("a", { href: entry.href, target: "_blank" }, picture) : picture, caption);
  }
  const failed = () => { caption.textContent = `${entry.name} (cannot be played: the file has moved, or this browser does not know its format)`; };
  const player = node(entry.kind, { controls: "", preload: entry.thumb || entry.kind === "audio" ? "none" : "metadata", src: entry.href, poster: entry.thumb, onerror: failed });
  return node("figure", {}, player, caption);
}
