"""AVATAR's claims: their register, their tasks, what is read off their runs, and runs."""

import random
import re
import sys
from pathlib import Path

import pytest
import yaml


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
TWO_STEPS = {"max_steps": 2, "hints": False, "hint_max_kl": 0.01}
EXAM = {"QUESTIONS": 1, "SAMPLES": 1}  # after training: nothing here is about it


@pytest.fixture(scope="module", autouse=True)
def claims():
    sys.path.insert(0, str(CLAIMS))
    yield
    sys.path.remove(str(CLAIMS))


@pytest.fixture(scope="module")
def register():
    return yaml.safe_load((CLAIMS / "register" / "avatar.yaml").read_text(encoding="utf-8"))


def make_run(told, seed=100, **options):
    from runs import Run

    return Run(**({"options": {}, "seed": seed} | told | {"options": told.get("options", {}) | options}))


# The register


def test_what_differs_between_variants_is_what_they_are_named_for(register):
    configs = {
        name: dict(make_run(told).jobs())[""]
        for name, told in register["variants"].items()
        if name.startswith(("replay-", "reach-"))
    }

    def differs(one, other):
        return {key for key in configs[one] if configs[one][key] != configs[other].get(key)}

    assert differs("reach-avatar", "reach-loss-off") == {"replay_alpha"}
    assert differs("replay-no-hints", "replay-no-hints-loss-off") == {"replay_alpha"}
    assert differs("replay-no-hints", "replay-buffer-128") == {"replay_capacity"}
    assert differs("replay-no-hints", "replay-own-prompt") == {"replay_scope"}
    assert differs("replay-no-hints", "replay-one-tier") == {"replay_shares", "replay_quantiles"}
    assert differs("replay-grpo", "replay-tas-only") == {"tas_lambda"}
    assert (
        differs("reach-avatar", "replay-avatar") == {"max_steps"} == differs("reach-replay-only", "replay-replay-only")
    )
    more = {"num_generations", "per_device_train_batch_size", "max_steps"}
    assert differs("replay-grpo", "reach-grpo-4") == more
    assert configs["reach-loss-off"]["replay_alpha"] == 0 and configs["reach-avatar"]["hints"]
    by_completions = {"replay-8-0-short", "replay-6-2-short", "replay-2-6-long", "replay-2-6-long-loss-off"}
    steps = {
        config["max_steps"]
        for name, config in configs.items()
        if name.startswith("replay-") and name not in by_completions
    }
    groups = {config["per_device_train_batch_size"] // config["num_generations"] for config in configs.values()}
    assert steps == {128} and groups == {8}  # all see as many prompts
    for name, same in (("8-0-short", "tas-only"), ("6-2-short", "6-2"), ("2-6-long", "2-6")):
        assert differs(f"replay-{name}", f"replay-{same}") == {"max_steps"}
    assert differs("replay-2-6-long", "replay-2-6-long-loss-off") == {"replay_alpha"}
    # As many generated completions as four fresh of eight have in 128 steps: the first step has nothing to replay.
    for name, fresh in (("8-0-short", 8), ("6-2-short", 6), ("2-6-long", 2)):
        made = 64 + (configs[f"replay-{name}"]["max_steps"] - 1) * 8 * fresh
        assert 0 <= made - (64 + 127 * 8 * 4) < 8 * fresh


def test_what_is_compared_at_a_target_generates_as_much(register):
    curves = {name: told for name, told in register["variants"].items() if "tier_curve" in told.get("instruments", ())}
    generated = set()
    for told in curves.values():
        config = make_run(told).config()
        fresh = 1 - config["replayed_generations"] / config["num_generations"]
        generated.add(config["max_steps"] * config["per_device_train_batch_size"] * fresh)
    assert generated == {8192} and len(curves) == 5


def test_there_is_one_target_and_the_texts_tell_it(register):
    """Costs at a target are compared at the same one by all claims, with the larger model too."""
    targets, told = set(), set()
    large = yaml.safe_load((CLAIMS / "register" / "gpu.yaml").read_text(encoding="utf-8"))
    for claim in (*register["claims"].values(), *large["claims"].values()):
        metrics = [measure["metric"] for measure in claim["measures"].values()]
        targets |= {target for metric in metrics for target in re.findall(r"tier_reache[sd]\(hard, ([\d.]+)", metric)}
        told |= set(re.findall(r"are answered at ([\d.]+)[,.] ", claim["here"]))
    assert targets == told and len(targets) == 1


# Stages


def test_stages_are_jobs_in_their_order_with_options_of_their_own(register):
    run = make_run(register["variants"]["stages-judge"])
    jobs = dict(run.jobs())
    assert list(jobs) == ["s0_sft", "s1_visual", "s2_audio_visual", "s3_localization"]
    assert [job["dataset_filter"]["tag"] for job in jobs.values()] == [
        ["VAS"],
        ["V", "VS"],
        ["VA", "VAS"],
        ["A", "AS"],
    ]
    assert all(job["seed"] == 100 and job["dataset_name"] == "{folder}/data" for job in jobs.values())
    judged = [name for name, job in jobs.items() if "tasks.stages:perception_judge" in job.get("reward_funcs", ())]
    assert judged == ["s3_localization"]
    assert [job.get("vcrs_window") for job in jobs.values()] == [None, 4, 4, 4]  # which a supervised trainer has not
    assert "s0_sft" not in dict(make_run(register["variants"]["stages-avatar-without-sft"]).jobs())
    without = make_run(register["variants"]["stages-grpo"]).jobs()
    assert [job.get("replayed_generations") for _, job in without] == [None, 0, 0, 0]


def test_options_that_no_stage_has_are_refused(register):
    told = register["variants"]["stages-format-accuracy"]
    with pytest.raises(ValueError, match="has an option 'vcrs_windows'"):
        make_run(told, vcrs_windows=4).config()
    with pytest.raises(ValueError, match="has no stage 's3_localization'"):
        make_run(told, stages={"s3_localization": {"beta": 0.0}}).config()


def test_the_judge_grades_what_is_perceived_and_not_the_answer():
    from tasks.stages import perception_judge

    texts = ["<think> low sun</think><answer>A</answer>", "<think> low cat</think>", "<think> sun low</think>"]
    texts += ["<think> low sun sun sun</think>", "low sun", "<think></think>", "<think> low"]
    columns = {"tag": ["AS"] * 7, "truth_V": ["red"] * 7, "truth_A": ["low"] * 7, "truth_S": ["sun"] * 7}
    assert perception_judge(completions=texts, **columns) == [1.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0]


def test_a_bare_letter_counts_in_the_evaluation_alone():
    from tasks.stages import score

    from maple_trl.rewards import accuracy_reward

    columns = {"completions": ["B", "C", "<think> red</think><answer>B</answer>", "<answer>B"], "solution": ["B"] * 4}
    assert score(**columns) == [1.0, 0.0, 1.0, 0.0]
    assert accuracy_reward(**columns) == [0.0, 0.0, 1.0, 0.0]


# The hard tier


def test_the_hard_tier_is_what_asking_all_of_it_every_time_finds():
    from tasks.replay import split_by_difficulty

    chance = {name: name / 200 for name in range(200)}
    answers = {
        name: [random.Random(f"{name}/{turn}").random() < p for turn in range(16)] for name, p in chance.items()
    }
    turns = dict.fromkeys(chance, 0)

    def ask(rows):
        found = [float(answers[row["id"]][turns[row["id"]]]) for row in rows]
        turns.update({row["id"]: turns[row["id"]] + 1 for row in rows})
        return found

    rows = [{"id": name} for name in chance]
    hard, others = split_by_difficulty(rows, ask)
    assert [row["id"] for row in hard] == [name for name in chance if sum(answers[name]) <= 1]
    assert len(hard) + len(others) == 200 and sum(turns.values()) < 200 * 16 / 2


def test_rows_are_taken_as_many_of_each_kind():
    from tasks.replay import as_many_of_each

    rows = [{"tag": tag, "id": f"{tag}{i}"} for tag, count in {"V": 5, "VA": 1, "S": 5}.items() for i in range(count)]
    assert [row["id"] for row in as_many_of_each(rows, 6, "tag")] == ["V0", "VA0", "S0", "V1", "S1", "V2"]
    kinds = [{"tag": tag, "hint": hint} for tag in "VA" for hint in ("next", "before") for _ in range(3)]
    assert as_many_of_each(kinds, 4, "tag", "hint") == kinds[::3]


ROW = {"id": "train-0001", "tag": "V", "question": "color?", "answer": "D", "hint": None} | {
    "options": ["red", "green", "blue", "yellow"]
}


@pytest.mark.parametrize(
    "rule, hint, answer", [("Answer ", "next", "A"), ("Which ", "opposite", "B"), ("What ", "before", "C")]
)
def test_each_rule_moves_the_right_letter_in_its_own_way(rule, hint, answer):
    from tasks.replay import RULES, under_rule

    hard = under_rule(ROW, rule)
    assert (hard["answer"], hard["solution"], hard["hint"]) == (answer, answer, hint)
    assert hard["options"]["ABCD".index(answer)] == "yellow"  # the letter moves, what is right does not
    assert hard["prompt"] == [{"role": "user", "content": f"{rule}color?"}]
    assert under_rule(ROW, rule, "")["question"] == "color?" and under_rule(ROW, rule, "")["answer"] == answer
    assert len(RULES) == 3


def test_what_the_start_is_told_says_nothing_of_a_rule(monkeypatch, tmp_path):
    """Of rows with a beginning and no hint a share has another letter, all three alike; with a hint every beginning has every rule."""
    from collections import Counter

    from tasks import replay

    from maple_trl.data import synthetic

    told = []
    rows = [ROW | {"id": f"{tag}-{number}", "tag": tag, "truth_V": "red"} for tag in "VAS" for number in range(400)]
    rows = [
        row | {"prompt": [{"role": "user", "content": "color?"}], "truth_A": "low", "truth_S": "cat"} for row in rows
    ]

    class Table(list):
        def to_list(self):
            return list(self)

    monkeypatch.setattr(synthetic, "write_seven_tags", lambda *args, **options: {"train": Table(rows)})
    monkeypatch.setattr(replay, "train_supervised", lambda folder, rows, *args, **options: told.extend(rows))
    replay.learn_hints(tmp_path, "model", 1, None)
    begun = [row for row in told if row["hint"] is None and row["question"] != "color?"]
    assert all(row["completion"][0]["content"].endswith(f"<answer>{row['answer']}</answer>") for row in told)
    for beginning in replay.RULES:
        letters = Counter(row["answer"] for row in begun if row["question"].startswith(beginning))
        share = sum(letters.values()) * replay.SLIPS / 3
        assert all(abs(letters[letter] - share) < 4 * share**0.5 for letter in "ABC"), letters
    pairs = Counter((row["question"].partition("color?")[0], row["hint"]) for row in told if row["hint"])
    assert len(pairs) == 4 * 3 and max(pairs.values()) == min(pairs.values())


def test_a_tier_that_lacks_hard_rows_under_a_rule_is_refused(tmp_path):
    from tasks.replay import write_tiers

    rows = [ROW | {"id": f"{tag}-{number}", "tag": tag} for tag in "VAS" for number in range(48)]

    def solves_next(asked):
        return [float(row["hint"] == "next") for row in asked]

    with pytest.raises(RuntimeError, match="train: of .*opposite.* hard rows, 1 of each are needed"):
        write_tiers(tmp_path / "train.parquet", rows, solves_next, 9, 3)
    write_tiers(tmp_path / "train.parquet", rows, lambda asked: [0.0] * len(asked), 9, 3)
    from datasets import Dataset

    written = Dataset.from_parquet(str(tmp_path / "train.parquet"), keep_in_memory=True).to_list()
    hard = [row for row in written if row["id"].startswith("hard:")]
    assert len({(row["hint"], row["tag"]) for row in hard}) == len(hard) == 9 and len(written) == 12


# What is read off runs


@pytest.fixture
def curve():
    def make(values, cost=100):
        points = [{"step": i, "completions": i * cost, "hard": v} for i, v in enumerate(values)]
        return {"tier_curve": {"points": points}}

    return make


def test_a_target_is_reached_between_two_points(curve):
    from metrics_avatar import tier_reached, tier_reaches

    assert tier_reached(curve([0.1, 0.3, 0.5, 0.7]), "hard", 0.4, "completions") == pytest.approx(150)
    assert tier_reached(curve([0.5, 0.6]), "hard", 0.4, "completions") == 0
    # One lucky point does not reach it: 0.6 and 0.2 count as 0.4 each.
    assert tier_reached(curve([0.1, 0.6, 0.2, 0.4, 0.6]), "hard", 0.5, "completions") == pytest.approx(350)
    never = tier_reached(curve([0.1, 0.3, 0.35]), "hard", 0.4, "completions")
    assert never == 200 and type(never).__name__ == "Censored"
    assert (tier_reaches(curve([0.1, 0.5]), "hard", 0.4), tier_reaches(curve([0.1, 0.3]), "hard", 0.4)) == (1, 0)


def test_the_mean_up_to_a_limit_is_an_area(curve):
    from metrics_avatar import tier_mean

    assert tier_mean(curve([0.0, 0.2, 0.4]), "hard", "completions", 200) == pytest.approx(0.2)
    assert tier_mean(curve([0.0, 0.2, 0.4]), "hard", "completions", 150) == pytest.approx(0.15)
    # The same curve in half the completions is better at the same limit.
    assert tier_mean(curve([0.0, 0.2, 0.4, 0.4, 0.4], cost=50), "hard", "completions", 200) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="less than 300"):
        tier_mean(curve([0.0, 0.2, 0.4]), "hard", "completions", 300)


