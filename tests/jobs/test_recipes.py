"""Recipes hold what the paper's tables say, and config files that build on others are read as they are meant."""

import json
import os
import re
import runpy
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml

from maple_trl import cli, train
from maple_trl.cli.eval import read_job
from maple_trl.data.hint_leaks import leaks_answer
from maple_trl.jobs.data import load_datasets
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import OmniScriptArguments, parse_args, trainer_class


pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
recipe_table = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "recipe_table.py")))
GPUS = 4

FULL = {"loss_aggregation": "sample", "epsilon_high": 0.3, "dynamic_sampling": "early", "curriculum": "static"}
# MAPLE, Tables 1 and 2 (QA) and 3 (Caption): what each row changes, and the paper's accuracy and seconds per step. Behind them what
# sections 5.2 and 5.4, Table 4 and the algorithms add.
QA = {
    "mupo": ({"method": "mupo"}, "58.58", "523.28"),
    "mapo_token": ({}, "58.68", "389.11"),
    "mapo_sample": ({"loss_aggregation": "sample"}, "58.86", "395.03"),
    "asymmetric_clipping": ({"epsilon_high": 0.3}, "58.62", "379.40"),
    "early_filtering": ({"dynamic_sampling": "early"}, "58.00", "197.02"),
    "mid_training": ({"dynamic_sampling": "mid"}, "58.39", "265.13"),
    "curriculum": ({"curriculum": "static"}, "59.05", "424.03"),
    "full_recipe": (FULL, "58.72", "164.72"),
    "adaptive_weights": ({"tag_weights": "adaptive", "num_train_epochs": 5}, "58.98", None),
    "adaptive_curriculum": ({"curriculum": "adaptive", "num_train_epochs": 5}, "59.38", None),
    "adaptive_weights_curriculum": (
        {"tag_weights": "adaptive", "curriculum": "static", "num_train_epochs": 5},
        "59.73",
        None,
    ),
    "best": ({"tag_weights": "adaptive", "curriculum": "adaptive", "num_train_epochs": 5}, "59.82", None),
    "mapo_group": ({"advantage_scope": "group"}, "58.68", "389.11"),
    "mapo_prompt": ({"loss_aggregation": "prompt"},),
    "full_without_aggregation": (FULL | {"loss_aggregation": "token"},),
    "full_without_clipping": (FULL | {"epsilon_high": None},),
    "full_without_filtering": (FULL | {"dynamic_sampling": "none"},),
    "full_without_curriculum": (FULL | {"curriculum": "none"},),
    "algorithm1": ({"batching": "mixed", "loss_strata": "tag"},),
    "curriculum_cycle": ({"curriculum": "static", "curriculum_granularity": "cycle"},),
    "qa_plus": ({}, "76.99"),
}
CAPTION = {
    "mupo": ({"method": "mupo"}, "67.67"),
    "mapo": ({}, "73.88"),
    "adaptive_weights": ({"tag_weights": "adaptive"}, "72.89"),
    "curriculum": ({"curriculum": "static"}, "71.95"),
    "adaptive_curriculum": ({"curriculum": "adaptive"}, "72.07"),
    "adaptive_weights_curriculum": ({"tag_weights": "adaptive", "curriculum": "static"}, "73.47"),
    "best": ({"tag_weights": "adaptive", "curriculum": "adaptive"}, "74.00"),
    "crw": ({}, "18.46"),
}
# Table 7 and section 5.1, without the axes of Tables 1 to 3
SHARED = {
    "bf16": True,
    "gradient_checkpointing": True,
    "max_prompt_length": 8192,
    "max_completion_length": 2048,
    "num_generations": 8,
    "learning_rate": 2e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "max_steps": -1,
    "cast_lm_head_to_fp32": True,
    "num_iterations": 1,
}
AXES = {
    "method": "mapo",
    "loss_aggregation": "token",
    "epsilon": 0.2,
    "epsilon_high": None,
    "dynamic_sampling": "none",
    "curriculum": "none",
    "tag_weights": "none",
    "advantage_scope": "tag",
    "batching": "stratified",
    "loss_strata": "tag",
    "modality_access": "required",
    "curriculum_granularity": "epoch",
}
# What `method: mupo` fills in.
UNAWARE = {"advantage_scope": "group", "batching": "mixed", "loss_strata": "batch", "modality_access": "all"}
# Data, which a row may change, and rewards.
DATA = {"mupo": {"dataset_filter"}, "qa_plus": {"dataset_name"}, "crw": {"reward_funcs"}}
OF_SET = {
    "maple_qa": {"temperature": 0.6, "top_p": 0.95, "difficulty": "binary", "num_train_epochs": 2}
    # 256 prompts a rollout and 32 an update on 4 GPUs: see test_batches_are_those_of_the_paper.
    | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "steps_per_generation": 64},
    "maple_caption": {"temperature": 0.7, "top_p": 0.9, "difficulty": "continuous", "num_train_epochs": 5}
    | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16, "steps_per_generation": 16},
}
PROMPTS = {"maple_qa": "maple-qa", "maple_caption": "maple-caption"}
ROWS = [("maple_qa", name) for name in QA] + [("maple_caption", name) for name in CAPTION]
EVALS = [path.relative_to(RECIPES) for path in sorted(RECIPES.glob("maple_*/eval_*.yaml")) if "base" not in path.name]


