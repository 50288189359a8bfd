"""Runs that go on and learn nothing say so, once, with the usual causes; runs that learn do not."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from omni_runs import DEFAULTS, build_trainer
from peft import LoraConfig
from tiny_models import build_tiny, build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer
from maple_trl.rewards import for_tags
from maple_trl.trainers.common.learning_checks import EQUAL_ROLLOUTS, ZERO_GRADIENTS, LearningChecks, Streak
from maple_trl.trainers.common.run_errors import NoStepError


pytestmark = pytest.mark.slow


MODULE = "maple_trl.trainers.common.learning_checks"
FACTS = {"temperature": 1.0, "max_completion_length": 6, "cut": 0.5}
SMALL = {"max_completion_length": 2, "gradient_accumulation_steps": 1, "logging_steps": 50}


def question(**columns):
    return {"prompt": [{"role": "user", "content": "which word"}], "solution": "A", "tag": "S"} | columns


ROWS = Dataset.from_list([question(subtitle=f"word {i}") for i in range(8)])
TEXTS = Dataset.from_dict({"prompt": [f"word {i}" for i in range(8)]})


def constant(completions, **_):
    return [0.5] * len(completions)


def nothing(completions, **_):
    return [None] * len(completions)


def varied(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def of_text(reward, tmp_path, **options):
    """GRPO on text alone, a prompt a step: a step takes a fraction of a second."""
    model, tokenizer = build_tiny_text()
    given = {"model": model, "processing_class": tokenizer, "reward": reward, "output_dir": str(tmp_path)}
    return build_trainer(tmp_path, TEXTS, **given, **(SMALL | {"learning_rate": 1e-6} | options))


def warned(caplog, words):
    return [record.message for record in caplog.records if record.name == MODULE and words in record.message]


@pytest.mark.parametrize(
    ("reward", "said"),
    [(constant, "each is 0.5"), (nothing, "no completion got a reward")],
    ids=["constant", "nothing"],
)
def test_equal_rewards_are_warned_of_once(reward, said, caplog, tmp_path):
    trainer = of_text(reward, tmp_path, max_steps=EQUAL_ROLLOUTS + 3, temperature=0.7)
    trainer.train()
    [message] = warned(caplog, "all rewards were equal")
    assert (
        f"Up to step {EQUAL_ROLLOUTS}, all rewards were equal in {EQUAL_ROLLOUTS} rollouts in a row ({said})"
        in message
    )
    assert "max_completion_length=2" in message and "temperature=0.7" in message and "never matches" in message
    [gradient] = warned(caplog, "the gradient was exactly 0")
    assert f"Up to step {ZERO_GRADIENTS}," in gradient and "all advantages are 0" in gradient
    notes = {note["kind"]: note for note in trainer.left_out()}
    steps = EQUAL_ROLLOUTS + 3
    assert (
        notes["equal_rewards"]["count"] == notes["equal_rewards"]["of"] == notes["equal_rewards"]["longest"] == steps
    )
    assert notes["zero_gradient"]["text"] == f"{steps} of {steps} steps without an update (gradient 0)"
    if reward is nothing:
        completions = 4 * steps
        text = f"reward 'nothing' gave nothing for {completions} of {completions} completions"
        assert notes["unrewarded"]["text"] == text
    else:
        assert "unrewarded" not in notes


def test_one_rollout_less_gives_no_warning(caplog, tmp_path):
    of_text(constant, tmp_path, max_steps=EQUAL_ROLLOUTS - 1).train()
    assert not warned(caplog, "all rewards were equal")


def test_varied_rewards_give_no_warning(caplog, tmp_path):
    trainer = of_text(varied, tmp_path, max_steps=EQUAL_ROLLOUTS + 1)
    trainer.train()
    assert not [record for record in caplog.records if record.name == MODULE]
    assert trainer.left_out() == []


def test_rewards_that_differ_between_prompts_alone_teach_nothing(caplog, tmp_path):
    """Every prompt has its own reward, the same for all its completions."""
    calls = []

    def of_prompt(prompts, **_):
        calls.append(1)
        return [float(len(set(prompts[:i]))) for i in range(1, len(prompts) + 1)]

    options = {"per_device_train_batch_size": 8, "max_steps": EQUAL_ROLLOUTS}
    of_text(of_prompt, tmp_path / "group", **options).train()
    [message] = warned(caplog, "all rewards were equal")
    assert "in each prompt's group, from 1 to 2" in message


def test_mapo_compares_the_prompts_of_a_tag_with_each_other(caplog, tmp_path):
    """
    Where a prompt's completions are held against the rollout, the same rewards do teach something.

    The scope `tag` takes the deviation of the tag, but the mean of the prompt.
    """

    def of_row(id, **_):
        return [float(one == id[0]) for one in id]

    found = {}
    for scope in ("group", "tag", "batch"):
        model, processor = build_tiny("qwen2_5_omni")
        options = DEFAULTS | SMALL | {"per_device_train_batch_size": 8, "max_steps": ZERO_GRADIENTS}
        rows = Dataset.from_list([question(subtitle=f"word {i}", id=str(i)) for i in range(8)])
        args = MAPOConfig(str(tmp_path / scope), advantage_scope=scope, **options)
        trainer = MAPOTrainer(model, of_row, args, rows, processing_class=processor)
        trainer.train()
        found[scope] = {note["kind"] for note in trainer.left_out()}
    assert {"equal_rewards", "zero_gradient"} <= found["group"] & found["tag"]
    assert not {"equal_rewards", "zero_gradient"} & found["batch"]


def test_avatar_compares_a_prompts_completions_with_each_other_and_replayed_ones_with_their_baselines(tmp_path):
    """Not those of two prompts, of which each has its own reward, the same for all that it is answered."""

    def of_row(id, **_):
        return [float(int(one) % 2) for one in id]

    def learnt_at_first(id, trainer_state, **_):
        """Replayed completions alone earned something else."""
        return [float(trainer_state.global_step == 0)] * len(id)

    found = {}
    for reward, alpha in ((of_row, 1.0), (learnt_at_first, 1.0), (learnt_at_first, 0.0)):
        model, processor = build_tiny("qwen2_5_omni")
        options = DEFAULTS | SMALL | {"per_device_train_batch_size": 8, "max_steps": 3}
        options |= {"num_generations": 4, "replayed_generations": 2, "replay_alpha": alpha}
        rows = Dataset.from_list([question(subtitle=f"word {i}", id=str(i)) for i in range(2)])
        args = AvatarConfig(str(tmp_path / f"{reward.__name__}{alpha}"), **options)
        trainer = AvatarTrainer(model, reward, args, rows, processing_class=processor)
        trainer.train()
        found[reward, alpha] = trainer.tally.checks.equal_rewards.count
    assert found == {(of_row, 1.0): 3, (learnt_at_first, 1.0): 1, (learnt_at_first, 0.0): 3}


@pytest.mark.parametrize(
    ("dropout", "options", "said"),
    [(0.05, {"num_iterations": 2}, "num_iterations above 1"), (0.05, {"beta": 0.1}, "beta above 0"), (0.05, {}, None)]
    + [(0.0, {"num_iterations": 2}, None)],
)
@pytest.mark.matrix(cases=4)
def test_dropout_is_warned_of_where_its_noise_is_taken_for_a_ratio(dropout, options, said, caplog, tmp_path):
    """On-policy a ratio is one whatever the mask."""
    lora = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj"], task_type="CAUSAL_LM")
    of_text(varied, tmp_path, peft_config=lora, **options)
    found = [record.message for record in caplog.records if "dropout layer(s)" in record.message]
    assert len(found) == (said is not None) and (said is None or f"random, which {said} compare(s)" in found[0])


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6))
def test_a_streak_is_what_counting_by_hand_finds(happened, limit):
    streak = Streak(limit)
    due = [streak.observe(value) for value in happened]
    runs = "".join("x" if value else " " for value in happened).split()
    assert streak.count == sum(happened) and streak.seen == len(happened)
    assert streak.longest == max(map(len, runs), default=0)
    first = next((i for i in range(limit, len(happened) + 1) if all(happened[i - limit : i])), None)
    assert [i + 1 for i, value in enumerate(due) if value] == ([] if first is None else [first])


def test_other_ranks_count_but_do_not_speak(caplog):
    import torch

    checks = LearningChecks(speaks=False)
    for step in range(1, EQUAL_ROLLOUTS + 2):
        checks.note_rewards(torch.zeros(2, 4))
        checks.end_rollout(step, FACTS)
        checks.note_gradient(0.0, step)
    assert checks.equal_rewards.warned and checks.zero_gradients.count == EQUAL_ROLLOUTS + 1
    assert not caplog.records
    again = LearningChecks()
    again.load_state_dict(checks.state_dict())
    assert again.state_dict() == checks.state_dict()


# What never fired


def test_replay_and_hints_that_never_fire_are_named(tmp_path):
    """
    Eight prompts in two steps are met once: none has completions of its own to replay, and nobody is stuck. The second
    step can replay by tier what the first one stored, unless no completion has a reward.
    """
    rows = Dataset.from_list([question(subtitle=f"word {i}", hint="it is word") for i in range(8)])
    options = DEFAULTS | SMALL | {"per_device_train_batch_size": 8}
    options |= {"replayed_generations": 2, "hints": True, "output_dir": str(tmp_path)}

    def run(reward=varied, **more):
        model, processor = build_tiny("qwen2_5_omni")
        args = AvatarConfig(**(options | more))
        trainer = AvatarTrainer(model, reward, args, rows, processing_class=processor)
        trainer.train()
        return {note["kind"]: note["text"] for note in trainer.left_out()}

    never = "replay never fired: nothing was replayed in 2 rollouts, with "
    for scope, batching, reward, stored, since in (
        ("prompt", "mixed", varied, 16, "a prompt's are replayed from its second visit on"),
        ("tiers", "mixed", nothing, 0, "a rollout replays what earlier ones stored"),
        ("tiers", "stratified", nothing, 0, "a rollout replays what earlier ones of its tags stored"),
    ):
        notes = run(reward, max_steps=2, replay_scope=scope, batching=batching)
        assert notes["replay_never_fired"] == f"{never}{stored} completions in the buffer ({since})"
        assert notes["hints_never_fired"].startswith(
            "hints never fired: no prompt was shown with its hint in 2 rollouts"
        )
    # The controls: a prompt's second visit replays, and by tier, the default, the second rollout does.
    assert "replay_never_fired" not in run(max_steps=6, num_train_epochs=3, replay_scope="prompt")
    notes = run(max_steps=2)
    assert "replay_never_fired" not in notes and "hints_never_fired" in notes


def test_a_reward_is_not_missed_on_rows_that_it_is_not_for(tmp_path):
    """`for_tags` leaves rows of other tags out on purpose; a reward that fails on its own rows is counted."""

    def fails_on_half(completions, **_):
        return [None if i % 2 else 1.0 * i for i in range(len(completions))]

    rows = Dataset.from_list([question(subtitle=f"word {i}", tag="S" if i % 2 else None) for i in range(8)])
    trainer = build_trainer(
        tmp_path,
        rows,
        reward=[for_tags(varied, ["S"], name="routed"), for_tags(fails_on_half, ["S"], name="half"), varied],
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        **(SMALL | {"per_device_train_batch_size": 8}),
    )
    trainer.train()
    asked = trainer.tally.rewards
    assert asked["varied"] == 16 and 0 < asked["routed"] == asked["half"] < 16
    notes = [note for note in trainer.left_out() if note["kind"] == "unrewarded"]
    assert [(note["name"], note["count"]) for note in notes] == [("half", asked["half"] // 2)]


def test_prompts_that_are_not_shared_and_rows_that_no_batch_had_are_named(tmp_path):
    """Two prompts a rollout of five rows: one is left over in each epoch. Eager attention takes no packed rows."""
    notes = {}
    for attention in ("eager", "sdpa"):
        model, processor = build_tiny("qwen2_5_omni")
        model.set_attn_implementation(attention)
        rows = ROWS.select(range(5 if attention == "eager" else 4))
        options = {
            "num_train_epochs": 1,
            "max_steps": -1,
            "shared_prefix": "auto",
            "output_dir": str(tmp_path / attention),
        }
        given = {"model": model, "processing_class": processor, "reward": varied}
        trainer = build_trainer(tmp_path, rows, **given, **options)
        trainer.train()
        notes[attention] = {note["kind"]: note["text"] for note in trainer.left_out()}
    assert notes["eager"]["prompts_not_shared"].startswith(
        "prompts were not shared by their completions: the language"
    )
    assert notes["eager"]["unseen_rows"] == "train_dataset: 1 of 5 usable rows were in no batch"
    assert notes["sdpa"] == {}


def test_rows_that_are_fed_less_and_groups_that_are_dropped_are_named(tmp_path):
    from media_files import tone, write_video

    write_video(tmp_path / "silent.mp4", frames=12)
    write_video(tmp_path / "heard.mp4", frames=12, audio=tone(0.5, 16000))

    def run(clip, reward):
        rows = Dataset.from_list([question(video=clip, tag="VA", id=str(i)) for i in range(2)])
        model, processor = build_tiny("qwen2_5_omni")
        folders = {"output_dir": str(tmp_path / reward.__name__), "media_root": str(tmp_path)}
        args = MAPOConfig(**(DEFAULTS | SMALL | folders | {"dynamic_sampling": "early"}))
        trainer = MAPOTrainer(model, reward, args, rows, processing_class=processor)
        trainer.train()
        return {note["kind"]: note["text"] for note in trainer.left_out()}

    notes = run("silent.mp4", constant)
    assert notes["rows_without_audio_track"] == "4 times a row was asked for sound that its video does not have"
    assert notes["dropped_groups"] == "1 group without a difference between rewards dropped (dynamic_sampling)"
    assert notes["zero_gradient"] == "1 of 1 step without an update (gradient 0)"
    assert run("heard.mp4", varied) == {}


# Runs without a step


def test_a_run_without_a_step_is_an_error(tmp_path):
    empty = IterableDataset.from_generator(lambda: iter([]))
    model, processor = build_tiny("qwen2_5_omni")
    trainer = build_trainer(
        tmp_path, empty, model=model, processing_class=processor, output_dir=str(tmp_path / "run"), max_steps=3
    )
    with pytest.raises(NoStepError, match=r"ended without an optimizer step: .*stream.*max_steps=3"):
        trainer.train()


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING)
