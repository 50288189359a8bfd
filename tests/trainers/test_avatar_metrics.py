"""What AVATAR logs, recomputed in plain loops from the rewards, tokens and log-probabilities of real runs."""

import math
from collections import Counter, defaultdict
from statistics import fmean

import pytest
import torch
from test_avatar import MODEL, Diary, G, Worth, alike, contents_of, data, ids_by_key, logs, make, take
from test_avatar_hints import with_hints
from torch.utils._python_dispatch import TorchDispatchMode

from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint
from maple_trl.rewards import accuracy_reward
from maple_trl.trainers.avatar.metrics import PassSums, pass_metrics
from maple_trl.trainers.avatar.trainer import AvatarTrainer
from maple_trl.trainers.common.hinted_rows import prompt_key


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture

LAMBDA = 0.5
OPTIONS = {
    "max_steps": 12,
    "num_generations": 4,
    "replayed_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "vcrs_window": 5,
    "replay_capacity": 30,
    "replay_max_age": 7,
    "tas_lambda": LAMBDA,
}
SIZE = OPTIONS["num_generations"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Six prompts of three tags, two a step, a third of the completions without a reward."""
    rows = take(data[1], VAS=2, AS=2, V=2)
    diary = Worth(none=True)
    trainer = make(data[0], tmp_path_factory.mktemp("metrics"), rows, diary, **OPTIONS)
    trainer.train()
    return trainer, diary


def steps(trainer, batches=2):
    """The completions of each optimizer step."""
    found = [sum(trainer.trained[i : i + batches], []) for i in range(0, len(trainer.trained), batches)]
    assert len(found) == len(logs(trainer))
    return found


def rewards_by_number(trainer, diary):
    """Per step, the reward of each completion by its number, of replayed ones that of when they were fresh."""
    ids, known, found = ids_by_key(trainer), {}, []
    for call, rows in zip(diary.calls, steps(trainer), strict=True):
        known |= {(entry["row"]["id"], entry["ids"]): entry["reward"] for entry in call}
        found.append({row["number"]: known[ids[row["key"]], row["ids"]] for row in rows})
    return found


def naive_buffer(trainer, diary, window=5, max_age=7):
    """
    After each step: what each tier holds as (prompt, step), what was evicted and has expired so far, the baselines, and
    how many completions were asked for and handed out.

    Lists and sorting; nothing is moved between tiers.
    """
    capacities = {"easy": 8, "medium": 10, "hard": 12}
    tiers = {tier: [] for tier in capacities}
    history, evicted, expired, unstorable, found = defaultdict(list), 0, 0, 0, []
    for step, (rows, rewards) in enumerate(zip(steps(trainer), rewards_by_number(trainer, diary), strict=True)):
        for tier, members in tiers.items():
            kept = [one for one in members if step - one[1] <= max_age]
            expired += len(members) - len(kept)
            tiers[tier] = kept
        stored = Counter(prompt for members in tiers.values() for prompt, _ in members)
        groups = list(dict.fromkeys(row["key"] for row in sorted(rows, key=lambda row: row["number"])))
        handed = sum(min(2, stored[key]) for key in groups)
        fresh = sorted((row for row in rows if not row["replayed"]), key=lambda row: row["number"])
        for row in fresh:
            if rewards[row["number"]] is not None:
                history[row["key"]] = [*history[row["key"]], rewards[row["number"]]][-window:]
        baselines = {key: sum(values) / len(values) for key, values in history.items()}
        ordered = sorted(baselines.values())
        hard, medium = (ordered[math.ceil(share * len(ordered) - 1e-9) - 1] for share in (0.40, 0.75))
        for row in fresh:
            if rewards[row["number"]] is None:
                unstorable += 1
                continue
            own = baselines[row["key"]]
            tiers["hard" if own <= hard else "medium" if own <= medium else "easy"].append((row["key"], step))
        for tier, members in tiers.items():
            while len(members) > capacities[tier]:
                members.pop(0)
                evicted += 1
        found.append(
            {
                "tiers": {tier: list(members) for tier, members in tiers.items()},
                "evicted": evicted,
                "expired": expired,
                "unstorable": unstorable,
                "baselines": baselines,
                "asked": 2 * len(groups),
                "handed": handed,
            }
        )
    return found


def test_sizes_of_tiers_and_what_became_of_the_rest(run):
    trainer, diary = run
    for entry, known in zip(logs(trainer), naive_buffer(trainer, diary), strict=True):
        for tier, members in known["tiers"].items():
            assert entry[f"replay/size/{tier}"] == len(members)
        assert entry["replay/size"] == sum(map(len, known["tiers"].values()))
        for name in ("evicted", "expired", "unstorable"):
            assert entry[f"replay/{name}"] == known[name], name
        assert entry["replay/discarded"] == entry["replay/promoted"] == entry["replay/demoted"] == 0
    last = logs(trainer)[-1]
    assert last["replay/evicted"] > 0 and last["replay/expired"] > 0 and last["replay/unstorable"] > 0
    held = Counter((prompt_key(e.prompt), e.step) for e in contents_of(trainer))
    assert held == Counter(one for members in known["tiers"].values() for one in members)


def test_ages(run):
    trainer, diary = run
    spread = set()
    for step, (entry, known) in enumerate(zip(logs(trainer), naive_buffer(trainer, diary), strict=True)):
        ages = [step - written for members in known["tiers"].values() for _, written in members]
        assert entry["replay/age_mean"] == pytest.approx(fmean(ages))
        assert entry["replay/age_max"] == max(ages) <= 7
        spread |= set(ages)
    assert len(spread) > 3


def test_share_and_generated(run):
    trainer, diary = run
    shares = set()
    for entry, rows, known in zip(logs(trainer), steps(trainer), naive_buffer(trainer, diary), strict=True):
        replayed = sum(row["replayed"] for row in rows)
        assert replayed == known["handed"]
        assert entry["replay/share"] == replayed / len(rows)
        assert entry["replay/generated"] == len(rows) - replayed
        shares.add(replayed)
    assert len(shares) > 1


def test_hit_rate(run):
    """The share of the replayed completions asked for that the buffer had."""
    trainer, diary = run
    rates = set()
    for entry, known in zip(logs(trainer), naive_buffer(trainer, diary), strict=True):
        rates.add(known["handed"] / known["asked"])
        assert entry.get("replay/hit_rate", 0.0) == pytest.approx(known["handed"] / known["asked"])
    assert len(rates) > 1


def quantile(values, share):
    """Between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_baselines(run):
    trainer, diary = run
    for entry, known in zip(logs(trainer), naive_buffer(trainer, diary), strict=True):
        values = list(known["baselines"].values())
        assert entry["vcrs/prompts"] == len(values)
        assert entry["vcrs/mean"] == pytest.approx(fmean(values), rel=1e-6)
        for percent in (10, 25, 50, 75, 90):
            assert entry[f"vcrs/p{percent}"] == pytest.approx(quantile(values, percent / 100), rel=1e-6)
    assert len(set(values)) > 3


def test_ratios(run):
    trainer, _ = run
    differ = []
    for entry, rows in zip(logs(trainer), steps(trainer), strict=True):
        ratios = [math.exp(x) for row in rows if row["replayed"] for x in (row["logps"] - row["old"]).tolist()]
        names = {name for name in entry if name.startswith("replay/ratio") or name == "replay/effective_share"}
        assert bool(ratios) == bool(names)
        if not ratios:
            continue
        ratios.sort()
        expected = sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios))
        assert entry["replay/effective_share"] == pytest.approx(expected, rel=1e-5)
        for percent in (5, 50, 95):
            at = ratios[round(percent / 100 * (len(ratios) - 1))]
            assert entry[f"replay/ratio_p{percent:02d}"] == pytest.approx(at, rel=1e-5)
        assert entry["replay/ratio_max"] == pytest.approx(ratios[-1], rel=1e-5)
        differ.append(1 - expected)
        edges = [0.25, 0.5, 0.8, 0.9, 0.95, 1 / 0.95, 1 / 0.9, 1.25, 2, 4]
        bins = Counter(sum(ratio >= edge for edge in edges) for ratio in ratios)
        assert shares_of(entry) == pytest.approx([bins[i] / len(ratios) for i in range(11)])
    assert max(differ) > 0.01
    assert len(bins) > 3