def parsed(path, *words):
    return parse_args(["--config", str(path), "--use_cpu", "true", *words])


def values(path):
    """Every value of a job by its name."""
    return {name: value for part in parsed(path) for name, value in vars(part).items() if not name.startswith("_")}


def tiny_of(folder, name):
    return RECIPES / "tiny" / f"{'caption_' if folder == 'maple_caption' else ''}{name}.yaml"


def own_keys(path):
    return set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"extends"}


# What the files hold


def test_every_row_of_the_tables_has_its_recipe_and_a_tiny_variant():
    def files(folder):
        found = {path.name for path in (RECIPES / folder).iterdir()} - {"base.yaml", "eval_base.yaml"}
        return found - {path.name for path in EVALS if path.parts[0] == folder}

    assert files("maple_qa") == {f"{name}.yaml" for name in QA}
    assert files("maple_caption") == {f"{name}.yaml" for name in CAPTION}
    twins = {recipe_table.tiny_of(RECIPES / path).name for path in EVALS}
    assert files("tiny") == {tiny_of(*row).name for row in ROWS} | {BOTH.name} | twins


def test_the_document_lists_every_recipe_with_what_its_file_says():
    text = recipe_table.DOC.read_text(encoding="utf-8")
    written = text.split(recipe_table.BEGIN)[1].split(recipe_table.END)[0].strip()
    assert written == recipe_table.table(), "run python scripts/recipe_table.py"
    rows = written.splitlines()[2:]
    assert len(rows) == len(ROWS) + len(EVALS)
    for link in re.findall(r"\]\(\.\./(recipes/[^)]+)\)", text):
        assert (ROOT / link).is_file(), link


def test_a_first_line_that_does_not_say_what_it_is_of_is_refused(write):
    with pytest.raises(ValueError, match="job.yaml: the first line must be '# MAPLE <what>"):
        recipe_table.read(write("job.yaml", "# MAPLE Table 1\n\nseed: 1"))


