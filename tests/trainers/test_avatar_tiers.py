"""Replay by tier, the default: groups whose replayed places hold completions of any prompts, each held against its own."""

from collections import Counter, defaultdict
from statistics import fmean, stdev

import pytest
from datasets import Dataset, IterableDataset
from test_avatar import Worth, by_hand, data, ids_by_key, logs, make, take
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.trainers.common.hinted_rows import prompt_key


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture

G = 4
TIERS = {
    "replay_scope": "tiers",
    "replay_draw": "balanced",
    "tas_lambda": 0.0,
    "num_generations": G,
    "replayed_generations": 2,
    "per_device_train_batch_size": 4 * G,
}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Three epochs of three rollouts."""
    diary = Worth()
    rows = take(data[1], V=4, VAS=4, S=4)
    trainer = make(data[0], tmp_path_factory.mktemp("tiers"), rows, diary, **TIERS, max_steps=9)
    trainer.train()
    return trainer, diary


def past(batch):
    return [row for row in batch if row["replayed"]]


def test_the_scope_of_this_run_is_the_default(run):
    assert AvatarConfig("unused", use_cpu=True, bf16=False).replay_scope == run[0].args.replay_scope


def test_all_places_are_drawn_from_the_second_rollout_on(run):
    trainer, _ = run
    assert [len(past(batch)) for batch in trainer.trained] == [0] + [8] * 8
    seen, others = set(), 0
    for batch, entry in zip(trainer.trained, logs(trainer), strict=True):
        own = {row["number"] // G: row["key"] for row in batch if not row["replayed"]}
        contents = [(prompt_key(row["key"]), row["ids"]) for row in past(batch)]
        assert set(contents) <= seen
        strange = [row["key"] != own[row["number"] // G] for row in past(batch)]
        assert entry["replay/of_other_prompts"] == pytest.approx(sum(strange) / len(batch))
        others += sum(strange)
        if past(batch):
            assert sum(entry[f"replay/drawn/{tier}"] for tier in ("easy", "medium", "hard")) == pytest.approx(1)
        seen |= {(prompt_key(row["key"]), row["ids"]) for row in batch if not row["replayed"]}
    assert others > 30  # of 64


def test_each_is_shown_its_own_prompt(run):
    trainer, _ = run
    shown = {}
    for batch in trainer.trained:
        for row in batch:
            if not row["replayed"]:
                shown[row["key"]] = tuple(row["prompt_ids"])
    for batch in trainer.trained:
        for row in past(batch):
            assert tuple(row["prompt_ids"]) == shown[row["key"]] and row["prompt"].key == row["key"]


def test_each_is_held_against_the_baseline_of_its_own_prompt(run):
    trainer, diary = run
    for found, expected in zip(trainer.trained, by_hand(trainer, diary), strict=True):
        for row in found:
            if "advantage" in row:
                assert row["advantage"] == pytest.approx(expected[row["number"]], rel=1e-4, abs=1e-4)
    # The reference notices another baseline.
    wrong = by_hand(trainer, diary, window=1)
    assert any(
        abs(row["advantage"] - numbers[row["number"]]) > 1e-2
        for found, numbers in zip(trainer.trained, wrong, strict=True)
        for row in found
    )


def advantages_of_replayed(trainer, diary):
    """Per rollout, (reward - baseline) of each replayed completion, with baselines kept here."""
    ids, history, rewards = ids_by_key(trainer), defaultdict(list), {}
    for call, batch in zip(diary.calls, trainer.trained, strict=True):
        for entry in call:
            history[entry["row"]["id"]].append(entry["reward"])
            rewards.setdefault((entry["row"]["id"], entry["ids"]), entry["reward"])
        found = [(rewards[ids[row["key"]], row["ids"]], ids[row["key"]]) for row in past(batch)]
        yield [(reward, reward - fmean(history[one][-20:])) for reward, one in found]


def test_the_mean_advantage_is_logged(run):
    trainer, diary = run
    for entry, found in zip(logs(trainer), advantages_of_replayed(trainer, diary), strict=True):
        if not found:
            assert "replay/advantage_mean" not in entry
            continue
        expected = fmean(difference for _, difference in found) / (stdev(reward for reward, _ in found) + 1e-4)
        assert entry["replay/advantage_mean"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_as_many_are_above_their_baseline_as_below(run):
    sides = [[(d > 1e-6) - (d < -1e-6) for _, d in found] for found in advantages_of_replayed(*run) if found]
    assert len(sides) == 8 and all(abs(sum(found)) <= 1 for found in sides[1:])


# Exposure


def hard_first(rows):
    """The first four prompts nearly always fail, the others nearly always succeed."""
    hard = set(rows["id"][:4])

    class Reward(Worth):
        def value_of(self, row, completion, ids, copy):
            usual = copy > 0 or len(self.calls) % 3 > 0
            return float(usual != (row["id"] in hard))

    return hard, Reward()


def share_of_hard(trainer, hard):
    ids = ids_by_key(trainer)
    replayed = [ids[row["key"]] in hard for batch in trainer.trained[3:] for row in past(batch)]
    return sum(replayed) / len(replayed)


@pytest.mark.long
@pytest.mark.parametrize("hard_share", [0.8, 0.1])
@pytest.mark.matrix(cases=1)
def test_shares_decide_how_often_hard_prompts_come_back(data, tmp_path, hard_share):
    """A third of the visits are of hard prompts, which fresh completions and own-prompt replay are bound to."""
    rows = take(data[1], V=4, VAS=4, S=4)
    hard, reward = hard_first(rows)
    options = TIERS | {"learning_rate": 0.0, "max_steps": 9, "replay_gradient_steps": 0, "replay_retier": True}
    options |= {"replay_shares": {"easy": 0.0, "medium": 1 - hard_share, "hard": hard_share}}
    options["replay_quantiles"] = [1 / 3, 1.0]
    trainer = make(data[0], tmp_path / "tiers", rows, reward, **options)
    trainer.train()
    # Three standard deviations of the share of 48 draws.
    assert share_of_hard(trainer, hard) == pytest.approx(hard_share, abs=0.18)
    if hard_share == 0.8:
        own = make(data[0], tmp_path / "own", rows, hard_first(rows)[1], **options | {"replay_scope": "prompt"})
        own.train()
        assert share_of_hard(own, hard) < 0.5  # the control: shares of the tiers steer none of its draws


def test_a_rollout_of_one_tag_replays_that_tag(data, tmp_path):
    rows = take(data[1], V=4, S=4)
    options = TIERS | {"batching": "stratified", "per_device_train_batch_size": 2 * G, "max_steps": 8}
    trainer = make(data[0], tmp_path, rows, Worth(), **options)
    trainer.train()
    ids, tag_of = ids_by_key(trainer), dict(zip(rows["id"], rows["tag"], strict=True))
    tags = [{tag_of[ids[row["key"]]] for row in batch} for batch in trainer.trained]
    assert all(len(found) == 1 for found in tags) and len(set.union(*tags)) == 2
    strange = [entry["replay/of_other_prompts"] for entry in logs(trainer)]
    assert max(strange) > 0
    counts = Counter(len(past(batch)) for batch in trainer.trained)
    assert counts == {0: 2, 4: 6}  # the first rollout of each tag finds nothing of it


def test_one_epoch_is_enough(data, tmp_path):
    rows = take(data[1], V=4, S=4)
    trainer = make(data[0], tmp_path, rows, Worth(), **TIERS | {"max_steps": -1, "num_train_epochs": 1})
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0, 0.5]


def test_a_streamed_set_is_told_what_to_set(data, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(list(take(data[1], V=4))))
    with pytest.raises(ValueError, match="replay_scope='tiers' shows rows again.*with replay_scope='prompt' streamed"):
        make(data[0], tmp_path, stream, **TIERS)
    make(data[0], tmp_path, stream, **TIERS | {"replay_scope": "prompt"})


@pytest.mark.parametrize("options", [{}, {"batching": "stratified"}], ids=str)
def test_a_text_model(options, tmp_path):
    model, tokenizer = build_tiny_text()
    words = ("three", "four", "five", "six", "seven", "one")
    tags = ("V", "S") * 3
    rows = Dataset.from_list([{"prompt": f"one two {w}", "tag": t} for w, t in zip(words, tags, strict=True)])
    config = AvatarConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, replayed_generations=2,
        max_completion_length=6, max_steps=4, learning_rate=0.0, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = AvatarTrainer(
        model, lambda completions, **k: [len(c) % 5 / 5 for c in completions], config, rows, processing_class=tokenizer
    )
    trainer.train()
    last = logs(trainer)[-1]
    assert last["replay/share"] == 0.5 and last["replay/of_other_prompts"] > 0
    assert last["replay/ratio_max"] == pytest.approx(1, abs=1e-5) == last["replay/ratio_p05"]
