"""An engine of somebody's own: an object with `sample` and `failed`, in the place of the trainer's."""

import pytest
from omni_runs import build_config, spread_reward
from tiny_models import build_tiny

from maple_trl import OmniGRPOTrainer


pytestmark = pytest.mark.slow


class Scripted:
    """Answers each row with tokens that tell its place, and fails on the rows that it is told to."""

    def __init__(self, fails=()):
        self.failed, self.asked = {}, []
        self.fails = fails

    def sample(self, turn, prompt_ids, prompts):
        self.asked.append([str(prompt.tag) for prompt in prompts])
        self.failed = dict.fromkeys(self.fails, "it was told to")
        return [[40 + row, 50, 60] for row in range(len(prompt_ids))], None


@pytest.mark.parametrize("fails", [(), (1,)])
def test_it_samples_for_a_trainer(fails, seven_tags, tmp_path):
    folder, dataset = seven_tags
    seen = []

    def reward(completion_ids, completions, **kwargs):
        seen.extend(completion_ids)
        return spread_reward(completions)

    model, processor = build_tiny("qwen2_5_omni")
    trainer = OmniGRPOTrainer(
        model,
        reward,
        args=build_config(folder, output_dir=str(tmp_path), max_steps=1, max_quarantined_share=1.0),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.engine = Scripted(fails)
    trainer.train()
    assert trainer.engine.asked and [ids[0] for ids in seen] == [40 + row for row in range(len(seen))]
    assert sum(trainer.unscorable_completions.values()) == len(fails)
    assert [note["kind"] for note in trainer.left_out()].count("quarantined") == len(fails)
