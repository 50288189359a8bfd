"""Hints in a training run: when a prompt gets its hint, who sees it, and how what was written under it is replayed."""

from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from test_avatar import Diary, G, contents_of, data, ids_by_key, logs, make, take
from tiny_models import build_tiny_text

from maple_trl.omni.prompt import RowError
from maple_trl.trainers.common.hinted_rows import prompt_key
from maple_trl.trainers.common.rollout import InFlight


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture

VISITS = 2  # that a prompt must be stuck
HINT = "zebra quartz"  # in no prompt of the set
USUAL = {"hints": True, "hint_visits": VISITS, "learning_rate": 0.0, "max_steps": 7}


def with_hints(rows, *hints):
    """The rows with these hints."""
    return Dataset.from_list([dict(row, hint=hint) for row, hint in zip(rows, hints, strict=True)])


def stuck(*ids, until=None):
    """Rewards: these rows always fail, until a call; the others do well, now and then better."""

    def value(row, copy, call):
        if row["id"] in ids and (until is None or call < until):
            return 0.0
        return 0.8 + 0.05 * (copy % 2)

    return Diary(value)


def texts(trainer, batch):
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    return [tokenizer.decode(ids) for ids in batch]


def hinted_visits(trainer):
    """Per rollout, the rows whose generation prompt held the hint."""
    return [[HINT in text for text in texts(trainer, call["rows"])] for call in trainer.generated]


