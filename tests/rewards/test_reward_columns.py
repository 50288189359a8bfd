"""What the trainer hands to reward functions besides the columns of the rows: groups and log-probabilities."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omni_runs import build_trainer, one_row_per_tag, spread_reward
from programs import Ranks
from tiny_models import build_tiny_text

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.encoded import batch_position_ids
from maple_trl.omni.serving import serve_media
from maple_trl.rewards import for_tags


SEEN = {}


def watching_reward(completions, completion_ids, completion_logprobs, group_ids=None, **columns):
    SEEN.update(ids=completion_ids, logprobs=completion_logprobs, groups=group_ids, prompts=columns["prompts"])
    return spread_reward(completions) if isinstance(completions[0], list) else [float(len(c)) for c in completions]


def plain_reward(completions, **columns):
    SEEN.update(columns=sorted(columns))
    return spread_reward(completions)


def test_log_probs_of_omni_completions_are_those_of_each_row_alone(seven_tags):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset).select(range(4))
    trainer = build_trainer(folder, rows, reward=watching_reward, learning_rate=0.0, temperature=0.7)
    trainer.train()
    model, size = trainer.model.eval(), trainer.num_generations
    assert len(set(SEEN["groups"])) == len(SEEN["ids"]) // size
    assert all(len(set(SEEN["groups"][i : i + size])) == 1 for i in range(0, len(SEEN["groups"]), size))
    prompts = trainer._prompts_by_key(SEEN["groups"])
    moved = 0.0
    for prompt, ids, handed in zip(prompts, SEEN["ids"], SEEN["logprobs"], strict=True):
        whole = torch.cat([prompt.input_ids, torch.tensor(ids)])[None]
        positions = batch_position_ids([prompt], len(prompt), len(ids))
        with torch.no_grad(), serve_media(trainer.family, model, [prompt]):
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), position_ids=positions).logits
        logits = logits[0, len(prompt) - 1 : -1].float()
        for temperature, equal in ((0.7, True), (1.0, False)):
            wanted = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            if equal:
                torch.testing.assert_close(torch.tensor(handed), wanted, rtol=1e-4, atol=1e-5)
            else:
                moved = max(moved, float((torch.tensor(handed) - wanted).abs().max()))
    assert moved > 1e-3


def test_log_probs_of_a_text_model_in_training_and_evaluation(tmp_path):
    model, tokenizer = build_tiny_text()
    rows = Dataset.from_list([{"prompt": "one two"}, {"prompt": "three"}])
    config = OmniGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=5, max_steps=1,
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = OmniGRPOTrainer(model, watching_reward, config, rows, rows, tokenizer)
    trainer.train()
    assert SEEN["groups"] is None
    assert [len(row) for row in SEEN["logprobs"]] == [len(ids) for ids in SEEN["ids"]]
    prompt = tokenizer(SEEN["prompts"][0], add_special_tokens=False)["input_ids"]
    whole = torch.tensor([prompt + SEEN["ids"][0]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(SEEN["ids"][0])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(SEEN["logprobs"][0]), wanted, rtol=1e-4, atol=1e-5)


def test_no_pass_is_made_where_no_reward_asks_for_log_probs(seven_tags, monkeypatch):
    folder, dataset = seven_tags
    trainer = build_trainer(folder, one_row_per_tag(dataset), reward=plain_reward)
    passes = []
    inner = trainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: passes.append(torch.is_grad_enabled()) or inner(*a, **k),
    )
    trainer.train()
    assert passes and all(passes)
    assert "group_ids" in SEEN["columns"] and "completion_logprobs" not in SEEN["columns"]


def test_a_routed_reward_is_handed_what_the_inner_one_names(seven_tags):
    folder, dataset = seven_tags
    SEEN.clear()
    routed = for_tags(watching_reward, ["V", "A", "S", "VA", "VS", "AS", "VAS"])
    build_trainer(folder, one_row_per_tag(dataset), reward=routed).train()
    assert [len(row) for row in SEEN["logprobs"]] == [len(ids) for ids in SEEN["ids"]]


def test_each_reward_is_logged_by_tag(seven_tags):
    folder, dataset = seven_tags
    graded = {}

    def graded_reward(completions, tag, **columns):
        values = [None if t == "S" else v for t, v in zip(tag, spread_reward(completions), strict=True)]
        for t, v in zip(tag, values, strict=True):
            graded.setdefault(t, []).append(v)
        return values

    trainer = build_trainer(folder, one_row_per_tag(dataset), reward=[graded_reward, plain_reward], max_steps=3)
    trainer.args.logging_steps = trainer.state.logging_steps = 3
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry][-1:]
    known = {tag: [v for v in values if v is not None] for tag, values in graded.items()}
    for tag, values in known.items():
        name = f"tag/{tag}/rewards/graded_reward"
        assert (name in entry) == bool(values)
        if values:
            assert abs(entry[name] - sum(values) / len(values)) < 1e-5
    everything = [v for values in known.values() for v in values]
    assert abs(entry["tag/all/rewards/graded_reward"] - sum(everything) / len(everything)) < 1e-5


# Several ranks


RUNS = [
    "avatar",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("omni", "omni-spread", "mapo-early", "text")),
]


@pytest.fixture(scope="module")
def votes(tmp_path_factory, tested):
    """What each rank has found, of one process and of two."""
    names = sorted(tested("test_a_group_votes_as_a_whole_whatever_ranks_hold_it", "name"))
    found = {}
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"votes-{world}")
        job, log = Path(__file__).parents[1] / "jobs" / "vote_job.py", out / "log"
        assert Ranks(world, [job, out, *names], log).wait() == 0, log.read_text()[-6000:]
        found[world] = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_group_votes_as_a_whole_whatever_ranks_hold_it(votes, name):
    (one,), two = (votes[world] for world in (1, 2))
    assert two[0][name] == two[1][name]
    first, second = one[name], two[0][name]
    assert len(first["scores"]) == (3 if name == "avatar" else 1)
    for alone, shared in zip(first["scores"], second["scores"], strict=True):
        assert shared[:3] == alone[:3] and alone[0] == alone[1] == alone[2]
        # A function that compares nothing is called with each rank's own.
        assert shared[3] == [value / 2 for value in alone[3]]
    # What is logged of them is this rank's, once.
    assert first["told"] == second["told"]
    scores = [values[0] for values in first["scores"]]
    if name == "avatar":  # replayed completions keep the scores that they have, and have no vote
        assert scores == [[1, 1, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    elif name == "omni-spread":
        assert first["told"] == [4] * 12
        assert scores[0][:4] in ([1, 0, 1, 0], [0, 1, 0, 1]) and scores[0][4:8] in ([1, 1, 0, 0], [0, 0, 1, 1])
        assert sum(scores[0][8:]) == 1
    else:
        assert scores == [[1, 1, 1, 1, 0, 0, 0, 0]] and first["told"] == [8] * 8


@pytest.mark.slow
def test_ranks_with_unequal_shares_gather_what_they_compare(votes):
    first, second = (rank["uneven"] for rank in votes[2])
    a, *b = [0, "a.mp4"], [1, "b.mp4"], [2, "b.mp4"], [3, "b.mp4"]
    assert first == {"keys": [[a, *b], [0, 1, 2]], "no keys": [[a, *b], [0, 1, 2]]}
    assert second == {"keys": [b, [2]], "no keys": [[a, *b], [3]]}
    assert votes[1][0]["uneven"] == {"keys": [[a], [0]], "no keys": [[a], [0]]}
