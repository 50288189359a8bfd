"""Where MAPO's runs and epochs end: shorter epochs, short rollouts, last steps, and trainers that are used again."""

import json
from collections import Counter
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs.runner import Job, changes, facts, once, write_inputs
from omni_runs import spread_reward
from test_mapo import DEFAULTS, Diary, Snapshots, Watched, dull_of, follow, logs, take, varied
from test_processes import by_tag, worst
from tiny_models import build_tiny

from maple_trl import MAPOConfig
from maple_trl.algorithms.schedule import GRANULARITIES, LEFTOVERS, StratifiedSchedule
from maple_trl.modalities import ModalityTag


pytestmark = pytest.mark.slow


G = 4  # completions of a prompt
EARLY = {"dynamic_sampling": "early", "revisit": "informative"}


@pytest.fixture
def build(seven_tags, tmp_path):
    """A trainer of a tiny random model; more arguments are fields of the config."""

    def make(dataset, reward=spread_reward, eval_dataset=None, callbacks=None, **options):
        model, processor = build_tiny("qwen2_5_omni")
        options = {"output_dir": str(tmp_path / "run"), "media_root": str(seven_tags[0]), **DEFAULTS, **options}
        return Watched(
            model,
            reward,
            MAPOConfig(**options),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
        )

    return make


# The schedule


@given(
    tags=st.lists(st.sampled_from(list(ModalityTag)), min_size=1, max_size=30),
    multiple=st.integers(1, 4),
    batches=st.integers(1, 3),
    stratified=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    leftover=st.sampled_from(LEFTOVERS),
    data=st.data(),
)
def test_epochs_that_leave_out_rows_fill_no_further_than_ranks_need(
    tags, multiple, batches, stratified, granularity, leftover, data
):
    left_out = data.draw(st.sets(st.integers(0, len(tags) - 1), max_size=len(tags) - 1))
    size = multiple * batches
    options = {"stratified": stratified, "granularity": granularity, "leftover": leftover, "multiple_of": multiple}
    schedule = StratifiedSchedule(tags, size, skipped=lambda epoch: left_out if epoch == 1 else (), **options)
    for epoch in range(3):
        taken, fresh = [schedule.next_batch()], []
        while not schedule.exhausted:
            taken.append(schedule.next_batch())
        assert schedule.epoch == epoch
        for batch in taken:
            own = batch.rows[: len(batch.rows) - batch.filled]
            fresh += own
            assert len(batch.rows) % multiple == 0 and 0 < len(own) and len(batch.rows) <= size
            if epoch == 1 and left_out:
                assert batch.filled == -len(own) % multiple
            else:
                assert len(batch.rows) == size
        skipped = left_out if epoch == 1 else set()
        assert sorted(fresh) == sorted(set(range(len(tags))) - skipped)
        assert not {row for batch in taken for row in batch.rows} & skipped


def test_an_epoch_without_two_of_five_rows():
    def sizes(multiple, left_out):
        schedule = StratifiedSchedule(["S"] * 5, 4, skipped=lambda epoch: left_out, multiple_of=multiple)
        batches = [schedule.next_batch()]
        while not schedule.exhausted:
            batches.append(schedule.next_batch())
        return [(len(batch.rows), batch.filled) for batch in batches]

    assert sizes(1, ()) == sizes(2, ()) == [(4, 0), (4, 3)]
    assert sizes(1, [0, 3]) == [(3, 0)] and sizes(2, [0, 3]) == sizes(4, [0, 3]) == [(4, 1)]


# Short rollouts in one process


def sizes_by_epoch(diary):
    found = {}
    for call in diary.calls:
        found.setdefault(call["epoch"], Counter())[len(call["prompts"])] += 1
    return found


