"""The review page in a real browser: clips that play, keys, undo, edits, two sessions at once, a killed server, layout."""

import json
import shutil
import signal
import time
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from browsers import chromium, needs_chromium
from PIL import Image
from review_server import Served, needs_gradio
from review_sets import caption_row, question_row, write_rows

from maple_trl.data.review.log import ReviewLog


EVIL = (
    "<img src=x onerror='window.hacked = 1'>${window.hacked = 1}{{value}}</script><script>window.hacked = 1</script>"
)
TAGS = ("V", "A", "S", "VA", "VS", "AS", "VAS")
TOKEN = "a-token-of-24-characters"

pytestmark = [pytest.mark.slow, needs_chromium, needs_gradio]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("home"), "--autoplay-policy=no-user-gesture-required") as made:
        made.new_context()  # of all pages that need none apart: it keeps the page's scripts as they were compiled
        yield made


@pytest.fixture(scope="module")
def served(clips, tmp_path_factory):
    """The seven-tag set's rows, a caption, a picture-less row, one with a broken clip, and rows full of markup."""
    folder = tmp_path_factory.mktemp("reviewed")
    shutil.copytree(clips, folder / "media")
    rows = [
        {**question_row(0), **row, "source": "synthetic", "provenance": [], "required_tag": None}
        for row in pq.read_table(clips / "train.parquet").to_pylist()
    ]
    rows = [{name: row[name] for name in question_row(0)} for row in rows]
    rows.append(caption_row(28, "VA", id="caption", video="train/clip-001.mp4", reference_v="A shape moves."))
    (folder / "media" / "broken.mp4").write_bytes(b"no clip at all")
    rows.append(question_row(29, "V", id="broken", video="broken.mp4"))
    evil = {"question": EVIL, "options": [EVIL, "b"], "answer": "A", "solution": "A", "subtitle": EVIL, "source": EVIL}
    rows.append(question_row(30, "S", id="evil " + EVIL[:60], **evil))
    long = "a long option that says a great deal about what can be seen and heard in the clip, over and over again"
    texts = [f"{long} {number}" for number in range(4)]
    asked = (
        "Which of these tells best what happens in the clip while the music plays, and who speaks to whom about it? "
        * 2
    )
    rows.append(
        question_row(
            31, "VAS", id="long", question=asked, options=texts, video="train/clip-002.mp4", subtitle="word " * 300
        )
    )
    for name, color in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (60, 40), color).save(folder / "media" / name)
    rows.append(question_row(32, "V", id="pictures", images=["red.png", "blue.png"]))
    write_rows(folder / "media" / "rows.parquet", rows)
    made = Served(folder, folder / "media" / "rows.parquet", "--log", folder / "review.log", "--reviewer", "ann")
    made.folder, made.rows = folder, rows
    yield made
    made.stop()


class Opened:
    """A page with all that went wrong in it."""

    def __init__(self, browser, url, query="", wait=True, apart=False):
        self.own = browser.new_context() if apart else None  # with cookies of its own
        self.page = (self.own or browser.contexts[0]).new_page()
        self.page.set_viewport_size({"width": 1280, "height": 720})
        self.page.set_default_timeout(60_000)
        self.errors, self.asked, self.url = [], [], url
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url + query)
        if wait:
            self.page.wait_for_function("() => Number(document.documentElement.dataset.turn) > 0")

    def turn(self) -> int:
        return int(self.page.evaluate("document.documentElement.dataset.turn || 0"))

    def after(self, act):
        """Does something, and waits until the server has answered it."""
        before = self.turn()
        act()
        self.wait_for_turn_after(before)

    def wait_for_turn_after(self, before: int, timeout: float | None = None):
        found = "turn => Number(document.documentElement.dataset.turn) > turn"
        self.page.wait_for_function(found, arg=before, timeout=timeout)

    def key(self, *keys):
        for key in keys:
            self.after(lambda key=key: self.page.keyboard.press(key))

    @property
    def row(self) -> str:
        return self.page.get_attribute("#card", "data-row")

    def text(self, place) -> str:
        return self.page.inner_text(place)

    def close(self):
        (self.own or self.page).close()


def log_of(served, name):
    """What a reviewer has done, from the file."""
    path = served.folder / "review.log"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["reviewer"] == name]