@pytest.mark.parametrize("folder, name", ROWS)
def test_a_recipe_has_the_values_of_its_row(folder, name):
    change, *_ = (QA if folder == "maple_qa" else CAPTION)[name]
    script_args, training_args, model_args = parsed(RECIPES / folder / f"{name}.yaml")
    assert type(training_args).__name__ == "MAPOConfig" and script_args.trainer == "mapo"
    expected = SHARED | OF_SET[folder] | AXES | (UNAWARE if change.get("method") == "mupo" else {}) | change
    if expected["curriculum"] == "adaptive":
        expected["curriculum_granularity"] = "cycle"
    expected |= {"revisit": "all", "prompt_template": PROMPTS[folder], "system_prompt": None}
    assert {field: getattr(training_args, field) for field in expected} == expected
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-Omni-3B"
    assert not model_args.use_peft and not model_args.frozen and model_args.dtype == "float32"
    assert training_args.output_dir == f"runs/{folder}/{name}"
    # E.2.4: what a caption is judged by belongs to one choice of signals.
    only = {"tag": ["VAS"]} if (folder, name) == ("maple_caption", "mupo") else None
    assert script_args.dataset_filter == only
    assert script_args.dataset_name == f"data/{folder}" + ("_plus" if name == "qa_plus" else "")
    if folder == "maple_qa":
        assert script_args.reward_funcs == [{"reward": "accuracy_reward", "answer_format": "brackets"}]
    else:
        (judge,) = script_args.reward_funcs
        assert judge["reward"] == "caption_judge" and ("contrastive" in judge) == (name == "crw")


@pytest.mark.parametrize("folder, name", ROWS)
def test_a_recipe_says_which_row_it_is_and_changes_nothing_else(folder, name):
    path = RECIPES / folder / f"{name}.yaml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    change, *figures = (QA if folder == "maple_qa" else CAPTION)[name]
    assert re.match(r"# MAPLE (Tables? [1234]|section 5\.[24]|Algorithm [12])\b", first)
    for figure in figures:
        assert figure is None or figure in first
    assert own_keys(path) <= {*AXES, "num_train_epochs", "output_dir"} | DATA.get(name, set())
    above = own_keys(RECIPES / folder / "full_recipe.yaml") if name.startswith("full_without") else set()
    assert set(change) <= own_keys(path) | above
    if above:
        assert len(own_keys(path) - {"output_dir"}) == 1  # one axis goes back


LAST_TWO = ("gradient_accumulation_steps", "steps_per_generation")


@pytest.mark.parametrize(
    "folder, prompts_per_rollout, updates, prompts_per_update",
    [("maple_qa", 256, 8, 32), ("maple_caption", 64, 1, 64)],
)
def test_batches_are_those_of_the_paper(folder, prompts_per_rollout, updates, prompts_per_update):
    """For the number of processes that the file's comment names; here there is one."""
    path = RECIPES / folder / "base.yaml"
    args = parsed(path)[1]
    assert f"For {GPUS} GPUs" in path.read_text(encoding="utf-8")
    micro_batch = args.per_device_train_batch_size * GPUS
    assert micro_batch * args.steps_per_generation == prompts_per_rollout * args.num_generations
    assert divmod(args.steps_per_generation, args.gradient_accumulation_steps) == (updates, 0)
    assert micro_batch * args.gradient_accumulation_steps == prompts_per_update * args.num_generations
    # Another number of GPUs: "change the last two in proportion".
    for gpus in (1, 2, 8):
        words = [f"--{name}={getattr(args, name) * GPUS // gpus}" for name in LAST_TWO]
        other = parsed(path, *words)[1]
        micro_batch = other.per_device_train_batch_size * gpus
        assert micro_batch * other.steps_per_generation == prompts_per_rollout * other.num_generations
        assert other.steps_per_generation // other.gradient_accumulation_steps == updates


def torn_groups(args):
    """Of a step, on any number of processes: micro-batches that hold some of a prompt's completions and not all."""
    return args.per_device_train_batch_size % args.num_generations


SUPERVISED = {"omni_sft"}
JOBS = [
    path.relative_to(RECIPES)
    for path in sorted(RECIPES.rglob("*.yaml"))
    if path.name not in ("base.yaml", "rl.yaml") and "stages" not in own_keys(path) and "eval_" not in path.name
]