@pytest.mark.parametrize("mode", ["none", "early"])
@pytest.mark.matrix(cases=1)
def test_a_short_rollout_generates_and_trains_fewer_rows(seven_tags, build, mode):
    data = take(seven_tags[1], V=4, S=4)
    dull, value = dull_of(data, 0, 1, 5)
    diary = Diary(value)
    options = (EARLY if mode == "early" else {}) | {"max_steps": -1, "num_train_epochs": 2}
    trainer = follow(diary, build(data, diary, **options))
    trainer.train()
    later = {2: 4} if mode == "none" else {2: 2, 1: 1}  # two rows of V, three of S
    assert sizes_by_epoch(diary) == {0: {2: 4}, 1: later}
    second = [call for call in diary.calls if call["epoch"] == 1]
    visits = Counter(one for call in second for one in call["prompts"])
    assert visits == Counter(one for one in data["id"] if mode == "none" or one not in dull)
    assert [entry["schedule/filled_rows"] for entry in logs(trainer)] == [0] * len(diary.calls)
    steps = [sum(map(len, trainer.trained[i : i + 2])) for i in range(0, len(trainer.trained), 2)]
    assert steps[4:] == [G * len(call["prompts"]) for call in second]
    assert steps[:4] == [G * sum(mode == "none" or one not in dull for one in c["prompts"]) for c in diary.calls[:4]]


def test_a_rollout_with_fewer_rows_than_micro_batches_trains(seven_tags, build):
    """Four completions in eight micro-batches: every other one is empty, each optimizer step has some."""
    data = take(seven_tags[1], S=4)
    _, value = dull_of(data, 0, 1, 2)
    seen = Snapshots()
    options = {"steps_per_generation": 8, "per_device_train_batch_size": 2, "num_iterations": 2, "beta": 0.0}
    trainer = build(data, Diary(value), callbacks=[seen], max_steps=16, **options, **EARLY)
    trainer.train()
    rows = [sum(map(len, trainer.trained[i : i + 2])) for i in range(0, len(trainer.trained), 2)]
    assert rows == [1] * 16 and seen.finite()
    assert all(seen.moved(step) for step in range(16))


def test_a_data_set_smaller_than_a_rollout_is_refused(seven_tags, build):
    with pytest.raises(ValueError, match="train_dataset has 1 usable rows, but one rollout takes 4 prompts"):
        build(take(seven_tags[1], S=1), Diary(varied), per_device_train_batch_size=8)


# The end of a run


RARELY = {"save_strategy": "steps", "save_steps": 1000, "logging_steps": 1000}


def run_to_the_end(build, data, mode, **options):
    _, value = dull_of(data, 0, 1, 5)
    diary = Diary(value)
    options = (EARLY if mode == "early" else {}) | {"max_steps": -1, "num_train_epochs": 2} | RARELY | options
    trainer = follow(diary, build(data, diary, **options))
    trainer.train(resume_from_checkpoint=True)
    return trainer, diary


STEPS = {"none": 8, "early": 4 + 3}