def shares_of(metrics):
    assert "replay/ratio_share/11" not in metrics
    return [metrics[f"replay/ratio_share/{i}"] for i in range(11)]


class Values(TorchDispatchMode):
    """Counts the single values that the host asks for, at each of which it would wait for a GPU."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_a_pass_is_taken_down_without_a_wait_for_each_row(data, tmp_path, monkeypatch):
    waits, record = [], AvatarTrainer._record

    def counted(trainer, flight):
        with Values() as values:
            record(trainer, flight)
            float(flight.logps.sum())  # the control: such a wait is seen
        waits.append(values.asked)

    monkeypatch.setattr(AvatarTrainer, "_record", counted)
    trainer = make(data[0], tmp_path, take(data[1], VAS=2), Worth(), **OPTIONS | {"max_steps": 3})
    trainer.train()
    assert set(waits) == {1} and any(row["replayed"] for rows in trainer.trained for row in rows)


def test_the_histogram_of_ratios_by_hand():
    """Of three passes on two ranks."""
    passes = [PassSums(), PassSums()]
    for place, ratios in ((0, [1.0, 1.0, 0.96, 0.1]), (0, [0.51, 2.1]), (1, [100.0, 1.06])):
        passes[place].add_log_ratios(torch.tensor(ratios).log())
    assert shares_of(pass_metrics(passes)) == [1 / 8, 0, 1 / 8, 0, 0, 3 / 8, 1 / 8, 0, 0, 1 / 8, 1 / 8]
    assert not any(name.startswith("replay/") for name in pass_metrics([PassSums()]))


def zero_variance(trainer, diary):
    """Per step, by tag and over all: shares of groups whose fresh rewards, and whose rewards of all, are alike."""
    ids = ids_by_key(trainer)
    tag_of = dict(zip(trainer.train_dataset["id"], trainer.train_dataset["tag"], strict=True))
    found = []
    for rows, rewards in zip(steps(trainer), rewards_by_number(trainer, diary), strict=True):
        groups = defaultdict(list)
        for row in rows:
            groups[row["number"] // SIZE].append(row)
        shares = {"fresh": defaultdict(list), "mixed": defaultdict(list)}
        for group in groups.values():
            fresh = alike([rewards[row["number"]] for row in group if not row["replayed"]])
            mixed = alike([rewards[row["number"]] for row in group])
            for name in ("all", tag_of[ids[group[0]["key"]]]):
                shares["fresh"][name].append(fresh)
                shares["mixed"][name].append(mixed)
        found.append({kind: {name: fmean(v) for name, v in of.items()} for kind, of in shares.items()})
    return found


def test_zero_variance_before_and_after_replay(run):
    trainer, diary = run
    differ = 0
    for entry, expected in zip(logs(trainer), zero_variance(trainer, diary), strict=True):
        assert entry["replay/zero_variance_fresh"] == entry["frac_reward_zero_std"] == expected["fresh"]["all"]
        assert entry["replay/zero_variance_mixed"] == expected["mixed"]["all"]
        differ += expected["fresh"] != expected["mixed"]
        for name, share in expected["fresh"].items():
            assert entry[f"tag/{name}/zero_variance"] == share
            assert entry[f"tag/{name}/zero_variance_mixed"] == expected["mixed"][name]
    assert differ


def test_rewards_by_tag_are_of_the_fresh_completions(run):
    trainer, diary = run
    for entry, call in zip(logs(trainer), diary.calls, strict=True):
        rewards = defaultdict(list)
        for one in call:
            for name in ("all", one["row"]["tag"]):
                rewards[name].append(one["reward"])
        for name, values in rewards.items():
            known = [value for value in values if value is not None]
            assert (f"tag/{name}/reward" in entry) == bool(known)
            if known:
                assert entry[f"tag/{name}/reward"] == pytest.approx(fmean(known), abs=1e-6)
            assert entry[f"tag/{name}/unscorable"] == pytest.approx(1 - len(known) / len(values))
        known = [value for value in rewards["all"] if value is not None]
        assert entry["reward"] == (pytest.approx(fmean(known), abs=1e-6) if known else None)


@pytest.mark.long
def test_a_longer_interval_weighs_its_steps_alike(data, run, tmp_path):
    """The same run, logged every third step. Rows weigh alike by tag, steps alike where a step has one value."""
    each, diary = run
    trainer = make(data[0], tmp_path, each.train_dataset, Worth(none=True), **OPTIONS | {"logging_steps": 3})
    trainer.train()
    for i, entry in enumerate(logs(trainer)):
        parts, calls = logs(each)[3 * i : 3 * i + 3], diary.calls[3 * i : 3 * i + 3]
        for name in ("replay/share", "replay/zero_variance_mixed", "rewardless", "loss_profile/0", "replay/generated"):
            assert entry[name] == pytest.approx(fmean(part[name] for part in parts), rel=1e-4)
        known = [one["reward"] for call in calls for one in call if one["reward"] is not None]
        assert entry["tag/all/reward"] == pytest.approx(fmean(known), abs=1e-6)


# Steps without a reward, and hints


@pytest.mark.parametrize("worths", [(0.0, 0.0, 1.0, None, -1.0), (0.25, 0.0, 0.0, 0.0, 0.0)])
@pytest.mark.matrix(cases=1)
def test_steps_without_a_reward(data, tmp_path, worths):
    """One right completion makes a step count; one that is worth less than nothing does not."""

    def value(row, copy, call):
        return worths[call] if copy == 0 else min(0.0, worths[call] or 0.0)

    trainer = make(data[0], tmp_path, take(data[1], VAS=2, S=2), Diary(value), max_steps=5)
    trainer.train()
    assert [entry["rewardless"] for entry in logs(trainer)] == [float(not (w or 0) > 0) for w in worths]


def test_a_step_is_judged_by_its_accuracy_where_there_is_one(data, tmp_path):
    rows = take(data[1], VAS=2, AS=2)
    never = rows.map(lambda row: {"solution": "no letter of these"})
    formed = Diary(lambda row, copy, call: 0.5)
    for dataset, expected in ((never, 1.0), (rows, 0.0)):
        trainer = make(data[0], tmp_path, dataset, [formed, accuracy_reward], max_steps=1)
        trainer.train()
        (entry,) = logs(trainer)
        assert entry["reward"] >= 0.5 and entry["rewardless"] == expected
        assert entry["tag/all/accuracy"] == pytest.approx(entry["rewards/accuracy_reward/mean"])
        assert entry["tag/all/reward"] == pytest.approx(entry["reward"])


def test_hint_rate(data, tmp_path):
    rows = with_hints(take(data[1], VAS=2, AS=2), "zebra", "zebra", None, "zebra")
    order = list(rows["id"])
    # The first is never right, the second from the fifth step on, the others always.
    diary = Diary(lambda row, copy, call: float(order.index(row["id"]) > 1 or (row["id"] == order[1] and call >= 4)))
    options = {"hints": True, "hint_visits": 1, "learning_rate": 0.0, "max_steps": 8, "vcrs_window": 4}
    trainer = make(data[0], tmp_path, rows, diary, **options)
    trainer.train()
    rates, stuck = [], []
    for call in diary.calls:
        shown = {entry["row"]["id"] for entry in call if "zebra" in entry["row"]["prompt"][-1]["content"]}
        rates.append(len(shown) / 4)
        right = {entry["row"]["id"] for entry in call if entry["reward"]}
        stuck.append(4 - len(right))
    assert [entry["hint/rate"] for entry in logs(trainer)] == rates == [0, 0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert [entry["hint/stuck_prompts"] for entry in logs(trainer)] == stuck
    assert [entry["hint/given"] for entry in logs(trainer)] == [0, 0] + [2] * 6
    assert [entry["hint/withdrawn"] for entry in logs(trainer)] == [0] * 4 + [1] * 4
    assert [entry["hint/hinted_prompts"] for entry in logs(trainer)] == [0, 0, 2, 2] + [1] * 4


# Where in completions the signal is


def profile_of(entry):
    return [entry[f"loss_profile/{i}"] for i in range(11)]


def test_loss_profile_against_a_loop(run):
    """At eleven points of each completion, between two tokens in proportion to their distance."""
    trainer, _ = run
    for entry, rows in zip(logs(trainer), steps(trainer), strict=True):
        points = [[] for _ in range(11)]
        for row in rows:
            length = len(row["ids"])
            if length < 2 or row["unscorable"]:
                continue
            old = row.get("old", row["logps"])
            ratios = (row["logps"] - torch.where(old.isnan(), row["logps"], old)).exp().tolist()
            signal = [abs(ratio * weight) for ratio, weight in zip(ratios, row["advantage"], strict=True)]
            for i, point in enumerate(points):
                place = i / 10 * (length - 1)
                left = math.floor(place + 1e-9)
                right = min(left + 1, length - 1)
                point.append(signal[left] + (place - left) * (signal[right] - signal[left]))
        assert profile_of(entry) == pytest.approx([fmean(point) for point in points], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"tas_lambda": 0.5}, lambda x: 1 + 0.5 * (2 * x - 1) ** 2),
        ({"tas_lambda": 2.0}, lambda x: 1 + 2 * (2 * x - 1) ** 2),
        ({"tas_lambda": 0.5, "tas_shape": "linear_decay"}, lambda x: 1 + 0.5 * (1 - x)),
        ({"tas_lambda": 0.5, "tas_shape": "inverse_parabolic"}, lambda x: 1 + 0.5 * (1 - (2 * x - 1) ** 2)),
        ({"tas_lambda": 0.0}, lambda x: 1),
    ],
)
@pytest.mark.parametrize("replayed", [4, 0])
@pytest.mark.matrix(cases=2)
def test_the_profile_has_the_shape_of_the_weights(data, tmp_path, options, shape, replayed):
    """Completions of eleven tokens each, by a policy that does not move."""
    options = options | {"max_completion_length": 11, "generation_kwargs": {"min_new_tokens": 11}}
    options |= {"learning_rate": 0.0, "max_steps": 2, "replayed_generations": replayed}
    trainer = make(data[0], tmp_path, take(data[1], VAS=2, S=2), Worth(), **options)
    trainer.train()
    assert {len(row["ids"]) for batch in trainer.trained for row in batch} == {11}
    assert any(row["replayed"] for batch in trainer.trained for row in batch) == bool(replayed)
    for entry in logs(trainer):
        profile = profile_of(entry)
        base = profile[5] / shape(0.5)
        assert base > 0.1
        assert profile == pytest.approx([base * shape(i / 10) for i in range(11)], rel=1e-4)
    if options["tas_lambda"] and "tas_shape" not in options:
        assert profile[0] / profile[5] == pytest.approx(1 + options["tas_lambda"], rel=1e-4)


# The penalty


def test_the_divergence_from_the_reference_is_that_of_the_fresh_completions(data, tmp_path):
    """The penalty is on them alone, so its logged size must not be thinned by the others."""
    model = load_model(resolve_checkpoint(MODEL), dtype="float32")
    options = {"model": model, "processing_class": load_processor(MODEL), "beta": 0.1, "learning_rate": 1e-2}
    trainer = make(data[0], tmp_path, take(data[1], VAS=2, S=2), Worth(), **options)
    trainer.train()
    for entry, rows in list(zip(logs(trainer), trainer.trained, strict=True))[1:]:
        assert sum(row["replayed"] for row in rows) == 2 * G
        gaps = [x for row in rows if not row["replayed"] for x in (row["ref"] - row["logps"]).tolist()]
        assert entry["kl"] == pytest.approx(fmean(math.exp(gap) - gap - 1 for gap in gaps), rel=1e-3)
