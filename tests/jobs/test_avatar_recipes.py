"""AVATAR's recipes: what the paper's tables and the authors' released settings say, in files, on a page, and in runs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer, say

from maple_trl import cli
from maple_trl.data import load_seven_tags
from maple_trl.jobs import train
from maple_trl.jobs.config_files import config_files
from maple_trl.jobs.options import parse_args
from maple_trl.jobs.stages import load_plan


pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parents[2]
AVATAR = ROOT / "recipes" / "avatar"
PAGE = ROOT / "docs" / "avatar_recipes.md"
TINY = AVATAR / "tiny"
BOTH = AVATAR / "maple_avatar.yaml"  # its twin stands elsewhere
PARTS = {"base.yaml", "rl.yaml"}
FILES = [path for path in sorted(AVATAR.rglob("*.yaml")) if TINY not in path.parents and path.name not in PARTS]
NAMES = [str(path.relative_to(AVATAR)) for path in FILES]
CPU = ["--use_cpu", "true"]
# What the paper's Table 1 and section 4.3 say: data sets, rewards and their weights. Of stage 3 the text has lost the weights.
STAGES = {
    "s0_sft": (["Video-R1-CoT", "TPO"], None, None),
    "s1_visual": (["Video-R1"], ["format_reward", "accuracy_reward"], [0.5, 0.5]),
    "s2_audio_visual": (
        ["AVQA", "AVE"],
        ["format_reward", "accuracy_reward", "self_consistency_reward"],
        [0.2, 0.4, 0.4],
    ),
    "s3_localization": (
        ["AVSBench"],
        ["format_reward", "object_place_reward", "self_consistency_reward", "stepwise_reasoning_judge"],
        [0.25, 0.25, 0.25, 0.25],
    ),
}
LORA = ["vision", "audio", "projectors", "llm"]
# PAPERS: sections 4 and 5 and appendix B, and what the authors have released where the text has lost the numbers.
PUBLISHED = {
    "num_frames": 32,
    "max_pixels": 50_176,
    "audio_in_video": True,
    "max_prompt_length": 16_384 - 2048,
    "max_completion_length": 2048,
    "num_generations": 8,
    "replayed_generations": 4,
    "replay_scope": "tiers",
    "replay_draw": "uniform",
    "replay_capacity": 10_000,
    "replay_min_size": 10,
    "replay_alpha": 1.0,
    "replay_shares": {"easy": 0.25, "medium": 0.35, "hard": 0.4},
    "replay_quantiles": [0.4, 0.75],
    "vcrs_window": 20,
    "tas_shape": "parabolic",
    "tas_lambda": 0.3,
    "hints": True,
    "hint_visits": 3,
    "beta": 0.1,
    "learning_rate": 5e-7,
    "warmup_steps": 0.05,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


def parsed(path, *words):
    return parse_args(["--config", str(path), *CPU, *words])


def values(path):
    """Every value of a job by its name."""
    return {name: value for part in parsed(path) for name, value in vars(part).items() if not name.startswith("_")}


def keys(path):
    """What a file says, with what those say that it extends."""
    found = {}
    for _, part in config_files(str(path)):
        found |= part
    return found


def is_plan(path):
    return "stages" in keys(path)


def rewards_of(script_args):
    return [entry if isinstance(entry, str) else entry["reward"] for entry in script_args.rewards]


# The published settings


def test_the_stages_stand_in_their_order():
    for folder, output_dir in ((AVATAR, "runs/avatar"), (TINY, "runs/avatar_tiny")):
        plan = load_plan(["--config", str(folder / "stages.yaml")])
        assert [stage.name for stage in plan.stages] == list(STAGES) and plan.output_dir == output_dir


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_published_values(name):
    sources, rewards, weights = STAGES[name]
    script_args, args, model_args = parsed(AVATAR / f"{name}.yaml")
    assert script_args.dataset_filter == {"source": sources} and args.output_dir == f"runs/avatar/{name}"
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-Omni-7B"
    assert model_args.use_peft and model_args.adapted == LORA and (model_args.lora_r, model_args.lora_alpha) == (8, 32)
    if rewards is None:
        assert script_args.trainer == "omni_sft" and script_args.completion_template is None
        assert (args.num_frames, args.max_pixels, args.audio_in_video) == (32, 50_176, True)
        return
    assert (script_args.trainer, rewards_of(script_args), args.reward_weights) == ("avatar", rewards, weights)
    assert sum(weights) == 1  # hint_below is a part of it
    assert {field: getattr(args, field) for field in PUBLISHED} == PUBLISHED
    assert args.num_train_epochs >= args.first_hinted_visit == 4
    train.load_rewards(script_args.rewards, args)


def test_a_step_is_one_prompt_and_400_steps_are_1600_completions():
    """RQ1: 1 600 completions in 400 iterations, GRPO's 8 000 in 1 000."""
    args = parsed(AVATAR / "s1_visual.yaml")[1]
    assert args.generation_batch_size == args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert args.generation_batch_size // args.num_generations == 1 and args.num_iterations == 1
    assert 400 * (args.num_generations - args.replayed_generations) == 1600
    (job,) = [job for job in _jobs(AVATAR / "table4_grpo.yaml") if job[1].output_dir.endswith("s1_visual")]
    assert 1000 * (job[1].num_generations - job[1].replayed_generations) == 8000


