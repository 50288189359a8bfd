"""`maple-trl eval --preset`: what it sets, what wins over it, and what is said of it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from eval_runs import MODEL, evaluate, lines_of, result_of

from maple_trl.cli.eval import read_job
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.benchmarks import BENCHMARKS
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.eval_presets import PRESETS
from maple_trl.metrics.answers import ANSWER_METRICS


DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BASE = ["--model", "m", "--data", "d", "--output", "o"]


def settled(*words):
    job = read_job([*BASE, *map(str, words)])
    return SimpleNamespace(**(vars(job.media) | vars(job.options) | vars(job)))


def table(title):
    """The rows of the table under a heading cell, as lists of cells without marks."""
    lines = DOCS[DOCS.index(f"| {title} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[cell.strip("`") for cell in row] for row in (cells[0], *cells[2:])]


def shown(value):
    return "–" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def test_the_tables_of_the_documentation_are_the_code():
    (_, *names), *rows = table("option")
    assert names == list(PRESETS)
    for name, column in zip(names, zip(*(row[1:] for row in rows), strict=True), strict=True):
        assert dict(zip((row[0] for row in rows), column, strict=True)) == {
            option: shown(PRESETS[name].options.get(option)) for option in (row[0] for row in rows)
        }
    assert {row[0] for row in rows} == {option for preset in PRESETS.values() for option in preset.options}
    told = {row[0]: dict(re.findall(r"`?(\w+)`? ([\w.]+)", row[1])) for row in table("benchmark")[1:]}
    own = {name: {k: shown(v) for k, v in values.items()} for name, values in PRESETS["avatar"].of_benchmark.items()}
    assert told == own
    # Negative control: a table that was changed is noticed.
    assert told != {**own, "lvbench": {"tags": "V"}}


def test_presets_name_benchmarks_and_options_that_there_are():
    for name, preset in PRESETS.items():
        assert set(preset.of_benchmark) <= set(BENCHMARKS)
        for benchmark in (None, "worldsense", *preset.of_benchmark):
            words = [] if benchmark is None else ["--benchmark", benchmark]
            options = vars(settled("--preset", name, *words))
            values = preset.values(benchmark)
            if benchmark is not None:
                values.pop("prompt_template", None)  # of tables
            assert {option: options[option] for option in values} == values and options["set_by_preset"] == values
    assert {row[0] for row in table("answer_metric")[1:]} == set(ANSWER_METRICS)


def test_published_decoding():
    for name, temperature, top_p in (("maple-qa", 0.6, 0.95), ("maple-caption", 0.7, 0.9)):
        options = settled("--preset", name)
        assert (options.temperature, options.top_p, options.max_new_tokens) == (temperature, top_p, 2048)
        assert (options.samples, options.num_frames) == (5, 32)
    options = settled("--preset", "avatar", "--benchmark", "videomme")
    assert (options.temperature, options.samples, options.num_frames, options.max_new_tokens) == (0, 1, 32, 64)
    assert options.tags == ["VA"] and settled("--preset", "avatar").tags is None
    # Negative control: without it, all is as it was.
    plain = settled()
    assert (plain.temperature, plain.samples, plain.num_frames, plain.set_by_preset) == (1.0, 5, 8, {})


def test_what_is_given_wins(tmp_path):
    options = settled("--preset", "avatar", "--num-generations", "3", "--temperature", "1.0", "--num_frames=4")
    assert (options.samples, options.temperature, options.num_frames) == (3, 1.0, 4)
    assert set(PRESETS["avatar"].options) - set(options.set_by_preset) == {"samples", "temperature", "num_frames"}
    # A value that is the default counts as given, too; so do files, whose empty keys give nothing.
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump({"preset": "maple-qa", "max_completion_length": 512, "top_p": None}))
    options = settled("--config", file)
    assert (options.max_new_tokens, options.top_p, options.temperature) == (512, 0.95, 0.6)
    assert settled("--config", file, "--preset", "avatar").temperature == 0
    options = settled("--preset", "avatar", "--video_fps", "1")
    assert (options.num_frames, options.video_fps) == (None, 1) and "num_frames" not in options.set_by_preset
    options = settled("--preset", "avatar", "--server", "http://127.0.0.1:9/v1")  # which says these itself
    assert not options.audio_in_video and options.temperature == 0
    with pytest.raises(SetupError, match="there is no preset 'mapel-qa'; there are maple-qa, maple-caption, avatar"):
        settled("--preset", "mapel-qa")


@pytest.mark.slow
def test_a_preset_is_printed_and_kept(tmp_path, capsys):
    clip = tmp_path / "video" / "clevrer" / "video_validation" / "one.mp4"
    clip.parent.mkdir(parents=True)
    shutil.copy(default_folder() / load_seven_tags()["test"][0]["video"], clip)
    (tmp_path / "json").mkdir()
    record = {"video": "one.mp4", "question": "Is it red?", "candidates": ["yes", "no"], "answer": "no"}
    (tmp_path / "json" / "object_existence.json").write_text(json.dumps([record]))
    words = [*MODEL, "--preset", "avatar", "--benchmark", "mvbench", "--data", tmp_path, "--quiet"]
    assert evaluate(*words, "--output", tmp_path / "out") == 0
    assert "preset avatar set temperature 0.0, samples 1, audio_in_video True" in capsys.readouterr().out
    found, (line,) = result_of(tmp_path / "out"), lines_of(tmp_path / "out")
    assert found["preset"]["name"] == "avatar" and found["preset"]["set"]["tags"] == ["VA"]
    assert not {"num_frames", "max_new_tokens"} & set(found["preset"]["set"])  # of MODEL
    assert found["asking"]["temperature"] == 0 and found["data"]["tags"] == ["VA"]
    # With its sound, and asked for the answer alone.
    assert line["fed"] == "VA" and line["audio_tokens"] > 0 and line["prompt"].endswith("<answer>LETTER</answer>")
    assert line["id"].endswith("-VA") and "<think>" not in line["prompt"]
    # Another evaluation is not mixed in.
    assert evaluate(*words, "--tags", "V", "--output", tmp_path / "out") == 2
    assert "data.tags: ['VA'], not ['V']" in capsys.readouterr().err
    assert evaluate(*words, "--tags", "S", "--output", tmp_path / "none") == 2
    assert "mvbench holds no row: 1 left out" in (said := capsys.readouterr().err) and "tag S needs subtitle" in said
    assert evaluate(*words, "--tags", "V", "VA", "--output", tmp_path / "both") == 0
    assert [line["fed"] for line in lines_of(tmp_path / "both")] == ["V", "VA"]


def test_tags_are_for_benchmarks(tmp_path, capsys):
    words = [*MODEL, "--data", "builtin:seven-tags", "--tags", "VA", "--output", tmp_path]
    assert evaluate(*words) == 2
    assert "--tags gives the questions of a benchmark other signals" in capsys.readouterr().err
    words = [*MODEL, "--data", tmp_path, "--benchmark", "mvbench", "--tags", "XY", "--output", tmp_path / "out"]
    assert evaluate(*words) == 2 and "'XY' is not a modality tag" in capsys.readouterr().err


def test_answers_of_a_table_are_read_as_the_style_has_them(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Answer as [LETTER]."}], "solution": "B", "id": "one"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    words = [*MODEL, "--preset", "maple-qa", "--samples", "1", "--data", tmp_path, "--quiet", "--output"]
    assert evaluate(*words, tmp_path / "out") == 0
    scored = result_of(tmp_path / "out")["scoring"]
    assert scored["score"]["entry"] == {"reward": "accuracy_reward", "answer_format": "brackets"}
    assert scored["parser"]["name"].endswith(":extract_bracketed")


def test_a_table_is_asked_as_published(tmp_path, capsys):
    """As the recipes ask it, whether it has prompts of another form or none; and read in the form that was asked for."""
    style = "Answer in this form: <answer>LETTER</answer>"
    row = {"id": "one", "question": "Who sings?", "options": ["a", "b"], "solution": "B"}
    tables = {"none": row, "other": row | {"prompt": [{"role": "user", "content": style}]}}
    media = {"video": str(default_folder() / load_seven_tags()["test"][0]["video"]), "tag": "V"}
    words = [*MODEL, "--samples", "1", "--quiet", "--media_root", default_folder()]

    def asked(name, *more):
        (tmp_path / "test.jsonl").write_text(json.dumps(tables[name] | media) + "\n")
        out = tmp_path / f"{name}{len(more)}"
        assert evaluate(*words, *more, "--data", tmp_path, "--output", out) == 0
        found, (line,) = result_of(out), lines_of(out)
        return found["preset"]["set"], line["prompt"], found["scoring"]["parser"]["name"]

    for name in tables:
        settings, prompt, parser = asked(name, "--preset", "maple-qa")
        assert settings["prompt_template"] == "maple-qa" and "B. b" in prompt and "<answer>" not in prompt
        assert prompt.rstrip().endswith("in square brackets.") and parser.endswith(":extract_bracketed")
    # Who names a style keeps the rows' prompts.
    settings, prompt, parser = asked("other", "--preset", "maple-qa", "--prompt_style", "answer")
    assert "prompt_template" not in settings and style in prompt and parser.endswith(":extract_answer")
    # Negative control: without the preset, a table without prompts is refused.
    (tmp_path / "test.jsonl").write_text(json.dumps(row | media) + "\n")
    assert evaluate(*words, "--data", tmp_path, "--output", tmp_path / "bare") == 2
    assert "has no column 'prompt'" in capsys.readouterr().err
    assert settled("--preset", "maple-caption").prompt_template == "maple-caption"
    assert settled("--preset", "maple-caption", "--benchmark", "mvbench").prompt_template is None
    assert settled("--preset", "maple-qa", "--prompt_template", "think").prompt_template == "think"
    kept = settled("--preset", "maple-qa", "--prompt_template", "null")
    assert kept.prompt_template is None and kept.prompt_style == "brackets"