@pytest.mark.parametrize("mode", STEPS)
def test_the_last_step_saves_evaluates_and_logs(seven_tags, build, tmp_path, mode):
    data, held_out = take(seven_tags[1], V=4, S=4), take(seven_tags[1], AS=1)
    evaluating = {"eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 1000, "num_generations_eval": 2}
    evaluating["per_device_eval_batch_size"] = 2
    trainer, _ = run_to_the_end(build, data, mode, **evaluating)
    steps = STEPS[mode]
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [steps]
    assert trainer.state.log_history[-1]["step"] == steps and "train_runtime" in trainer.state.log_history[-1]
    saved = json.loads((tmp_path / "run" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert saved["global_step"] == saved["max_steps"] == steps
    assert [e["step"] for e in saved["log_history"] if "eval_loss" in e] == [steps]


@pytest.mark.parametrize("mode", STEPS)
def test_the_last_entry_tells_what_no_other_has_told(seven_tags, build, mode):
    trainer, diary = run_to_the_end(build, take(seven_tags[1], V=4, S=4), mode, save_strategy="no")
    [entry] = trainer.state.log_history
    assert "train_runtime" in entry and entry["step"] == STEPS[mode]
    for tag in ("V", "S"):
        rewards = [reward for call in diary.calls if call["tags"][0] == tag for reward in call["rewards"]]
        assert entry[f"tag/{tag}/reward"] == pytest.approx(fmean(rewards))


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.matrix(cases=1)
def test_epochs_save_evaluate_and_log_when_they_end(seven_tags, build, tmp_path, mode):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    options |= {"eval_dataset": take(seven_tags[1], AS=1), "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    trainer, _ = run_to_the_end(build, take(seven_tags[1], V=4, S=4), mode, **options)
    ends = [4, STEPS[mode]]
    assert sorted(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")) == ends
    assert [entry["step"] for entry in logs(trainer)] == ends
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == ends


@pytest.mark.long
@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.matrix(cases=1)
def test_nothing_is_left_to_do_after_the_last_checkpoint(seven_tags, build, tmp_path, mode):
    data = take(seven_tags[1], V=4, S=4)
    first, diary = run_to_the_end(build, data, mode)
    assert len(diary.calls) == STEPS[mode]
    again, diary = run_to_the_end(build, data, mode, learning_rate=1.0)
    assert not diary.calls and not again.trained and again.state.global_step == STEPS[mode]
    weights = dict(again.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in first.model.named_parameters())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{STEPS[mode]}"]
    longer, diary = run_to_the_end(build, data, mode, num_train_epochs=3)
    assert {call["epoch"] for call in diary.calls} == {2} and longer.state.global_step > STEPS[mode]


# Trainers that are used again


def test_a_trainer_can_train_twice(seven_tags, build):
    data = take(seven_tags[1], V=4, S=4)
    diary, seen = Diary(varied), Snapshots()
    options = {"max_steps": -1, "num_train_epochs": 1, "tag_weights": "adaptive", "callbacks": [seen]}
    trainer = follow(diary, build(data, diary, **options))
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4 and len(diary.calls) == 8 and len(logs(trainer)) == 4
    for calls in (diary.calls[:4], diary.calls[4:]):
        assert sorted(one for call in calls for one in call["prompts"]) == sorted(data["id"])
        assert {call["epoch"] for call in calls} == {0}
    assert seen.finite() and all(seen.moved(step) for step in (0, 1, 2, 3, 5, 6, 7, 8))


def test_a_trainer_that_stopped_within_a_rollout_can_train_again(seven_tags, build):
    data = take(seven_tags[1], V=2, S=2)
    diary = Diary(varied)
    trainer = follow(diary, build(data, diary, num_iterations=2, max_steps=3))
    trainer.train()
    assert len(diary.calls) == 2
    trainer.train()
    assert trainer.state.global_step == 3 and len(diary.calls) == 4


def test_a_run_that_failed_within_a_rollout_leaves_nothing_to_the_next(seven_tags, build):
    data = take(seven_tags[1], V=4)
    diary = Diary(varied)
    options = {"dynamic_sampling": "early", "num_iterations": 2, "max_steps": 2}
    trainer = build(data, diary, **options)
    log_probs = trainer._get_per_token_logps_and_entropies

    def fail(*args, **kwargs):
        raise MemoryError("as a pass over the completions may")

    trainer._get_per_token_logps_and_entropies = fail
    with pytest.raises(MemoryError):
        trainer.train()
    assert len(diary.calls) == 1
    trainer._get_per_token_logps_and_entropies = log_probs
    trainer.train()
    assert len(diary.calls) == 2, "the new completions are scored"
    fresh = diary.calls[1]["rewards"]
    assert logs(trainer)[0]["tag/all/reward"] == pytest.approx(sum(fresh) / len(fresh))


def test_a_trainer_can_evaluate_before_it_trains(seven_tags, build):
    data = take(seven_tags[1], V=4, S=4)

    def run(evaluate):
        diary = Diary(varied)
        options = {"num_generations_eval": 2, "per_device_eval_batch_size": 2, "tag_weights": "adaptive"}
        trainer = build(data, diary, eval_dataset=take(seven_tags[1], AS=2), **options)
        if evaluate:
            assert trainer.evaluate()["eval_tag/AS/reward"] == pytest.approx(0.125)
        trainer.train()
        return trainer

    evaluated, plain = run(True), run(False)
    assert evaluated.schedule.state_dict() == plain.schedule.state_dict()
    assert evaluated.tag_weights.state_dict() == plain.tag_weights.state_dict()
    for one, two in zip(logs(evaluated), logs(plain), strict=True):
        assert one.keys() == two.keys()
        assert not any(name.startswith(("eval", "tag/AS")) for name in one)
        assert one["tag/all/reward"] == two["tag/all/reward"]
    assert evaluated.evaluate()["eval_tag/AS/reward"] == pytest.approx(0.125)


# Short rollouts in two processes


SHORT = {
    # Completions of a prompt can be shared by both: any number of prompts will do.
    "even": {"num_generations": 2, "per_device_train_batch_size": 2},
    # They cannot: prompts must come in pairs.
    "odd": {"num_generations": 3, "per_device_train_batch_size": 3},
}
TAGS = ("S", "VA", "AS", "S", "V", "A", "VAS", "VS")
DULL = (1, 4, 6)


MODES = {"early": EARLY, "first": EARLY | {"num_train_epochs": 1}, "none": {}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Eight rows in two rollouts of four prompts, then the five that taught something; one process and two."""

    def make(folder):
        rows = [row | {"varied": i not in DULL} for i, row in enumerate(by_tag(write_inputs(folder), TAGS))]
        common = {
            "batching": "mixed",
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "max_steps": -1,
            "num_train_epochs": 2,
            "gradient_checkpointing": False,
            "shuffle_dataset": False,
        }

        def runs(world):
            settings = {"trainer": "mapo", "reward": "where_varied", "fixed_completions": True}
            for name, sizes in SHORT.items():
                for mode, more in MODES.items():
                    options = common | sizes | more | {"gradient_accumulation_steps": 4 // world}
                    yield {"name": f"{name}-{mode}", "options": options, **settings}

        for job in [Job(world, folder, str(world), rows, list(runs(world))) for world in (1, 2)]:
            job.wait()

    return once(tmp_path_factory, "mapo-epochs", make)


def generated(results, world, name):
    """The rows of each rollout over all ranks, one for each completion."""
    ranks = [facts(results / str(world), name, rank)["used"] for rank in range(world)]
    return [[one for ids in shares for one in ids] for shares in zip(*ranks, strict=True)]


def trained(results, world, name):
    """Per optimizer step, the prompts of the completions that each rank trained on."""
    steps = 4 // world  # micro-batches
    told = [facts(results / str(world), name, rank)["trained"] for rank in range(world)]
    return [
        [[key for chunk in chunks[i : i + steps] for key, _ in chunk] for chunks in told]
        for i in range(0, len(told[0]), steps)
    ]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SHORT)
def test_ranks_share_a_short_rollout(results, name, world):
    copies = SHORT[name]["num_generations"]
    rollouts = generated(results, world, f"{name}-early")
    prompts = [len(rows) / copies for rows in rollouts]
    filled = int(name == "odd" and world == 2)
    assert prompts == [4, 4, 4, 1 + filled]
    logged = [entry for entry in facts(results / str(world), f"{name}-early")["log"] if "loss" in entry]
    assert [entry["schedule/filled_rows"] for entry in logged] == [0, 0, 0, filled]
    told = json.loads((results / "1.json").read_text())["rows"]
    due = {row["id"] for row in told if row["varied"]}
    assert {one for rows in rollouts[2:] for one in rows} == due
    if not filled:
        assert all(count == copies for count in Counter(one for rows in rollouts[2:] for one in rows).values())
    for rows, ranks in zip(rollouts, trained(results, world, f"{name}-early"), strict=True):
        kept = sum(one in due for one in rows)
        assert sum(map(len, ranks)) == kept and max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SHORT)
def test_rollouts_stay_whole_where_nothing_is_left_out(results, name, world):
    rollouts = generated(results, world, f"{name}-none")
    assert [len(rows) for rows in rollouts] == [4 * SHORT[name]["num_generations"]] * 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHORT)
def test_short_rollouts_move_the_weights_alike_on_any_number_of_processes(results, name, mode):
    """Also where one process trains on a row more than the other: nine rows are left of the first rollout of `odd`."""
    one, two = changes(results / "1", f"{name}-{mode}"), changes(results / "2", f"{name}-{mode}")
    error, where = worst(one, two)
    if (name, mode) == ("odd", "early"):  # two processes fill the last rollout, one does not
        assert error > 0.01
    else:
        assert error <= 1e-3, where
    other = "none" if mode == "early" else "early"
    assert worst(one, changes(results / "1", f"{name}-{other}"))[0] > 0.01
