"""
`vote_job.py OUT NAME ...`: trainings on scripted answers, of these names, alone or as one of several ranks.

Each rank writes `OUT/RANK.json`: by run the scores of each rollout, one list per reward function, and what the completions
table has been told beside them.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset


sys.path.append(str(Path(__file__).parents[1]))

from omni_runs import DEFAULTS  # noqa: E402
from tiny_models import build_tiny, build_tiny_text  # noqa: E402

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer  # noqa: E402
from maple_trl.rewards import for_tags, self_consistency_reward  # noqa: E402
from maple_trl.trainers.omni_grpo.whole_groups import WholeGroups  # noqa: E402


async def later(completions, group_ids=None, log_extra=None, **columns):
    """Votes as well, after it has said how many of its row are told to it."""
    told = [columns["number"].count(number) for number in columns["number"]]
    log_extra("told", told)
    return self_consistency_reward(completions=completions, group_ids=group_ids, **columns)


def alone(completions, **columns):
    """Compares nothing: how many completions it is called with."""
    return [float(len(completions))] * len(completions)


class Scripted:
    """Answers by their places among those of all ranks, over and over, and notes the scores."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        counts = gather_object([len(prompt_ids)])
        first = sum(counts[: self.accelerator.process_index])
        texts = [self.answers[place % len(self.answers)] for place in range(first, first + len(prompt_ids))]
        return [self._tokenizer(f"<answer>{text}</answer>")["input_ids"] for text in texts], None

    def _calculate_rewards(self, *args, **kwargs):
        again = self._flight.scores is not None
        scores = super()._calculate_rewards(*args, **kwargs)
        self.noted = getattr(self, "noted", []) + [scores.T.tolist()] * (not again)
        return scores


class Omni(Scripted, OmniGRPOTrainer):
    pass


class MAPO(Scripted, MAPOTrainer):
    pass


class Avatar(Scripted, AvatarTrainer):
    pass


KINDS = {
    "omni": (Omni, OmniGRPOConfig),
    "mapo": (MAPO, MAPOConfig),
    "avatar": (Avatar, AvatarConfig),
    "text": (Omni, OmniGRPOConfig),
}
# Rows of a rollout, their answers by place, and options.
RUNS = {
    "omni": (8, "AAAABBCD", {}),
    # The second of three prompts lies on both ranks. In two groups the model's own confidence decides.
    "omni-spread": (12, "ABABCCAABDCE", {"num_generations": 4}),
    "mapo-early": (8, "AAAABBCD", {"dynamic_sampling": "early"}),
    # Four are replayed from the second visit on.
    "avatar": (8, "AABCBAAA", {"replayed_generations": 4, "replay_scope": "prompt", "max_steps": 3}),
    "text": (8, "AAAABBCD", {}),
}


def train(name: str, out: Path, world: int) -> dict:
    kind = name.partition("-")[0]
    trainer_class, config_class = KINDS[kind]
    rows_of_rollout, answers, options = RUNS[name]
    sizes = {"per_device_train_batch_size": rows_of_rollout // world, "gradient_accumulation_steps": 1}
    options = DEFAULTS | {"num_generations": 8, "max_completion_length": 24, "learning_rate": 0.0} | sizes | options
    prompts = rows_of_rollout // options["num_generations"]
    if kind == "text":
        model, processor = build_tiny_text()
        rows, routed = [{"prompt": f"word {i}", "number": i} for i in range(prompts)], self_consistency_reward
    else:
        model, processor = build_tiny("qwen2_5_omni")
        question = {"prompt": [{"role": "user", "content": "which word"}], "tag": "S", "solution": "A"}
        rows = [question | {"subtitle": f"word {i}", "number": i} for i in range(prompts)]
        routed = for_tags(self_consistency_reward, ["S"])
    args = config_class(str(out / name), **options)
    rewards = [self_consistency_reward, routed, later, alone]
    trainer = trainer_class(model, rewards, args, Dataset.from_list(rows), processing_class=processor)
    trainer.answers = answers
    trainer.train()
    return {"scores": trainer.noted, "told": list(trainer._logs["extra"]["told"])}


def uneven(rank: int, world: int) -> dict:
    """Three rows of one rank and one of the other, of two groups: what each is told, and which are its own."""
    held = [[("a", 0), ("b", 1), ("b", 2)], [("b", 3)]] if world == 2 else [[("a", 0)]]
    rows = [{"number": number, "video": f"{group}.mp4"} for group, number in held[rank]]
    found = {}
    for name, keys in (("keys", [group for group, _ in held[rank]]), ("no keys", None)):
        groups = WholeGroups.gathered(rows, keys, rank)
        found[name] = [[[row["number"], row["video"]] for row in groups.rows], groups.own]
    return found


def main() -> None:
    out, state = Path(sys.argv[1]), PartialState(cpu=True)
    found = {name: train(name, out, state.num_processes) for name in sys.argv[2:]}
    found["uneven"] = uneven(state.process_index, state.num_processes)
    (out / f"{state.process_index}.json").write_text(json.dumps(found))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