def test_the_warm_up_is_a_share_of_the_steps():
    assert parsed(AVATAR / "s1_visual.yaml")[1].get_warmup_steps(1000) == 50


def test_the_judge_of_stage_3():
    script_args, args, _ = parsed(AVATAR / "s3_localization.yaml")
    judge = train.load_rewards(script_args.rewards, args)[-1]
    assert (judge.frames, judge.sees_solution, judge.free_grades) == (8, False, False)
    assert judge.scorer.options.model == "OpenGVLab/InternVL3-2B" and judge.scorer.options.sampling["temperature"] == 0
    script_args, args, _ = parsed(AVATAR / "judge_sees_solution.yaml")
    judge = train.load_rewards(script_args.rewards, args)[-1]
    assert (judge.frames, judge.sees_solution, judge.free_grades) == (8, True, True)


# The tables


def _jobs(path):
    plan = load_plan(["--config", str(path), *CPU])
    return [plan.parse(i) for i in range(len(plan.stages))]


@pytest.mark.parametrize("name", [name for name in NAMES if is_plan(AVATAR / name)])
@pytest.mark.matrix(cases=3)
def test_every_stage_of_a_row_can_be_read_and_differs_in_what_the_row_says(name):
    """Each of its stages is the published one but for the keys of the row."""
    own = set(keys(AVATAR / name)) - {"stages", "output_dir"}
    published = {Path(job[1].output_dir).name: job for job in _jobs(AVATAR / "stages.yaml")}
    for job in _jobs(AVATAR / name):
        stage = Path(job[1].output_dir).name
        if stage not in published:
            continue  # a stage of Table 8, of which the page says how it differs
        for mine, theirs in zip(job, published[stage], strict=True):
            skipped = {"output_dir", "model_name_or_path"} | own
            differ = {key for key, value in vars(mine).items() if value != vars(theirs)[key]} - skipped
            assert not {key for key in differ if not key.startswith("_")} - {"distributed_state"}, stage


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_twin_is_its_recipe_with_the_tiny_settings_over_it(name):
    if AVATAR / name == BOTH:
        return
    twin = TINY / name
    small = set().union(*(yaml.safe_load((TINY / part).read_text(encoding="utf-8")) for part in PARTS)) - {"extends"}
    own = set(yaml.safe_load(twin.read_text(encoding="utf-8"))) - {"extends", "output_dir"}
    assert keys(twin)["output_dir"] == keys(AVATAR / name)["output_dir"].replace("runs/avatar", "runs/avatar_tiny", 1)
    if is_plan(twin):
        stages = [[Path(stage).name for stage in keys(path)["stages"]] for path in (twin, AVATAR / name)]
        assert stages[0] == stages[1] and own <= {"stages", "model_name_or_path", "hint_max_kl"}
        assert keys(twin).get("model_name_or_path", "builtin:tiny-omni") == "builtin:tiny-omni"
        files = [stage.file for stage in load_plan(["--config", str(twin)]).stages]
        assert all(TINY in Path(file).resolve().parents for file in files)
        return
    tiny, real = values(twin), values(AVATAR / name)
    derived = {"generation_batch_size", "mixed_precision", "activation_checkpointing", "distributed_state"}
    derived |= {"steps_per_generation"}
    assert {key for key in real if tiny[key] != real[key]} - derived <= small | own | {"output_dir"}
    kept = {"trainer", "num_generations", "replayed_generations", "tas_lambda", "hints", "hint_visits", "beta"}
    assert not (small | own) & kept
    # The judge is a server, and the embedded set has letters for answers.
    assert not own & {"reward_funcs"} or name in ("s1_visual.yaml", "s3_localization.yaml")
    assert tiny["model_name_or_path"] == "builtin:tiny-omni"


