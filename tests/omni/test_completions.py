"""Thoughts stand between `<think>` and `</think>` in every text of a completion, however a model marks them itself."""

import copy
import re
from pathlib import Path

import pytest
from omni_runs import build_trainer
from tiny_models import build_tiny
from trl.chat_template_utils import gemma4_template

import maple_trl
from maple_trl.evaluation.evaluator import EvalOptions, Evaluator
from maple_trl.omni.completions import completion_texts
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.rewards.answers import extract_answer, extract_bracketed


# As Gemma 4 writes it: both marks are special tokens.
SAID = "<|channel>thought\nPerhaps [A].<channel|><answer>B</answer><turn|>"
READ = "<think>Perhaps [A].</think><answer>B</answer>"
ROW = {"prompt": [{"role": "user", "content": "Which?"}], "solution": "B"}


def tokens(family, text):
    return family.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def gemma():
    return family_for(*build_tiny("gemma4"))


@pytest.mark.parametrize(
    "said, read",
    [
        (SAID, READ),
        ("<answer>B</answer><turn|>", "<answer>B</answer>"),
        ("<|channel>thought\nPerhaps <answer>A</answer>", "<think>Perhaps <answer>A</answer>"),  # cut at the limit
        ("<|channel>thought", "<think>"),
        ("<|channel>thought\n<channel|>B<turn|>", "B"),  # told not to think
        ("<|channel>thoughts\nx<channel|>B", "<think>thoughts\nx</think>B"),
        ("so <channel|>B", "so </think>B"),
        ("", ""),
    ],
)
def test_special_tokens_around_thoughts_become_marks(gemma, said, read):
    before = tokens(gemma, "<|turn>model\n")
    texts = completion_texts(gemma, [tokens(gemma, "C"), tokens(gemma, said)], [before, before])
    assert texts == ["C", read] and completion_texts(gemma, [], []) == []


def test_readers_tell_the_answer_from_the_draft(gemma):
    def both_ways(said):
        """The text, and the control: what a tokenizer makes of it."""
        ids = tokens(gemma, said)
        return *completion_texts(gemma, [ids], [[]]), gemma.tokenizer.decode(ids, skip_special_tokens=True)

    assert [format_reward(completions=[text]) for text in both_ways(SAID)] == [[1.0], [0.0]]
    drafted = "<|channel>thought\nIt may be [A].<channel|>It is [B].<turn|>"
    assert [extract_bracketed(text) for text in both_ways(drafted)] == ["B", None]
    cut = "<|channel>thought\nPerhaps <answer>A</answer>, but"
    assert [extract_answer(text) for text in both_ways(cut)] == [None, "A"]


@pytest.mark.parametrize(
    "ending, begun",
    [("<think>\n", "<think>"), ("<think>", "<think>"), ("<think>\n\n</think>\n\n", ""), ("\n", "")],
)
def test_thoughts_that_the_template_begins_begin_in_the_text(ending, begun):
    """As templates of models named Thinking do."""
    family = family_for(*build_tiny("qwen3_vl"))
    said, prompt = "It is red.</think><answer>B</answer>", tokens(family, f"What?<|im_start|>assistant\n{ending}")
    (text,) = completion_texts(family, [tokens(family, said)], [prompt])
    assert text == begun + said and format_reward(completions=[text]) == [float(bool(begun))]


def test_evaluations_read_them(gemma, tmp_path):
    model, _ = build_tiny("gemma4")
    options = EvalOptions(samples=1, temperature=0.0)
    with MediaLoader(tmp_path, backend="pyav", workers=0) as loader:
        builder = PromptBuilder(gemma, loader, chat_template_kwargs={"enable_thinking": True})
        evaluator = Evaluator(model, builder, [ROW], accuracy_reward, extract_answer, options)
        evaluator._generate = lambda prompts, names: ([tokens(gemma, SAID)], [False])
        (line,) = evaluator.run(evaluator.batches[0])
    assert (line["completion"], line["answer"], line["score"], line["finish"]) == (READ, "B", 1.0, "end")


class Scripted:
    """Answers each row with the same tokens."""

    failed = {}

    def __init__(self, ids):
        self.ids = ids

    def sample(self, turn, prompt_ids, prompts):
        return [list(self.ids) for _ in prompt_ids], None


def test_rewards_read_them_whatever_trl_makes_of_a_tokenizer(gemma, tmp_path):
    """Of one with a template of responses, as newer checkpoints have it, TRL hands over the answer alone."""
    from datasets import Dataset

    model, processor = build_tiny("gemma4")
    processor.tokenizer.response_template = copy.deepcopy(gemma4_template)
    seen = []

    def reward(completions, **columns):
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(place) for place in range(len(completions))]

    given = {"model": model, "processing_class": processor, "chat_template_kwargs": {"enable_thinking": True}}
    given |= {"gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.0}
    trainer = build_trainer(tmp_path, Dataset.from_list([ROW]), reward=reward, output_dir=str(tmp_path), **given)
    trainer.engine = Scripted(tokens(gemma, SAID))
    trainer.train()
    assert seen == [READ] * 4
    assert [completion[0]["content"] for completion in trainer._logs["completion"]] == [READ] * 4
    assert trainer.generate_completions([ROW]) == [READ]


def test_completions_become_texts_in_one_place():
    """What skips special tokens elsewhere loses the marks; only of text-only models, which have no family, may that be."""
    package = Path(maple_trl.__file__).parent
    places = {str(path.relative_to(package)) for path in package.rglob("*.py") if "skip_special" in path.read_text()}
    making_the_tiny_model = "data/tiny_omni.py"
    assert places - {making_the_tiny_model} == {"omni/completions.py", "trainers/common/rollout_log.py"}
    assert len(re.findall("skip_special", (package / "trainers/common/rollout_log.py").read_text())) == 1