@pytest.fixture
def opened(browser, served, request):
    """The page, with a reviewer of the test's own, at the first row."""
    made = Opened(browser, served.url, f"?reviewer={request.node.name[:40]}&row={served.rows[0]['id']}")
    made.name = request.node.name[:40]
    yield made
    made.close()


def first_of(served, tag):
    return next(row["id"] for row in served.rows if row["tag"] == tag)


PLAYED = """clip => new Promise((done, failed) => {
    clip.onerror = () => failed('it cannot play');
    clip.ontimeupdate = () => clip.currentTime > 0.05 ? done([clip.videoWidth, clip.webkitAudioDecodedByteCount]) : 0;
    clip.play().catch(failed);
})"""


def test_clips_play_with_what_their_tag_gives(browser, served):
    heard, seen = {}, {}
    opened = Opened(browser, served.url, f"?reviewer=player&row={served.rows[0]['id']}")
    page = opened.page
    last = max(served.rows.index(next(row for row in served.rows if row["tag"] == tag)) for tag in TAGS)
    for row in served.rows[: last + 1]:
        if row is not served.rows[0]:
            opened.key("ArrowRight")
        assert opened.row == row["id"]
        tag = row["tag"]
        if tag in seen:
            continue
        clip = page.locator("#player #clip")
        assert clip.count() == int(tag != "S")
        seen[tag], heard[tag] = clip.evaluate(PLAYED) if tag != "S" else (0, 0)
        word = (served.folder / "media" / row["subtitle"]).read_text().split("\n")[2]
        assert page.locator("#player .subtitle").count() == int("S" in tag)
        assert (word in opened.text("#player")) == ("S" in tag)
    assert opened.errors == []
    opened.close()
    assert {tag for tag, width in seen.items() if width} == {"V", "VA", "VS", "VAS"}
    assert {tag for tag, size in heard.items() if size} == {"A", "VA", "AS", "VAS"}, (
        "V has no sound that could be let out"
    )