def test_no_file_stands_alone():
    twins = {str(path.relative_to(TINY)) for path in TINY.rglob("*.yaml")} - PARTS
    assert twins == set(NAMES) - {BOTH.name} and (ROOT / "recipes" / "tiny" / BOTH.name).is_file()


def test_the_run_of_both_has_all_of_both():
    script_args, args, _ = parsed(BOTH)
    assert (script_args.trainer, type(args).__name__) == ("avatar", "AvatarConfig")
    expected = {"method": "mapo", "batching": "stratified", "advantage_scope": "tag", "loss_strata": "tag"}
    expected |= {"loss_aggregation": "sample", "tag_weights": "adaptive", "dynamic_sampling": "early"}
    expected |= {"curriculum": "adaptive", "curriculum_granularity": "cycle", "revisit": "unsolved"}
    expected |= {"replayed_generations": 4, "tas_lambda": 0.3, "hints": True, "num_train_epochs": 5}
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.num_train_epochs >= args.first_hinted_visit


# The page


def _table(heading):
    """Rows of the first table below a heading, as lists of cells."""
    lines = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_page_names_every_recipe_once():
    rows = _table("Which row is which")
    assert sorted(re.match(r"\[`([^`]+)`\]", row[0])[1] for row in rows) == sorted(NAMES)
    for row in rows:
        name, place = re.match(r"\[`([^`]+)`\]\(([^)]+)\)", row[0]).groups()
        assert (PAGE.parent / place).resolve() == AVATAR / name and all(row)


def test_the_page_names_no_file_that_is_not_there():
    named = re.findall(r"recipes/[\w/]+\.yaml", PAGE.read_text(encoding="utf-8"))
    assert len(named) > len(NAMES) and all((ROOT / name).is_file() for name in named)


def test_the_page_says_what_a_row_changes():
    told = {re.match(r"\[`([^`]+)`\]", row[0])[1]: row[2] for row in _table("Which row is which")}
    full = [Path(stage).stem for stage in keys(AVATAR / "stages.yaml")["stages"]]
    for name, cell in told.items():
        said = {key: yaml.safe_load(value) for key, value in re.findall(r"`([a-z_]+): ([^`]*)`", cell)}
        found = {key: value for key, value in keys(AVATAR / name).items() if key != "output_dir"}
        if is_plan(AVATAR / name):
            found["stages"] = [Path(stage).stem for stage in found["stages"]]
            if found["stages"] == full:
                del found["stages"]
        elif name.removesuffix(".yaml") in STAGES or AVATAR / name == BOTH:
            found = {}
        else:
            own = yaml.safe_load((AVATAR / name).read_text(encoding="utf-8"))
            found = {key: value for key, value in own.items() if key not in ("extends", "output_dir")}
        if name == "judge_sees_solution.yaml":
            judge = found["reward_funcs"][-1]
            assert said == {"reward_funcs": "with sees_solution and free_grades"}
            assert judge["sees_solution"] and judge["free_grades"]
            continue
        assert said == found, name


_KEY = re.compile(r"([a-z]\w*): *(.*?) *# \[([^\]]+)\].*")


