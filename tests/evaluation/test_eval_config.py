"""`maple-trl eval --config`: what files say, what the command line says, and what is refused."""

import json
import os
from types import SimpleNamespace

import pytest
import yaml

from maple_trl import cli
from maple_trl.cli.eval import read_job
from maple_trl.jobs.errors import SetupError


def settled(*words):
    """An evaluation as it is understood, all of its options at hand."""
    job = read_job([str(word) for word in words])
    return SimpleNamespace(**(vars(job.media) | vars(job.options) | vars(job)))


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


JUDGE = {"reward": "caption_judge", "server": {"model": "m", "base_url": "http://127.0.0.1:8000/v1"}}
BASE = {"model": "m", "data": "d", "output": "o"}


def test_without_a_file_all_is_as_the_help_says():
    options = vars(settled("--model", "m", "--data", "d", "--output", "o"))
    assert options["samples"] == 5 and options["access"] == ("required",) and options["temperature"] == 1.0
    assert options["generation"] == {} and options["quiet"] is False and options["audio_in_video"] is False
    assert options["num_frames"] == 8 and settled("--model", "m", "--data", "d", "--output", "o").reward_funcs


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path / "e.yaml", **BASE, samples=3, temperature=0.5, quiet=True, generation={"seed_": 1})
    options = settled("--samples", "2", "--config", file, "--output", "elsewhere")
    assert (options.samples, options.temperature, options.quiet, options.output_dir) == (2, 0.5, True, "elsewhere")
    assert options.generation == {"seed_": 1} and options.batch_size == 8
    # A value that is the default counts as given, too.
    assert settled("--config", file, "--samples", "5").samples == 5


def test_files_build_on_files(tmp_path):
    (tmp_path / "more").mkdir()
    write(tmp_path / "base.yaml", **BASE, samples=3, seed=4, env={"MAPLE_TEST_VARIABLE": 7})
    file = write(tmp_path / "more" / "e.yaml", extends="../base.yaml", samples=2, seed=None)
    options = settled("--config", file)
    assert (options.samples, options.seed, options.model_name_or_path) == (2, 0, "m")
    assert os.environ.pop("MAPLE_TEST_VARIABLE") == "7"


def test_values_are_read_as_on_the_command_line(tmp_path):
    keys = {
        "access": ["V", "required"],
        "filter": {"tag": ["V"]},
        "max_pixels": "3136",
        "top_p": 1,
        "confidence": "9e-1",
    }
    options = settled("--config", write(tmp_path / "e.yaml", **BASE, **keys, judge=JUDGE))
    assert options.access == ("V", "required") and options.dataset_filter == {"tag": ["V"]}
    assert options.max_pixels == 3136 and options.top_p == 1.0 and options.confidence == 0.9
    assert options.reward_funcs == [JUDGE]
    assert settled("--config", tmp_path / "e.yaml", "--judge", json.dumps(JUDGE)).reward_funcs == [json.dumps(JUDGE)]


def test_a_report_may_be_named_or_asked_for(tmp_path):
    for value, wanted in ((True, ""), (False, None), ("r.html", "r.html")):
        assert settled("--config", write(tmp_path / "e.yaml", **BASE, report=value)).report == wanted
    assert settled("--report", "--config", write(tmp_path / "e.yaml", **BASE)).report == ""


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sample": 3}, "unknown key 'sample'; did you mean samples?"),
        ({"num-frames": 3}, "unknown key 'num-frames'; did you mean num_frames?"),
        ({"learning_rate": 3}, "unknown key 'learning_rate'"),
        ({"config": "x"}, "unknown key 'config'"),
        ({"samples": 2.5}, "samples must be a whole number, got 2.5"),
        ({"samples": True}, "samples must be a whole number, got True"),
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        ({"quiet": "perhaps"}, "quiet must be true or false, got 'perhaps'"),
        ({"missing_media": "drop"}, "missing_media must be one of 'keep', 'leave_out', 'error', got 'drop'"),
        ({"generation": [1]}, "generation: must be a mapping of names to values, got .1."),
        ({"generation": "3"}, "generation: must be a JSON object, got 3"),
        ({"env": [1]}, "env must be a mapping"),
        ({"extends": "nowhere.yaml"}, "extends .*nowhere.yaml: cannot read the config file"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused(tmp_path, keys, message):
    with pytest.raises(SetupError, match=f"e.yaml: .*{message}" if "extends" in keys else f"e.yaml: {message}"):
        settled("--config", write(tmp_path / "e.yaml", **BASE, **keys))


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(SetupError, match="^--model_name_or_path is missing$"):
        settled("--data", "d")
    file = write(tmp_path / "e.yaml", model="m", data="d")
    with pytest.raises(SetupError, match="--output_dir is missing, and .*e.yaml does not hold output_dir either"):
        settled("--config", file)
    assert cli.main(["eval", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the config file" in capsys.readouterr().err
    (tmp_path / "twice.yaml").write_text("model: a\nmodel: b\n")
    with pytest.raises(SetupError, match="line 2: 'model' is given twice"):
        settled("--config", tmp_path / "twice.yaml")


def test_a_file_gives_the_same_numbers_as_the_command_line(tmp_path):
    words = ["--limit", "3", "--samples", "2", "--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "14"]
    words += ["--access", "V,required", "--filter", '{"tag":["V"]}', "--quiet"]
    named = ["--model", "builtin:tiny-omni", "--data", "builtin:seven-tags"]
    assert cli.main(["eval", *named, *words, "--output", str(tmp_path / "words")]) == 0
    keys = {"limit": 3, "samples": 2, "num_frames": 4, "max_pixels": 3136, "max_new_tokens": 14, "quiet": True}
    keys |= {"access": ["V", "required"], "filter": {"tag": ["V"]}, "model": named[1], "data": named[3]}
    file = write(tmp_path / "e.yaml", **keys, output=str(tmp_path / "file"))
    assert cli.main(["eval", "--config", str(file)]) == 0
    assert (tmp_path / "file" / "result.json").read_bytes() == (tmp_path / "words" / "result.json").read_bytes()