def test_pictures_are_shown_beside_each_other(browser, served):
    opened = Opened(browser, served.url, "?reviewer=player&row=pictures")
    pictures = opened.page.locator("#player img.picture")
    assert pictures.count() == 2 and opened.page.locator("#player #clip").count() == 0
    opened.page.wait_for_function(
        "() => [...document.querySelectorAll('#player img.picture')].every((one) => one.complete && one.naturalWidth)"
    )
    sizes = pictures.evaluate_all("all => all.map((one) => [one.naturalWidth, one.naturalHeight])")
    assert sizes == [[60, 40], [60, 40]]
    boxes = [pictures.nth(number).bounding_box() for number in range(2)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and boxes[0]["y"] == boxes[1]["y"]
    assert all(box["height"] > 100 and box["y"] + box["height"] <= 720 for box in boxes)
    opened.key("Shift+Digit2")  # as A
    assert opened.page.locator("#player img.picture").count() == 0
    assert opened.errors == []
    opened.close()


def test_a_row_is_looked_at_as_another_tag(opened, served):
    row = served.rows[0]
    assert opened.page.get_attribute(".player", "data-look") == row["tag"]
    opened.key("Shift+Digit7")
    assert opened.page.get_attribute(".player", "data-look") == "VAS"
    assert opened.page.locator(".subtitle").count() == opened.page.locator("video#clip").count() == 1
    opened.after(lambda: opened.page.click(".looks [data-look=A]"))
    assert opened.page.locator("audio#clip").count() == 1 and opened.page.locator("video").count() == 0
    opened.key("Enter")
    assert log_of(served, opened.name)[0]["looked"] == ["VAS", "A"]
    assert opened.errors == []


@pytest.mark.long
def test_the_space_key_plays_and_pauses(opened):
    opened.key("Shift+Digit4")
    opened.page.wait_for_function("document.querySelector('#clip').readyState > 2")
    opened.page.keyboard.press("Space")
    opened.page.wait_for_function("!document.querySelector('#clip').paused")
    opened.page.keyboard.press("Space")
    opened.page.wait_for_function("document.querySelector('#clip').paused")


def test_keys_decide_and_undo(opened, served):
    """Each action goes into the log before the page shows it, for the row that was shown."""
    ids = [row["id"] for row in served.rows]
    tags = [row["tag"] for row in served.rows]
    assert opened.row == ids[0] and "0 of" in opened.text(".progress")
    wanted = {"1": "V", "4": "VA", "7": "VAS"}
    for number, key in enumerate(wanted):
        opened.key(key)
        assert opened.row == ids[number + 1]
        (*_, line) = log_of(served, opened.name)
        same = wanted[key] == tags[number]
        assert (line["row"], line["action"]) == (ids[number], "retag")
        assert line["after"] == ({"decision": "accepted"} if same else {"decision": "retagged", "tag": wanted[key]})
        assert line["before"]["decision"] == "undecided" and line["seconds"] < 100
    opened.key("Enter")
    opened.key("x")
    opened.page.wait_for_function("document.activeElement.closest('#reason') !== null")
    opened.page.keyboard.type("the clip ends too soon")
    opened.key("Enter")
    opened.key("x", "2")
    assert [line["action"] for line in log_of(served, opened.name)] == ["retag"] * 3 + ["accept", "reject", "reject"]
    assert [line["reason"] for line in log_of(served, opened.name)[4:]] == [
        "the clip ends too soon",
        "question unclear",
    ]
    assert "6 of" in opened.text(".progress") and opened.row == ids[6]
    for number in (5, 4, 3):
        opened.key("u")
        assert opened.row == ids[number] and "undone" in opened.text("#message")
        assert opened.page.locator("#decision").count() == 0
    opened.key("n")
    assert opened.row == ids[4], "the next one that is undecided"
    opened.key("ArrowLeft", "ArrowLeft")
    assert opened.row == ids[2] and opened.text("#decision") in ("retagged", "accepted")
    for _ in range(3):
        opened.key("u")
    opened.key("u")
    assert opened.text("#message") == "there is nothing to undo" and "0 of" in opened.text(".progress")
    assert opened.errors == []


def test_the_answer_is_shown_when_it_is_asked_for(opened, served):
    row = served.rows[0]
    assert opened.page.locator("#right-answer").count() == 0
    opened.key("Shift+B")
    assert opened.page.get_attribute("[data-answer=B]", "class").strip() == "mine"
    opened.key("r")
    assert opened.text("#right-answer") == row["answer"]
    right = "you were right" if row["answer"] == "B" else "you said B"
    assert right in opened.text("#card .answer")
    opened.key("Shift+C")
    assert "would not be your own" in opened.text("#message")
    opened.key("Enter")
    (line,) = log_of(served, opened.name)
    assert line["answer"] == "B" and line["revealed"] is True
    assert opened.page.locator("#right-answer").count() == 0, "of the next row it is not shown"


@pytest.mark.long
def test_a_question_is_edited(opened, served):
    row = served.rows[0]
    opened.key("e")
    assert opened.page.input_value("#edit-question textarea") == row["question"]
    opened.page.fill("#edit-question textarea", "What is there?")
    opened.page.fill("#edit-options textarea", "one")
    opened.after(lambda: opened.page.keyboard.press("Control+Enter"))
    assert "1 options" in opened.text("#message") and log_of(served, opened.name) == []
    assert opened.page.input_value("#edit-question textarea") == "What is there?", "what was typed stays"
    opened.page.fill("#edit-options textarea", "one\ntwo\n\n three ")
    letter = "A" if row["answer"] == "B" else "B"
    opened.page.keyboard.press("1")  # typed, and no order
    opened.page.fill("#edit-options textarea", "one\ntwo\n\n three ")
    opened.page.fill("#edit-answer textarea, #edit-answer input", letter.lower())
    opened.after(lambda: opened.page.keyboard.press("Control+Enter"))
    (line,) = log_of(served, opened.name)
    expected = {
        "question": "What is there?",
        "options": ["one", "two", "three"],
        "answer": letter,
        "prompt": "What is there?",
    }
    assert {name: line["after"].get(name) for name in expected} == expected
    assert opened.row == row["id"] and "What is there?" in opened.text("#card .question")
    assert opened.text("#decision") == "edited"
    opened.key("e")
    opened.after(lambda: opened.page.keyboard.press("Escape"))
    assert opened.page.locator("#edit-panel").count() == 0 or not opened.page.is_visible("#edit-panel")
    opened.key("u")
    assert opened.text("#card .question") == row["question"]
    assert opened.errors == []


def test_rows_are_chosen_by_tag_and_state(opened, served):
    from playwright.sync_api import TimeoutError as TooLate

    def choose(place, text, told):
        before = opened.turn()
        for _ in range(10):  # a list closes when what was asked before is drawn meanwhile
            opened.page.evaluate("document.activeElement.blur()")
            opened.page.click(f"{place} input")
            try:
                opened.page.click(f"[role=option]:has-text('{text}') >> nth=0", timeout=3000, force=True)
                opened.wait_for_turn_after(before, timeout=6000)
                opened.page.wait_for_function("told => location.search.includes(told)", arg=told, timeout=6000)
                return
            except TooLate:
                continue
        raise AssertionError(f"{text} could not be chosen")

    ids = [row["id"] for row in served.rows]
    vas = [row["id"] for row in served.rows if row["tag"] == "VAS"]
    opened.key("3", "Enter")
    choose("#tag-filter", "VAS", "tag=VAS")
    assert opened.row == (ids[2] if ids[2] in vas else vas[0]) and f"of {len(vas)} VAS decided" in opened.text(
        ".progress"
    )
    choose("#tag-filter", "all tags", "tag=all")
    choose("#show-filter", "decided by me", "show=reviewed")
    seen = []
    for _ in range(2):
        seen.append(opened.row)
        opened.key("ArrowRight")
    assert set(seen) <= set(ids[:2]) and "no further row" in opened.text("#message")
    choose("#show-filter", "unreviewed", "show=unreviewed")
    opened.key("ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert opened.row == ids[2], "the first one that is undecided"
    assert "show=unreviewed" in opened.page.url and "tag=all" in opened.page.url


@pytest.mark.long
def test_a_page_that_is_loaded_again_shows_the_same(opened):
    opened.key("5", "ArrowRight", "ArrowLeft", "ArrowLeft")
    row, name = opened.row, opened.page.input_value("#reviewer input, #reviewer textarea")
    opened.page.reload()
    opened.page.wait_for_function("() => Number(document.documentElement.dataset.turn) > 0")
    assert opened.row == row and opened.page.input_value("#reviewer input, #reviewer textarea") == name
    assert opened.text("#decision") in ("retagged", "accepted") and "1 of" in opened.text(".progress")


def test_keys_that_come_too_fast_decide_on_nothing_unseen(opened, served):
    for _ in range(12):
        opened.page.keyboard.press("Enter")
    opened.page.wait_for_timeout(1500)
    opened.after(lambda: opened.page.keyboard.press("r"))
    rows = [line["row"] for line in log_of(served, opened.name)]
    ids = [row["id"] for row in served.rows]
    assert rows == ids[: len(rows)] and opened.row == ids[len(rows)] and 1 <= len(rows) <= 12


@pytest.mark.long
def test_two_reviewers_at_once(browser, served):
    """Each decides for themselves, sees nothing of the other before, and the disagreement after."""
    row = served.rows[12]["id"]
    one = Opened(browser, served.url, f"?reviewer=one&row={row}")
    other = Opened(browser, served.url, f"?reviewer=other&row={row}", apart=True)
    tag = served.rows[12]["tag"]
    first, second = [
        key for key, name in zip("1234567", ("V", "A", "S", "VA", "VS", "AS", "VAS"), strict=True) if name != tag
    ][:2]
    one.key(first)
    other.after(lambda: other.page.evaluate("document.querySelector('#do-refresh').click()"))
    assert (
        "one" not in other.page.locator(".others").all_inner_texts() and other.page.locator(".disagreed").count() == 0
    )
    other.key(second, "ArrowLeft")
    assert "one retagged" in other.text(".others") and other.page.locator(".disagreed").count() == 1
    one.key("ArrowLeft")
    assert "other retagged" in one.text(".others") and "1 disagreed" in one.text(".progress")
    one.key("u")
    assert one.page.locator(".others").count() == 0
    other.key("ArrowRight", "ArrowLeft")
    assert other.text("#decision") == "retagged" and other.page.locator(".disagreed").count() == 0
    assert log_of(served, "one")[0]["after"] != log_of(served, "other")[0]["after"]
    assert one.errors == other.errors == []
    one.close()
    other.close()


def test_texts_of_the_set_stay_texts(browser, served):
    row = next(row["id"] for row in served.rows if row["id"].startswith("evil"))
    opened = Opened(browser, served.url, f"?reviewer={quote('<img src=x onerror=hacked=1>')}&row={quote(row)}")
    page = opened.page
    assert opened.row == row
    assert opened.text(".question") == EVIL.strip() and EVIL[:40] in opened.text(".subtitle")
    opened.key("x")
    page.keyboard.type(EVIL)
    opened.key("Enter", "ArrowLeft")
    page.click("#card summary")
    assert EVIL[:40] in opened.text("#card .reason") and EVIL[:40] in opened.text("#card .origin")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#card img, #player img, #bar img").count() == 0
    assert [error for error in opened.errors if "favicon" not in error] == []
    assert all(url.startswith((served.url, "data:", "blob:")) for url in opened.asked), (
        "nothing is asked for elsewhere"
    )
    opened.close()


def test_a_broken_clip_says_why_and_a_caption_its_reference(browser, served):
    opened = Opened(browser, served.url, "?reviewer=broken&row=broken")
    assert "not-media: broken.mp4" in opened.text("#player .problem >> visible=true")
    opened.page.goto(f"{served.url}?reviewer=broken&row=caption")
    opened.page.wait_for_function("() => document.querySelector('#card')?.dataset.row === 'caption'")
    assert "Describe the clip." in opened.text(".question") and "Caption 28." in opened.text("#card")
    assert "A shape moves." in opened.text("#card")
    opened.page.wait_for_function("() => Number(document.documentElement.dataset.turn) > 0")
    opened.key("e")
    opened.page.fill("#edit-reference textarea", "A yellow shape moves.")
    opened.after(lambda: opened.page.click("#do-save"))
    assert log_of(served, "broken")[0]["after"] == {"decision": "edited", "reference": "A yellow shape moves."}
    opened.close()


@pytest.mark.long
@pytest.mark.parametrize("row", ["VAS", "long"])
@pytest.mark.matrix(cases=1)
def test_all_of_it_is_seen_without_scrolling(browser, served, row):
    name = first_of(served, row) if row in ("VAS",) else row
    opened = Opened(browser, served.url, f"?reviewer=looker&row={name}")
    page = opened.page
    parts = [
        "#clip",
        ".subtitle",
        "#card .question",
        "#card .options li >> nth=0",
        "#bar .progress",
        "#reviewer",
        "#tag-filter",
        "#show-filter",
    ]
    parts += [
        f"#do-{name}" for name in ("accept", "edit", "reject", "undo", "reveal", "previous", "next", "unreviewed")
    ]
    parts += [f"#do-tag-{tag}" for tag in ("V", "A", "S", "VA", "VS", "AS", "VAS")]
    parts += ["#card .options li >> nth=3"] if row == "VAS" else []
    for size in ((1280, 720), (900, 700)):
        page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for part in parts:
            box = page.locator(part).bounding_box()
            assert box["x"] >= 0 and box["y"] >= 0 and box["width"] > 10 and box["height"] > 10, part
            assert box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1], (part, box)
        assert page.locator("#clip").bounding_box()["height"] > 150
        assert page.evaluate("[document.documentElement.scrollHeight, document.documentElement.scrollWidth]") == [
            size[1],
            size[0],
        ]
        cut = "buttons => buttons.filter((b) => b.scrollWidth > b.clientWidth + 1).map((b) => b.textContent)"
        assert page.locator("#actions button").evaluate_all(cut) == []
        opened.key("e")
        for part in ("#do-save", "#edit-question textarea", "#edit-options textarea"):
            box = page.locator(part).bounding_box()
            page.locator(part).scroll_into_view_if_needed()
            assert box["width"] > 100, part
        opened.after(lambda: page.keyboard.press("Escape"))
    opened.close()


@pytest.mark.long
def test_a_server_that_is_killed_loses_nothing(browser, clips, tmp_path):
    """Kill -9 in the middle of actions, twice; a page that is left open goes on with the server that follows."""
    words = [clips, "--log", tmp_path / "review.log", "--reviewer", "ann"]
    served = Served(tmp_path, *words)
    opened = Opened(browser, served.url)
    page, told, port = opened.page, 0, served.port
    try:
        for turn in range(2):
            for _ in range(3):
                opened.key("Enter")
                told += 1
            page.keyboard.press("4")  # under way when the server is killed
            time.sleep((0.0, 0.05)[turn])
            served.kill()
            if turn == 1:
                page.evaluate("window.before = true")
                page.wait_for_timeout(10_000)  # until a key counts again, where the one before has had no answer
                page.keyboard.press("Enter")
            log = ReviewLog(tmp_path / "review.log")
            written = len(log.replay.actions("ann"))
            assert told <= written <= told + 1 and all(line.torn for line in log.damaged)
            with open(tmp_path / "review.log", "ab") as file:  # as a kill in the middle of a write leaves it
                file.write(b'{"id": "0123')
            served = Served(tmp_path, *words, port=port)
            assert "was not written to its end" in served.output.read_text()
            if turn < 1:
                opened.close()
                opened = Opened(browser, served.url)
                page = opened.page
            else:  # the page itself finds that a server answers again, and goes on at the same row
                page.wait_for_function("window.before === undefined")
            page.wait_for_function("() => Number(document.documentElement.dataset.turn) > 0")
            assert page.inner_text("#decided") == str(written)
            told = written
        cache = served.cache / "maple_trl" / "review"
        assert len([path for path in cache.iterdir() if path.is_dir()]) == 1, "copies of killed servers are gone"
        served.program.send_signal(signal.SIGTERM)
        assert served.program.wait(60) == 0 and list(cache.iterdir()) == []
    finally:
        opened.close()
        served.program.kill()
    rows = [entry.row for entry in ReviewLog(tmp_path / "review.log").replay.actions("ann")]
    assert len(rows) == len(set(rows)) == told


@pytest.mark.long
def test_two_servers_on_one_log(browser, served, clips):
    """Two processes: what one writes, the other shows and keeps."""
    second = Served(served.folder, served.folder / "media" / "rows.parquet", "--log", served.folder / "review.log")
    row = served.rows[20]["id"]
    one = Opened(browser, served.url, f"?reviewer=here&row={row}")
    other = Opened(browser, second.url, f"?reviewer=here&row={row}")
    try:
        one.key("2")
        other.key("r")
        assert other.text("#decided") == "1" and other.page.get_attribute("#card", "data-decided") == "A"
        other.key("u")
        assert "undone" in other.text("#message")
        one.key("u")
        assert one.text("#message") == "there is nothing to undo"
        assert [line["action"] for line in log_of(served, "here")] == ["retag", "undo"]
    finally:
        one.close()
        other.close()
        second.stop()


@pytest.mark.long
def test_the_token_is_asked_for(browser, clips, tmp_path):
    (tmp_path / "token.txt").write_text(TOKEN)
    served = Served(tmp_path, clips, "--log", tmp_path / "review.log", "--token_file", tmp_path / "token.txt")
    opened = Opened(browser, served.url, wait=False, apart=True)
    page = opened.page
    try:
        assert page.url.endswith("/login") and page.locator("#card").count() == 0
        page.fill("#token", "not-the-token-of-it")
        page.click("button")
        page.wait_for_selector(".wrong")
        page.goto(served.url)
        assert page.url.endswith("/login")
        page.fill("#token", TOKEN)
        page.click("button")
        page.wait_for_function("() => Number(document.documentElement.dataset.turn) > 0")
        assert TOKEN not in page.url and TOKEN not in page.content()
        page.wait_for_function("document.querySelector('#clip, .subtitle') !== null")
        opened.key("Enter")
        answers = page.evaluate(
            """async () => Promise.all(['/gradio_api/file=/etc/passwd', '/media/../../etc/passwd', '/media/0/V/..%2f..%2fx',
            '/gradio_api/proxy=http://127.0.0.1/', '/gradio_api/upload'].map(async (path) => (await fetch(path)).status))"""
        )
        assert answers == [404] * 5
    finally:
        opened.close()
        served.stop()