def _marked(path):
    """Options of a file: value and source; each of its lines has one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if re.match(r"[a-z]\w*:", line)]
    options = [line for line in options if line.split(":")[0] not in ("extends", "trainer", "output_dir")]
    unmarked = [line for line in options if not _KEY.fullmatch(line)]
    assert not unmarked
    return {match[1]: (match[2], match[3]) for match in map(_KEY.fullmatch, options)}


def test_every_line_says_where_its_value_is_from_and_the_page_says_the_same():
    marked = _marked(AVATAR / "base.yaml") | _marked(AVATAR / "rl.yaml")
    for stage in STAGES:
        _marked(AVATAR / f"{stage}.yaml")
    assert {source.split()[0].rstrip(",") for _, source in marked.values()} == {"paper", "released", "ours"}
    rows = _table("Where the settings are from")
    for option, value, source in rows:
        assert marked[option.strip("`")] == (value.strip("`"), source)
    assert {option.strip("`") for option, *_ in rows} >= {*PUBLISHED, "lora_r", "lora_alpha", "num_train_epochs"}


# Runs


def run(path, folder, *words):
    words = ["--config", path, "--output_dir", folder, *CPU, "--evaluate_before_after", "false", *words]
    return cli.main(["train", *map(str, words)])


def logged(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_the_tiny_stages_run(tmp_path):
    words = ["--max_steps", 2, "--per_device_train_batch_size", 16, "--logging_steps", 1, "--save_strategy", "no"]
    assert run(TINY / "stages.yaml", tmp_path, *words) == 0
    told = json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))["stages"]
    assert [(entry["name"], entry["done"], entry["summary"]["steps"]) for entry in told] == [
        (name, True, 2) for name in STAGES
    ]
    last = logged(tmp_path / "s2_audio_visual")[-1]
    assert last["replay/size"] > 0 and "rewards/self_consistency_reward/mean" in last and last["kl"] >= 0
    assert "rewards/object_place_reward/mean" in logged(tmp_path / "s3_localization")[-1]
    assert (tmp_path / "s3_localization" / "model.safetensors").is_file()
    # Two steps are a first try: told, and not refused.
    told = [{note["kind"] for note in entry["summary"]["left_out"]} for entry in told]
    assert ["hints_never_fired" in kinds for kinds in told] == [False, True, True, True]


@pytest.mark.long
def test_adapters_go_from_stage_to_stage_with_the_stage_s_beginning_as_reference(tmp_path):
    """LoRA and the KL term, as published: at a stage's first step the policy is the reference, and at the next it is not."""
    words = ["--use_peft", "true", "--lora_r", 4, "--learning_rate", 1e-2, "--warmup_steps", 0, "--max_steps", 2]
    words += ["--per_device_train_batch_size", 8, "--logging_steps", 1, "--save_strategy", "no"]
    assert run(TINY / "table5_sft_s1_s2.yaml", tmp_path, *words) == 0
    for stage in ("s1_visual", "s2_audio_visual"):
        first, second = (entry["kl"] for entry in logged(tmp_path / stage))
        assert abs(first) < 1e-5 < second, stage
    assert (tmp_path / "s2_audio_visual" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in NAMES if is_plan(AVATAR / name) and name != "stages.yaml"])
@pytest.mark.matrix(cases=2)
def test_a_tiny_twin_runs_a_step(name, tmp_path):
    """Its last stage, from the embedded model; the stages before it are those of other rows."""
    words = [
        "--output_dir",
        tmp_path,
        *CPU,
        "--evaluate_before_after",
        "false",
        "--max_steps",
        1,
        "--logging_steps",
        1,
    ]
    words += ["--per_device_train_batch_size", 8, "--save_strategy", "no", "--media_check", "none"]
    plan = load_plan(["--config", str(TINY / name), *map(str, words)])
    job = plan.parse(len(plan.stages) - 1)
    job[2].model_name_or_path = "builtin:tiny-omni"
    summary = train.run(*job)
    assert summary["steps"] == 1
    (entry,) = logged(job[1].output_dir)
    replays, shaped = job[1].replayed_generations > 0, job[1].tas_lambda > 0
    assert ("replay/size" in entry) == replays and "loss_profile/0" in entry
    if not replays:
        assert not shaped or job[1].tas_shape == "parabolic"


def test_400_steps_generate_1600_completions_and_the_first_two_8_more(tmp_path):
    """With one prompt a step, as the published recipe has it: two whole groups, then four each."""
    words = ["--max_steps", 5, "--per_device_train_batch_size", 8, "--logging_steps", 1, "--save_strategy", "no"]
    assert run(TINY / "s1_visual.yaml", tmp_path, *words) == 0
    assert [entry["replay/generated"] for entry in logged(tmp_path)] == [8, 8, 4, 4, 4]
    fired = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["fired"]
    assert [(note["kind"], note["count"], note.get("generated")) for note in fired] == [("replayed", 12, 28)]


# Hints


@pytest.fixture(scope="module")
def some_rows():
    """A filter that leaves rows whose answer the embedded model does not always know, and that have a hint."""
    rows = [row for row in load_seven_tags()["train"] if row["tag"] == "VS"][:16]
    return json.dumps({"id": [row["id"] for row in rows]})


