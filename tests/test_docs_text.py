"""What pages quote is in the code: messages of errors, badges, columns and options of others' words for ours, examples."""

import ast
import importlib.util
import inspect
import json
import re
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from maple_trl import AvatarConfig, MAPOConfig, MAPOTrainer, OmniGRPOConfig, __version__
from maple_trl.cli import main
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.jobs.model_config import OmniModelConfig
from maple_trl.jobs.options import OmniScriptArguments, parse_args
from maple_trl.omni.loading import resolve_checkpoint


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script(name):
    """A script, which may import another that stands beside it."""
    sys.path[:] = [str(ROOT / "scripts"), *(place for place in sys.path if place != str(ROOT / "scripts"))]
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block(text, language, nth=0):
    """The nth code block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[nth]


# Messages


def literals():
    """Every text of the package's sources, a line each; `\\0` stands for what is filled in."""
    told = []
    for path in (ROOT / "maple_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                told.append(re.sub(r"%[sdr]|%\.\d[gf]", "\0", node.value))
            elif isinstance(node, ast.JoinedStr):
                told.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
    return "\n".join(text.replace("\n", " ") for text in told)


def quoted(page):
    """The messages of the first columns of a page's tables."""
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def missing(messages, text):
    pattern = {message: "[^\n]*?".join(map(re.escape, message.split("…"))) for message in messages}
    return [message for message in messages if not re.search(pattern[message], text)]


def test_messages_of_troubleshooting_are_the_code_s():
    messages = quoted((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    text = literals()
    assert len(messages) > 50 and missing(messages, text) == []
    assert missing(["no such words … at all"], text) == ["no such words … at all"]


# README


def test_readme_is_a_first_screen():
    before, _, rest = README.partition("<!-- claims: begin -->")
    claims, _, after = rest.partition("<!-- claims: end -->")
    assert len((before + after).splitlines()) <= 125
    # Those with a verdict become more, which is why they are folded.
    assert 15 < len(re.sub(r"<details.*?</details>", "", claims, flags=re.DOTALL).splitlines()) <= 28
    local = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith(("http", "#"))]
    assert local and [link for link in local if not (ROOT / link.partition("#")[0]).exists()] == []
    pages = {f"docs/{page.name}" for page in DOCS.glob("*.md")} | {"examples/README.md", "notebooks/README.md"}
    assert pages - set(local) == set()


def test_badges_say_what_setup_cfg_says():
    badges = script("draw_badges")
    for file, fact in badges.facts().items():
        assert (DOCS / "badges" / f"{file}.svg").read_text(encoding="utf-8") == badges.draw(*fact), (
            "run: python scripts/draw_badges.py"
        )
    assert "[![python 3.11+]" in README and badges.facts()["python"][1] == "3.11+"
    assert "[![TRL 1.16]" in README and badges.facts()["trl"][1] == "1.16"


def test_the_jobs_of_readme_and_quick_start_are_read(tmp_path):
    for number, page in enumerate((README, (DOCS / "quickstart.md").read_text(encoding="utf-8"))):
        file = tmp_path / f"job-{number}.yaml"
        file.write_text(block(page, "yaml"), encoding="utf-8")
        _, training, model = parse_args(
            ["--config", str(file), "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]
        )
        assert isinstance(training, MAPOConfig) and model.use_peft and training.num_frames == 8


def test_the_three_lines_of_python_train(tmp_path, monkeypatch):
    """As they stand there, but for the model, sizes, and a step in the place of three epochs."""
    lines = block(README, "python")
    lines = lines.replace("Qwen/Qwen2.5-Omni-3B", resolve_checkpoint("builtin:tiny-omni")).replace(
        '"data"', repr(str(default_folder()))
    )
    small = "max_steps=1, per_device_train_batch_size=8, max_completion_length=4, max_pixels=3136, bf16=False, use_cpu=True, report_to='none', num_frames=4"
    rows = load_seven_tags()["train"].select(range(16))
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        MAPOTrainer,
        "on_optimizer_step",
        lambda self, step=MAPOTrainer.on_optimizer_step: (made.append(self), step(self))[1],
    )
    exec(lines.replace("num_frames=8", small), {"rows": rows})  # noqa: S102
    assert len(made) == 1 and made[0].state.global_step == 1


# Moving


def test_what_others_names_are_called_here_exists():
    page = (DOCS / "moving.md").read_text(encoding="utf-8")
    options = {field.name for config in (OmniGRPOConfig, MAPOConfig, AvatarConfig) for field in fields(config)}
    options |= set(ROW_FEATURES) | {"question_type", "omni_grpo", "stages"}
    options |= {field.name for config in (OmniModelConfig, OmniScriptArguments) for field in fields(config)}
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)(?::[^`]*)?`", row[-1])}
    assert len(named) > 30
    assert named - options - {"format_reward", "accuracy_reward", "stepwise_reasoning_judge"} == set()


def test_a_table_of_ms_swift_and_a_score_of_verl_become_ours(tmp_path, monkeypatch):
    page = (DOCS / "moving.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", "content": "B"}]
    Path("swift.jsonl").write_text(json.dumps({"messages": talk, "videos": ["clips/a.mp4"], "solution": "B"}) + "\n")
    Path("swift").mkdir()
    Path("swift.jsonl").rename("swift/swift.jsonl")
    (command,) = re.findall(r"`(maple-trl data convert sharegpt [^`]*)`", page)
    assert main(command.split()[1:]) == 0
    (row,) = Dataset.from_parquet([str(file) for file in Path("rows").rglob("*.parquet")])
    assert row["prompt"] == [talk[0] | {"content": "What moves?"}] and row["solution"] == "B"
    names = {}
    exec(block(page, "python", 1), names)  # noqa: S102
    assert names["reward"]([[{"role": "assistant", "content": "it is B"}], "A"], ["B", "B"]) == [1.0, 0.0]


# Reference


def reference():
    """The names that the reference's pages show."""
    return [
        name
        for path in sorted((DOCS / "reference").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)
    ]


def members(name):
    """What is public below a name of the reference: itself, and members of modules and classes that are ours."""
    parent, _, last = name.rpartition(".")
    try:
        thing = import_module(name)
    except ModuleNotFoundError:
        thing = getattr(import_module(parent), last)
    yield name, thing
    if inspect.ismodule(thing):
        public = getattr(thing, "__all__", None) or [
            key for key, value in vars(thing).items() if key[0] != "_" and getattr(value, "__module__", "") == name
        ]
        for key in public:
            value = getattr(thing, key)
            if callable(value):
                yield f"{name}.{key}", value
                yield from methods(f"{name}.{key}", value)
    else:
        yield from methods(name, thing)


def methods(name, thing):
    if inspect.isclass(thing) and thing.__module__.startswith("maple_trl"):
        for key, value in vars(thing).items():
            plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if key[0] != "_" and (inspect.isfunction(plain) or isinstance(value, property)):
                yield f"{name}.{key}", getattr(thing, key)


def undocumented(found):
    """Names without a docstring of their own or of what they override."""
    return [name for name, thing in found if not (inspect.getdoc(thing) or "").strip()]


def test_every_public_name_of_the_reference_has_a_docstring():
    found = [each for name in reference() for each in members(name)]
    assert len(found) > 150 and undocumented(found) == []


def test_a_name_without_a_docstring_is_found():
    class Bare:
        __module__ = "maple_trl.bare"

        def told(self):
            """Say it."""

        def untold(self):
            pass

    assert undocumented(methods("Bare", Bare)) == ["Bare.untold"]


@pytest.mark.parametrize("module", ["maple_trl", "maple_trl.algorithms", "maple_trl.rewards", "maple_trl.evaluation"])
def test_public_names_are_in_the_reference(module):
    shown = {name for each in reference() for name, _ in members(each)}
    last = {name.rpartition(".")[2] for name in shown}
    public = [name for name in import_module(module).__all__ if callable(getattr(import_module(module), name))]
    assert [name for name in public if name not in last] == []


# Pictures and files at the top


def test_pictures_are_small():
    """Text as text, and two decimals: with the outlines of letters a picture has twice the size."""
    pictures = {path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.svg")}
    assert len(pictures) > 10
    assert [path for path, drawn in pictures.items() if len(drawn) > 64_000 or "DejaVuSans-" in drawn] == []


def test_files_at_the_top_are_well_formed():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and len(citation["references"]) == 2
    assert {one["url"].rpartition("/")[2] for one in citation["references"]} == {
        MAPOTrainer._paper["id"],
        "2508.03100",
    }
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_name_no_host():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert (
        len(lines) > 50
        and [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line)] == []
    )


def test_pictures_of_concepts_are_as_they_are_drawn(tmp_path):
    """A tag, a share or a curve that changes is drawn anew: python scripts/draw_concepts.py."""
    concepts = script("draw_concepts")
    concepts.FOLDER = tmp_path
    concepts.main()
    for path in (DOCS / "concepts").glob("*.svg"):
        assert len((tmp_path / path.name).read_text()) == pytest.approx(len(path.read_text()), rel=0.2), path.name


def test_the_picture_of_a_run_is_drawn_of_a_run(tmp_path):
    log = [
        {"step": step, "reward": step / 10, "rewards/accuracy_reward/mean": step / 12, "tag/V/reward": step / 10}
        for step in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (tmp_path / "summary.json").write_text(
        json.dumps({"before": {"V": 0.2, "all": 0.2}, "after": {"V": 0.9, "all": 0.9}})
    )
    run = script("draw_run")
    run.PICTURE = tmp_path / "run.svg"
    run.main(tmp_path)
    drawn = run.PICTURE.read_text()
    assert drawn.startswith("<?xml") and "<dc:date>" not in drawn
    run.main(tmp_path)
    assert run.PICTURE.read_text() == drawn
