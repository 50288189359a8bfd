"""
Both ways over to lmms-eval 0.7.3: its tasks asked of our models, and our rows as its tasks.

lmms-eval is no dependency, nor has it an extra: it asks for a PyAV before 16, which reads clips otherwise than that of this package,
with which it works too. [`evaluate_with_lmms`] and `maple_trl.integrations.lmms_model` need it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from maple_trl.files import as_json
from maple_trl.omni.content import place_blocks
from maple_trl.omni.embedded import as_paths, stored_path
from maple_trl.omni.errors import RowError
from maple_trl.omni.prompt_spec import PROMPT_COLUMNS


if TYPE_CHECKING:
    from datasets import Dataset

    from maple_trl.omni.prompt import PromptBuilder

VERSION = "0.7.3"
"""The release that this bridge is written for: others moved their model interface."""

MODEL_NAME = "maple_trl"
ROOT_FIELD = "maple_media_root"
"""Column that tells a document of ours from others; holds the folder of its media."""

_KINDS = ("image", "video", "audio")
"""Kinds of media, in the order in which lmms-eval hands them over beside a text."""

_CODE = '''"""Functions of this folder's tasks. Written by maple_trl."""

from maple_trl.integrations.lmms_bridge import doc_to_messages, doc_to_target, doc_to_text, doc_to_visual, score_doc
from maple_trl.rewards import accuracy_reward


def process_results(doc, results):
    return score_doc(doc, results, accuracy_reward)
