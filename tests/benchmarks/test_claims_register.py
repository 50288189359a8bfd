"""The register of claims: what it holds is read, and each mistake is named with its place and what would be right."""

import json
from types import SimpleNamespace

import claim_sets
import pytest
import tasks
from claim_sets import CLAIMS, known_tasks, write_register
from register import RegisterError, check_jobs, read_register


@pytest.fixture
def register(tmp_path):
    folder = write_register(tmp_path)
    known_tasks(folder)
    return read_register(folder)


def test_claims_are_read_in_the_order_of_their_numbers(register):
    assert list(register.claims) == ["sooner", "better"]
    better = register.claims["better"]
    assert (better.paper, better.figure, better.needs) == ("MAPLE", "+3", "")
    assert better.variants == ("new", "old")
    assert [(one.name, one.role, one.effect, one.expects, one.least) for one in better.measures] == [
        ("accuracy", "claim", "difference", "above", 0.03),
        ("seconds", "control", "ratio", "equal", 0.1),
    ]
    lines = better.file.read_text().splitlines()
    own = lines[better.lines[0] - 1 : better.lines[1]]
    assert own[0].strip() == "better:" and own[-1].strip() == "role: control"
    with pytest.raises(AttributeError):
        better.says = "more"


def test_claims_are_chosen_by_name_and_number(register):
    assert [one.name for one in register.choose([])] == ["sooner", "better"]
    assert [one.name for one in register.choose(["2"])] == ["better"]
    with pytest.raises(RegisterError, match="no claim 'soner'; did you mean sooner"):
        register.choose(["better", "soner"])


@pytest.mark.long
@pytest.mark.slow
def test_what_is_registered_can_be_run():
    register = read_register(CLAIMS)
    rules = register.rules
    assert rules.looks == (5, 10) and rules.level == 0.0294 and rules.confidence == 0.95
    check_jobs(register, list(register.variants))
    names = {}
    for name, variant in register.variants.items():
        names.setdefault(variant.run(0).key(), []).append(name)
    assert [own for own in names.values() if len(own) > 1] == []  # no two are the same run


def test_jobs_are_those_of_the_runs(register):
    check_jobs(register, list(register.variants))
    config = register.variants["old"].run(3).config()
    assert config["seed"] == 3 and config["learning_rate"] == 1e-3  # over the recipe's
    assert config["max_steps"] == 2 and config["method"] == "mupo"  # the task's, and the recipe's


def measure(topic, **fields):
    topic["claims"]["better"]["measures"]["accuracy"].update(fields)


