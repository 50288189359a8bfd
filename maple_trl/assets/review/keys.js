// Keys, clicks within the page's own parts, and the time a row has been looked at.
(() => {
  "use strict";
  const TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"];
  const KEYS = {
    Enter: "accept", e: "edit", x: "reject", u: "undo", z: "undo", r: "reveal",
    ArrowLeft: "previous", p: "previous", ArrowRight: "next", n: "unreviewed",
  };
  let picked = null; // what was clicked, for the next action
  let waiting = 0; // since when an action is under way
  let row = null, entry = null, seconds = 0, since = null; // the row that is shown, and how long it has been looked at

  const find = (selector) => document.querySelector(selector);
  const shown = (element) => element !== null && element.offsetParent !== null;

  function count() {
    const now = performance.now();
    if (since !== null) seconds += (now - since) / 1000;
    since = document.hidden ? null : now;
  }

  window.mapleReview = {
    // What the page sends as its view: that of the row which is seen, with the time, and what was clicked. Gradio's own
    // values may be those of the row before.
    stamp() {
      count();
      const made = JSON.stringify({ ...view(), seconds, pick: picked });
      picked = null;
      return made;
    },
    fromAddress(view, reviewer, tag, show) {
      const given = new URLSearchParams(location.search);
      const row = given.get("row");
      return [row ? JSON.stringify({ row }) : "", given.get("reviewer") || reviewer, given.get("tag") || tag, given.get("show") || show];
    },
  };

  function act(name, pick = null) {
    if (waiting && performance.now() - waiting < 10000) return;
    const button = find(`#do-${name}`);
    if (button === null || button.disabled) return;
    waiting = performance.now();
    picked = pick;
    button.click();
  }

  // What is seen: the card says it, and the bar where a form stands in the card's place.
  function view() {
    const text = (find("#card") ?? find(".bar"))?.dataset.view;
    return text ? JSON.parse(text) : {};
  }

  // What the server has answered. Its parts are painted one after the other.

  function answered() {
    const bar = find(".bar"), sent = bar === null ? {} : JSON.parse(bar.dataset.view), card = find("#card");
    if (card === null ? !shown(find("#edit-panel")) && sent.row : view().turn !== sent.turn) {
      setTimeout(answered, 10);
      return;
    }
    waiting = 0;
    const active = document.activeElement;
    if (active !== null && active !== document.body && active.closest("#tag-filter, #show-filter, #actions, #player, #card-place")) active.blur();
    if (card !== null && (card.dataset.row !== row || card.dataset.entry !== entry)) {
      ({ row, entry } = card.dataset);
      seconds = 0; // since the row was shown, or last decided on
      since = document.hidden ? null : performance.now();
    }
    for (const tag of TAGS) {
      const button = find(`#do-tag-${tag}`);
      button?.classList.toggle("proposed", tag === card?.dataset.tag);
      button?.classList.toggle("chosen", tag === card?.dataset.decided);
    }
    remember();
    document.documentElement.dataset.turn = bar.dataset.turn;
  }

  // The address says what is shown, so that a page that is loaded again shows it again.
  function remember() {
    const address = new URL(location.href);
    const value = (selector) => find(`${selector} input, ${selector} textarea`)?.value;
    address.searchParams.set("reviewer", value("#reviewer") || "");
    address.searchParams.set("row", row ?? "");
    for (const name of ["tag", "show"]) address.searchParams.set(name, find(".bar").dataset[name]);
    history.replaceState(null, "", address);
  }

  let turn = null;
  function look() {
    const bar = find(".bar");
    if (bar !== null && bar.dataset.turn !== turn) {
      turn = bar.dataset.turn;
      setTimeout(answered, 0);
    }
    const reason = find("#reason textarea, #reason input");
    if (shown(reason) && reason.dataset.seen !== turn) {
      reason.dataset.seen = turn;
      reason.focus();
    }
  }

  document.addEventListener("visibilitychange", count);
  // Gradio may run this before or after the page's body is there.
  new MutationObserver(look).observe(document, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["data-turn", "class"],
  });

  // A clip that cannot be played says why.
  document.addEventListener("error", async (event) => {
    const clip = event.target;
    if (!(clip instanceof HTMLMediaElement) || clip.id !== "clip") return;
    const place = find("#clip-problem");
    const answer = await fetch(clip.src, { headers: { Range: "bytes=0-0" } });
    if (place === null) return;
    place.textContent = answer.ok ? "this browser cannot play the clip" : await answer.text();
    place.hidden = false;
    clip.hidden = true;
  }, true);

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-look], [data-answer], [data-reason]");
    if (button instanceof HTMLButtonElement) {
      const { look, answer, reason } = button.dataset;
      if (look) act("look", look);
      else if (answer) act("answer", answer);
      else act("reject-now", reason);
    }
  });

  document.addEventListener("keydown", (event) => {
    const at = event.target;
    const panel = shown(find("#edit-panel")) ? "edit" : shown(find("#reject-panel")) ? "reject" : null;
    if (event.key === "Escape") {
      if (panel) act(`cancel-${panel}`);
      else at.blur?.();
      return;
    }
    if (panel === "edit") {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        at.blur?.(); // so that Gradio has what was typed last
        setTimeout(() => act("save"), 50);
      }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1];
    if (panel === "reject") {
      const reason = at.closest?.("#reason") && at.value === "" && digit ? document.querySelectorAll("[data-reason]")[digit - 1] : null;
      if (reason) {
        event.preventDefault();
        act("reject-now", reason.dataset.reason);
      }
      return;
    }
    if (at.closest?.("input, textarea, select, [contenteditable], [role=listbox]")) return;
    const letter = event.shiftKey && /^[a-z]$/i.test(event.key) ? event.key.toUpperCase() : null;
    let done = true;
    if (digit && digit <= TAGS.length) event.shiftKey ? act("look", TAGS[digit - 1]) : act(`tag-${TAGS[digit - 1]}`);
    else if (letter) done = find(`[data-answer="${letter}"]`) !== null && (act("answer", letter), true);
    else if (event.key === " ") {
      const clip = find("#clip");
      if (clip) clip.paused ? clip.play() : clip.pause();
    } else if (!event.shiftKey && KEYS[event.key] && !event.repeat) act(KEYS[event.key]);
    else done = false;
    if (done) event.preventDefault();
  });
})();
