"""A run is published to a hub over HTTP with a card, survives a broken connection, and comes back as it was."""

import json
import logging
import re
import shlex
import shutil
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import checkpoint_layouts as layouts
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from local_hub import local_hub, taken_for_the_hub
from media_files import copy_small_set
from omni_runs import QUIET_ON_CPU
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file
from tiny_models import build_tiny, build_tiny_text

from maple_trl import OmniPipeline, OmniSFTConfig, OmniSFTTrainer, cli
from maple_trl.hub.errors import PublishError
from maple_trl.hub.model_card import CardFacts, render_model_card
from maple_trl.hub.publish import check_upload, push_model
from maple_trl.hub.results import read_evaluation
from maple_trl.jobs import train as jobs
from maple_trl.omni import checkpoints
from maple_trl.omni.adapters import load_whole
from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint


ROOT = Path(__file__).resolve().parents[2]
KEY = "hf_secretsecretsecret"
OPTIONS = (
    "--trainer mapo --model_name_or_path builtin:tiny-omni --use_cpu true --bf16 false --dtype float32 --report_to none "
    "--use_peft true --lora_r 2 --gradient_accumulation_steps 1 --per_device_train_batch_size 4 --logging_steps 1 "
    "--save_steps 1 --max_pixels 3136 --num_frames 4 --num_generations 2 --max_completion_length 4 --max_steps 2 "
    "--learning_rate 1e-3 --gradient_checkpointing false --shared_prefix off --reward_weights 0.5 1.0 "
    "--evaluate_before_after true --eval_questions_per_tag 2 "
    f"--push_to_hub true --hub_model_id me/run --hub_strategy all_checkpoints --hub_always_push true --hub_token {KEY}"
).split()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        with taken_for_the_hub(patch, tmp_path_factory.mktemp("cache"), KEY) as hub:
            yield hub


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """The folder of a run of two steps that published each of its checkpoints; beside it are its rows and clips."""
    folder = tmp_path_factory.mktemp("private")
    rows = copy_small_set(folder / "media")
    for split in ("train", "test"):
        rows.to_json(folder / "media" / f"{split}.jsonl")
    data = ["--dataset_name", str(folder / "media"), "--media_root", str(folder / "media")]
    assert cli.main(["train", *OPTIONS, *data, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def at_once(monkeypatch):
    """Tries again without waiting."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


def card_of(hub, repository, branch="main"):
    return ModelCard(hub.files(repository, branch)["README.md"].decode())


# What is published


def test_every_checkpoint_and_the_end_are_published(hub, run):
    published = hub.files("me/run")
    model = {name for name in published if "/" not in name}
    assert model == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("processor_config.json", "chat_template.jinja"),
    }
    for step in (1, 2):
        there = {path.name for path in (run / f"checkpoint-{step}").iterdir()}
        names = {name.partition("/")[2] for name in published if name.startswith(f"checkpoint-{step}/")}
        assert {"optimizer.pt", "trainer_state.json", "rows.json", "README.md"} <= names
        assert there - names == {"training_args.bin", "model_card.json"}
    trained = load_file(run / "adapter_model.safetensors")
    uploaded = load(published["adapter_model.safetensors"])
    assert trained.keys() == uploaded.keys() and all(torch.equal(trained[name], uploaded[name]) for name in trained)
    last = load(published["checkpoint-2/adapter_model.safetensors"])
    assert all(torch.equal(last[name], trained[name]) for name in trained)


def test_no_key_and_no_path_leaves_the_machine(hub, run):
    """Of all that was ever uploaded, and of what stays here the key."""
    assert {key for *_, key in hub.requests if key} == {KEY}
    private = [str(run.parent), str(run.parent.parent), str(checkpoints.__file__).rpartition("/maple_trl/")[0]]
    held = {name for repository in hub.repositories.values() for name in repository.branches}
    assert held
    for repository, found in hub.repositories.items():
        for commit in found.commits.values():
            for path, blob in commit.items():
                content = hub.blobs[blob]
                assert KEY.encode() not in content, (repository, path)
                for place in private:
                    assert place.encode() not in content, (repository, path)
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in kept)
    assert not [path for path in kept if KEY.encode() in path.read_bytes()]
    # The control: what is not published does name this machine.
    assert (
        str(run.parent) in (run / "args.json").read_text() and str(run.parent) in (run / "model_card.json").read_text()
    )
    assert "/assets/tiny-omni" in (run / "adapter_config.json").read_text()
    uploaded = json.loads(hub.files("me/run")["adapter_config.json"])
    assert uploaded["base_model_name_or_path"] == "builtin:tiny-omni"


def test_the_card_tells_what_the_model_is(hub, run):
    card = card_of(hub, "me/run")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "video-text-to-text"
    assert {"trl", "grpo", "mapo", "omni", "maple-trl", "video", "audio", "subtitles", "lora"} <= set(data["tags"])
    assert "base_model" not in data and "datasets" not in data  # the one is no repository, the other a local folder
    for line in (
        "# run",
        "A LoRA adapter for an omni-modal language model. It reads pictures, video, sound and subtitles",
        "- **Base model**: `builtin:tiny-omni`",
        "- **Trained with**: MAPO ([MAPLE: Modality-Aware Post-training and Learning Ecosystem]"
        "(https://huggingface.co/papers/2602.11596)), 2 steps, an adapter",
        "- **Data**: a local set",
        "| format_reward | 0.5 |",
        "| accuracy_reward | 1.0 |",
        "model_name_or_path: builtin:tiny-omni",
        "dataset_name: <local path>",
        "lora_r: 2",
        "learning_rate: 0.001",
        "eprint = {arXiv:2602.11596}",
        "eprint = {arXiv:2508.03100}",
        "@software{vonwerra2020trl",
        f"- torch {torch.__version__.split('+')[0]}",
    ):
        assert line in card.text, line
    for absent in ("None", "media_root", "output_dir", "text-generation", "hub_token"):
        assert absent not in str(card), absent
    for step in (1, 2):  # PEFT's own card lay there
        assert f"{step} steps" in hub.files("me/run")[f"checkpoint-{step}/README.md"].decode()


def snippet(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return code


def greedy(model, processor, ask, row, tokens):
    """Greedy decoding without a cache, generation config or pipeline: the whole prompt is passed for each token."""
    from maple_trl.omni.encoded import batch_position_ids, forward_position_ids
    from maple_trl.omni.serving import serve_media

    prompt, new = ask.encode(row), []
    end, banned = processor.tokenizer.eos_token_id, sorted(ask.family.suppressed_ids)
    for _ in range(tokens):
        ids = torch.cat([prompt.input_ids, torch.tensor(new, dtype=torch.long)])[None]
        positions = forward_position_ids(batch_position_ids([prompt], len(prompt), len(new)))
        with serve_media(ask.family, model, [prompt]), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0, -1]
        logits[banned] = -torch.inf
        new.append(int(logits.argmax()))
        if new[-1] == end:
            break
    return processor.tokenizer.decode(new, skip_special_tokens=True)


def clips_beside(folder, run):
    """The files that the card's example names: those of a row that needs all three signals."""
    rows = [json.loads(line) for line in (run.parent / "media/test.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["tag"] == "VAS")
    shutil.copy(run.parent / "media" / row["video"], folder / "clip.mp4")
    (folder / "clip.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nthe word is one\n")


def test_the_example_of_the_card_runs_against_the_published_model(hub, run, tmp_path, capsys):
    clips_beside(tmp_path, run)
    code = snippet(card_of(hub, "me/run"))
    names = {}
    with chdir(tmp_path):
        exec(compile(code, "README.md", "exec"), names)
        answer, ask = names["answer"], names["ask"]
        assert capsys.readouterr().out.strip() == answer.strip() and answer
        assert isinstance(ask.model, PeftModel) and '"tag": "VAS"' in code
        model, processor = load_whole(str(run), dtype="float32")  # of this machine
        row = {"prompt": "What is shown, what is heard, and what is said?", "tag": "VAS"}
        row |= {"video": "clip.mp4", "audio": "clip.mp4", "subtitle": "clip.srt"}
        prompt = ask.encode(row)
        assert {"video", "audio"} <= set(prompt.kinds) and prompt.media_tokens["subtitle"] > 0
        assert answer.startswith(greedy(model.eval(), processor, ask, row, 12))


# From the folder of a run that has ended


def test_a_finished_run_is_pushed_with_what_was_measured(hub, run, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert cli.main(["push", str(run), "me/finished", "--private", "--license", "mit", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert KEY not in out + err + caplog.text and hub.repositories["me/finished"].private
    assert told["url"].startswith(hub.endpoint) and "training.png" in told["files"] and not told["own_card"]
    assert {path: path.read_bytes() for path in before} == before  # nothing in the folder is changed
    card = card_of(hub, "me/finished")
    assert card.data.license == "mit" and card.data.model_name == "me/finished"
    assert '"me/finished",' in snippet(card) and "![Curves of training](training.png)" in card.text
    summary = json.loads((run / "summary.json").read_text())
    values = {one.metric_name: one.metric_value for one in card.data.eval_results if one.metric_type == "accuracy"}
    assert values == {
        "accuracy" if tag == "all" else f"accuracy {tag}": round(value, 4) for tag, value in summary["after"].items()
    }
    for tag, value in summary["after"].items():
        (cells,) = re.findall(rf"^\| {tag} \| (.+) \|$", card.text, re.MULTILINE)
        told, low, high, questions = cells.split(" | ")
        assert float(told) == pytest.approx(value, abs=5e-4) and float(low) <= value <= float(high)
        assert int(questions) == summary["questions"][tag]


def test_an_evaluation_within_the_run_is_in_the_card(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "rollouts", "summary.json"))

    def evaluate(model, name, *more):
        words = ["--dataset-name", str(run.parent / "media"), "--media-root", str(run.parent / "media")]
        words += ["--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "4", "--limit", "14", *more]
        assert cli.main(["eval", "--model", str(model), *words, "--output", str(tmp_path / "run" / name)]) == 0
        return json.loads((tmp_path / "run" / name / "result.json").read_text())

    result = evaluate(tmp_path / "run", "eval")
    shutil.copytree(tmp_path / "run/eval", tmp_path / "run/of-another")
    foreign = result | {"model": result["model"] | {"name": "builtin:tiny-omni", "adapter": None}}
    (tmp_path / "run/of-another/result.json").write_text(json.dumps(foreign))
    facts = CardFacts.read(tmp_path / "run")
    card = render_model_card(facts, tmp_path / "run")
    found = result["accesses"]["required"]["accuracy"]
    for tag, one in [*found["per_tag"].items(), ("all", found["sample_mean"])]:
        line = f"| {tag} | {one['value']:.3f} | "
        assert card.text.count(line) == 1, (tag, card.text)
    assert f"| {found['sample_mean']['count']} | {found['sample_mean']['clips']} |" in card.text
    assert "split `test`" in card.text and "a local set, required" in card.text and str(tmp_path) not in str(card)
    assert ", sampled answers (temperature 1), 5 to each question, seed 0, intervals of 95%" in card.text

    def told(asking, **counts):
        """How the card tells of the same evaluation with other options, or samples with other notes."""
        required = result["accesses"]["required"]
        required = required | {"completions": required["completions"] | counts}
        changed = result | {"asking": result["asking"] | asking, "accesses": {"required": required}}
        (tmp_path / "run/eval/result.json").write_text(json.dumps(changed))
        return read_evaluation(tmp_path / "run/eval")[0].how

    assert ", greedy answers, seed 0" in told({"temperature": 0.0, "samples": 1})
    cut = {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    assert "(temperature 0.8, top_p 0.95, top_k 20, min_p 0.1)" in told(cut)
    # A model behind a server that takes no temperature is not greedy, whatever was asked for.
    refused = {"note:model-default-temperature": 1, "note:model-default-top_p": 1}
    once = {"temperature": 0.0, "samples": 1}
    assert ", sampled answers (the model's own temperature and top_p), seed" in told(once, **refused)


def test_a_card_that_a_person_wrote_stays(hub, run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "rollouts"))
    text = (run / "README.md").read_text().replace("# run", "# My model")
    (tmp_path / "run/README.md").write_text(text)
    pushed = push_model(tmp_path / "run", "me/own", license="mit")
    assert pushed.own_card and hub.files("me/own")["README.md"].decode() == text


def test_a_base_model_that_is_known_by_a_path_can_be_named(hub, run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "rollouts"))
    for name in ("adapter_config.json", "model_card.json"):
        path = tmp_path / "run" / name
        path.write_text(re.sub(r"\"[^\"]*assets/tiny-omni\"", f'"{tmp_path}/models/base"', path.read_text()))
    (tmp_path / "models/base").mkdir(parents=True)
    push_model(tmp_path / "run", "me/unnamed")
    card = card_of(hub, "me/unnamed")
    assert "base_model" not in card.data.to_dict() and "one without a public name" in card.text
    assert 'base_model="BASE_MODEL"' in snippet(card)
    assert json.loads(hub.files("me/unnamed")["adapter_config.json"])["base_model_name_or_path"] is None
    push_model(tmp_path / "run", "me/named", base_model="Qwen/Qwen2.5-Omni-7B")
    card = card_of(hub, "me/named")
    assert card.data.base_model == "Qwen/Qwen2.5-Omni-7B" and card.data["base_model_relation"] == "adapter"
    assert "[Qwen/Qwen2.5-Omni-7B](https://huggingface.co/Qwen/Qwen2.5-Omni-7B)" in card.text
    named = json.loads(hub.files("me/named")["adapter_config.json"])
    assert named["base_model_name_or_path"] == "Qwen/Qwen2.5-Omni-7B"
    with pytest.raises(
        checkpoints.CheckpointError, match="me/unnamed does not say which model the adapter belongs to"
    ):
        OmniPipeline.from_pretrained("me/unnamed")


# Merged, with a connection that breaks


@pytest.fixture(scope="module")
def merged(run):
    folder = run.parent / "merged"
    assert cli.main(["export", str(run), str(folder), "--max_shard_size", "500KB", "--license", "mit"]) == 0
    return folder


def test_an_upload_goes_on_where_the_connection_broke(hub, merged, at_once, capsys):
    import hashlib

    shards = sorted(merged.glob("*.safetensors"))
    assert len(shards) >= 3
    blobs = {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in shards}
    stuck = next(blob for blob, name in blobs.items() if name == shards[1].name)
    hub.broken_uploads.add(stuck)
    assert cli.main(["push", str(merged), "me/merged"]) == 2
    assert "maple-trl push: cannot upload to me/merged: " in capsys.readouterr().err
    assert not hub.files("me/merged") and stuck not in hub.blobs  # nothing half
    assert len(blobs.keys() & hub.blobs.keys()) == len(shards) - 1
    tried = [path for method, path, _ in hub.requests if path == f"/_lfs/{stuck} broken"]
    assert len(tried) > 1  # it was tried again by itself
    hub.broken_uploads.clear()
    before = len(hub.requests)
    assert cli.main(["push", str(merged), "me/merged"]) == 0
    sent = [path for method, path, _ in hub.requests[before:] if method == "PUT"]
    assert sent == [f"/_lfs/{stuck}"]
    assert {path.name for path in shards} < set(hub.files("me/merged"))


def test_a_download_goes_on_where_the_connection_broke(hub, merged, run, at_once, tmp_path):
    if "me/merged" not in hub.repositories:
        push_model(merged, "me/merged")
    hub.broken_downloads = 3
    ask = OmniPipeline.from_pretrained("me/merged", dtype="float32", num_frames=4, max_pixels=3136)
    assert hub.broken_downloads == 0
    mine = load_model(str(merged)).state_dict()
    theirs = ask.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    adapted, processor = load_whole(str(run), dtype="float32")
    clips_beside(tmp_path, run)
    with chdir(tmp_path):
        names = {}
        exec(compile(snippet(card_of(hub, "me/merged")), "README.md", "exec"), names)
        row = {"prompt": "What is shown, what is heard, and what is said?", "tag": "VAS"}
        row |= {"video": "clip.mp4", "audio": "clip.mp4", "subtitle": "clip.srt"}
        assert names["answer"].startswith(greedy(adapted.eval(), processor, names["ask"], row, 12))


def test_a_merged_model_has_its_card_with_what_was_measured(hub, merged, run):
    card = ModelCard.load(merged / "README.md")
    assert card.data.library_name == "transformers" and card.data.license == "mit" and "lora" not in card.data.tags
    assert card.data.eval_results and "| VAS |" in card.text and "- **Trained with**: MAPO" in card.text
    assert "An omni-modal language model." in card.text and str(run.parent) not in str(card)
    if "me/merged" in hub.repositories:
        assert "| VAS |" in card_of(hub, "me/merged").text


# Strategies, and a hub that goes away


def text_trainer(folder, **options):
    """A trainer of two steps on text, for what has nothing to do with media."""
    model, tokenizer = build_tiny_text()
    rows = Dataset.from_list([{"prompt": "which word", "completion": " one"}] * 4)
    shared = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    args = OmniSFTConfig(str(folder), **(QUIET_ON_CPU | shared | options))
    return OmniSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


STRATEGIES = {
    "end": set(),
    "every_save": set(),
    "checkpoint": {"last-checkpoint"},
    "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.matrix(cases=2)
def test_each_strategy_publishes_what_it_says(hub, strategy, tmp_path):
    repository = f"me/{strategy}"
    trainer = text_trainer(
        tmp_path / "run", push_to_hub=True, hub_model_id=repository, hub_strategy=strategy, hub_always_push=True
    )
    trainer.train()
    if strategy == "end":
        assert not hub.files(repository)
    trainer.push_to_hub(commit_message="done")
    files = hub.files(repository)
    assert {name.partition("/")[0] for name in files if "/" in name} == STRATEGIES[strategy]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    commits = len(hub.repositories[repository].commits) - 1  # the first is empty
    assert commits == {"end": 1, "every_save": 3, "checkpoint": 5, "all_checkpoints": 5}[strategy]
    now = load(files["model.safetensors"])["model.norm.weight"]
    assert torch.equal(now, trainer.model.model.norm.weight)
    if strategy == "all_checkpoints":  # each is that of its step
        first, last = (load(files[f"checkpoint-{step}/model.safetensors"])["model.norm.weight"] for step in (1, 2))
        assert torch.equal(last, now) and not torch.equal(first, last)
    card = card_of(hub, repository)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert 'model="' + repository + '"' in card.text and "Omni SFT" in card.text
    assert not trainer.publisher.failures


def test_a_hub_that_goes_away_costs_no_result(tmp_path, monkeypatch, at_once, caplog):
    with taken_for_the_hub(monkeypatch, tmp_path / "cache", KEY) as own:
        trainer = text_trainer(
            tmp_path / "run", push_to_hub=True, hub_model_id="me/lost", hub_strategy="every_save", hub_always_push=True
        )
    assert own.repositories.keys() == {"me/lost"}
    monkeypatch.setattr(checkpoints, "_reached", set())
    trainer.train()  # to its end
    assert trainer.state.global_step == 2 and trainer.publisher.failures
    assert "me/lost: an upload failed, and training goes on: " in caplog.text
    with pytest.raises(PublishError, match="push_to_hub: .* cannot be reached"):
        trainer.save_model(str(tmp_path / "run"))
    unpublished = jobs._save(trainer)
    assert f"The run is whole in {tmp_path / 'run'}: `maple-trl push {tmp_path / 'run'} REPO_ID`" in str(unpublished)
    assert "\n" not in str(unpublished) and KEY not in str(unpublished) + caplog.text
    saved = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(saved["model.norm.weight"], trainer.model.model.norm.weight)
    with taken_for_the_hub(monkeypatch, tmp_path / "cache", KEY) as own:
        assert cli.main(["push", str(tmp_path / "run"), "me/found"]) == 0
        assert torch.equal(
            load(own.files("me/found")["model.safetensors"])["model.norm.weight"], saved["model.norm.weight"]
        )


@pytest.mark.parametrize(
    ("folder", "repository", "message"),
    [
        ("run", "run", "'run' is no id of a repository; write OWNER/NAME"),
        ("run", "./me/run", "'./me/run' is no id of a repository; write OWNER/NAME"),
        ("absent", "me/x", "there is no folder "),
        (
            "empty",
            "me/x",
            "holds no model: there must be config.json or adapter_config.json, and weights as safetensors",
        ),
        ("checkpoints", "me/x", "holds no model: .*; its checkpoints are: checkpoint-1, checkpoint-2"),
        ("shards", "me/x", "lacks model-00002-of-0000"),
    ],
)
def test_what_is_no_model_is_refused_by_name(hub, run, merged, tmp_path, capsys, folder, repository, message):
    places = {"run": run, "absent": tmp_path / "absent", "empty": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    if folder == "checkpoints":
        places[folder] = tmp_path / "own"
        for step in (1, 2):
            (tmp_path / f"own/checkpoint-{step}").mkdir(parents=True)
    if folder == "shards":
        places[folder] = tmp_path / "merged"
        shutil.copytree(merged, tmp_path / "merged", ignore=shutil.ignore_patterns("model-00002*"))
    known = set(hub.repositories)
    assert cli.main(["push", str(places[folder]), repository]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and set(hub.repositories) == known


def test_without_a_hub_one_line_says_so(run, tmp_path, monkeypatch, capsys):
    with local_hub() as closed:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed.endpoint)
    monkeypatch.setattr(checkpoints, "_reached", set())
    assert cli.main(["push", str(run), "me/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maple-trl push: cannot upload to me/x: {closed.endpoint} cannot be reached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["push", str(run), "me/x"]) == 2
    assert capsys.readouterr().err == "maple-trl push: cannot upload to me/x: HF_HUB_OFFLINE is set\n"
    # A job says it before its first step.
    words = ["--dataset_name", str(run.parent / "media"), "--media_root", str(run.parent / "media")]
    assert cli.main(["train", *OPTIONS, *words, "--output_dir", str(tmp_path / "new")]) == 2
    assert "push_to_hub: cannot make the repository: HF_HUB_OFFLINE is set" in capsys.readouterr().err.splitlines()[-1]


def test_a_key_that_may_not_write_is_told_without_it(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert cli.main(["push", str(run), "me/refused"]) == 2
    err = capsys.readouterr().err
    assert "the Hub refuses it (HTTP 401): is there a key that may write" in err and "hf_other" not in err


def test_a_processor_of_the_hub_is_read(hub, run):
    """The published folder is whole: processor and template are those of the run."""
    mine, theirs = load_processor(str(run)), load_processor("me/run")
    assert mine.chat_template == theirs.chat_template and mine.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_the_commands_of_the_docs_run(hub, run, tmp_path, capsys):
    """`docs/hub.md`, as it stands there; the model of its last export is a tiny one under the published name."""
    text = (ROOT / "docs/hub.md").read_text()
    original = layouts.published(tmp_path / "original", "qwen2_5_omni")
    name = "Qwen/Qwen2.5-Omni-7B"
    hub.publish(name, {path.name: path.read_bytes() for path in original.iterdir()})
    shutil.copytree(run, tmp_path / "runs/demo")
    assert "max_steps: 200" in (ROOT / "recipes/demo.yaml").read_text()  # the last checkpoint of `make demo`
    (tmp_path / "runs/demo/checkpoint-2").rename(tmp_path / "runs/demo/checkpoint-200")
    model, processor = build_tiny("qwen2_5_omni")
    model.name_or_path = model.config._name_or_path = name
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "runs/lora")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 5
    with chdir(tmp_path):
        for command in commands:
            program, *words = shlex.split(command)
            assert program == "maple-trl" and cli.main(words) == 0, command
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        capsys.readouterr()
        exec(compile(code, "docs/hub.md", "exec"), {})
        assert capsys.readouterr().out.strip()
        answers = load_model("exported/full"), load_whole("runs/lora")[0].merge_and_unload()
        assert all(
            torch.allclose(one, other, atol=1e-6)
            for one, other in zip(*(model.state_dict().values() for model in answers), strict=True)
        )
    card = ModelCard.load(tmp_path / "exported/full/README.md")
    assert card.data.base_model == name and card.data["base_model_relation"] == "finetune"
    assert "step-200" in hub.repositories["me/demo"].branches and hub.repositories["me/demo"].private
    assert "2 steps" in hub.files("me/demo", "step-200")["README.md"].decode()


def test_relative_paths_are_not_taken_for_names_on_the_hub_from_elsewhere(tmp_path):
    shutil.copytree(resolve_checkpoint("builtin:tiny-omni"), tmp_path / "runs" / "sft")
    rows = copy_small_set(tmp_path / "data" / "rows")
    for split in ("train", "test"):
        rows.to_json(tmp_path / "data" / "rows" / f"{split}.jsonl")
    words = "--trainer omni_sft --completion_template <answer>{solution}</answer> --model_name_or_path runs/sft --output_dir runs/rl "
    words += (
        "--dataset_name data/rows --media_root data/rows --use_cpu true --bf16 false --dtype float32 --report_to none "
    )
    words += (
        "--use_peft true --lora_r 2 --max_steps 1 --max_pixels 3136 --num_frames 4 --gradient_checkpointing false "
    )
    words += "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --save_strategy steps --save_steps 1 "
    words += "--evaluate_before_after true --eval_questions_per_tag 1 --report false"
    with chdir(tmp_path):
        assert cli.main(["train", *words.split()]) == 0
    assert (
        json.loads((tmp_path / "runs" / "rl" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "runs/sft"
    )
    (tmp_path / "elsewhere").mkdir()
    with chdir(tmp_path / "elsewhere"):  # where neither is
        for folder in (tmp_path / "runs" / "rl", tmp_path / "runs" / "rl" / "checkpoint-1"):
            card = str(render_model_card(CardFacts.read(folder), folder))
            assert "runs/sft" not in card and "data/rows" not in card, card
            (config,) = [one for one in check_upload(folder, "me/rl") if one.path_in_repo == "adapter_config.json"]
            assert json.loads(config.path_or_fileobj)["base_model_name_or_path"] is None