@pytest.mark.parametrize("name", JOBS, ids=str)
@pytest.mark.matrix(cases=33)
def test_a_micro_batch_holds_whole_groups(name):
    """Else a prompt passes once for each micro-batch that has some of its completions; supervised ones have no groups."""
    script_args, args, _ = parsed(RECIPES / name)
    assert script_args.trainer in SUPERVISED or torn_groups(args) == 0


def test_torn_groups_are_noticed(write):
    path = write("job.yaml", f"extends: {RECIPES / 'maple_qa' / 'best.yaml'}\nper_device_train_batch_size: 4")
    assert torn_groups(parsed(path)[1]) == 4


@pytest.mark.parametrize("folder, name", ROWS)
@pytest.mark.matrix(cases=19)
def test_a_tiny_variant_is_the_recipe_with_the_tiny_settings_over_it(folder, name):
    tiny, real = values(tiny_of(folder, name)), values(RECIPES / folder / f"{name}.yaml")
    small = own_keys(RECIPES / "tiny" / "base.yaml")
    assert tiny["prompt_template"] == "{question}"
    # TRL and transformers compute these from others.
    derived = {"generation_batch_size", "mixed_precision", "activation_checkpointing", "distributed_state"}
    differ = {key for key in real if tiny[key] != real[key]} - derived
    assert differ <= small | {"output_dir"}
    assert not small & {*AXES, "trainer", "difficulty"}
    assert own_keys(tiny_of(folder, name)) == {"output_dir"} | ({"reward_funcs"} if name == "crw" else set())
    assert (tiny["model_name_or_path"], tiny["dataset_name"]) == ("builtin:tiny-omni", "builtin:seven-tags")
    assert tiny["output_dir"].startswith("runs/tiny/") and tiny["output_dir"] != real["output_dir"]
    assert tiny["steps_per_generation"] > tiny["gradient_accumulation_steps"]  # else nothing is ever clipped


