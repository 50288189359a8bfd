"""A register of claims that is small enough for tests, with a task of its own, and results written without training."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import yaml


CLAIMS = Path(__file__).resolve().parents[1] / "benchmarks" / "claims"
sys.path.insert(0, str(CLAIMS))

TASK = '''
"""Two questions of each tag, and the embedded model as it is."""

from datasets import Dataset

from maple_trl.rewards import accuracy_reward

VERSION = 3
ACCESSES = ("required",)
QUESTIONS, SAMPLES = 1, 2


def prepare(folder):
    from maple_trl.data.synthetic import write_seven_tags

    write_seven_tags(folder, prompts_per_tag=2, seed=0)


def options(trainer):
    return {
        "model_name_or_path": "builtin:tiny-omni",
        "dataset_name": "{folder}",
        "media_root": "{folder}",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "steps_per_generation": 1,
    }


def held_out(folder):
    return Dataset.from_parquet(str(folder / "test.parquet"), keep_in_memory=True)


def score(**columns):
    return accuracy_reward(**columns)
'''
TOPIC = {
    "variants": {
        "new": {"task": "probe", "recipe": "tiny/mapo_token", "instruments": ["curve"]},
        "old": {"task": "probe", "recipe": "tiny/mupo", "instruments": ["curve"], "options": {"learning_rate": 1e-3}},
    },
    "claims": {
        "better": {
            "number": 2,
            "paper": "MAPLE",
            "source": "Table 1",
            "says": "The new one answers more rightly.",
            "figure": "+3",
            "here": "The same on a tiny model.",
            "measures": {
                "accuracy": {
                    "metric": "after.trained.accuracy.all",
                    "of": "new",
                    "against": "old",
                    "expects": "above",
                    "least": 0.03,
                },
                "seconds": {
                    "metric": "cost.cpu_seconds",
                    "of": "new",
                    "against": "old",
                    "as": "ratio",
                    "expects": "equal",
                    "least": 0.1,
                    "role": "control",
                },
            },
        },
        "sooner": {
            "number": 1,
            "paper": "AVATAR",
            "source": "Fig. 5",
            "says": "The new one is there sooner.",
            "figure": "-80 %",
            "here": "The same on a tiny model.",
            "measures": {
                "completions": {
                    "metric": "reached(all, 0.6, completions)",
                    "of": "new",
                    "against": "old",
                    "as": "ratio",
                    "expects": "below",
                    "least": 0.2,
                }
            },
        },
    },
}


def command():
    """`main` of `python benchmarks/claims`, in this process."""
    named = importlib.util.spec_from_file_location("claims_command", CLAIMS / "__main__.py")
    module = importlib.util.module_from_spec(named)
    named.loader.exec_module(module)
    return module.main


def write_register(folder: Path, change=None) -> Path:
    """Writes the register; `change` may edit what the topic's file holds."""
    (folder / "register").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "probe.py").write_text(TASK)
    rules = (CLAIMS / "register.yaml").read_text().partition("changes:")[0]
    (folder / "register.yaml").write_text(f"{rules}changes: []\n")
    topic = json.loads(json.dumps(TOPIC))
    if change is not None:
        change(topic)
    (folder / "register" / "topic.yaml").write_text(yaml.safe_dump(topic, sort_keys=False))
    return folder


def known_tasks(folder: Path) -> None:
    from tasks import use_folders

    use_folders(folder / "tasks")


QUESTIONS = 140
"""Of a made-up result."""


def write_results(evidence, variant: str, accuracy: dict[int, float], **told) -> None:
    """
    Writes what runs of a variant could have left, with accuracies by seed.

    Args:
        told: `seconds` and `reached` by seed, the latter `None` where the target was not.
    """
    from runs import questions_file, write_result
    from scores import encoded_scores, rounded

    tags = "V A S VA VS AS VAS".split()
    for seed, share in accuracy.items():
        run, file = evidence.run(variant, seed)
        right = round(share * QUESTIONS)
        draw = random.Random(f"{seed}")  # the same questions first, of every variant
        order = draw.sample(range(QUESTIONS), QUESTIONS)
        scores = [5.0 if place < right else 0.0 for place in order]
        exam = {"accuracy": {"all": right / QUESTIONS}, "samples": 5, "error": 0.01} | encoded_scores(scores, 5)
        spent = told.get("reached", {}).get(seed, 300)
        points = [(at, 0.7 if spent is not None and at >= spent else 0.5) for at in range(0, 1001, 50)]
        result = run.identity() | {
            "recipe": run.recipe,
            "options": dict(run.options),
            "seed": seed,
            "packages": {},
            "minutes": 1.5,
            "after": {"trained": exam, "required": exam},
            "cost": dict.fromkeys(("cpu_seconds", "wall_seconds"), told.get("seconds", {}).get(seed, 50.0)),
            "log": {"entropy": [0.5, None, 0.25, 0.25]},
            "curve": {"points": [{"completions": at, "accuracy": {"all": one}} for at, one in points]},
        }
        write_result(file, rounded(result))
        questions = {
            "ids": [f"q{number}" for number in range(QUESTIONS)],
            "tags": [tags[number % 7] for number in range(QUESTIONS)],
            "clips": [number // 2 for number in range(QUESTIONS)],
        }
        write_result(questions_file(file, result), questions)