@pytest.mark.long
def test_a_hint_fires_in_the_published_recipe_s_tiny_twin(tmp_path, some_rows, capsys):
    words = ["--dataset_filter", some_rows, "--logging_steps", 1, "--save_strategy", "no"]
    assert run(TINY / "s1_visual.yaml", tmp_path / "fires", *words) == 0
    entries = logged(tmp_path / "fires")
    assert len(entries) == 8  # 4 epochs of 16 prompts
    given = [entry["hint/given"] for entry in entries]
    assert given[:6] == [0] * 6 and given[-1] >= 1  # at the fourth visit, and not before
    assert [entry["hint/rate"] > 0 for entry in entries][:6] == [False] * 6
    summary = json.loads((tmp_path / "fires" / "summary.json").read_text(encoding="utf-8"))
    (note,) = [note for note in summary["fired"] if note["kind"] == "hinted"]
    assert note["given"] == given[-1] and f"{note['given']} hint" in note["text"]
    assert not any(note["kind"] == "hints_never_fired" for note in summary["left_out"])
    assert note["text"] in capsys.readouterr().out
    # Controls: no prompt is ever stuck; hints are off.
    assert run(TINY / "s1_visual.yaml", tmp_path / "never", *words, "--hint_below", 0) == 0
    summary = json.loads((tmp_path / "never" / "summary.json").read_text(encoding="utf-8"))
    assert [note["kind"] for note in summary["fired"]] == ["replayed"]
    assert [note["count"] for note in summary["left_out"] if note["kind"] == "hints_never_fired"] == [0]
    assert "hints never fired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs", 3], "no hint can ever be shown: with hint_visits=3 that is at a prompt's visit 4"),
        (["--hint_visits", 4], "with hint_visits=4 that is at a prompt's visit 5 at the earliest"),
        (["--replay_max_age", 0], "older than replay_max_age=0 when the prompt comes back"),
        (["--dataset_name", "builtin:seven-tags"], "hints=True, but train_dataset has no column 'hint'"),
    ],
)
def test_hints_that_can_never_fire_are_refused_by_name(words, message, tmp_path, some_rows, capsys):
    assert run(TINY / "s1_visual.yaml", tmp_path, "--dataset_filter", some_rows, *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_stages_are_looked_at_before_the_first_begins(tmp_path, capsys):
    """Hours of stage 0 are not spent on a stage 1 that would be refused."""
    assert run(TINY / "stages.yaml", tmp_path, "--hint_visits", 9) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "stage s1_visual: hints=True, but no hint can ever be shown" in told
    assert not (tmp_path / "stages.json").exists()


# Stage 3 with its judge


def _judged(path, server):
    """The rewards of a recipe with a judge at another address, as JSON for the command line."""
    entries = keys(path)["reward_funcs"]
    entries[-1]["server"] = entries[-1]["server"] | {"base_url": server.url, "cache_file": None}
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]


@pytest.mark.parametrize("name", ["s3_localization.yaml", "judge_sees_solution.yaml"])
@pytest.mark.matrix(cases=1)
def test_stage_3_trains_with_its_judge(name, tmp_path):
    sees = name.startswith("judge")
    grades = {"audio_cues": 0.35, "caption": 0.5} if sees else {}
    grades |= {"visual_objects": 0.4, "spatial_locations": 0.8}
    words = ["--max_steps", 1, "--per_device_train_batch_size", 8, "--logging_steps", 1, "--save_strategy", "no"]
    words += ["--dataset_filter", '{"tag": ["VAS"]}', "--reward_weights", *["0.25"] * 4]
    with ChatServer(lambda number, body: say(json.dumps(grades))) as server:
        words += ["--reward_funcs", *_judged(AVATAR / name, server)]
        assert run(TINY / name, tmp_path, *words) == 0
        calls = list(server.calls)
    (entry,) = logged(tmp_path)
    assert calls and entry["judge/stepwise_reasoning_judge/visual_objects"] == pytest.approx(0.4)
    assert ("judge/stepwise_reasoning_judge/caption" in entry) == sees
    for call in calls:
        assert ('name="solution"' in call.text) == ('name="answer"' in call.text) == sees
        pictures = [b for m in call.body["messages"] if isinstance(m["content"], list) for b in m["content"]]
        assert sum(block["type"] == "image_url" for block in pictures) == 4  # all that the tiny clips have