def test_a_caption_recipe_without_a_key_says_so_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["--config", str(RECIPES / "maple_caption" / "mapo.yaml"), "--use_cpu", "true"]
    job = parse_args([*words, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SetupError, match=r"\(caption_judge\): no key: set the environment variable OPENAI_API_KEY"):
        train.build_trainer(*job)


def test_the_judge_of_the_caption_recipes(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdefghijklmnop")
    path = RECIPES / "maple_caption" / "best.yaml"
    (judge,) = train.load_rewards(parsed(path)[0].rewards)
    options = judge.scorer.options
    assert (judge.__name__, options.model, options.sampling["temperature"]) == ("caption_judge", "gpt-4o", 0)
    # The line that is commented out is right too, and is what crw.yaml does.
    lines = (RECIPES / "maple_caption" / "base.yaml").read_text(encoding="utf-8").splitlines()
    (line,) = [line.strip("# ").split("  #")[0] for line in lines if "# contrastive:" in line]
    (entry,) = parsed(path)[0].rewards
    (weighed,) = train.load_rewards([entry | yaml.safe_load(line)])
    assert (weighed.__name__, weighed.alpha) == ("caption_judge_crw", 0.5)
    (crw,) = parsed(RECIPES / "maple_caption" / "crw.yaml")[0].rewards
    assert crw == entry | yaml.safe_load(line)


# Evaluation


@pytest.mark.parametrize("name", EVALS, ids=str)
def test_an_evaluation_has_the_published_settings(name):
    """Table 7 says the same of train and test."""
    job, trained = read_job(["--config", str(RECIPES / name)]), parsed(RECIPES / name.parts[0] / "base.yaml")[1]
    assert (job.options.temperature, job.options.top_p) == (trained.temperature, trained.top_p)
    assert (job.options.samples, job.options.max_new_tokens) == (5, trained.max_completion_length)
    assert job.media.max_prompt_length == trained.max_prompt_length == 8192
    assert job.media.num_frames == trained.num_frames and job.media.prompt_template == PROMPTS[name.parts[0]]
    served = read_job(["--config", str(RECIPES / name), "--server", "http://127.0.0.1:9/v1"])
    assert served.media.max_prompt_length is None and served.options == job.options
    # The preset says nothing else: with it alone, an evaluation is the same.
    words = ["--model", job.model_name_or_path, "--data", job.dataset_name, "--output", job.output_dir]
    alone = read_job([*words, "--preset", job.preset])
    assert (alone.options, alone.media) == (job.options, job.media)
    assert job.dataset_name == f"data/{name.parts[0]}" + ("_plus" if "qa_plus" in name.name else "")
    if not job.model_name_or_path.startswith("Qwen/"):  # it is what a recipe writes
        recipe = RECIPES / Path(job.model_name_or_path).relative_to("runs").with_suffix(".yaml")
        assert parsed(recipe)[1].output_dir == job.model_name_or_path


@pytest.mark.parametrize("name", EVALS, ids=str)
def test_a_tiny_evaluation_is_the_evaluation_with_the_tiny_settings_over_it(name):
    twin = recipe_table.tiny_of(RECIPES / name)
    tiny, real = (read_job(["--config", str(path)]) for path in (twin, RECIPES / name))
    assert own_keys(twin) == {"output_dir"} and tiny.output_dir != real.output_dir
    assert (tiny.model_name_or_path, tiny.dataset_name) == ("builtin:tiny-omni", "builtin:seven-tags")
    options = ("samples", "temperature", "top_p", "access", "seed")
    assert [getattr(tiny.options, o) for o in options] == [getattr(real.options, o) for o in options]


def test_a_tiny_evaluation_runs(tmp_path):
    words = ["--config", RECIPES / "tiny" / "eval_zero_shot.yaml", "--output", tmp_path, "--limit", 7, "--quiet"]
    assert cli.main(["eval", *map(str, words)]) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["accesses"]["required"]["counts"]["scored"] == 7 and result["asking"]["samples"] == 5


# MAPLE and AVATAR in one run

BOTH = RECIPES / "tiny" / "maple_avatar.yaml"


def test_the_recipe_of_both_has_all_of_both():
    script_args, args, _ = parsed(BOTH)
    assert (script_args.trainer, type(args).__name__) == ("avatar", "AvatarConfig")
    expected = {"method": "mapo", "batching": "stratified", "advantage_scope": "tag", "loss_strata": "tag"}
    expected |= {"loss_aggregation": "sample", "tag_weights": "adaptive", "dynamic_sampling": "early"}
    expected |= {"curriculum": "adaptive", "curriculum_granularity": "cycle", "revisit": "unsolved"}
    expected |= {"num_generations": 8, "replayed_generations": 4, "replay_scope": "tiers", "replay_draw": "balanced"}
    expected |= {"tas_shape": "parabolic", "tas_lambda": 0.5, "hints": True}
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.steps_per_generation > args.gradient_accumulation_steps  # else nothing is ever clipped


@pytest.mark.long
def test_the_recipe_of_both_runs(tmp_path):
    words = ["--config", BOTH, "--output_dir", tmp_path, "--max_steps", 8, "--use_cpu", "true", "--logging_steps", 1]
    words += ["--evaluate_before_after", "false", "--per_device_train_batch_size", 16, "--zero_shot_questions", 2]
    words += ["--dataset_filter", '{"tag": ["S", "VA"]}']  # so that tags come again
    assert cli.main(["train", *map(str, words)]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = [entry for entry in map(json.loads, lines) if "loss" in entry]
    found = {name for entry in logged for name in entry}
    assert found >= {"tag/S/weight", "tag/VA/weight", "tag/all/priority", "tag/all/dropped", "hint/stuck_prompts"}
    assert max(entry.get("replay/share", 0) for entry in logged) > 0
    assert {path.name for path in (tmp_path / "checkpoint-8").iterdir()} >= {"mapo.json", "avatar.json", "replay"}


def test_the_embedded_hints():
    """A signal of several says nothing about the answer: all letters go with it."""
    (splits, root), (plain, _) = (
        load_datasets(OmniScriptArguments(dataset_name=f"builtin:seven-tags{name}")) for name in ("-hints", "")
    )
    letters = defaultdict(set)
    for row in splits["train"]:
        assert (row["hint"] is None) == (len(row["tag"]) == 1)
        if row["hint"] is not None:
            assert row[f"truth_{row['tag'][0]}"] in row["hint"]
            assert leaks_answer(row["hint"], row["question"], row["solution"]) is None
            letters[row["tag"], row["hint"]].add(row["solution"])
    assert len(letters) == 4 * 4 and all(found == set("ABCD") for found in letters.values())
    for split, rows in splits.items():
        assert rows.remove_columns("hint").to_list() == plain[split].to_list()


# extends


@pytest.fixture
def write(tmp_path):
    def file(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    file.folder = tmp_path
    return file


def test_later_files_and_the_file_itself_win(write, monkeypatch):
    monkeypatch.delenv("ONE_VARIABLE", raising=False)
    monkeypatch.delenv("OTHER_VARIABLE", raising=False)
    monkeypatch.chdir(write.folder)
    write("far/root.yaml", "seed: 1\nmax_steps: 1\nlogging_steps: 1\nsave_steps: 1\nenv: {ONE_VARIABLE: 1}")
    write("far/near.yaml", "extends: root.yaml\nmax_steps: 2\nlogging_steps: 2\nsave_steps: 2")
    write("other.yaml", "bf16: false\nlogging_steps: 3\nsave_steps: 3\nenv: {ONE_VARIABLE: 3, OTHER_VARIABLE: 3}")
    write("job.yaml", "extends: [far/near.yaml, other.yaml]\nsave_steps: 4")
    args = parsed("job.yaml", "--output_dir", str(write.folder))[1]
    assert (args.seed, args.max_steps, args.logging_steps, args.save_steps) == (1, 2, 3, 4)
    assert (os.environ["ONE_VARIABLE"], os.environ["OTHER_VARIABLE"]) == ("3", "3")
    again = parsed("job.yaml", "--output_dir", str(write.folder), "--save_steps", "5")[1]
    assert again.save_steps == 5
    turned = write("turned.yaml", "extends: [other.yaml, far/near.yaml]")
    assert parsed(turned, "--output_dir", str(write.folder))[1].logging_steps == 2


def test_a_file_that_two_others_share_counts_once(write):
    """Were it read again after the first of them, it would undo what that one changes."""
    write("shared.yaml", "seed: 1\nmax_steps: 1\nbf16: false")
    write("one.yaml", "extends: shared.yaml\nseed: 2")
    write("other.yaml", "extends: ./shared.yaml\nmax_steps: 3")
    args = parsed(write("job.yaml", "extends: [one.yaml, other.yaml]"), "--output_dir", str(write.folder))[1]
    assert (args.seed, args.max_steps) == (2, 3)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"job": "extends: gone.yaml"}, r"job\.yaml: extends .*gone\.yaml: cannot read the config file .*gone\.yaml"),
        ({"job": "extends: a.yaml", "a": "extends: b.yaml"}, r"[\\/]a\.yaml: extends .*b\.yaml: cannot read"),
        ({"job": "extends: job.yaml"}, r"job\.yaml: extends .*job\.yaml, which is built on it: .*job\.yaml -> .*job"),
        (
            {"job": "extends: a.yaml", "a": "extends: b.yaml", "b": "extends: a.yaml"},
            r"[\\/]b\.yaml: extends .*[\\/]a\.yaml, which is built on it: .*job\.yaml -> .*a\.yaml -> .*b\.yaml -> .*a",
        ),
        ({"job": "extends: 3"}, r"job\.yaml: extends must be a file or a list of files, got 3"),
        ({"job": "extends:"}, r"job\.yaml: extends must be a file or a list of files, got None"),
        ({"job": "extends: [a.yaml, 3]", "a": "seed: 1"}, r"extends must be a file or a list of files, got \['a"),
        ({"job": "extends: a.yaml\nseed: 1", "a": "sead: 1"}, r"[\\/]a\.yaml: unknown key 'sead'; did you mean seed"),
        ({"job": "extends: a.yaml\nsead: 1", "a": "seed: 1"}, r"job\.yaml: unknown key 'sead'"),
        ({"job": "extends: a.yaml", "a": "seed: 1.5"}, r"[\\/]a\.yaml: seed must be a whole number, got 1\.5"),
        ({"job": "extends: a.yaml", "a": "seed: 1\nseed: 2"}, r"[\\/]a\.yaml: line 2: 'seed' is given twice"),
        ({"job": "extends: a.yaml", "a": "env: 3"}, r"[\\/]a\.yaml: env must be a mapping"),
    ],
)
def test_wrong_bases_are_refused_with_the_file(write, files, message):
    paths = {name: write(f"{name}.yaml", text) for name, text in files.items()}
    with pytest.raises(SetupError, match=message):
        parsed(paths["job"], "--output_dir", str(write.folder), "--bf16", "false")