@pytest.fixture
def build(data, tmp_path):
    def of(rows, reward, **options):
        return make(data[0], tmp_path / "run", rows, reward, **(USUAL | options))

    return of


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """
    Four prompts, all visited at each step. Two are stuck, one of which has no hint; a third has one and is not stuck.
    Both begin to do well at the sixth step.
    """
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, None, HINT, None)
    diary = stuck(*rows["id"][:2], until=5)
    options = USUAL | {"max_steps": 9, "vcrs_window": G // 2}
    trainer = make(data[0], tmp_path_factory.mktemp("hints"), rows, diary, **options)
    trainer.train()
    return trainer, diary, rows["id"]


def groups_of(batch):
    """Completions of a rollout by prompt, in the order of their numbers."""
    ordered = sorted(batch, key=lambda row: row["number"])
    return [list(rows) for _, rows in groupby(ordered, key=lambda row: row["number"] // G)]


def test_a_stuck_prompt_gets_its_hint_and_loses_it_when_it_does_well(run):
    trainer, diary, ids = run
    # Nothing is replayed at the first visit, so there is no divergence; at the second visit there is, and it is 0.
    shown = [[entry["row"]["id"] for entry in call if HINT in str(entry["row"]["prompt"])] for call in diary.calls]
    assert [set(one) for one in shown] == [set()] * VISITS + [{ids[0]}] * 4 + [set()] * 3
    assert [len(one) for one in shown[VISITS:6]] == [G // 2] * 4
    rates = [entry["hint/rate"] for entry in logs(trainer)]
    assert rates == [0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]
    last = logs(trainer)[-1]
    assert (last["hint/given"], last["hint/withdrawn"], last["hint/hinted_prompts"]) == (1, 1, 0)
    assert [entry["hint/stuck_prompts"] for entry in logs(trainer)] == [2] * 5 + [0] * 4
    assert [entry["hint/hinted_prompts"] for entry in logs(trainer)] == [0, 0, 1, 1, 1, 0, 0, 0, 0]


def test_the_hint_is_in_that_prompts_tokens_only(run):
    trainer, diary, ids = run
    for call, seen, rows in zip(diary.calls, hinted_visits(trainer), trainer.generated, strict=True):
        assert seen == [HINT in str(entry["row"]["prompt"]) for entry in call]
        told = texts(trainer, rows["rows"])
        for entry, text in zip(call, told, strict=True):
            question = entry["row"]["prompt"][-1]["content"]
            assert question in text and text.count(HINT) == (HINT in question)
            if HINT in question:
                assert question.endswith(f"\nHint: {HINT}") and entry["row"]["id"] == ids[0]
    # The media are those of the prompt without it.
    hinted = {len(row["prompt_ids"]) for b in trainer.trained for row in b if row["key"].endswith("+hint")}
    plain = {r["key"]: r for b in trainer.trained for r in b}
    (key,) = {key for key in plain if key.endswith("+hint")}
    one, other = plain[key]["prompt"], plain[prompt_key(key)]["prompt"]
    assert one.kinds == other.kinds and one.media_tokens == other.media_tokens and len(hinted) == 1
    assert len(one) > len(other)


def test_what_was_written_under_the_hint_is_marked_and_replayed_under_it(run):
    trainer, diary, ids = run
    under_hint = {}
    for call in diary.calls:
        for entry in call:
            under_hint.setdefault((entry["row"]["id"], entry["ids"]), set()).add(HINT in str(entry["row"]["prompt"]))
    name = ids_by_key(trainer)
    flags = [
        (e, under_hint[name[prompt_key(e.prompt)], tuple(e.completion_ids.tolist())]) for e in contents_of(trainer)
    ]
    assert all(e.hinted in seen for e, seen in flags)
    assert sum(e.hinted for e, _ in flags) == 4 * G // 2 and all(prompt_key(e.prompt) in name for e, _ in flags)
    mixed = replayed_hinted_later = 0
    for step, batch in enumerate(trainer.trained):
        for group in groups_of(batch):
            past = [row for row in group if row["replayed"]]
            for row in past:
                one = name[prompt_key(row["key"])]
                assert row["key"].endswith("+hint") in under_hint[one, row["ids"]]
                assert (HINT in texts(trainer, [row["prompt_ids"]])[0]) == row["key"].endswith("+hint")
                # Written by the same policy under the same prompt: nothing else would give these probabilities.
                assert torch.allclose(row["logps"], row["old"], atol=1e-5)
            mixed += len({row["key"] for row in past}) > 1
            replayed_hinted_later += sum(row["key"].endswith("+hint") for row in past) * (step > 5)
    assert mixed and replayed_hinted_later


def test_a_prompt_is_one_group_of_the_kept_completions_with_its_hint_and_without(run):
    trainer, _, ids = run
    files = sorted(Path(trainer.args.output_dir, "rollouts").glob("*.parquet"))
    lines = [line for file in files for line in pq.read_table(file).to_pylist()]
    assert {line["hinted"] for line in lines if line["id"] == ids[0]} == {True, False}
    key = {one: key for key, one in ids_by_key(trainer).items()}
    for number, one in enumerate(ids):
        assert {(line["group"], line["row"]) for line in lines if line["id"] == one} == {(key[one], number)}


def test_under_the_other_prompt_they_would_have_other_probabilities(run):
    """The control of the test before, and a reference: each completion alone, without padding."""
    trainer, _, _ = run
    prompts = {row["key"]: row["prompt"] for batch in trainer.trained for row in batch}
    stored = [e for e in contents_of(trainer) if e.prompt + "+hint" in prompts]
    differ = []
    for e in stored:
        found = {}
        for hinted in (False, True):
            prompt = prompts[e.prompt + "+hint" if hinted else prompt_key(e.prompt)]
            ids = torch.cat([prompt.input_ids, e.completion_ids.long()])[None]
            with torch.no_grad(), trainer._in_flight(InFlight([prompt])):
                logps = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, torch.ones_like(ids), len(e.completion_ids)
                )[0][0]
            found[hinted] = (logps - e.logps).abs().max()
        assert found[e.hinted] < 1e-4
        differ.append(float(found[not e.hinted]))
    assert {e.hinted for e in stored} == {False, True} and min(differ) > 1e-3


@pytest.mark.parametrize("options", [{"learning_rate": 3e-2}, {"learning_rate": 1e-4, "hint_max_kl": 0.0}])
@pytest.mark.matrix(cases=1)
def test_a_prompt_that_the_policy_still_moves_on_gets_none(data, build, options):
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, HINT, None, None)
    trainer = build(rows, stuck(*rows["id"][:2]), **options)
    trainer.train()
    assert not any(any(call) for call in hinted_visits(trainer))
    assert logs(trainer)[-1]["hint/given"] == 0 and logs(trainer)[-1]["hint/stuck_prompts"] >= 2


@pytest.mark.long
def test_a_slow_policy_or_a_wide_limit_gives_the_hint(data, build):
    """Controls: the limit decides, and nothing else of the run before."""
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, HINT, None, None)
    trainer = build(rows, stuck(*rows["id"][:2]), learning_rate=3e-2, hint_max_kl=1e6)
    trainer.train()
    assert logs(trainer)[-1]["hint/given"] == 2
    for hint_visits in (1, 4):
        trainer = build(rows, stuck(*rows["id"][:2]), hint_visits=hint_visits)
        trainer.train()
        first = max(hint_visits, 2)  # a visit with replay must have been
        assert [any(call) for call in hinted_visits(trainer)] == [False] * first + [True] * (7 - first)


def test_hints_off_show_none(data, build):
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, HINT, HINT, HINT)
    trainer = make(data[0], build(rows, Diary()).args.output_dir, rows, stuck(*rows["id"]), learning_rate=0.0)
    trainer.train()
    assert not any(any(call) for call in hinted_visits(trainer))
    assert not any(name.startswith("hint/") for name in logs(trainer)[-1])


