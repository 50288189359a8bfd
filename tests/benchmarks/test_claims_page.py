"""From results on disk to docs/claims.md, by the commands of `python benchmarks/claims`."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import claim_sets
import programs
import pytest
from claim_sets import CLAIMS, known_tasks, write_register, write_results
from evidence import Evidence, Wanted, digest, forget_other_code, forgotten, wanted_anew, wanted_runs
from metrics import Censored, MissingValueError, read_metric
from page import BEGIN, DIGEST, Page, read_headlines
from papers import read_figures
from register import IS_THERE, RegisterError, read_register
from runs import source
from scores import decoded_scores, encoded_scores, rounded, whole
from verdicts import CANT_TELL, DOES_NOT, HOLDS


main = claim_sets.command()

BETTER = {0: 0.80, 1: 0.82, 2: 0.79, 3: 0.81, 4: 0.80}
WORSE = {0: 0.60, 1: 0.61, 2: 0.60, 3: 0.62, 4: 0.59}
UNCLEAR = {0: 0.55, 1: 0.75, 2: 0.52, 3: 0.72, 4: 0.58}


@pytest.fixture
def evidence(tmp_path):
    folder = write_register(tmp_path / "register-of-tests")
    known_tasks(folder)
    return Evidence(read_register(folder), tmp_path / "results")


def claims(command, evidence, *words):
    """`python benchmarks/claims` on a register and results of a test."""
    shared = ["--register", evidence.register.folder, "--results", evidence.results]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in (command, *shared, *words)])
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def report(evidence, docs, readme="README.md"):
    done = claims("report", evidence, "--docs", docs, "--readme", docs / readme, "--json", docs / "told.json")
    assert done.returncode == 0, done.stderr
    return (docs / "claims.md").read_text(), json.loads((docs / "told.json").read_text())


def write_decided(evidence):
    """Claim 2 holds and its control fails; claim 1 holds, though the old one never got there twice."""
    write_results(evidence, "new", BETTER, seconds={n: 60 + n for n in range(5)}, reached=dict.fromkeys(range(5), 150))
    reached = {0: 700, 1: None, 2: 650, 3: None, 4: 800}
    write_results(evidence, "old", WORSE, seconds={n: 40 + n for n in range(5)}, reached=reached)


# The page


def test_a_report_tells_what_was_found(evidence, tmp_path):
    write_decided(evidence)
    docs = tmp_path / "docs"
    docs.mkdir()
    readme = "# Title\n\n<!-- claims: begin -->\nold\n<!-- claims: end -->\nlast\n"
    (docs / "README.md").write_text(readme)
    page, told = report(evidence, docs)
    assert told["better"]["verdict"] == HOLDS and told["better"]["controls_failed"] == ["seconds"]
    assert told["sooner"]["verdict"] == HOLDS and told["sooner"]["measures"]["completions"]["censored"] == 2
    low, high = told["better"]["measures"]["accuracy"]["interval"]
    assert low < 0.2 < high
    row = next(line for line in page.splitlines() if "The new one answers more rightly." in line)
    assert f"+0.200 [{low:+.3f}, {high:+.3f}] | 5 | **holds**; **CONTROL FAILS: seconds**" in row
    assert "Of 2 claims: holds: 2. Claims with a control that fails: 1." in page
    assert "`python benchmarks/claims run gpu --workers 1`" in page and not re.search(r"\{[A-Z]", page)
    cells = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines()}
    errors = [cells[f"| {name}"][8] for name in ("completions", "seconds (control)")]
    assert errors == ["not counted", "–"] and float(cells["| accuracy"][8].split()[0]) > 0
    assert (
        "**The control seconds fails: the effect may be something else than what is claimed**: × " in page
        and "2 runs never got there" in page
    )
    linked = re.findall(r"\((\S+\.(?:json|svg))\)", page)
    assert len(linked) == 2 * 10 + 3 and all((docs / file).is_file() for file in linked)
    written = (docs / "README.md").read_text()
    assert written.startswith("# Title\n\n<!-- claims: begin -->\n\nOf 2 claims: ") and written.endswith(
        "<!-- claims: end -->\nlast\n"
    )
    line = next(line for line in written.splitlines() if "The new one answers more rightly." in line)
    assert line.startswith("- **holds**; **CONTROL FAILS: seconds**: [") and "](claims.md#better) (" in line
    assert f"here +0.200 [{low:+.3f}, {high:+.3f}])" in line
    # The same again: the same bytes.
    files = [docs / "claims.md", docs / "README.md", *sorted((docs / "claims").iterdir())]
    assert [file.name for file in files[2:]] == ["better.svg", "sooner-curves.svg", "sooner.svg"]
    before = [file.read_bytes() for file in files]
    for file in files[2:]:
        file.unlink()
    report(evidence, docs)
    assert [file.read_bytes() for file in files] == before


def test_curves_are_drawn_with_the_interval_of_their_mean(evidence):
    from plots import band, curves_of, drawn_curves
    from scipy import stats

    write_decided(evidence)
    (curves,) = curves_of(evidence.register.claims["sooner"])
    assert (curves.of, curves.cost, curves.variants) == ("all", "completions", ("new", "old"))
    assert curves_of(evidence.register.claims["better"]) == []
    runs = [curves.points(evidence.read("old", seed)) for seed in range(5)]
    runs[0] = runs[0][:15]  # ends at 700, beyond which not all five are known
    costs, means, reaches = band(runs)
    assert (costs[0], costs[-1]) == (0, 700)
    at = [dict(points)[700] for points in runs]
    low, high = stats.t.interval(0.95, 4, statistics.fmean(at), statistics.stdev(at) / 5**0.5)
    assert 0.5 < statistics.fmean(at) < 0.7
    assert (means[-1] - reaches[-1], means[-1] + reaches[-1]) == pytest.approx((low, high))
    assert (means[0], reaches[0]) == (0.5, 0)
    # What a metric calls them, and what it means where it says nothing.
    for text, of, cost in (
        ("area(held_out)", "all", "completions"),
        ("reached(V, 0.5, wall_seconds)", "V", "wall_seconds"),
        ("area(all, steps)", "all", "step"),
    ):
        measure = dataclasses.replace(evidence.register.claims["sooner"].measures[0], metric=read_metric(text))
        (other,) = curves_of(dataclasses.replace(evidence.register.claims["sooner"], measures=(measure,)))
        assert (other.of, other.cost) == (of, cost)
    drawn = drawn_curves(evidence, evidence.register.claims["sooner"])
    assert "new (5 seeds)" in drawn and "old (5 seeds)" in drawn and "completions" in drawn
    # A run without a point takes its variant out of the plot, and not the page.
    edit(evidence, "old", 3, lambda result: result["curve"].update(points=[]))
    drawn = drawn_curves(Evidence(evidence.register, evidence.results), evidence.register.claims["sooner"])
    assert "new (5 seeds)" in drawn and "old (" not in drawn


def test_a_result_that_is_changed_changes_the_verdict(evidence, tmp_path):
    write_decided(evidence)
    docs = tmp_path / "docs"
    assert report(evidence, docs)[1]["better"]["verdict"] == HOLDS
    for seed in range(5):
        file = evidence.run("new", seed)[1]
        result = json.loads(file.read_text())
        old = json.loads(evidence.run("old", seed)[1].read_text())
        result["after"]["trained"]["digits"] = old["after"]["trained"]["digits"]
        file.write_text(json.dumps(result))
    page, told = report(evidence, docs)
    assert told["better"]["verdict"] == DOES_NOT and "**does not**" in page
    assert not (docs / "README.md").exists()  # without markers nothing is written into it


def test_what_was_not_run_is_said(evidence, tmp_path, monkeypatch):
    monkeypatch.setitem(IS_THERE, "gpu", lambda: False)
    (evidence.register.folder / "register" / "topic.yaml").write_text(
        (evidence.register.folder / "register" / "topic.yaml")
        .read_text()
        .replace("number: 1\n", "number: 1\n    needs: gpu\n")
    )
    evidence = Evidence(read_register(evidence.register.folder), evidence.results)
    page, told = report(evidence, tmp_path / "docs")
    assert "| not measured |" in page and "| not run (needs a GPU) |" in page
    assert told["better"]["verdict"] == CANT_TELL and not list((tmp_path / "docs" / "claims").iterdir())
    done = claims("status", evidence)
    assert "sooner: not run, needs a GPU" in done.stdout and "better: 0 of 10 runs" in done.stdout
    assert "10 runs of which no time is known" in done.stdout


def page_of(tmp_path, new, old, change):
    """The page and the claim `better` of a register whose measures are changed; of the variant late there is one run."""

    def add(topic):
        topic["variants"]["late"] = {"task": "probe", "recipe": "tiny/mapo_sample"}
        change(topic["claims"]["better"]["measures"])

    folder = write_register(tmp_path / "register-of-measures", add)
    known_tasks(folder)
    evidence = Evidence(read_register(folder), tmp_path / "results-of-measures")
    write_results(evidence, "new", new)
    write_results(evidence, "old", old)
    write_results(evidence, "late", {0: 0.6})
    return Page(evidence, tmp_path), evidence.register.claims["better"]


@pytest.mark.parametrize(
    ("new", "expects", "shown"),
    [
        (WORSE, "above", "**does not** (less than +0.1)"),  # nothing is there; of a smaller effect nothing is said
        (WORSE, "below", "**does not** (more than -0.1)"),
        (BETTER, "below", "**does not** (the other way round)"),
        (BETTER, "equal", "**does not** (apart, by 0.1 or more)"),
        (BETTER, "not above", "**does not** (above, by 0.1 or more)"),
    ],
)
@pytest.mark.matrix(cases=3)
def test_a_claim_that_does_not_hold_says_of_which_effect(tmp_path, new, expects, shown):
    def change(measures):
        measures["accuracy"] |= {"least": 0.1, "expects": expects}
        del measures["seconds"]

    page, claim = page_of(tmp_path, new, WORSE, change)
    assert page.verdict(claim) == f"{shown}; no control"
    contradicted, short = (0, 1) if " than " in shown else (1, 0)
    assert f"- Of those that do not, {contradicted} are contradicted" in page.counts()[-1]
    assert f" {short + 1} only lack an effect of the size" in page.counts()[-1]  # and the other claim


def test_a_row_shows_what_decides_and_parts_are_no_controls(tmp_path):
    def change(measures):
        accuracy = measures.pop("accuracy")
        measures |= {name: accuracy | {"expects": "not below"} for name in ("first", "second")}
        measures["third"] = accuracy | {"expects": "below"}
        measures["alone"] = accuracy | {"role": "part"}
        measures["nothing-alone"] = accuracy | {"role": "part", "expects": "below"}
        measures["seconds"]["least"] = 0.3

    page, claim = page_of(tmp_path, BETTER, WORSE, change)
    assert page.here(claim).startswith("third: +0.200 [") and page.here(claim).endswith("]; 1 more below")
    assert page.here(claim, "more").endswith("]; 1 more")
    assert page.verdict(claim) == "**does not** (third: the other way round)"  # its control holds
    section = "\n".join(page.section(claim))
    assert "- Of the effect, the part alone has alone: +0.200 [" in section and "the part nothing-alone" not in section
    assert "| alone (part) |" in section


SLIGHTLY = {seed: value - 0.05 for seed, value in BETTER.items()}


@pytest.mark.parametrize(
    ("new", "expects", "least", "shown"),
    [
        (SLIGHTLY, "not below", 0.1, "**holds** (below, by less than 0.1); no control"),
        (SLIGHTLY, "not below", 0.05, "can't tell (below, perhaps by 0.05 or more)"),
        (SLIGHTLY, "equal", 0.1, "**holds** (apart, by less than 0.1); no control"),
        (SLIGHTLY, "below", 0.1, "**holds** (smaller than would matter); no control"),
        (BETTER, "not below", 0.1, "**holds**; no control"),
    ],
)
@pytest.mark.matrix(cases=3)
def test_a_loss_by_less_than_would_matter_is_told_with_the_verdict(tmp_path, new, expects, least, shown):
    def change(measures):
        measures["accuracy"] |= {"least": least, "expects": expects}
        del measures["seconds"]

    page, claim = page_of(tmp_path, new, BETTER, change)
    assert page.verdict(claim) == shown
    harmless = expects in ("not below", "equal")
    if "holds" in shown:
        assert f" {int(harmless)} say that nothing is lost" in page.counts()[0]
    else:
        assert "say that" not in page.counts()[0]


def test_an_open_control_that_differs_is_named_also_where_the_claim_can_not_tell(tmp_path):
    def change(measures):
        measures["drift"] = measures["accuracy"] | {"expects": "equal", "least": 0.05, "role": "control"}
        measures["accuracy"] |= {"against": "late"}
        measures["unclear"] = measures["accuracy"] | {"role": "control"}
        del measures["seconds"]

    page, claim = page_of(tmp_path, SLIGHTLY, BETTER, change)
    write_results(page.evidence, "late", UNCLEAR)
    page = Page(Evidence(page.register, page.evidence.results), tmp_path)
    told = "can't tell (a second look is due); 2 of 2 controls can't tell: drift is apart, perhaps by 0.05 or more"
    assert page.verdict(claim) == told
    assert "- Controls that can't tell: drift (-0.05" in "\n".join(page.section(claim))


def test_the_papers_figures_stand_beside_what_is_found(tmp_path):
    page, claim = page_of(tmp_path, WORSE, WORSE, lambda measures: measures["accuracy"].update(least=0.1))
    assert "– | 5 |" in next(line for line in page.section(claim) if line.startswith("| accuracy |"))
    for figure, told in ((0.0, "+0.0000 (within)"), (0.2, "+0.2000 (outside)")):
        page.figures = {"better": {"accuracy": figure}}
        assert f"| {told} | 5 |" in next(line for line in page.section(claim) if line.startswith("| accuracy |"))
        told = f"a figure for 1 of these, which the intervals of {int(figure == 0)} hold and those of {int(figure != 0)} exclude"
        assert told in page.counts()[-1]


OF_THE_OTHER_SIGN = {
    ("captions-disparity", "mapo"),  # Table 3 says the reverse of the text
    ("avatar-components", "shaping"),  # on this one of six benchmarks
}


def test_figures_have_the_sign_that_their_claim_expects():
    """What is expected of them, from texts that are theirs: a figure of `against` less `of` would be of the other sign."""
    register = read_register()
    other = set()
    for name, figures in read_figures(register).items():
        for measure in (one for one in register.claims[name].measures if one.name in figures):
            side = figures[measure.name] - (1 if measure.effect == "ratio" else 0)
            if measure.expects in ("above", "below") and (side > 0) != (measure.expects == "above"):
                other.add((name, measure.name))
    assert other == OF_THE_OTHER_SIGN


@pytest.mark.parametrize(
    "told, message",
    [
        ("avatar-complations: {tokens: 1}", "no claim 'avatar-complations'; did you mean avatar-completions"),
        ("avatar-completions: {token: 1}", "avatar-completions has no measure 'token'; did you mean tokens"),
        ("avatar-completions: {tokens: 80 %}", "avatar-completions.tokens must be a number, got '80 %'"),
    ],
)
def test_figures_are_of_measures_of_the_register(tmp_path, told, message):
    (tmp_path / "figures.yaml").write_text(told)
    with pytest.raises(RegisterError, match=f"figures.yaml: .*{message}"):
        read_figures(read_register(), tmp_path / "figures.yaml")


def test_seconds_of_runs_that_were_disturbed_or_of_other_code_are_not_judged(evidence):
    """They are shown; a second look would not help."""
    write_decided(evidence)

    def judged():
        anew = Evidence(evidence.register, evidence.results)
        return anew.claim(anew.register.claims["better"])[1]["seconds"], wanted(anew, 1)

    assert judged()[0].verdict == DOES_NOT
    edit(evidence, "old", 3, lambda result: result["cost"].update(wall_seconds=48.0))  # 43 of CPU
    told, later = judged()
    assert (told.verdict, told.withheld, later) == (CANT_TELL, True, [])
    assert (
        told.estimate.seeds == 5
        and told.reason == "seconds that don't compare: 1 of 10 runs had other programs beside them"
    )
    edit(evidence, "old", 3, lambda result: result["cost"].update(wall_seconds=47.0))
    assert judged()[0].verdict == DOES_NOT
    edit(evidence, "old", 2, lambda result: result.update(source="other"))
    assert judged()[0].reason == "seconds that don't compare: 1 of 5 pairs are of different code"


def test_a_claim_with_a_measure_that_lacks_runs_is_measured_in_part(tmp_path):
    def change(measures):
        measures["beside-late"] = measures["accuracy"] | {"against": "late"}
        measures["control-late"] = measures["beside-late"] | {"role": "control"}
        del measures["seconds"]

    page, claim = page_of(tmp_path, BETTER, WORSE, change)
    assert page.found["better"][1]["accuracy"].verdict == HOLDS
    assert page.verdict(claim) == "measured in part" and page.here(claim).endswith("; 1 not measured")
    section = "\n".join(page.section(claim))
    assert "| not measured (1 of 5 seeds) |" in section and "Controls that are not measured: control-late." in section
    assert "measured in part: 1" in page.counts()[0]
    assert any("The new one answers more rightly." in row for row in page.table())

    def none_that_decides(measures):
        change(measures)
        measures["accuracy"] |= {"role": "control"}

    page, claim = page_of(tmp_path / "again", BETTER, WORSE, none_that_decides)
    assert (page.verdict(claim), page.here(claim)) == ("not measured", "–")


def test_results_of_variants_that_are_gone_are_kept_and_listed(evidence, tmp_path):
    write_decided(evidence)
    topic = evidence.register.folder / "register" / "topic.yaml"
    topic.write_text(topic.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    changed = Evidence(read_register(evidence.register.folder), evidence.results)
    assert [result["seed"] for _, result in forgotten(changed)].count(0) == 1 and len(forgotten(changed)) == 5
    page, told = report(changed, tmp_path / "docs")
    assert told["better"]["verdict"] == CANT_TELL  # nothing to compare with
    listed = page.partition("## No longer in the register")[2]
    assert listed.count("learning_rate: 0.001") == 5 and "`tiny/mupo` on `probe` (version 3)" in listed


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_runs_older_than_their_registration_are_told(evidence, tmp_path):
    folder = evidence.register.folder
    evidence = Evidence(evidence.register, folder / "results")

    def commit(day):
        date = f"2026-12-{day}T12:00:00+0000"
        who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        variables = os.environ | who | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        for words in (["add", "."], ["commit", "-qm", "x"]):
            subprocess.run(["git", "-C", folder, *words], check=True, env=variables)

    subprocess.run(["git", "init", "-q", folder], check=True)
    commit(10)
    write_decided(evidence)
    commit(11)
    page, _ = report(evidence, tmp_path / "docs")
    assert "of 2026-12-10" in page and "Warning" not in page
    topic = folder / "register" / "topic.yaml"
    topic.write_text(topic.read_text().replace("least: 0.03", "least: 0.04"))
    page, _ = report(evidence, tmp_path / "docs")
    assert "register/topic.yaml is not as it is committed" in page
    commit(20)
    page, _ = report(evidence, tmp_path / "docs")
    assert "10 of 10 runs of `better` were not committed after its text in the register" in page
    assert "`sooner` were not committed" not in page and "after the rules" not in page
    rules = folder / "register.yaml"
    rules.write_text(rules.read_text().replace("level: 0.0294", "level: 0.03"))
    for file in evidence.results.glob("*/*.json"):  # committed at once with what they are judged by
        file.write_text(file.read_text() + "\n")
    commit(21)
    page, _ = report(evidence, tmp_path / "docs")
    assert "10 of 10 runs were not committed after the rules that decide" in page


def edit(evidence, variant, seed, change):
    file = evidence.run(variant, seed)[1]
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))
    return file


def made(evidence, **told):
    for name in ("new", "old"):
        for seed in range(5):
            edit(evidence, name, seed, lambda result: result.update(told))


def test_runs_that_other_libraries_or_other_code_made_are_told(evidence, tmp_path):
    write_decided(evidence)
    made(evidence, packages={"torch": "2.9"}, source="aa", start="bb")
    page = "\n".join(Page(evidence, tmp_path).lines())
    assert "10 runs: torch 2.9; source aa" in page and "Warning" not in page and "<summary>10 runs</summary>" in page
    edit(evidence, "old", 4, lambda result: result.update(packages={"torch": "2.10"}, source="cc"))
    page = "\n".join(Page(Evidence(evidence.register, evidence.results), tmp_path).lines())
    assert "Runs of `better` were made with different libraries, which change numbers: torch 2.10, 2.9." in page
    assert "1 runs: torch 2.10; source cc" in page
    assert "<summary>10 runs, by 2 states of this package's code</summary>" in page


def test_runs_are_compared_from_the_same_start_alone(evidence, tmp_path):
    write_decided(evidence)
    made(evidence, start="bb")
    edit(evidence, "old", 4, lambda result: result.update(start="dd"))
    apart = Evidence(evidence.register, evidence.results)
    found = apart.claim(apart.register.claims["better"])[1]["accuracy"]
    told = "not measured (4 of 5 seeds); runs of seed 4 began from different starts"
    assert (found.verdict, found.estimate, found.reason) == (CANT_TELL, None, told)
    chosen = apart.register.choose([])
    assert list(wanted_anew(apart, chosen, lambda task: "dd")) == [Wanted("new", 4, "dd")]
    assert list(wanted_anew(apart, chosen, lambda task: "ee")) == [Wanted("new", 4, "ee"), Wanted("old", 4, "ee")]

    assert "1 pairs of runs began from different starts" in claims("status", apart, "better").stdout
    assert wanted(apart, 1) == []  # a look of four seeds is none

    # What the other start makes of the same run stands beside it, and is what it is compared with.
    first, beside = (apart.run("new", 4, start)[1] for start in ("", "dd"))
    result = json.loads(first.read_text()) | {"start": "dd"}
    result["after"]["trained"]["digits"] = "5" * 140
    beside.write_text(json.dumps(result))
    again = Evidence(evidence.register, evidence.results)
    measure = again.register.claims["better"].measure("accuracy")
    assert again.sample(measure, "new", range(5)).value == pytest.approx([*list(BETTER.values())[:4], 1.0], abs=0.005)
    assert again.claim(again.register.claims["better"])[1]["accuracy"].estimate.seeds == 5
    assert list(wanted_anew(again, chosen, lambda task: "ee")) == [] and forgotten(again) == []
    assert "pairs of runs" not in claims("status", again).stdout
    third = again.run("new", 4, "ff")[1]
    third.write_text(json.dumps(result | {"start": "ff"}))
    assert forgotten(again) == [] and again.pair(measure, 4)[0] == beside
    page = "\n".join(Page(again, tmp_path).lines())
    assert "<summary>10 runs, from 2 starts, both of a pair from the same, " in page
    assert f"[4](results/probe/{beside.name})" in page and first.name not in page


def test_a_second_look_from_another_start_is_told(evidence, tmp_path):
    write_results(evidence, "new", UNCLEAR | {seed + 5: share for seed, share in UNCLEAR.items()})
    write_results(evidence, "old", WORSE | {seed + 5: share for seed, share in WORSE.items()})
    edit(evidence, "old", 7, lambda result: result.update(start="dd"))
    page = Page(evidence, tmp_path)
    found = page.found["better"][1]["accuracy"]
    assert (found.estimate.seeds, found.verdict) == (5, CANT_TELL)
    assert found.reason == "runs of seed 7 began from different starts"
    assert "can't tell (a second look is due)" in page.verdict(page.register.claims["better"])
    asked = list(wanted_anew(page.evidence, page.register.choose(["better"]), lambda task: "dd"))
    assert asked == [Wanted("new", 7, "dd")]


def test_what_is_decided_asks_for_no_run_once_more(evidence):
    write_decided(evidence)
    for name in ("new", "old"):
        write_results(evidence, name, dict.fromkeys(range(5, 10), 0.7))
    edit(evidence, "old", 7, lambda result: result.update(start="dd"))
    anew = Evidence(evidence.register, evidence.results)
    assert list(wanted_anew(anew, anew.register.choose([]), lambda task: "dd")) == []


def test_what_several_measures_say_stands_behind_their_names(tmp_path):
    def change(measures):
        accuracy = measures.pop("accuracy") | {"least": 0.1}
        measures |= {"one": accuracy, "two": accuracy, "three": accuracy | {"least": 0.2}}
        measures["equal"] = accuracy | {"expects": "equal"}
        del measures["seconds"]

    page, claim = page_of(tmp_path, SLIGHTLY, SLIGHTLY, change)
    assert page.verdict(claim) == "**does not** (one, two: less than +0.1; three: less than +0.2); no control"


def test_without_matplotlib_a_report_says_so_and_writes_nothing(evidence, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("--docs", tmp_path / "docs", "--readme", tmp_path / "README.md")
    assert claims("report", evidence, *words).returncode == 0  # no plot yet
    page = (tmp_path / "docs" / "claims.md").read_bytes()
    write_decided(evidence)
    done = claims("report", evidence, *words)
    assert done.returncode == 2 and done.stderr == (
        "error: plots of what was measured need matplotlib: pip install matplotlib\n"
    )
    assert (tmp_path / "docs" / "claims.md").read_bytes() == page


def test_a_damaged_result_is_named_and_is_no_run_that_is_done(evidence):
    write_decided(evidence)
    file = evidence.run("old", 3)[1]
    for damage in (file.read_text()[:100], "[]", ""):
        file.write_text(damage)
        for command in ("status", "report", "run"):
            done = claims(command, evidence)
            assert done.returncode == 2 and f"error: {file} is damaged (" in done.stderr
            assert "or delete it to have it made anew" in done.stderr


def test_a_claim_whose_task_lacks_something_is_not_run(evidence, tmp_path, monkeypatch):
    file = evidence.register.folder / "register" / "topic.yaml"
    file.write_text(file.read_text().replace("task: probe", "task: stamps"))
    monkeypatch.setattr("tasks._cache", tmp_path)
    done = claims("run", evidence)
    needs = (
        "needs the media of Debian's tuxpaint-stamps-default, which `python benchmarks/claims/fetch_stamps.py` fetches"
    )
    assert done.returncode == 0 and done.stdout.count(f" is not run: it {needs}") == 2
    assert "0 runs are done, 0 failed, 0 are left" in done.stdout
    assert claims("status", evidence).stdout.count(f"not run, {needs}") == 2
    page = Page(Evidence(read_register(evidence.register.folder), evidence.results), tmp_path)
    assert page.counts() == ["Of 2 claims: not run: 2. Claims with a control that fails: 0."]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seeds", "4-2"), "must be seeds such as 0-4, the smaller one first, got '4-2'"),
        (("--seeds", "all"), "must be seeds such as 0-4 or 0,2,7, got 'all'"),
        (("--workers", "many"), "must be a whole number of 1 or more, got 'many'"),
        (("--workers", "0"), "must be a whole number of 1 or more, got '0'"),
    ],
)
def test_words_that_mean_nothing_are_refused(evidence, capsys, words, told):
    with pytest.raises(SystemExit):
        main(["run", "--register", str(evidence.register.folder), *words])
    assert told in capsys.readouterr().err


def test_quick_results_of_other_code_are_forgotten(evidence):
    quick = Evidence(evidence.register, evidence.results, quick=True)
    for told in (evidence, quick):
        write_results(told, "new", {0: 0.5, 1: 0.5})
        edit(told, "new", 1, lambda result: result.update(source=source()))
    forget_other_code(evidence.results)
    there = [
        Evidence(evidence.register, evidence.results, kind).there("new", n) for kind in (True, False) for n in (0, 1)
    ]
    assert there == [False, True, True, True]


# Which runs are asked for


def wanted(evidence, look):
    return list(wanted_runs(evidence, evidence.register.choose([]), look))


def test_second_looks_are_of_what_can_not_tell(evidence):
    first = wanted(evidence, 0)
    assert first == [Wanted(name, seed) for seed in range(5) for name in ("new", "old")]
    write_decided(evidence)
    assert wanted(evidence, 1) == []
    write_results(evidence, "new", UNCLEAR, reached=dict.fromkeys(range(5), 150))
    evidence = Evidence(evidence.register, evidence.results)
    assert [one for one in wanted(evidence, 1) if one.seed == 5] == [Wanted("new", 5), Wanted("old", 5)]
    # A measure that was decided at the first look is not looked at again.
    later = {seed: 0.9 - seed / 20 for seed in range(5, 10)}
    for name in ("new", "old"):
        write_results(evidence, name, later, reached=dict.fromkeys(range(5, 10), 300))
    found = evidence.claim(evidence.register.claims["better"])[1]
    assert found["accuracy"].estimate.seeds == 10
    assert evidence.claim(evidence.register.claims["sooner"])[1]["completions"].estimate.seeds == 5
    assert wanted(evidence, 1) and all(evidence.there(one.variant, one.seed) for one in wanted(evidence, 1))


def test_status_counts_hours_by_what_runs_took(evidence):
    write_results(evidence, "new", dict(list(BETTER.items())[:2]))
    done = claims("status", evidence, "better")
    assert done.stdout.splitlines() == [
        "  2 better: 2 of 10 runs, 0.2 CPU hours left",  # 8 of 1.5 minutes
        "8 runs are left in all, 0.2 CPU hours left",
    ]


def test_a_value_that_is_not_there_is_named(evidence):
    write_decided(evidence)
    edit(evidence, "old", 3, lambda result: result["cost"].pop("cpu_seconds"))
    found = evidence.claim(evidence.register.claims["better"])[1]["seconds"]
    assert (found.verdict, found.estimate) == (CANT_TELL, None)
    assert "seed 3 of old: cost.cpu_seconds: no 'cpu_seconds' in cost; there is wall_seconds" in found.reason


def test_a_decided_look_does_not_ask_for_values_of_later_seeds(evidence):
    write_decided(evidence)
    later = dict.fromkeys(range(5, 10), 0.7)
    for name in ("new", "old"):
        write_results(evidence, name, later)
        edit(evidence, name, 7, lambda result: result.pop("cost"))
        edit(evidence, name, 7, lambda result: result["after"]["trained"].update(digits="-" * 140))
    found = evidence.claim(evidence.register.claims["better"])[1]
    assert (found["accuracy"].verdict, found["accuracy"].estimate.seeds) == (HOLDS, 5)


def test_the_register_is_checked_and_rules_are_tried_by_command(evidence, tmp_path):
    done = claims("check", evidence)
    assert done.returncode == 0 and "2 claims with 3 measures and 2 variants: 10 runs at the first look" in done.stdout
    file = tmp_path / "rates.json"
    words = ["--registers", "5", "--effect", "0.1", "--between-seeds", "0.01", "--json", file]
    done = claims("simulate", evidence, *words)
    assert "50 claims with an effect of +0.100 and as many without" in done.stdout and "stated" not in done.stdout
    rates = json.loads(file.read_text())
    assert rates["planted"] == 1 and rates["null"] <= 0.2 and rates["setting"]["effect"] == 0.1
    # What is on disk says how much runs differ.
    write_decided(evidence)
    for seed in range(5):
        for name, answers in (("new", BETTER), ("old", WORSE)):
            evidence.run(name, seed)[1].unlink()
            write_results(evidence, name, {seed: answers[seed] + seed % 2 * 0.05 * (name == "new")})
    done = claims("simulate", evidence, "--registers", "1")
    stated, measured = re.findall(r"deviation (\S+) between seeds", done.stdout)
    assert stated == "0.020" and float(measured) > 0.012 and float(measured) != 0.02
    assert done.stdout.count("stated: at least") == 1


# Metrics and results


def test_metrics_are_read_off_a_result():
    points = [(0, 0.2), (100, 0.7), (200, 0.4), (300, 0.6), (400, 0.8)]
    result = {
        "curve": {"points": [{"completions": at, "accuracy": {"all": one}} for at, one in points]},
        "log": {"tag/all/entropy": [4.0, 3.0, None, 2.0, 1.0]},
        "cost": {"a": 3.0, "b": 2},
    }
    assert read_metric("reached(all, 0.5, completions)").value(result) == 200  # 0.7 and 0.4
    never = read_metric("reached(held_out, 0.75, completions)").value(result)
    assert never == 400 and isinstance(never, Censored)
    assert not isinstance(read_metric("reached(all, 0.7, completions)").value(result), Censored)
    assert read_metric("area(all)").value(result) == pytest.approx((0.45 + 0.55 + 0.5 + 0.7) / 4)
    assert read_metric("log.tag/all/entropy.1").value(result) == 3
    assert read_metric("mean(log.tag/all/entropy)").value(result) == 2.5
    assert read_metric("last(log.tag/all/entropy)").value(result) == 1
    assert read_metric("first(log.tag/all/entropy, 0.5)").value(result) == 3.5
    assert read_metric("quotient(cost.a, cost.b)").value(result) == 1.5
    with pytest.raises(MissingValueError, match="is a series; say mean"):
        read_metric("log.tag/all/entropy").value(result)


def test_the_gap_is_that_of_the_paper():
    # MAPLE, Table 1, row MUPO; the differences of its columns are those of the counts it gives.
    tags = "V A S VA VS AS VAS".split()
    accuracy = dict(zip(tags, [0.8, 0.7, 0.6, 0.75, 0.7, 0.65, 0.5], strict=True))
    counts = dict(zip(tags, [552, 75, 76, 1145, 1784, 171, 1198], strict=True))
    after = {"trained": {"accuracy": accuracy, "counts": counts}}
    uni, bi = (
        sum(accuracy[t] * counts[t] for t in own) / sum(counts[t] for t in own) for own in (tags[:3], tags[3:6])
    )
    expected = (abs(bi - uni) / uni + abs(0.5 - uni) / uni + abs(0.5 - bi) / bi) / 3
    assert read_metric("gap").value({"after": after}) == pytest.approx(expected)
    with pytest.raises(MissingValueError, match="all seven tags"):
        read_metric("gap").value({"after": {"trained": {"accuracy": {"V": 1.0}, "counts": {"V": 1}}}})


@pytest.mark.parametrize(
    ("sums", "samples", "digits", "of"),
    [
        ([5.0, 0.0, 3.0, None], 5, "503-", 5),
        ([1.0, 0.25, None], 1, "999250---", 999),
        ([12.0, 6.0], 12, "999500", 999),
    ],
)
def test_scores_are_kept_as_digits(sums, samples, digits, of):
    told = encoded_scores(sums, samples)
    assert told == {"digits": digits, "of": of}
    means = [None if one is None else one / samples for one in sums]
    assert list(decoded_scores(told)) == [None if one is None else pytest.approx(one, abs=1e-3) for one in means]
    with pytest.raises(ValueError, match="scores lie between 0 and 1"):
        encoded_scores([-1.0], samples)


def test_a_result_without_some_clips_has_the_accuracy_of_the_others():
    questions = {"ids": list("abcd"), "tags": ["V", "V", "A", "A"], "clips": [0, 1, 1, 2]}
    result = {"after": {"trained": {"digits": "50-5", "of": 5, "samples": 5}}}
    exam = whole(result, questions)["after"]["trained"]
    assert exam["accuracy"] == {"all": 2 / 3, "V": 0.5, "A": 1.0} and exam["counts"] == {"all": 3, "V": 2, "A": 1}
    assert exam["questions"] == [["a", "V", 5.0], ["b", "V", 0.0], ["d", "A", 5.0]]
    assert whole(result, questions, {1})["after"]["trained"]["accuracy"] == {"all": 1.0, "V": 1.0, "A": 1.0}
    assert rounded({"a": [1.234567, float("nan")], "b": 3}) == {"a": [1.2346, None], "b": 3}


def test_the_page_in_docs_is_of_this_register_and_these_results():
    """Whoever changes the register or adds results writes the report anew."""
    told = (CLAIMS.parents[1] / "docs" / "claims.md").read_text()
    assert f"{DIGEST} `{digest(read_register(), CLAIMS / 'results')}`.\n" in told


def test_readmes_table_shows_the_claims_that_it_is_to_show_as_the_page_does():
    root = CLAIMS.parents[1]

    def rows(text, *places):
        """Paper, effect and verdict of each claim; a control or a measure more may be told at another place."""
        found = {}
        for line in text.splitlines():
            if line.startswith("| ") and (name := re.search(r"\]\((?:docs/claims\.md)?#([a-z-]+)\)", line)):
                cells = line.split(" | ")
                found.setdefault(name[1], [cells[place].replace(" below", "").removesuffix(" |") for place in places])
        return found

    shown = rows((root / "README.md").read_text().partition(BEGIN)[2].partition("<details")[0], 1, 2, 3)
    page = rows((root / "docs" / "claims.md").read_text(), 3, 4, 6)
    assert list(shown) == read_headlines(read_register()) and len(shown) > 9
    assert shown == {name: page[name] for name in shown}


def test_readme_has_the_words_of_each_claim_that_it_tells():
    readme = (CLAIMS.parents[1] / "README.md").read_text()
    register, told = read_register(), set(re.findall(r"\]\(docs/claims\.md#([a-z0-9-]+)\)", readme))
    missing = [name for name in told & set(register.claims) if f"[{register.claims[name].says}](" not in readme]
    assert len(told & set(register.claims)) > 50 and missing == []


@pytest.mark.parametrize(
    "told, message",
    [
        (
            "[maple-gradient-variance, avatar-complations]",
            "no claim 'avatar-complations'; did you mean avatar-completions",
        ),
        ("[avatar-shape, maple-gradient-variance, avatar-shape]", "avatar-shape stands there twice"),
    ],
)
def test_headlines_are_claims_of_the_register(tmp_path, told, message):
    (tmp_path / "headlines.yaml").write_text(told)
    with pytest.raises(RegisterError, match=f"headlines.yaml: .*{message}"):
        read_headlines(read_register(), tmp_path / "headlines.yaml")


def test_one_more_result_or_another_number_is_another_digest(evidence):
    write_results(evidence, "new", BETTER)
    seen = {digest(evidence.register, evidence.results)}
    (file, *_) = sorted(evidence.results.glob("*/*.json"))
    (evidence.results / file.parent.name / "more.json").write_text("{}")
    seen.add(digest(evidence.register, evidence.results))
    file.write_text(file.read_text().replace("0", "1", 1))
    seen.add(digest(evidence.register, evidence.results))
    file.unlink()
    seen.add(digest(evidence.register, evidence.results))
    assert len(seen) == 4


@pytest.mark.long
def test_the_page_in_docs_is_what_the_results_say(tmp_path):
    """With this code; the digest that the page tells does not know the code."""
    done = programs.run([CLAIMS, "report", "--docs", tmp_path, "--readme", tmp_path / "README.md"])
    assert done.returncode == 0, done.stderr

    def without_git(file):
        text = re.sub(r"\(\S*benchmarks/claims/results/", "(results/", file.read_text())
        told = [
            line for line in text.splitlines() if line and not line.startswith(("The register is ", "> **Warning."))
        ]
        return told

    assert without_git(tmp_path / "claims.md") == without_git(CLAIMS.parents[1] / "docs" / "claims.md")