# Which trainer


def test_the_trainer_decides_the_config_class(write):
    words = ["--output_dir", str(write.folder), "--bf16", "false"]
    plain = write("plain.yaml", "seed: 1")
    mapo = write("mapo.yaml", "extends: plain.yaml\ntrainer: mapo\ncurriculum: static")
    back = write("back.yaml", "extends: mapo.yaml\ntrainer: omni_grpo")
    assert type(parsed(plain, *words)[1]).__name__ == "OmniGRPOConfig"
    assert parsed(mapo, *words)[1].curriculum == "static"
    script_args, training_args, _ = parsed(plain, *words, "--trainer=mapo", "--curriculum", "static")
    assert (script_args.trainer, training_args.curriculum) == ("mapo", "static")
    for case in ([back], [mapo, "--trainer", "omni_grpo"]):  # the key of the other trainer stays behind
        with pytest.raises(
            SetupError, match=r"mapo\.yaml: unknown key 'curriculum', .* MAPOConfig: set trainer: mapo"
        ):
            parsed(*case, *words)
    with pytest.raises(SetupError, match="unknown option --tag-weights, .* MAPOConfig: set trainer: mapo"):
        parsed(plain, *words, "--tag-weights", "adaptive")
    assert "set trainer" not in refusal(plain, *words, "--no_such_option", "1")