@pytest.mark.long
def test_prompts_that_do_well_are_not_stuck_though_all_are_of_the_hard_tier(data, build):
    rows = with_hints(take(data[1], S=4), HINT, HINT, HINT, HINT)
    trainer = build(rows, Diary(lambda row, copy, call: 1.0))
    trainer.train()
    assert logs(trainer)[-1]["replay/size/hard"] == logs(trainer)[-1]["replay/size"]
    assert logs(trainer)[-1]["hint/stuck_prompts"] == 0
    trainer = build(rows, Diary(lambda row, copy, call: 1.0), hint_below=1.5)
    trainer.train()
    assert logs(trainer)[-1]["hint/given"] == 4


def test_a_hint_that_does_not_fit_is_left_out_and_named(data, build, caplog):
    rows = with_hints(take(data[1], VA=2, S=2), HINT + " red" * 90, HINT, None, None)
    trainer = build(rows, stuck(*rows["id"][:2]))
    key = {one: key for key, one in ids_by_key(trainer).items()}
    trainer.train()
    told = [record.getMessage() for record in caplog.records if "without its hint" in record.getMessage()]
    assert told and all(key[rows["id"][0]] in one and "prompt-too-long" in one for one in told)
    assert "max_prompt_length is 128" in told[0]
    for call, seen in zip(trainer.reward_funcs[0].calls[VISITS:], hinted_visits(trainer)[VISITS:], strict=True):
        assert {entry["row"]["id"] for entry, flag in zip(call, seen, strict=True) if flag} == {rows["id"][1]}
        assert not any(HINT in str(e["row"]["prompt"]) for e in call if e["row"]["id"] == rows["id"][0])
    assert not any(e.hinted for e in contents_of(trainer) if prompt_key(e.prompt) == key[rows["id"][0]])
    assert (
        logs(trainer)[-1]["hint/given"] == 1
    )  # where it fits, it is given: the run with a hint of usual length shows it