'''


class BridgeError(RuntimeError):
    """lmms-eval is missing, is another release, or has not done what it was asked."""


def require_lmms_eval() -> None:
    """
    Check for lmms-eval.

    Raises:
        BridgeError: when lmms-eval is not installed in the release that the bridge is written for.
    """
    try:
        found = importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        raise BridgeError(
            f"the bridge needs lmms-eval {VERSION}, but {f'{found} is installed' if found else 'it is not installed'}: "
            f"uv pip install maple-trl 'lmms-eval=={VERSION}' --override FILE, where FILE holds the lines 'av>=18' (it asks for a "
            "PyAV before 16, which reads clips otherwise) and 'filelock<4' (it needs one, and does not say so)"
        )


def manifest() -> Any:
    """
    Return what the entry point `lmms_eval.models` names: the class behind `--model maple_trl`.

    Raises:
        BridgeError: as [`require_lmms_eval`].
    """
    require_lmms_eval()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, chat_class_path="maple_trl.integrations.lmms_model.MapleModel")


# Our rows as a task


def write_task(
    folder: str | os.PathLike,
    name: str,
    dataset: Dataset,
    media_root: str | os.PathLike,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write rows as a task of lmms-eval: `NAME.jsonl`, `NAME.yaml` and the functions that they share.

    `lmms_eval --include_path FOLDER --tasks NAME` asks it of any of its models. A model of this package, asked by either
    harness, reads the same prompts. Another gets the same signals in lmms-eval's own way, which does not tell a video's sound
    from its pictures: media as files, each where it stands in the prompt, and the subtitle as text.

    Args:
        folder: where to write; made if absent.
        name: of the task: letters, digits, `_` and `-`.
        dataset: rows with `prompt` (of texts), `solution`, and what media, `tag` and `options` they have.
        media_root: the folder of their media.
        generation: options of lmms-eval, beside `max_new_tokens` 512, greedy answers, and no text that ends one.

    Returns:
        the YAML file.

    Raises:
        ValueError: for an unusable name, and for a row without prompt or solution or that cannot be asked, naming it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"a task's name has letters, digits, '_' and '-' alone, got {name!r}")
    root = os.path.realpath(media_root)
    dataset = as_paths(dataset)
    for number, row in enumerate(dataset):
        if not _is_text_prompt(row.get("prompt")):
            raise ValueError(f"row {number}: field 'prompt' must be messages whose content is text")
        if as_json(row.get("solution")) in (None, ""):  # of tables: NaN
            raise ValueError(f"row {number}: field 'solution' is empty")
        try:
            _builder(root).spec(row)
        except RowError as error:
            raise ValueError(f"row {number}: {error}") from error
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for row in dataset:
            file.write(json.dumps(as_json({**row, ROOT_FIELD: root}), ensure_ascii=False, allow_nan=False) + "\n")
    (folder / "maple_task.py").write_text(_CODE, encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        # Without `until`, lmms-eval ends an answer at its first blank line.
        "generation_kwargs": {"max_new_tokens": 512, "temperature": 0, "do_sample": False, "until": []}
        | dict(generation or {}),
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        "metadata": [{"version": 1.0}],
    }
    functions = ("doc_to_visual", "doc_to_text", "doc_to_messages", "doc_to_target", "process_results")
    text = yaml.safe_dump(task, sort_keys=False)
    text += "".join(f"{function}: !function maple_task.{function}\n" for function in functions)
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _is_text_prompt(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in prompt)
    )


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """Return what the tag of a document (`doc`) feeds: pictures as such, then absolute paths of videos, then of sounds."""
    blocks = [block for message in _messages(doc) for block in message["content"] if block["type"] in _KINDS]
    return [_url(block) for block in sorted(blocks, key=lambda block: _KINDS.index(block["type"]))]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """
    Return the text of a document's prompt, with the subtitle that its tag feeds, and without marks of media.

    Args:
        doc: a row that the task's table holds.
        lmms_eval_specific_kwargs: not used; lmms-eval passes it.
    """
    texts = [[block["text"] for block in message["content"] if block["type"] == "text"] for message in _messages(doc)]
    return "\n".join(map("".join, texts))


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """Return the solution of a document (`doc`)."""
    return str(doc["solution"])


def doc_to_messages(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> list[dict]:
    """
    Return a document's prompt as lmms-eval writes messages: media and subtitle at their marks, or before the last question.

    Args:
        doc: a row that the task's table holds.
        lmms_eval_specific_kwargs: not used; lmms-eval passes it.
    """
    return [
        {
            "role": message["role"],
            "content": [{**block, "url": _url(block)} if "url" in block else block for block in message["content"]],
        }
        for message in _messages(doc)
    ]


def _messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Return a document's messages, whose blocks of media hold their path as `url`.

    What is fed, and where it stands, is decided as for the models of this package. Other models have no way to take the
    sound of a video alone: of its pictures and sound there is one block, and one for its sound alone.
    """
    builder = _builder(doc[ROOT_FIELD])
    spec = builder.spec(row_of(doc))
    subtitle = spec.subtitle or ""
    if spec.subtitle_file:
        subtitle = builder.check_subtitle(subtitle, spec.subtitle_parts, spec.needs_subtitle)
    files = dict(zip(_KINDS, (spec.images, spec.videos, spec.audios), strict=True))
    of_video = not doc.get("audio")
    own_place = {kind: [True] * len(named) for kind, named in files.items()}
    if of_video and spec.videos:
        own_place["audio"] = [False] * len(spec.audios)
    waiting = {kind: iter(named) for kind, named in files.items()}

    def filled(block: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = block["type"]
        if kind not in _KINDS:
            return block
        file = next(waiting[kind])
        path = stored_path(file) or os.path.join(doc[ROOT_FIELD], file)
        return {"type": "video" if kind == "audio" and of_video else kind, "url": path}

    placed = place_blocks(spec.messages, own_place, subtitle, builder.subtitle_template)
    return [{**message, "content": [filled(block) for block in message["content"]]} for message in placed]


@lru_cache(maxsize=8)
def _builder(root: str) -> PromptBuilder:
    """Return what decides of rows below a media root what they feed, whatever model reads it."""
    from maple_trl.evaluation.served_prompts import MessageEncoder
    from maple_trl.omni.media.loader import MediaLoader
    from maple_trl.omni.prompt import PromptBuilder

    # No more than subtitles is read.
    return PromptBuilder(MessageEncoder(), MediaLoader(root, cache_bytes=1 << 20, backend="pyav", workers=0))


def _url(block: Mapping[str, Any]) -> Any:
    """Return a medium as lmms-eval's models take it: a path, or a picture as such."""
    if block["type"] != "image":
        return block["url"]
    from PIL import Image

    from maple_trl.omni.media.pictures import upright_rgb

    with Image.open(block["url"]) as picture:
        return upright_rgb(picture)[0]


def score_doc(doc: Mapping[str, Any], results: Sequence[str], score: Callable[..., Sequence[float | None]]) -> dict:
    """
    Return a document's `accuracy`.

    Args:
        doc: a row of ours.
        results: one completion.
        score: a reward function with TRL's signature.

    Raises:
        ValueError: when it gives no score.
    """
    columns = {name: [value] for name, value in doc.items() if name not in ("prompt", "completion")}
    completions = [[{"role": "assistant", "content": results[0]}]]
    (value,) = score(prompts=[doc["prompt"]], completions=completions, **columns)
    if value is None:
        raise ValueError(f"document {doc.get('id')!r} cannot be scored: its solution is {doc.get('solution')!r}")
    return {"accuracy": float(value)}


def row_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row behind a document of ours (`doc`), with media paths below its root."""
    return {name: doc[name] for name in ("id", *PROMPT_COLUMNS) if doc.get(name) is not None}


# Asking


def evaluate_with_lmms(
    tasks: Sequence[str],
    model: Any,
    include_path: str | os.PathLike | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """
    Run lmms-eval in this process.

    Args:
        tasks: names; its own, or those in `include_path`.
        model: a [`~maple_trl.integrations.lmms_model.MapleModel`], or another model of lmms-eval.
        include_path: folder that [`write_task`] filled. With it, lmms-eval's own tasks are not looked up, which is faster.
        limit: questions per task.

    Returns:
        what `lmms_eval.evaluator.simple_evaluate` returns: `results` by task, and `samples`.

    Raises:
        BridgeError: without lmms-eval, and for a task that is not there or has no result: lmms-eval itself may end
            without an error then.
    """
    require_lmms_eval()
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=None if include_path is None else os.fspath(include_path), include_defaults=include_path is None
    )
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        where = f" in {include_path}: {', '.join(manager.all_tasks) or 'none'}" if include_path is not None else ""
        raise BridgeError(f"lmms-eval has no task {unknown[0] if unknown else tasks!r}{where}")
    # One thread: our scoring functions are not said to be safe in several.
    found = evaluator.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, process_docs_parallel=1
    )
    results = (found or {}).get("results") or {}
    lacking = [name for name in tasks if name not in results]
    if lacking:
        raise BridgeError(f"lmms-eval gave no result for {', '.join(lacking)}; it has {', '.join(results) or 'none'}")
    return found