def refusal(*words):
    with pytest.raises(SetupError) as caught:
        parsed(*words)
    return str(caught.value)


@pytest.mark.parametrize("name", ["grpo", "[mapo]", "3"])
def test_an_unknown_trainer_is_refused(write, name):
    path = write("job.yaml", f"trainer: {name}")
    assert "trainer must be one of 'omni_grpo', 'mapo', 'avatar', 'omni_sft', got" in refusal(path)
    assert "got 'nope'" in refusal(path, "--trainer", "nope")
    assert refusal(path, "--trainer") == "--trainer needs a value"


def test_trainers_by_name():
    from maple_trl import MAPOTrainer, OmniGRPOTrainer

    assert (trainer_class("mapo"), trainer_class("omni_grpo")) == (MAPOTrainer, OmniGRPOTrainer)
    assert [trainer_class(name).__name__ for name in ("avatar", "omni_sft")] == ["AvatarTrainer", "OmniSFTTrainer"]
    with pytest.raises(SetupError, match="got 'ppo'"):
        trainer_class("ppo")


def test_help_shows_the_options_of_the_chosen_trainer(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--dynamic_sampling" not in shown and "maple-trl train --trainer mapo --help_all" in shown
    assert cli.main(["train", "--trainer", "mapo", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--dynamic_sampling" in shown and "--media_root" in shown
    assert "maple-trl train --trainer omni_grpo --help_all" in shown
    assert cli.main(["train", "--trainer", "nope", "--help-all"]) == 2
    assert "trainer must be one of" in capsys.readouterr().err


# The jobs themselves


ADDED = ["mapo_group", "mapo_prompt", "algorithm1", "curriculum_cycle", "qa_plus", "caption_mupo", "caption_crw"]
ADDED += [f"full_without_{axis}" for axis in ("aggregation", "clipping", "filtering", "curriculum")]


@pytest.mark.parametrize("name", ["mupo", "full_recipe", "caption_best", *ADDED])
@pytest.mark.matrix(cases=2)
def test_a_tiny_recipe_runs(name, tmp_path):
    words = ["--config", RECIPES / "tiny" / f"{name}.yaml", "--output_dir", tmp_path, "--max_steps", 2, "--use_cpu"]
    words += ["true", "--evaluate_before_after", "false", "--logging_steps", 1, "--per_device_train_batch_size", 16]
    words += ["--num_generations", 4, "--save_strategy", "no"]
    if name == "caption_best":
        words += ["--zero_shot_questions", 2]
    if name == "caption_crw":
        words += ["--dataset_filter", '{"tag": ["VAS"]}']
    assert cli.main(["train", *map(str, words)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2 and (tmp_path / "model.safetensors").is_file()
    fed = {(line["rollout"], line["tag"]) for line in pq.read_table(tmp_path / "rollouts").to_pylist()}
    mixed = len(fed) > len({rollout for rollout, _ in fed})
    assert mixed == (name in ("mupo", "algorithm1"))
    if name == "caption_mupo":
        assert {tag for _, tag in fed} == {"VAS"}
    if name == "caption_crw":
        logged = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert any("tag/all/accuracy_reward_crw/similarity" in entry for entry in logged)


@pytest.mark.long
def test_the_recipes_of_table_4_take_a_set_of_three_strata(tmp_path):
    """As `maple-trl data qa-plus` makes them: `tag` is what a row is fed, `required_tag` what its question needs."""
    splits, root = load_datasets(OmniScriptArguments(dataset_name="builtin:seven-tags"))
    inputs = {"exact": ("VA", "VA"), "superset": ("VA", "VAS"), "deficit": ("VA", "V")}
    for split, rows in splits.items():
        questions = [row for row in rows if row["tag"] == "VA"][:4]
        expanded = [
            row
            | {
                "id": f"{row['id']}-{fed}",
                "question_id": row["id"],
                "required_tag": required,
                "tag": fed,
                "stratum": name,
            }
            for row in questions
            for name, (required, fed) in inputs.items()
        ]
        lines = [json.dumps({name: value for name, value in row.items() if name != "prompt"}) for row in expanded]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    words = ["--config", RECIPES / "tiny" / "qa_plus.yaml", "--dataset_name", tmp_path, "--media_root", root]
    words += ["--output_dir", tmp_path / "run", "--max_steps", 2, "--use_cpu", "true", "--save_strategy", "no"]
    words += ["--evaluate_before_after", "false", "--per_device_train_batch_size", 8, "--num_generations", 4]
    assert cli.main(["train", *map(str, words)]) == 0
    fed = {line["tag"] for line in pq.read_table(tmp_path / "run" / "rollouts").to_pylist()}
    assert fed <= {"VA", "VAS", "V"}
    words = [
        "--config",
        RECIPES / "tiny" / "eval_qa_plus.yaml",
        "--data",
        tmp_path,
        "--media-root",
        root,
        "--quiet",
    ]
    words += ["--model", tmp_path / "run", "--output", tmp_path / "eval", "--samples", 1]
    assert cli.main(["eval", *map(str, words)]) == 0
    lines = pq.read_table(tmp_path / "eval" / "rows.parquet").to_pylist()
    assert {(line["tag"], line["fed"]) for line in lines} == {("VA", "VA"), ("VA", "VAS"), ("VA", "V")}
