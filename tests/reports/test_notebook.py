"""What notebooks show of a run: from files of a run's own writers, with texts that would be markup if anything let them."""

from html.parser import HTMLParser

import pytest

from maple_trl.records.metrics_log import write_metrics
from maple_trl.records.rollouts import ROLLOUTS, read_rollouts, write_rollout
from maple_trl.records.run_html import run_html
from maple_trl.reports.folders import ReportError
from maple_trl.reports.notebook import completions, curves


HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>&amp;"
LOG = [
    {"step": step, "loss": 0.5, "reward": 0.1 * step, "tag/all/accuracy": 0.1 * step, "tag/V/accuracy": 0.05 * step}
    for step in range(1, 11)
]
PNG = b"\x89PNG\r\n\x1a\n"


def line(number, text, reward, **changes):
    rewards = {"accuracy_reward": reward, "format <b>": None}
    known = {"group": f"g{number}", "tag": "V", "prompt": f"question {number}", "solution": "B", "replayed": False}
    return (
        {"rollout": number, "step": number, "completion": text, "rewards": rewards, "reward": reward} | known | changes
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / ROLLOUTS).mkdir()
    write_metrics(LOG, folder / "metrics.jsonl")
    first = [line(0, "an early one", 0.0), line(0, "a sound", 1.0, group="other", tag="VA")]
    last = [line(7, "worse", 0.25), line(7, HOSTILE, 0.75, advantage=0.5, replayed=True), line(7, "unscored", None)]
    last += [line(7, "x" * 5000, 0.5, group="long", prompt=HOSTILE, video=[HOSTILE], subtitle="it's <i>")]
    write_rollout(folder / ROLLOUTS, 0, first, ".")
    write_rollout(folder / ROLLOUTS, 7, last, ".")
    return folder


class Markup(HTMLParser):
    """All elements, and all text between them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.texts = set(), [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def check_plain(html):
    """Nothing in it but text in headings and tables: no script, no address, no style; returns its texts."""
    found = Markup(html)
    assert found.elements <= {"h4", "p", "b", "br", "table", "thead", "tbody", "tr", "th", "td"}
    assert found.attributes == []
    return found.texts


def test_no_text_of_a_run_is_read_as_markup(run):
    texts = check_plain(run_html(f"Trainer {HOSTILE}", LOG, str(run), [{"text": f"lost {HOSTILE}"}]))
    assert any(HOSTILE in text for text in texts if text.startswith("Trainer"))
    texts = check_plain(completions(run, groups=9).html)
    assert sum(HOSTILE in text for text in texts) == 3 and "format <b>" in texts


def test_a_run_tells_what_it_has_learned(run):
    texts = check_plain(run_html("Trainer", LOG, str(run), []))
    assert texts[0] == "Trainer: 10 steps"
    cells = [text for text in texts if text.strip()]
    at = cells.index("accuracy")
    assert cells[at : at + 3] == ["accuracy", "0.100", "1.000"] and cells[cells.index("V") + 2] == "0.500"
    assert cells[-1] == "Nothing was left out, failed or never fired."
    assert run_html("Trainer", [], str(run), []) == "<h4>Trainer: not trained yet</h4>"


def test_completions_of_a_group_stand_together_the_best_first(run):
    texts = check_plain(completions(run, groups=2).html)
    order = [texts.index(text) for text in (HOSTILE, "worse", "unscored")]
    assert order == sorted(order) and "0.500" in texts and "replayed" in texts
    (long,) = [text for text in texts if text.startswith("xxx")]
    assert len(long) < 700 and "…" in long
    assert "step 7, tag V, fed" in "".join(texts)


def test_completions_are_chosen_by_tag_and_step(run):
    assert "a sound" in completions(run, tag="av").html
    early = completions(run, step=6, groups=9).html
    assert "an early one" in early and "worse" not in early
    with pytest.raises(ValueError, match="no completions"):
        completions(run, tag="S")
    with pytest.raises(ValueError, match="no completions"):
        completions(run, step=-1)


def test_the_latest_rollouts_alone_can_be_read(run):
    table, _, broken = read_rollouts(run / ROLLOUTS, latest=1)
    assert set(table["rollout"].to_pylist()) == {7} and broken == []
    assert len(read_rollouts(run / ROLLOUTS)[0]) == 6


def test_curves_are_a_picture_of_the_log(run, tmp_path):
    picture = curves(run)._repr_png_()
    assert picture.startswith(PNG)
    other = [{**entry, "reward": -entry["reward"]} for entry in LOG]
    write_metrics(other, tmp_path / "metrics.jsonl")
    assert curves(tmp_path).png != picture == curves(run).png
    accuracy = {"V": 0.5, "all": 0.5}
    assert len(curves(run, accuracy, accuracy).png) > len(picture)
    with pytest.raises(ReportError, match="there is no folder"):
        curves(tmp_path / "none")
