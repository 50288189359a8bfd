"""What an installed package adds: one small file and one entry point each, used by the commands and in Python."""

import json
import os
import random
import sys

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from eval_runs import MODEL, evaluate, lines_of, result_of
from tiny_models import build_tiny

from maple_trl import Registry, cli
from maple_trl.algorithms import TagCurriculum, register_curriculum, register_scope
from maple_trl.algorithms.advantages import SCOPES, group_advantages, lifts_equal_rewards
from maple_trl.algorithms.curriculum import CURRICULA
from maple_trl.cli.command import COMMANDS
from maple_trl.data.benchmarks import BENCHMARKS, read_benchmark
from maple_trl.data.converters import CONVERTERS
from maple_trl.evaluation import EvalOptions
from maple_trl.evaluation.served_prompts import MessageEncoder
from maple_trl.omni.families import base, family_for
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.rewards import REWARDS, accuracy_reward, extract_answer
from maple_trl.rewards.calls import find_rewards
from maple_trl.trainers.avatar.checks import check_tags
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.mapo.config import MAPOConfig


REGISTRIES = (REWARDS, SCOPES, CURRICULA, base._FAMILIES, BENCHMARKS, CONVERTERS, COMMANDS)

FILES = {
    "reward": """
def brevity(completions, **columns):
    return [1 / (1 + len(completion[0]["content"])) for completion in completions]
""",
    "scope": '''
def above_mean(rewards, prompts, tags, eps):
    """1 above the mean of its prompt, -1 below."""
    same = (prompts[:, None] == prompts).double()
    return (rewards - same @ rewards / same.sum(1)).sign()
''',
    "curriculum": """
seen = []

def words_first(tags, priorities, zero_shot, rng):
    seen.append(dict(priorities))
    return sorted(tags, key=lambda tag: "S" not in tag)
""",
    "family": """
from maple_trl.omni.families.qwen2_5_omni import Qwen2_5OmniFamily

class ForkFamily(Qwen2_5OmniFamily):
    model_types = ("my_branch",)
""",
    "benchmark": """
from maple_trl.data.benchmarks.base import Benchmark, Medium, Question
from maple_trl.modalities import ModalityTag

def read(record):
    return Question(record.text("riddle"), record.text("word"), "text", subtitle=Medium((record.path("file"),)))

riddles = Benchmark(
    "riddles", "Riddles", read, required=("riddle", "word", "file"), tables=("{split}.jsonl",), splits=("test",),
    hub="me/riddles", tag=ModalityTag.S, media="subtitles beside the table",
)
""",
    "converter": """
from maple_trl.data.converters import Converter, Sample

def read(record, place):
    yield Sample(clip=record.text("word"), question=record.text("riddle"), solution=record.text("word"), kind="text", text="Hm.")

words = Converter("words", "Words", "Riddles", read, (("*.jsonl", "test"),), media="none", hub="me/riddles")
""",
    "engine": '''
import re
from maple_trl.evaluation.base import Answer, BaseEvaluator

class Parrot(BaseEvaluator):
    """Says what the subtitles say."""

    generation = {}

    def _answers(self, prompts, batch):
        words = {number: re.search("it is a ([a-z]+)", str(prompt.messages))[1] for number, prompt in prompts.items()}
        return {n: [Answer(f"<answer>{w}</answer>", "end", 1, None)] * self.options.samples for n, w in words.items()}

    def _read(self, prompt):
        return {"notes": list(prompt.notes), "inputs": prompt.digest}
''',
    "command": """
def greet(words):
    print("hello", *words)
    return 3
""",
    "broken": "raise OSError('no such library')\n",
    "number": "seven = 7\n",
}
ENTRIES = """
[maple_trl.rewards]
brevity = more_maple.reward:brevity
[maple_trl.scopes]
above_mean = more_maple.scope:above_mean
broken = more_maple.broken:scope
seven = more_maple.number:seven
tag = more_maple.scope:above_mean
[maple_trl.curricula]
words_first = more_maple.curriculum:words_first
[maple_trl.families]
my_branch = more_maple.family:ForkFamily
[maple_trl.benchmarks]
riddles = more_maple.benchmark:riddles
[maple_trl.converters]
words = more_maple.converter:words
[maple_trl.commands]
greet = more_maple.command:greet
"""
JOB = """
trainer: mapo
model_name_or_path: builtin:tiny-omni
dataset_name: builtin:seven-tags
dataset_filter: {tag: [S, A]}
reward_funcs: [brevity]
advantage_scope: above_mean
curriculum: words_first
use_cpu: true
dtype: float32
bf16: false
gradient_checkpointing: false
report_to: none
disable_tqdm: true
num_generations: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
max_completion_length: 6
max_steps: 3
save_strategy: "no"
"""


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    return ["train", "--config", str(tmp_path / "job.yaml"), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as `pip install` leaves it; nothing of it stays."""
    site = tmp_path / "site"
    for name, text in {"__init__": "", **FILES}.items():
        (site / "more_maple").mkdir(parents=True, exist_ok=True)
        (site / "more_maple" / f"{name}.py").write_text(text)
    (site / "more_maple-1.dist-info").mkdir()
    (site / "more_maple-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: more-maple\nVersion: 1\n")
    (site / "more_maple-1.dist-info" / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(site))
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_found", dict(registry._found))
    yield site
    for name in [name for name in sys.modules if name.split(".")[0] == "more_maple"]:
        del sys.modules[name]


@pytest.fixture
def riddles(tmp_path):
    folder = tmp_path / "riddles"
    folder.mkdir()
    (folder / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nit is a maple\n")
    rows = [{"riddle": "What is it?", "word": word, "file": "a.srt"} for word in ("maple", "oak")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def told(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_job_trains_with_the_reward_scope_and_curriculum(package, job, tmp_path):
    assert cli.main(job) == 0
    lines = [
        line for file in sorted((tmp_path / "run" / "rollouts").iterdir()) for line in pq.read_table(file).to_pylist()
    ]
    assert len(lines) == 24
    groups = {}
    for line in lines:
        groups.setdefault((line["rollout"], line["group"]), []).append(line)
        assert line["reward"] == pytest.approx(dict(line["rewards"])["brevity"])
    for group in groups.values():
        mean = sum(line["reward"] for line in group) / len(group)
        for line in group:
            offset = line["reward"] - mean
            assert line["advantage"] == (0 if abs(offset) < 1e-9 else 1 if offset > 0 else -1)
    assert {line["advantage"] for line in lines} >= {1, -1}
    # Rounds of a batch per tag: the tag with subtitles first, where `static` and `adaptive` begin with A.
    tags = [{line["tag"] for line in lines if line["rollout"] == i} for i in range(3)]
    assert tags == [{"S"}, {"A"}, {"S"}]
    seen = sys.modules["more_maple.curriculum"].seen
    assert {} in seen and {"S", "A"} in [set(priorities) for priorities in seen]


def test_an_evaluation_asks_the_benchmark_and_scores_with_the_reward(package, riddles, tmp_path):
    words = ["--benchmark", "riddles", "--data", riddles, "--output", tmp_path / "out", "--samples", 2]
    assert evaluate(*MODEL, *words, "--reward_funcs", "brevity", "--device", "cpu", "--quiet") == 0
    lines = lines_of(tmp_path / "out")
    assert [line["score"] for line in lines] == pytest.approx([1 / (1 + len(line["completion"])) for line in lines])
    assert len(lines) == 4 and result_of(tmp_path / "out")["data"]["benchmark"] == "riddles"


def test_the_converter_makes_rows(package, riddles, tmp_path, capsys):
    assert cli.main(["data", "convert", "words", str(riddles), str(tmp_path / "rows"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"test": 2}
    assert cli.main(["data", "convert", "word", str(riddles), str(tmp_path / "more")]) == 2
    assert "Unknown converter 'word'" in told(capsys)


def test_an_engine_answers_the_benchmark(package, riddles):
    from more_maple.engine import Parrot

    found = read_benchmark("riddles", riddles)
    with MediaLoader(found.media_root, MediaLimits()) as loader:
        builder = PromptBuilder(MessageEncoder(), loader)
        engine = Parrot(builder, found.dataset.to_list(), accuracy_reward, extract_answer, EvalOptions(samples=2))
        lines = [line for batch in engine.batches for line in engine.run(batch)]
    assert [line["score"] for line in lines] == [1.0, 1.0, 0.0, 0.0]


def test_a_model_has_the_family(package):
    model, processor = build_tiny("qwen2_5_omni")
    model.config.model_type = "my_branch"
    family = family_for(model, processor)
    assert type(family).__name__ == "ForkFamily" and "my_branch" in base.registered_types()


def test_the_command_runs_and_help_imports_nothing_of_the_package(package, capsys):
    assert cli.main(["--help"]) == 0
    assert "greet" in capsys.readouterr().out
    assert not [name for name in sys.modules if name.startswith("more_maple")]
    assert cli.main(["greet", "--loud", "you"]) == 3
    assert capsys.readouterr().out == "hello --loud you\n"


def test_in_python_the_reward_is_known_by_name(package):
    assert [reward.__name__ for reward in find_rewards(["brevity", "accuracy_reward"])] == [
        "brevity",
        "accuracy_reward",
    ]
    assert find_rewards("length_reward") == "length_reward"  # takes parameters


def test_without_the_package_each_name_is_refused_with_those_that_there_are(job, riddles, tmp_path, capsys):
    names = "'group', 'tag', 'tag_whitened', 'batch'"
    assert cli.main(job) == 2
    assert f"advantage_scope must be one of {names}, got 'above_mean'" in told(capsys)
    assert cli.main([*job, "--advantage_scope", "tag"]) == 2
    assert "curriculum must be one of 'none', 'static', 'adaptive', got 'words_first'" in told(capsys)
    assert cli.main([*job, "--advantage_scope", "tag", "--curriculum", "none"]) == 2
    assert "unknown reward 'brevity'; there are accuracy_reward, box_iou_reward, format_reward" in told(capsys)
    assert evaluate(*MODEL, "--benchmark", "riddles", "--data", riddles, "--output", tmp_path / "out") == 2
    assert "there is no benchmark 'riddles'; there are daily-omni, intentbench" in told(capsys)
    assert cli.main(["greet"]) == 2
    assert "there is no command greet" in told(capsys)
    model, processor = build_tiny("qwen2_5_omni")
    model.config.model_type = "my_branch"
    with pytest.raises(ValueError, match="'my_branch'; known: .*qwen2_5_omni_thinker"):
        family_for(model, processor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' of the package more-maple (more_maple.broken:scope) cannot be loaded: OSError: no such"),
        ("seven", "'seven' of the package more-maple (more_maple.number:seven) is none: it is int"),
        ("tag", "'tag' of the package more-maple (more_maple.scope:above_mean): there is another one of this name"),
    ],
)
def test_what_a_package_offers_wrongly_is_told_before_anything_begins(name, message, package, job, capsys):
    assert cli.main([*job, "--advantage_scope", name]) == 2
    assert f"the advantage scope {message}" in told(capsys)


def test_decorators_do_the_same_in_a_script(monkeypatch):
    for registry in (SCOPES, CURRICULA):
        monkeypatch.setattr(registry, "_found", dict(registry._found))

    @register_scope("doubled")
    def doubled(rewards, prompts, tags, eps):
        return 2 * rewards

    @register_scope("short")
    def short(rewards, prompts, tags, eps):
        return rewards[1:]

    @register_curriculum("forgetful")
    def forgetful(tags, priorities, zero_shot, rng):
        return tags[1:]

    rewards = torch.tensor([1.0, torch.nan, 3.0])
    assert group_advantages(rewards, [0, 0, 1], "VVA", "doubled").tolist() == [2.0, 0.0, 6.0]
    with pytest.raises(ValueError, match="'short' must give a finite number for each of 2 completions"):
        group_advantages(rewards, [0, 0, 1], "VVA", "short")
    with pytest.raises(ValueError, match=r"curriculum 'forgetful' must give each of .* once"):
        TagCurriculum("forgetful").order(["V", "A"], random.Random(0))
    with pytest.raises(ValueError, match="the advantage scope 'tag' is there already"):
        register_scope("tag")(doubled)
    assert SCOPES["tag"] is not doubled
    # Whether equal rewards teach is asked of the scope itself.
    assert [lifts_equal_rewards(name) for name in ("group", "tag", "tag_whitened", "batch", "doubled")] == [
        0,
        0,
        1,
        1,
        1,
    ]
    args = MAPOConfig(
        curriculum="forgetful", curriculum_window=3, zero_shot_accuracy={"V": 0.5}, use_cpu=True, bf16=False
    )
    assert args.curriculum_granularity == "cycle"
    with pytest.raises(ValueError, match="'doubled' those have a gradient too"):
        MAPOConfig(advantage_scope="doubled", dynamic_sampling="early", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="row 0: advantage_scope='doubled' needs a field 'tag'"):
        check_tags(
            AvatarConfig(advantage_scope="doubled", use_cpu=True, bf16=False), Dataset.from_list([{"prompt": "a"}])
        )


def test_names_that_two_packages_offer_are_refused(package):
    other = package / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text("[maple_trl.tests]\none = json:loads\n")
    (package / "more_maple-1.dist-info" / "entry_points.txt").write_text("[maple_trl.tests]\none = json:dumps\n")
    registry = Registry("test", "maple_trl.tests")
    with pytest.raises(ValueError, match="test 'one' of the package .*: there is another one of this name"):
        "one" in registry  # noqa: B015


def test_what_is_installed_meanwhile_is_found(package):
    """Metadata are read once for as long as nothing changes."""
    registry = Registry("test", "maple_trl.tests")
    os.utime(package, (1, 1))  # so that what follows is later, whatever the clock of the disk
    assert "two" not in registry and "two" not in list(registry)
    other = package / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "entry_points.txt").write_text("[maple_trl.tests]\ntwo = json:loads\n")
    assert "two" in registry and registry["two"] is json.loads