MISTAKES = {
    "key": (
        lambda t: t["claims"]["better"].update(figur="x"),
        "claim better: unknown key 'figur'; did you mean figure",
    ),
    "absent": (lambda t: t["claims"]["better"].pop("source"), "claim better: source is missing"),
    "paper": (lambda t: t["claims"]["better"].update(paper="APLE"), "paper must be one of MAPLE, AVATAR, ours"),
    "variant": (
        lambda t: measure(t, of="now"),
        "claim better: measure accuracy: of: no variant 'now'; did you mean new",
    ),
    "other": (lambda t: measure(t, against="ol"), "against: no variant 'ol'; did you mean old"),
    "recipe": (
        lambda t: t["variants"]["new"].update(recipe="tiny/no"),
        "variant new: no recipe 'tiny/no' in recipes/",
    ),
    "task": (lambda t: t["variants"]["new"].update(task="prob"), "variant new: no task 'prob'; there are .*embedded"),
    "instrument": (
        lambda t: t["variants"]["new"].update(instruments=["scope"]),
        "no instrument 'scope'; there are curve",
    ),
    "seed": (lambda t: t["variants"]["new"].update(options={"seed": 3}), "seed is no option of a variant"),
    "function": (lambda t: measure(t, metric="reach(all)"), "metric: no function 'reach'.*did you mean reached"),
    "arguments": (
        lambda t: measure(t, metric="reached(all, 0.6)"),
        "metric: reached\\(all, 0.6\\): missing .*'cost'; its arguments are what, target, cost",
    ),
    "itself": (lambda t: measure(t, against="new"), "against is new, too: a variant differs from itself by nothing"),
    "tasks": (
        lambda t: t["variants"]["old"].update(task="embedded"),
        "of and against are of different tasks, embedded and probe, and begin from different starts",
    ),
    "path": (lambda t: measure(t, metric="gradient.norm"), "reads 'gradient', which is no instrument of new"),
    "log": (lambda t: measure(t, metric="mean(log.entrop)"), "reads 'entrop' of the log; kept of it is .*entropy"),
    "access": (
        lambda t: measure(t, metric="after.all.accuracy.all"),
        "probe is not asked by 'all', but by trained, req",
    ),
    "as": (lambda t: measure(t, **{"as": "quotient"}), "as must be one of difference, ratio, got 'quotient'"),
    "expects": (lambda t: measure(t, expects="more"), "expects must be one of above, below, equal, not b"),
    "least": (lambda t: measure(t, least=0), "least must be above 0"),
    "ratio": (
        lambda t: measure(t, **{"as": "ratio", "expects": "below", "least": 2}),
        "least must be above 0 and below 1",
    ),
    "controls": (lambda t: measure(t, role="control"), "claim better: measures: none has the role claim"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_place(tmp_path, mistake):
    change, told = MISTAKES[mistake]
    known_tasks(write_register(tmp_path, change))
    with pytest.raises(RegisterError, match=f"^register/topic.yaml: .*{told}"):
        read_register(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("looks: [5, 10]", "looks: [3, 10]", "rules: looks must be numbers of at least 5 seeds"),
        ("level: 0.0294", "level: 0.05", "rules: level 0.05 is not corrected for 2 looks"),
        ("changes: []", "changes: [{date: 2026-12-24, what: x}]", "changes: why is missing"),
        ("changes: []", "", "changes is missing"),
    ],
)
def test_a_mistake_of_the_rules_is_named(tmp_path, before, after, told):
    file = write_register(tmp_path) / "register.yaml"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(RegisterError, match=f"^register.yaml: {told}"):
        read_register(tmp_path)


def test_a_variant_has_one_place(tmp_path):
    folder = write_register(tmp_path)
    known_tasks(folder)
    (folder / "register" / "other.yaml").write_text("variants:\n  old: {task: probe, recipe: tiny/mupo}\n")
    with pytest.raises(RegisterError, match="topic.yaml: variant old: is also in register/other.yaml"):
        read_register(folder)
    text = "variants:\n  one: {task: probe, recipe: tiny/mupo}\n  one: {task: probe, recipe: tiny/mupo}\n"
    (folder / "register" / "other.yaml").write_text(text)
    with pytest.raises(RegisterError, match="other.yaml: line 3: one is given twice, first in line 2"):
        read_register(folder)


def test_an_option_that_no_config_has_is_found_without_training(tmp_path):
    def change(topic):
        topic["variants"]["new"]["options"] = {"learning_rat": 1}

    folder = write_register(tmp_path, change)
    known_tasks(folder)
    register = read_register(folder)
    check_jobs(register, ["old"])
    with pytest.raises(
        RegisterError, match="variant new: job.yaml: unknown key 'learning_rat'; did you mean learning_rate"
    ):
        check_jobs(register, ["new"])


def test_what_decides_a_run_decides_its_file(tmp_path):
    known_tasks(write_register(tmp_path))
    register = read_register(tmp_path)
    new = register.variants["new"]
    files = {
        new.run(0).file(),
        new.run(1).file(),
        new.run(0, quick=True).file(),
        register.variants["old"].run(0).file(),
    }
    assert len(files) == 4
    assert new.run(0).file() == read_register(tmp_path).variants["new"].run(0).file()
    assert claim_sets.CLAIMS / "results" / "probe" in {file.parent for file in files}


# What tasks make


def test_what_a_task_has_made_is_made_anew_where_it_is_half_or_by_others(tmp_path, monkeypatch):
    made = []

    def prepare(folder):
        made.append(folder)
        (folder / "train.parquet").write_bytes(b"%d" % len(made))

    source = tmp_path / "task.py"
    source.write_text("VERSION = 7")
    task = SimpleNamespace(VERSION=7, prepare=prepare, __file__=str(source))
    monkeypatch.setattr(tasks, "load_task", lambda name: task)
    monkeypatch.setattr(tasks, "_cache", tmp_path / "cache")
    folder = tasks.prepared("own", False)
    assert tasks.prepared("own") == folder and len(made) == 1
    start = tasks.start_of(folder)
    whole = (folder / "whole").read_text()
    for damage in (whole[:20], "", json.dumps(json.loads(whole) | {"made_by": {}})):
        (folder / "whole").write_text(damage)
        (folder / "stale").touch()
        tasks.prepared("own")
        assert not (folder / "stale").exists()
    source.write_text("VERSION = 7\nSIZE = 2")
    tasks.prepared("own")
    monkeypatch.setattr(tasks, "versions", lambda: {"torch": "0.1"})
    tasks.prepared("own")
    assert len(made) == 6 and tasks.start_of(folder) != start and tasks.prepared("own") == folder and len(made) == 6