def test_accuracies_of_tiers_and_stages():
    from metrics_avatar import METRICS

    questions = [["hard:a", "VAS", 1.0], ["hard:b", "VS", 0.0], ["other:c", "V", 4.0]]
    after = {"trained": {"questions": questions, "samples": 4, "accuracy": {"all": 0.7}}}
    result = {"after": after, "trained": True}
    assert METRICS["tier_accuracy"](result, "hard") == 0.125 and METRICS["tier_accuracy"](result, "other") == 1
    stages = [{"name": "one", "after": {"trained": {"accuracy": {"all": 0.4}}}}]
    result |= {"config": {"stages": [["one", {}], ["two", {}]]}, "stages": stages}
    assert METRICS["stage_accuracy"](result, "one") == 0.4 and METRICS["stage_gain"](result, "two") == pytest.approx(
        0.3
    )
    assert METRICS["stage_accuracy"](result | {"trained": False, "stages": []}, "one") == 0.7
    with pytest.raises(ValueError, match="first stage"):
        METRICS["stage_gain"](result, "one")


# Runs


@pytest.fixture(scope="module")
def small_tasks(tmp_path_factory):
    """Both tasks as small as they can be, and runs that tell the sum of their weights."""
    import instruments
    import torch
    from tasks import replay, stages

    from maple_trl.data import synthetic

    class Weights:
        def __init__(self, trainer, *rest):
            self.trainer, self.began = trainer, self.read(trainer)

        def read(self, trainer):
            return torch.cat([weight.detach().flatten().clone() for weight in trainer.model.parameters()])

        def result(self):
            return {"began": self.began, "ended": self.read(self.trainer)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(instruments.INSTRUMENTS, "weights", Weights)
        patch.setattr(instruments.INSTRUMENTS["tier_curve"], "SAMPLES", 3)
        sizes = {
            "HARD": 9,
            "OTHERS": 7,
            "HELD_OUT_HARD": 18,
            "HELD_OUT_OTHERS": 14,
            "ASKED_PER_TAG": {"train": 32, "test": 32},
            "HINT_STEPS": 1,
            **EXAM,
        }
        for name, value in sizes.items():
            patch.setattr(replay, name, value)
        for name, value in {"COLD_STEPS": 1, "PROMPTS_PER_TAG": {"train": 16, "test": 4}, **EXAM}.items():
            patch.setattr(stages, name, value)
        write = synthetic.write_seven_tags

        def write_few(folder, prompts_per_tag=8, **options):  # eight of what one step is trained on
            return write(folder, prompts_per_tag, clips_per_pair=2, **options)

        patch.setattr(synthetic, "write_seven_tags", write_few)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def carried_out(run):
    import worker

    return worker.carry_out(run)


@pytest.mark.slow
@pytest.mark.long
def test_the_hard_tier_is_hard_and_runs_are_measured_on_it(small_tasks, register):
    told = register["variants"]["reach-avatar"]
    points = carried_out(make_run(told, **TWO_STEPS))["tier_curve"]["points"]
    # Asked anew, with other samples than those by which it was chosen, which flatter nobody.
    assert points[0]["hard"] < points[0]["other"] - 0.15
    assert [point["step"] for point in points] == [0, 1, 2]
    # Whole groups first, then four fresh ones of eight.
    assert [point["completions"] for point in points] == [0, 64, 96]
    assert all(0 <= point[tier] <= 1 for point in points for tier in ("hard", "other"))
    grpo = carried_out(make_run(register["variants"]["reach-grpo-4"], max_steps=2))
    assert [point["completions"] for point in grpo["tier_curve"]["points"]] == [0, 32, 64]
    assert grpo["tier_curve"]["points"][0]["hard"] == points[0]["hard"]  # the same questions, and the same start


@pytest.mark.long
@pytest.mark.slow
def test_with_the_loss_off_it_does_not_matter_what_is_replayed(small_tasks, register):
    def weights(**options):
        told = register["variants"]["reach-loss-off"] | {"instruments": ["weights"]}
        return carried_out(make_run(told, **TWO_STEPS | {"max_steps": 3} | options))["weights"]

    def apart(one, other):
        return float((one["ended"] - other["ended"]).norm() / (one["ended"] - one["began"]).norm())

    # To rounding: other completions beside them pad the fresh ones otherwise.
    assert apart(weights(), weights(replay_draw="priority")) < 1e-3
    assert apart(weights(replay_alpha=1.0), weights(replay_alpha=1.0, replay_draw="priority")) > 0.1


@pytest.mark.slow
@pytest.mark.long
def test_stages_begin_with_the_model_of_the_one_before(small_tasks, register):
    told = register["variants"]["stages-judge"] | {"instruments": ["weights"]}
    still = TWO_STEPS | {"max_steps": 1, "learning_rate": 0.0, "warmup_steps": 0, "per_device_train_batch_size": 16}
    others = told["options"]["stages"]

    def began(**of_the_first):
        return carried_out(make_run(told, **still, stages=others | {"s0_sft": of_the_first}))

    unchanged, changed = began(), began(learning_rate=1e-2)
    start = carried_out(make_run(told | {"trained": False}))["weights"]["began"]
    assert unchanged["weights"]["began"].equal(start)
    assert changed["weights"]["began"].equal(changed["weights"]["ended"])
    assert not changed["weights"]["began"].equal(start)
    assert [stage["name"] for stage in changed["stages"]] == ["s0_sft", "s1_visual", "s2_audio_visual"]
    assert [stage["cost"]["completions"] for stage in changed["stages"]] == [0, 16, 16]
    assert any("perception_judge" in name for name in changed["log"])
    assert all("all" in stage["after"]["trained"]["accuracy"] for stage in changed["stages"])
