"""
The commands of README and of the pages run as they stand there, page by page (those that take long: test_docs_commands_long.py).

What cannot be run is held against what it names: a make target is run dry, extras are those of setup.cfg, files of the repository
exist, and every option is one that the command's own help shows.
"""

import ast
import configparser
import contextlib
import functools
import io
import re
import shlex
import subprocess

import pytest
from page_commands import ALL, LONG, NOT_RUN, commands, follow, reason_not_to_run
from page_readers import HAS, ROOT

from maple_trl.cli import main


@pytest.mark.parametrize("page", [page for page in HAS if page not in LONG])
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    assert follow(page, tmp_path, monkeypatch) == []


# What is not run


@functools.cache
def shown(command):
    """What the help of a command of maple-trl shows."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main([command, "--help-all" if command == "train" else "--help"])
    return told.getvalue()


def faults(command):
    """What a command names that there is not."""
    words = shlex.split(command)
    files = (word for word in words if re.match(r"(recipes|examples|benchmarks|scripts)/", word))
    told = [f"no file {word}" for word in files if not (ROOT / word).exists()]
    if "maple_trl.cli" in words:  # behind a launcher
        words = ["maple-trl", *words[words.index("maple_trl.cli") + 1 :]]
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        told += [done.stderr] * (done.returncode != 0)
    elif words[:2] == ["pip", "install"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        named = {name.strip() for extras in re.findall(r"\[(.+?)\]", command) for name in extras.split(",")}
        told += [f"no extra {name}" for name in named - set(setup["options.extras_require"])]
    elif words[0] == "maple-trl":
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        told += [f"no option {one}" for one in sorted(options) if not re.search(rf"{one}(?!\w)", shown(words[1]))]
    return told


def test_what_is_not_run_names_what_there_is():
    left_out = [command for page in ALL.values() for command in page if reason_not_to_run(command)]
    told = {command: faults(command) for command in left_out}
    assert {command: found for command, found in told.items() if found} == {}


def test_what_is_not_run_has_a_reason_and_a_test_of_its_like():
    every = [command for page in ALL.values() for command in page]
    assert [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, command) for command in every)] == []
    assert sum(reason_not_to_run(command) is None for command in every) > 75
    for reason, test in NOT_RUN.values():
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert reason and name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_a_page_with_commands_says_what_its_reader_has():
    run = {page for page, found in ALL.items() if any(reason_not_to_run(command) is None for command in found)}
    assert set(HAS) == run and set(HAS) > LONG


# Negative controls

# Each command with what is said of it, or with nothing where it works.
TRIED = {
    "maple-trl data convert humanomni data/intent_train data/rows": "",
    "maple-trl data validate data/rows --media_root data/intent_train": "",
    "maple-trl data convert humanomni data/intent_train data/rows ": "is there already",  # once more
    "maple-trl data validate nowhere/rows": "there is no table nowhere/rows",
    "maple-trl plan --model Qwen/Qwen2.5-Omni-3B --gpu H300": "gpu 'H300' is not known",
    "maple-trl eval --model_name_or_path NAME --dataset_name data/rows --output_dir runs/eval": "it has train",
    "maple-trl completion bash > nowhere/maple-trl": "No such file or directory",
    "source <(maple-trl completion fish)": "invalid choice: 'fish'",
    "printf told > /dev/null": "wrote no ['/dev/null']",
    "printf told --dry_run > told.txt": "a dry run wrote ['told.txt']",
    "maple-trl sing --loud": "there is no command sing",
}


def test_commands_that_do_not_work_are_found(tmp_path, monkeypatch):
    text = "\n".join(["```console", *(f"$ {command}" for command in TRIED), "3 songs", "```"])
    told = follow("docs/moving.md", tmp_path, monkeypatch, text)
    for found, said in zip(told, filter(None, TRIED.values()), strict=True):
        assert said in found


def test_commands_are_read_from_blocks():
    text = "```bash\nmaple-trl sing --loud   # a song\nmaple-trl eval \\\n    --louder 1 && make nothing\n```\n"
    text += "```console\n$ maple-trl env\n3 rows\n```\n```text\nmaple-trl nothing\n```\n"
    assert commands(text) == ["maple-trl sing --loud", "maple-trl eval --louder 1", "make nothing", "maple-trl env"]


def test_what_is_not_there_is_found_in_what_is_not_run():
    assert faults("make nothing") and faults("pip install -e '.[none]'") == ["no extra none"]
    assert faults("python benchmarks/nothing.py") == ["no file benchmarks/nothing.py"]
    assert faults("maple-trl vllm-serve --model NAME --louder 1") == ["no option --louder"]
