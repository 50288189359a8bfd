"""The page of a report in a real browser: no errors, filters, pages, clips that play, and markup that stays text."""

import io
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsers import chromium, needs_chromium
from PIL import Image

from maple_trl import AvatarConfig, AvatarTrainer, cli
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation import evaluation_results
from maple_trl.omni.embedded import store
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.records.critical_steps import write_critical_steps
from maple_trl.records.evaluations import LINES
from maple_trl.records.rollouts import write_rollout
from maple_trl.reports import write_report
from maple_trl.reports.report import end_live
from maple_trl.rewards import accuracy_reward, format_reward


ABSENT = ["accuracy", "weights", "critical", "distances"]  # of the run: its clips have one tag each
ABSENT += ["left-out", "configuration"]  # a trainer without a job
SECTIONS = "curves rewards curriculum disparity advantages positions lengths replay ratios projection rollouts".split()
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("home")) as made:
        yield made


class Opened:
    """A page with all that went wrong in it."""

    def __init__(self, browser, path):
        # Without smooth scrolling, which goes on while the next thing is clicked.
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
        self.errors, self.asked = [], []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(Path(path).as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        self.heights = self.heights_of_charts()

    def heights_of_charts(self):
        return self.page.locator(".chart").evaluate_all("places => places.map((place) => place.offsetHeight)")

    def after(self, act):
        """Does something that draws the completions anew, and waits for that."""
        drawn = int(self.page.get_attribute("#rollout-list", "data-drawn"))
        act()
        newer = "before => Number(document.querySelector('#rollout-list').dataset.drawn) > before"
        self.page.wait_for_function(newer, arg=drawn, timeout=60_000)

    def set(self, name, value):
        self.after(lambda: (self.page.fill(f"#filter-{name}", value), self.page.press(f"#filter-{name}", "Enter")))

    def fitting(self):
        """Groups and completions that the page says fit."""
        text = self.page.inner_text("#rollouts .pager >> nth=0").replace(",", "")
        return tuple(map(int, re.search(r"(\d+) groups (\d+) completions fit", text).groups()))

    def texts(self):
        return self.page.locator(".completion pre").all_inner_texts()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of AvatarTrainer on clips, in the folder that its report will stand in."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"num_frames": 4, "max_pixels": 3136, "max_prompt_length": 128, "max_completion_length": 14}
    options |= {"num_generations": 4, "replayed_generations": 2, "per_device_train_batch_size": 28, "max_steps": 5}
    options |= {"learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    options |= {"bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
    options |= {"num_train_epochs": 5, "reward_weights": [0.2, 0.8], "tas_lambda": 0.5}
    data = load_seven_tags()["train"]
    first = {tag: i for i, tag in reversed(list(enumerate(data["tag"])))}
    trainer = AvatarTrainer(
        model=load_model("builtin:tiny-omni", dtype="float32"),
        processing_class=load_processor("builtin:tiny-omni"),
        reward_funcs=[format_reward, accuracy_reward],
        args=AvatarConfig(output_dir=str(folder / "run"), media_root=str(default_folder()), **options),
        train_dataset=data.select(sorted(first.values())),
    )
    trainer.train()
    write_report(folder / "run", folder / "run" / "report.html")
    return folder / "run"


def lines_of(folder):
    return [line for path in sorted((folder / "rollouts").iterdir()) for line in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def page_of_run(browser, trained):
    found = Opened(browser, trained / "report.html")
    yield found
    found.page.close()


@pytest.fixture
def opened(page_of_run):
    """The page of the run, with all it shows; loading it anew costs more than what is done with it."""
    page_of_run.after(lambda: page_of_run.page.click("text=Show all"))
    return page_of_run


def looks(image):
    """How many colours an image has, and what share of it is not white."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).reshape(-1, 3)
    colors = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)  # rows are slow to compare
    return len(np.unique(colors)), float((pixels < 240).any(axis=1).mean())


# A real run


def test_the_page_opens_without_errors_and_draws(browser, opened):
    page = opened.page
    assert page.title().startswith("run")
    for section in SECTIONS:
        page.locator(f"#{section}").scroll_into_view_if_needed()
        page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
        charts = page.locator(f"#{section} .chart")
        for i in range(charts.count()):
            charts.nth(i).scroll_into_view_if_needed()
            charts.nth(i).locator(".main-svg").first.wait_for(timeout=30_000)
    assert opened.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in opened.asked), opened.asked
    assert opened.heights_of_charts() == opened.heights, "what is below a chart moves when it is drawn"
    drawn = {section: page.locator(f"#{section} .main-svg").count() for section in SECTIONS}
    assert all(drawn[section] for section in SECTIONS if section != "rollouts"), drawn
    # Every plot says what it shows, and every section has a sentence on it.
    titles = (
        "place => [place.layout.title, place.layout.xaxis.title, place.layout.yaxis.title].map((title) => title.text)"
    )
    shown = page.evaluate(f"[...document.querySelectorAll('.chart')].map({titles})")
    assert len(shown) > 25 and all(map(all, shown)), shown
    for section in SECTIONS:
        assert len(page.locator(f"#{section} .what").first.inner_text()) > 30, section
    # The shares of each histogram of ratios add up to 1.
    bars = page.evaluate("[...document.querySelectorAll('#ratios .chart')].map((place) => place.data)")[0]
    assert len(bars) == 2 and all(trace["type"] == "bar" and len(trace["x"]) == 11 for trace in bars)
    assert all(sum(trace["y"]) == pytest.approx(1, abs=1e-3) for trace in bars)
    assert [bars[0]["x"][i] for i in (0, 5, 10)] == ["< 0.25", "0.95–1.05", "≥ 4"]
    # What this run has not got has no card, and the list at the end says why.
    assert page.locator("#absent dd").evaluate_all("all => all.map((one) => one.dataset.section)") == sorted(
        ABSENT, key=["configuration", "left-out", "accuracy", "weights", "critical", "distances"].index
    )
    for section in ABSENT:
        assert page.locator(f"#{section}").count() == page.locator(f"nav a[href='#{section}']").count() == 0
    assert all(len(text) > 20 for text in page.locator("#absent dd").all_inner_texts())
    assert page.locator("main .missing").count() == 0
    for section in ("curves", "rewards", "replay", "rollouts"):
        colors, inked = looks(page.locator(f"#{section}").screenshot())
        assert colors > 100 and inked > 0.02, section
    # Negative control: an empty page is told from a drawn one.
    empty = browser.new_page()
    assert looks(empty.screenshot()) == (1, 0.0)
    empty.close()


def test_curves_of_each_tag_can_be_chosen(opened):
    page = opened.page
    page.locator("#curves-by-tag").scroll_into_view_if_needed()
    page.locator("#curves-by-tag .main-svg").first.wait_for()
    names = page.locator("#curves-by-tag .legendtext").all_text_contents()
    assert names == ["all", "V", "A", "S", "VA", "VS", "AS", "VAS"]
    stroke = "#curves-by-tag .scatterlayer .trace:nth-child(2) path.js-line"
    before = page.get_attribute(stroke, "d")
    assert "rgb(18, 89, 168)" in page.get_attribute(stroke, "style")  # the colour of V
    page.select_option("#curves .controls select >> nth=0", label="share of right answers")
    title = page.locator("#curves-by-tag .gtitle")
    title.filter(has_text="share of right answers").wait_for()
    assert page.get_attribute(stroke, "d") != before
    page.select_option("#curves-smoothing", "0.2")
    assert opened.errors == []


def test_filters_show_what_fits(opened, trained):
    """Counted anew from the files of the run."""
    lines = lines_of(trained)

    def expected(fits):
        found = [line for line in lines if fits(line)]
        return len({(line["rollout"], line["group"]) for line in found}), len(found)

    assert opened.fitting() == expected(lambda line: True)
    opened.after(lambda: opened.page.uncheck("#tag-V"))
    opened.after(lambda: opened.page.uncheck("#tag-VAS"))
    assert opened.fitting() == expected(lambda line: line["tag"] not in ("V", "VAS"))
    badges = opened.page.locator(".group .tag").all_inner_texts()
    assert badges and not {"V", "VAS"} & set(badges)
    opened.set("least", "0.5")
    assert opened.fitting() == expected(lambda line: line["tag"] not in ("V", "VAS") and line["reward"] >= 0.5)
    dim = opened.page.locator(".completion.dim .reward").all_inner_texts()
    bright = opened.page.locator(".completion:not(.dim) .reward").all_inner_texts()
    assert all(float(text.split()[1]) < 0.5 for text in dim) and all(float(text.split()[1]) >= 0.5 for text in bright)
    opened.after(lambda: opened.page.click("text=Show all"))
    assert opened.fitting() == expected(lambda line: True)
    opened.after(lambda: opened.page.select_option("#filter-kind", "replayed"))
    assert opened.fitting() == expected(lambda line: line["replayed"])
    assert "replayed, of step" in opened.page.inner_text(".badge >> nth=0")
    opened.set("lastStep", "2")
    assert opened.fitting() == expected(lambda line: line["replayed"] and line["step"] <= 2)
    opened.set("least", "99")
    assert opened.fitting() == (0, 0) and "No completion fits" in opened.page.inner_text("#rollout-list")
    assert opened.errors == []


def test_pages_go_through_all_groups(opened, trained):
    seen = []
    pages = -(-opened.fitting()[0] // 8)
    for page in range(pages):
        seen += opened.texts()
        if page < pages - 1:
            opened.after(lambda: opened.page.click("button[data-go=next] >> nth=0"))
    assert sorted(seen) == sorted(line["completion"] or "(empty)" for line in lines_of(trained))
    assert opened.page.locator("button[data-go=next]").first.is_disabled()
    opened.after(lambda: opened.page.click("button[data-go=first] >> nth=0"))
    assert opened.texts() == seen[: len(opened.texts())]


def test_texts_are_searched_and_questions_followed(opened, trained):
    lines = lines_of(trained)
    word = lines[-1]["completion"].split(">")[1].split()[0][:6]
    opened.set("text", word)
    groups = {(line["rollout"], line["group"]) for line in lines if word in line["completion"]}
    assert f"{len(groups)} groups" in opened.page.inner_text("#rollouts .pager >> nth=0")
    opened.after(lambda: opened.page.click("text=Show all"))
    name = opened.page.inner_text(".group .link >> nth=0")
    opened.after(lambda: opened.page.click(".group .link >> nth=0"))
    assert opened.fitting()[1] == sum(line["id"] == name for line in lines)


def test_clips_play_and_have_a_picture(opened):
    """H.264 and AAC, from the files beside the page."""
    page = opened.page
    for _ in range(4):
        if page.locator(".group video").count() and page.locator(".group audio").count():
            break
        opened.after(lambda: page.click("button[data-go=next] >> nth=0"))
    video = page.locator(".group video").first
    assert video.get_attribute("poster").startswith("data:image/jpeg;base64,")
    for kind in ("video", "audio"):
        place = page.locator(f".group {kind}").first
        assert not place.get_attribute("src").startswith(("/", "http", "file"))
        place.evaluate("player => { player.preload = 'auto'; player.load(); }")
        place.evaluate(
            "player => new Promise((done, failed) => { player.oncanplay = done; "
            "player.onerror = () => failed('it cannot play'); if (player.readyState > 2) done(); })"
        )
        assert place.evaluate("player => player.duration") > 0.1
    empty = "player => { player.replaceWith(player = document.createElement('video')); return player.offsetHeight; }"
    assert video.evaluate("player => player.offsetHeight") == video.evaluate(empty), "what is below moves as it loads"
    assert opened.errors == []


def test_the_slider_goes_through_the_steps(opened, trained):
    page, lines = opened.page, lines_of(trained)
    steps = sorted({line["step"] for line in lines})
    told = page.locator(".steps output")
    assert told.inner_text() == f"all {len(steps)} steps kept"
    page.focus("#step-slider")
    for at, step in enumerate(steps[:2], 1):
        opened.after(lambda: page.keyboard.press("ArrowRight"))
        assert opened.fitting()[1] == sum(line["step"] == step for line in lines)
        assert told.inner_text() == f"step {step} ({at} of {len(steps)} kept)"
    opened.after(lambda: page.click("button[data-step='-1']"))
    opened.after(lambda: page.click("button[data-step='-1']"))
    assert opened.fitting()[1] == len(lines) and page.input_value("#filter-firstStep") == ""
    opened.set("firstStep", str(steps[1]))  # and follows what is typed
    assert told.inner_text() == f"steps {steps[1]} to {steps[-1]}"


def test_a_point_of_a_curve_leads_to_its_completions(opened, trained):
    """Of a tag, and of the rollouts between its log entry and the one before."""
    page, lines = opened.page, lines_of(trained)
    page.locator("#curves-by-tag").scroll_into_view_if_needed()
    page.locator("#curves-by-tag .main-svg").first.wait_for()
    page.select_option("#curves-metric", label="mean reward (weighted sum)")
    # The point that is furthest from those of other tags at its step.
    spot = """() => {
      const place = document.getElementById("curves-by-tag"), { xaxis, yaxis } = place._fullLayout;
      const all = place.data.filter((one) => one.meta.tag).flatMap((one) => one.x.map((x, i) => ({ x, y: one.y[i], tag: one.meta.tag })));
      const alone = ({ x, y, tag }) => Math.min(...all.filter((other) => other.x === x && other.tag !== tag).map((other) => Math.abs(other.y - y)));
      const best = all.sort((a, b) => alone(b) - alone(a))[0], box = place.getBoundingClientRect();
      return [box.left + xaxis._offset + xaxis.l2p(best.x), box.top + yaxis._offset + yaxis.l2p(best.y), best.x, best.tag];
    }"""
    x, y, step, tag = page.evaluate(spot)
    page.mouse.move(x, y)
    opened.after(lambda: page.mouse.click(x, y))
    fits = [line for line in lines if line["tag"] == tag and line["step"] == step - 1]
    assert fits and opened.fitting()[1] == len(fits)
    assert sorted(opened.texts()[: len(fits)]) == sorted(line["completion"] or "(empty)" for line in fits)
    assert page.locator("#rollouts").evaluate("place => Math.abs(place.getBoundingClientRect().top) < 60")
    # Steps of which nothing was kept: the nearest before, which is said.
    opened.after(lambda: page.evaluate("showSteps(0, 90, 99, null)"))
    last = max(line["step"] for line in lines)
    assert opened.fitting()[1] == sum(line["step"] == last for line in lines)
    assert f"No completions were kept of steps 90 to 99; shown are those of step {last}." in page.inner_text(
        "#rollouts"
    )
    assert opened.errors == []


def brightness(page):
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    return float(np.median(pixels))


def test_dark_and_narrow(opened):
    """By the system's choice and by the switch, charts too; and nothing is wider than a phone."""
    page = opened.page
    page.locator("#curves-by-tag").scroll_into_view_if_needed()
    stroke = "#curves-by-tag .scatterlayer .trace:nth-child(2) path.js-line"
    ground = "document.querySelector('#curves-by-tag .main-svg').style.background"
    page.locator(stroke).wait_for(state="attached")
    assert brightness(page) > 200 and page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => {ground} === 'rgb(26, 30, 36)'")
    assert "rgb(92, 159, 240)" in page.get_attribute(stroke, "style") and brightness(page) < 60
    page.select_option("#theme", "light")
    assert page.evaluate(ground) == "rgb(255, 255, 255)" and brightness(page) > 200
    page.select_option("#theme", "auto")
    assert brightness(page) < 60
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("() => document.getElementById('curves-by-tag').layout.width < 390")
    page.evaluate("beforePrint(); afterPrint()")  # draws what nobody has scrolled to
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "all => all.filter((one) => one.getBoundingClientRect().right > 391).map((one) => one.className)"
    assert page.locator("main .chart, main .main-svg, main select, main .group").evaluate_all(wide) == []
    page.set_viewport_size({"width": 1400, "height": 900})
    page.wait_for_function("() => document.getElementById('curves-by-tag').layout.width > 390")
    assert opened.errors == []


def strokes(pdf):
    """What lines of a PDF are drawn with: how often each colour is set, to two digits."""
    found = {}
    for part in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            text = zlib.decompress(part)
        except zlib.error:  # a font or a picture
            continue
        for color in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) RG", text):
            key = tuple(round(float(value), 2) for value in color)
            found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.long
def test_paper_shows_every_chart(browser, trained):
    """Of a page that was never scrolled, and is dark on the screen."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="dark")
    page.goto((trained / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    count = page.locator(".chart").count()
    drawn = "[...document.querySelectorAll('.chart')].filter((place) => place.querySelector('.main-svg')).length"
    first = page.evaluate(drawn)
    page.evaluate("window.removeEventListener('beforeprint', beforePrint)")
    blank = strokes(page.pdf(format="A4"))  # the control: without what prepares the page, charts are blank
    assert 0 <= first < count // 2 and page.evaluate(drawn) < count // 2
    page.evaluate("window.addEventListener('beforeprint', beforePrint)")
    whole = strokes(page.pdf(format="A4"))
    assert page.evaluate(drawn) == count
    light = {"V": (18, 89, 168), "A": (224, 96, 0), "S": (0, 154, 114), "VA": (75, 31, 111), "VAS": (224, 85, 155)}
    for tag, color in light.items():
        key = tuple(round(value / 255, 2) for value in color)
        assert whole.get(key, 0) > blank.get(key, 0), tag
    assert sum(whole.values()) > 2 * sum(blank.values())
    page.close()


def test_the_page_of_a_run_that_goes_on_follows_it(browser, trained, tmp_path):
    """It loads itself anew where its reader is, with what was chosen, and stops when the run has ended."""
    folder = shutil.copytree(trained, tmp_path / "run")
    write_report(folder, folder / "report.html", live=15)
    opened = Opened(browser, folder / "report.html")
    page = opened.page
    pause = "document.querySelector('#live button').click()"
    page.evaluate(pause)
    assert page.inner_text("#live span") == "Live, paused."
    page.select_option("#curves-metric", label="share of right answers")
    opened.after(lambda: page.uncheck("#tag-VA"))
    opened.after(lambda: page.click("button[data-go=next] >> nth=0"))
    page.evaluate("document.getElementById('rollouts').scrollIntoView()")
    page.evaluate("window.scrollBy(0, 200)")
    group, at = page.inner_text(".group .link >> nth=0"), page.evaluate("window.scrollY")
    where = "document.getElementById('rollouts').getBoundingClientRect().top"
    top = page.evaluate(where)
    page.evaluate("window.before = true")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 6, "tag/VA/accuracy": 0.5, "reward": 0.9}\n')
    write_report(folder, folder / "report.html", live=600)
    page.evaluate(pause)
    assert page.inner_text("#live span").startswith("Live: this page follows the run.") and at > 1000
    anew = "() => window.before === undefined && 'ready' in document.documentElement.dataset"
    page.wait_for_function(anew, timeout=60_000)
    assert page.evaluate("REPORT.runs[0].curves.metrics.reward.step.at(-1)") == 6
    assert page.input_value("#curves-metric").endswith("accuracy") and not page.is_checked("#tag-VA")
    assert page.inner_text(".group .link >> nth=0") == group and page.input_value(".pager input >> nth=0") == "2"
    assert page.evaluate(where) == pytest.approx(top, abs=3)
    end_live(folder / "report.html")
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    assert not page.is_visible("#live") and opened.errors == []
    page.close()


# An evaluation


def test_an_evaluation_shows_its_questions_clips_and_errors(browser, tmp_path):
    rows = load_seven_tags()["test"].select(range(14)).to_list()
    rows[0]["video"] = "gone.mp4"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "builtin:tiny-omni", "--data", str(tmp_path), "--media-root", str(default_folder())]
    words += ["--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "14", "--samples", "2", "--quiet"]
    words += ["--access", "required,all", "--max-errors", "1", "--output", str(tmp_path / "eval"), "--report"]
    assert cli.main(["eval", *words]) == 0
    opened = Opened(browser, tmp_path / "eval" / "report.html")
    page = opened.page
    assert opened.fitting() == (13, 26)
    opened.set("text", rows[1]["prompt"][0]["content"])
    prompts = page.locator(".group .prompt pre").all_inner_texts()
    assert prompts and set(prompts) == {f"user: {rows[1]['prompt'][0]['content']}"}
    opened.after(lambda: page.click("text=Show all"))
    opened.after(lambda: page.select_option("#filter-access", "required"))
    for row in rows[1:5]:
        group = page.locator(".group").filter(has=page.get_by_role("button", name=row["id"], exact=True))
        assert [group.locator(kind).count() for kind in ("video", "audio")] == [int(s in row["tag"]) for s in "VA"]
        assert (row["subtitle"] in group.inner_text()) == ("S" in row["tag"])
    place = page.locator(".group video").first
    place.evaluate(
        "player => new Promise((done, failed) => { player.oncanplay = done; player.onerror = () => failed('no'); "
        "player.preload = 'auto'; player.load(); })"
    )
    page.click("text=Questions with errors")
    told = page.inner_text("#accuracy details")
    assert "not-found" in told and "gone.mp4" in told and "no such file under" in told
    for section in ("accuracy", "rewards", "disparity", "projection"):
        page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
        page.locator(f"#{section} .main-svg").first.wait_for(timeout=30_000)
    assert opened.heights_of_charts() == opened.heights
    assert opened.errors == []
    page.close()


def test_samples_without_a_score_and_rows_without_ids_are_told(browser, tmp_path):
    """Of two questions one sample of three was graded, and the second evaluation is of the second row alone."""
    for folder, rows in (("whole", [0, 1]), ("part", [1])):
        lines = [
            dict.fromkeys(LINES.names)
            | {"id": str(i), "row": i, "tag": "V", "access": "required", "sample": sample, "completion": "?"}
            | {"status": "unscored" if sample else "scored", "score": None if sample else 1.0, "notes": []}
            | {"reason": "no-judge" if sample else None, "prompt": f"question {row}", "solution": "A"}
            for i, row in enumerate(rows)
            for sample in range(3)
        ]
        table = pa.Table.from_pylist(lines, LINES)
        (tmp_path / folder).mkdir()
        pq.write_table(table, tmp_path / folder / "rows.parquet")
        result = evaluation_results(table, ["required"], 3) | {"data": {"sha256": folder}}
        (tmp_path / folder / "result.json").write_text(json.dumps(result))
    write_report([tmp_path / "whole", tmp_path / "part"], tmp_path / "two.html")
    opened = Opened(browser, tmp_path / "two.html")
    told = opened.page.inner_text("#accuracy")
    assert "samples not gradable\t4 of 6: 4 no-judge" in told and "samples not gradable\t2 of 3: 2 no-judge" in told
    assert told.count("all questions, were errors and what is not gradable wrong or right\t33.3 % to 100.0 %") == 2
    assert "only questions with equal prompts, media, solutions and tags are compared" in told
    assert opened.errors == []
    opened.page.close()


@pytest.mark.long
def test_pictures_are_shown(browser, tmp_path, monkeypatch):
    """Of files beside the page and of a table that holds them; a small copy stands in the page, and the file behind it."""
    monkeypatch.setattr("maple_trl.omni.embedded.FOLDER", tmp_path / "inside")
    media = tmp_path / "media"
    media.mkdir()
    for name, color in (("red.png", (250, 10, 10)), ("blue.png", (10, 10, 250))):
        Image.new("RGB", (600, 400), color).save(media / name)
    rows = [
        {"image": "red.png", "tag": "V", "prompt": [{"role": "user", "content": "Which? A. red\nB. blue"}]},
        {
            "images": ["red.png", "blue.png"],
            "prompt": [{"role": "user", "content": "<image> or <image>?"}],
            "tag": "V",
        },
        {
            "image": store((media / "blue.png").read_bytes(), "inside.png"),
            "prompt": [{"role": "user", "content": "?"}],
            "tag": "V",
        },
    ]
    lines = [json.dumps({"id": f"row-{n}", "solution": "A", **row}) + "\n" for n, row in enumerate(rows)]
    (tmp_path / "test.jsonl").write_text("".join(lines))
    words = [
        "--model",
        "builtin:tiny-omni",
        "--data",
        str(tmp_path),
        "--media-root",
        str(media),
        "--quiet",
        "--report",
    ]
    words += ["--max-pixels", "12544", "--max-new-tokens", "6", "--samples", "2", "--output", str(tmp_path / "eval")]
    assert cli.main(["eval", *words]) == 0
    opened = Opened(browser, tmp_path / "eval" / "report.html")
    pictures = opened.page.locator(".group .media img")
    assert opened.fitting() == (3, 6) and pictures.count() == 4
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.get_attribute("src").startswith("data:image/jpeg;base64,")
        assert picture.evaluate("one => one.decode().then(() => one.naturalWidth)") in range(100, 320)
    links = opened.page.locator(".group .media a").evaluate_all("all => all.map((one) => one.getAttribute('href'))")
    assert sorted(links) == ["../media/blue.png", "../media/red.png", "../media/red.png"]
    assert "inside.png" in opened.page.locator(".group").filter(has_text="row-2").inner_text()
    shot = opened.page.locator(".group").filter(has_text="row-1").screenshot()
    seen = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((250, 10, 10), (10, 10, 250)):
        assert (np.abs(seen - color).max(axis=1) < 30).sum() > 5_000, color
    assert opened.errors == []
    opened.page.close()


# Markup in what models say


def evil_run(folder):
    """Each field that a model, a data set or a job writes tries to be markup."""
    (folder / "rollouts").mkdir(parents=True)
    lines = [
        {
            "rollout": 0,
            "step": i // 4,
            "group": f"{i // 4}",
            "id": EVIL,
            "tag": "V",
            "prompt": EVIL,
            "completion": f"{EVIL} {i}",
            "solution": EVIL,
            "rewards": {EVIL: 0.5},
            "reward": 0.5,
            "replayed": False,
            "video": [f"{EVIL}.mp4", "javascript:window.hacked=1"],
            "subtitle": EVIL,
        }
        for i in range(12)
    ]
    write_rollout(folder / "rollouts", 0, lines, str(folder))
    entries = [
        {f"rewards/{EVIL}/mean": 0.5, "tag/V/reward": 0.5, f"tag/V/{EVIL}": 1.0, EVIL: 1.0, "step": i}
        for i in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    accuracy = {"V": 0.5, "A": 0.25, "all": 0.4}
    summary = {
        "before": accuracy,
        "after": accuracy,
        "model": EVIL,
        "dataset": EVIL,
        "questions": {"V": 1, "A": 1, "all": 2},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_script_in_a_completion_does_nothing(browser, tmp_path):
    folder = evil_run(tmp_path / "<script>window.hacked=1<")
    write_report([folder, folder], tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    page = opened.page
    assert opened.texts()[0].startswith(EVIL), "the completion is shown as it was written"
    for section in page.locator("main section").evaluate_all("all => all.map((one) => one.id)"):
        page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
        page.wait_for_timeout(100)
    page.select_option("#any-metric select", EVIL)
    page.hover("#curves .chart >> nth=0")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None and opened.errors == []
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.locator("script").count() == 9  # two that run, three of data, curves and a chunk of each run
    assert (
        page.locator("a").evaluate_all("links => links.filter((a) => !a.getAttribute('href').startsWith('#')).length")
        == 0
    )
    page.close()


@pytest.mark.long
def test_the_policy_of_the_page_stops_what_gets_in(browser, tmp_path):
    """Negative control of the test above: put into the page as markup, the same text would run, but for the policy."""
    folder = evil_run(tmp_path / "run")
    write_report(folder, tmp_path / "report.html")
    text = (
        (tmp_path / "report.html").read_text(encoding="utf-8").replace("<h2>Overview</h2>", f"<h2>Overview</h2>{EVIL}")
    )
    (tmp_path / "broken.html").write_text(text, encoding="utf-8")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    (tmp_path / "open.html").write_text(policy.sub("", text), encoding="utf-8")
    stopped, ran = Opened(browser, tmp_path / "broken.html"), Opened(browser, tmp_path / "open.html")
    assert ran.page.evaluate("window.hacked") == 1
    assert stopped.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in error for error in stopped.errors)
    stopped.page.close()
    ran.page.close()


# Two runs, and many completions


@pytest.mark.long
def test_two_runs_stand_side_by_side(browser, trained, tmp_path):
    write_report([trained, evil_run(tmp_path / "other")], tmp_path / "two.html")
    opened = Opened(browser, tmp_path / "two.html")
    assert opened.page.inner_text("h1") == "run against other"
    both = opened.fitting()
    opened.after(lambda: opened.page.select_option("#filter-inRun", "1"))
    assert opened.fitting() == (3, 12) and both == (3 + opened_groups(trained), 12 + len(lines_of(trained)))
    page = opened.page
    page.locator("#curves-by-tag").scroll_into_view_if_needed()
    page.locator("#curves-by-tag .main-svg").first.wait_for()
    dashes = page.locator("#curves-by-tag .scatterlayer path.js-line").evaluate_all(
        "lines => new Set(lines.map((line) => line.style.strokeDasharray)).size"
    )
    assert dashes == 2, "solid for the first run, dashed for the second"
    assert page.locator("#replay .missing").inner_text().startswith("No data. other:")
    assert opened.errors == []
    page.close()


@pytest.mark.long
def test_more_runs_have_a_colour_each(browser, tmp_path):
    """And a chart for each tag; what they were told to do stands side by side, and what went wrong first."""
    for name, rate in (("one", 1), ("two", 2), ("three", 2)):
        (tmp_path / name).mkdir()
        entries = [{"step": i, "tag/V/reward": i / 40, "tag/A/reward": 0.5, "reward": i / 40} for i in range(1, 41)]
        for entry in entries if name == "three" else ():
            entry["rewards/accuracy_reward/mean"] = 0.0
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        options = {"learning_rate": rate, "seed": 7, "num_generations": 4, "reward_funcs": ["accuracy_reward"]}
        (tmp_path / name / "args.json").write_text(json.dumps(options))
    entry = {
        "dataset": "train_dataset",
        "rows": [3, 4],
        "reason": "unreadable",
        "path": "a.mp4",
        "detail": "<b>no</b>",
    }
    (tmp_path / "three" / "quarantine.json").write_text(json.dumps([entry] * 120))
    write_report([tmp_path / name for name in ("one", "two", "three")], tmp_path / "many.html")
    opened = Opened(browser, tmp_path / "many.html")
    page = opened.page
    page.evaluate("beforePrint(); afterPrint()")
    names = page.evaluate(
        "[...document.querySelectorAll('#curves-by-tag .chart')].map((one) => one.layout.title.text)"
    )
    assert [name.split(":")[0] for name in names] == ["V", "A"]
    traces = page.evaluate(
        "document.querySelector('#curves-by-tag .chart').data.map((one) => [one.line.color, one.opacity ?? 1, one.y])"
    )
    colors = [traces[i][0] for i in range(0, 6, 2)]
    assert len(traces) == 6 and len(set(colors)) == 3 and [one[0] for one in traces[1::2]] == colors
    raw, smoothed = traces[0], traces[1]  # smoothed from the beginning, what was logged faintly below
    assert raw[1] < 0.5 < smoothed[1] and raw[2] == [i / 40 for i in range(1, 41)] and smoothed[2] != raw[2]
    assert page.locator(".alerts li").all_inner_texts() == [
        "accuracy_reward was 0 for every completion, in all 40 log entries: it teaches nothing.",
        "120 prompts quarantined (120 unreadable; first a.mp4): see Left out.",
    ]
    differing = page.locator("#configuration table").first.inner_text()
    assert "learning_rate\t1\t2\t2" in differing and "seed" not in differing
    page.click("#all-options summary")
    page.fill("#option-search", "see")
    assert page.locator("#all-options tbody tr").all_inner_texts() == ["seed\t7\t7\t7"]
    page.click("#quarantine-2 summary")
    assert "the first 100 of 120" in page.inner_text("#quarantine-2 summary")
    assert page.locator("#quarantine-2 tbody tr").count() == 100 and "<b>no</b>" in page.inner_text("#quarantine-2")
    assert opened.errors == []
    page.close()


@pytest.mark.long
def test_figures_of_both_papers_are_drawn(browser, tmp_path):
    """Two runs over each other, points that are numbered by clip, and scores on solid and dotted lines."""
    for name, sight in (("plain", "x"), ("varied", "{tag} sees")):
        folder = tmp_path / name
        (folder / "rollouts").mkdir(parents=True)
        lines = [
            {"rollout": 0, "step": 0, "group": f"{c}{tag}", "id": f"{c}{tag}", "tag": tag, "clip": f"clip {c}"}
            | {"completion": f"{sight.format(tag=tag)} {c}{i}", "rewards": {"accuracy_reward": i % 2}, "reward": i % 2}
            | {"advantage": i - 0.5, "tokens": 5 + i, "replayed": False, "prompt": "q", "solution": "A"}
            for c in "abc"
            for tag in ("V", "VA", "VAS")
            for i in range(2)
        ]
        write_rollout(folder / "rollouts", 0, lines, ".")
        entry = {f"tag/all/{metric}": 0.5 for metric in ("reward", "reward_kept", "prompt_tokens", "clip_fraction")}
        entries = [entry | {"reward": 0.5, "step_time": 2.0, "step": i} for i in range(1, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        steps = [{"position": i / 20} for i in range(20)]
        write_critical_steps(folder, {"judge": "a judge", "steps": steps})
    (tmp_path / "varied" / "args.json").write_text(json.dumps({"tas_lambda": 0.3}))
    write_report([tmp_path / "plain", tmp_path / "varied"], tmp_path / "two.html", projection="tsne")
    opened = Opened(browser, tmp_path / "two.html")
    page = opened.page
    for section in ("curves", "advantages", "critical", "lengths", "projection", "distances"):
        for i in range(page.locator(f"#{section} .chart").count()):
            page.locator(f"#{section} .chart").nth(i).scroll_into_view_if_needed()
            page.locator(f"#{section} .chart").nth(i).locator(".main-svg").first.wait_for(timeout=30_000)
    told = "place => [place.layout.title.text, place.data.map((trace) => [trace.name, trace.type, trace.mode || ''])]"
    charts = "[...document.querySelectorAll('.chart')].filter((place) => place.layout)"
    drawn = dict(page.evaluate(f"{charts}.map({told})"))
    over = [["plain", "bar", ""], ["varied", "bar", ""]]
    for title in ("Distances between completions of one clip", "Advantages of fresh completions"):
        assert drawn[title] == over, title
    assert drawn["Positions of critical steps"][:2] == over and "by TAS" in drawn["Positions of critical steps"][2][0]
    assert drawn["Accuracy by completion length"] == over and len(drawn["Rollout score"]) == 4
    assert {"Prompt length", "Clipped tokens"} <= set(drawn)
    assert drawn["varied"] == [[tag, "scatter", "markers+text"] for tag in ("V", "VA", "VAS")]
    assert page.inner_text("#clip-numbers") == "Clips: 1 clip a, 2 clip b, 3 clip c."
    assert "A step of varied takes 1 times as long as one of plain" in page.inner_text("#efficiency")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert opened.heights_of_charts() == opened.heights and opened.errors == []
    page.close()


def opened_groups(folder):
    return len({(line["rollout"], line["group"]) for line in lines_of(folder)})


@pytest.mark.long
def test_many_completions_are_paged(browser, tmp_path):
    """20 000 in 2500 groups: texts are unpacked for the groups that are shown alone."""
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    for number in range(25):
        lines = [
            {
                "rollout": number,
                "step": number,
                "group": f"{number}-{i // 8}",
                "row": i // 8,
                "tag": "VA",
                "prompt": "user: q",
            }
            | {"completion": f"text {number} {i}", "reward": (i % 8) / 7, "rewards": {}, "replayed": False}
            for i in range(800)
        ]
        write_rollout(tmp_path / "run" / "rollouts", number, lines, ".")
    write_report(tmp_path / "run", tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.fitting() == (2500, 20_000)
    assert opened.page.locator(".completion").count() == 64
    assert opened.texts()[0] == "text 24 0"
    opened.after(lambda: opened.page.click("button[data-go=last] >> nth=0"))
    assert opened.texts()[-1] == "text 0 799" and opened.page.locator(".completion").count() <= 64
    # A page that is typed is drawn when the next button is pressed; the button that is let go turns to the page after.
    page, after = opened.page.locator(".pager input").first, opened.page.locator("button[data-go=next]").first
    opened.after(lambda: opened.page.click("button[data-go=first] >> nth=0"))
    page.fill("5")
    after.hover()
    opened.after(opened.page.mouse.down)
    assert page.input_value() == "5" and opened.texts()[0] == "text 24 256"
    opened.after(opened.page.mouse.up)
    assert page.input_value() == "6" and opened.texts()[0] == "text 24 320"
    opened.set("least", "0.9")
    assert opened.fitting() == (2500, 2500)
    opened.set("text", "text 7 8")
    # In rollout 7, texts 8, 80 to 89 and so on; of these the ones with the highest reward.
    wanted = {i // 8 for i in range(800) if str(i).startswith("8") and i % 8 == 7}
    assert f"{len(wanted)} groups" in opened.page.inner_text("#rollouts .pager >> nth=0")
    # A search goes on to its end, whatever is clicked meanwhile.
    opened.after(lambda: opened.page.click("text=Show all"))
    search = "text => { text.value = 'text 7 8'; text.dispatchEvent(new Event('change')); "
    search += "document.querySelector('button[data-go=next]').click(); }"
    opened.after(lambda: opened.page.locator("#filter-text").evaluate(search))
    wanted = {i // 8 for i in range(800) if str(i).startswith("8")}
    assert opened.page.inner_text("#rollouts .pager .status >> nth=0") == f"{len(wanted)} groups fit"
    assert opened.errors == []
    opened.page.close()