@pytest.mark.parametrize("second", [None, "another hint of other length"])
@pytest.mark.matrix(cases=1)
def test_rows_of_one_prompt_with_different_hints(data, build, second):
    """Equal prompts share their experiences, so a completion written under one row's hint may come up at the other."""
    one, other = take(data[1], VAS=1, S=1).to_list()
    rows = Dataset.from_list([dict(one, hint=HINT), dict(one, hint=second), dict(other, hint=None)])
    options = {"per_device_train_batch_size": G, "max_steps": 18, "hint_visits": 1}
    trainer = build(rows, stuck(one["id"]), **options)
    trainer.train()
    for batch in trainer.trained:
        for row in batch:
            if row["replayed"]:
                assert torch.allclose(row["logps"], row["old"], atol=1e-4)
    assert logs(trainer)[-1]["hint/given"] >= 1


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.matrix(cases=1)
def test_a_text_model_is_shown_hints(tmp_path, chat):
    model, tokenizer = build_tiny_text()
    names = ["what color is", "low or high"]
    prompts = [[{"role": "user", "content": text}] for text in names] if chat else names
    rows = Dataset.from_dict({"prompt": prompts, "id": names, "hint": ["red blue red", None]})
    diary = stuck(names[0], until=4)
    options = USUAL | {"model": model, "processing_class": tokenizer, "per_device_train_batch_size": 2 * G}
    trainer = make(tmp_path, tmp_path / "run", rows, diary, vcrs_window=G // 2, **options)
    trainer.train()
    shown = ["red blue red" in str(entry["row"]["prompt"]) for call in diary.calls for entry in call]
    seen = ["red blue red" in text for call in trainer.generated for text in texts(trainer, call["rows"])]
    assert shown == seen and any(shown)
    assert {e["row"]["id"] for call in diary.calls for e in call if "Hint: red" in str(e["row"]["prompt"])} == {
        names[0]
    }
    marked = [e for e in contents_of(trainer) if e.hinted]
    assert len(marked) == sum(shown)
    replayed = [row for batch in trainer.trained for row in batch if row["replayed"]]
    assert all(torch.allclose(row["logps"], row["old"], atol=1e-5) for row in replayed)
    under = [row for row in replayed if "red blue red" in texts(trainer, [row["prompt_ids"]])[0]]
    assert under and logs(trainer)[-1]["hint/withdrawn"] == 1


# Refusals


@pytest.mark.parametrize(
    ("hints", "error", "message"),
    [
        (None, ValueError, r"hints=True, but train_dataset has no column 'hint' \(its columns: id, prompt"),
        ([None, "", "  ", None], ValueError, "hints=True, but every 'hint' of train_dataset is empty"),
        (
            ["fine", None, "see <|VIDEO|>", None],
            RowError,
            r"train_dataset, row 2, .*'hint'.*holds the text '<\|VIDEO\|>'",
        ),
    ],
)
def test_hints_that_cannot_be_used_are_refused_before_training(data, build, hints, error, message):
    rows = take(data[1], VAS=2, S=2)
    with pytest.raises(error, match=message):
        build(rows if hints is None else with_hints(rows, *hints), Diary())
    build(with_hints(rows, "fine", None, None, None), Diary())


def test_a_text_run_without_hints_is_refused_too(tmp_path):
    model, tokenizer = build_tiny_text()
    options = {"model": model, "processing_class": tokenizer, "hints": True, "per_device_train_batch_size": G}
    with pytest.raises(ValueError, match="has no column 'hint'"):
        make(tmp_path, tmp_path, Dataset.from_dict({"prompt": ["low or high"]}), Diary(), **options)


def test_streamed_rows_are_shown_their_hints(data, build):
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, None, None, None).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows * 5))
    trainer = build(stream, stuck(rows[0]["id"], rows[1]["id"]), max_steps=5, shuffle_dataset=False)
    trainer.train()
    assert [sum(call) for call in hinted_visits(trainer)] == [0, 0, G // 2, G // 2, G // 2]
    assert all(torch.allclose(r["logps"], r["old"], atol=1e-5) for b in trainer.trained for r in b if r["replayed"])


def test_the_hint_does_not_change_the_row(data, build):
    """Rows belong to the data set: a second visit must not find the hint of the first in them."""
    rows = with_hints(take(data[1], VAS=2, S=2), HINT, HINT, None, None)
    before = rows.to_list()
    trainer = build(rows, stuck(*rows["id"][:2]))
    trainer.train()
    assert rows.to_list() == before and trainer.train_dataset.to_list() == before
    told = [text for call in trainer.generated for text in texts(trainer, call["rows"])]
    assert max(text.count(HINT) for text in told) == 1
