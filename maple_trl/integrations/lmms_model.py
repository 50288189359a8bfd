"""Our models behind lmms-eval's interface for models. Importing this needs lmms-eval."""

from __future__ import annotations

import json
import os
import tempfile
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from maple_trl.evaluation.evaluator import EvalOptions, Evaluator
from maple_trl.integrations.lmms_bridge import ROOT_FIELD, BridgeError, require_lmms_eval, row_of
from maple_trl.modalities import ModalityTag
from maple_trl.omni.families.base import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.pictures import upright_rgb
from maple_trl.omni.media.sampling import MediaLimits
from maple_trl.omni.prompt import PromptBuilder


_DEFAULT_UNTIL = ["\n\n"]  # what lmms-eval sets where a task says nothing
_KNOWN_OPTIONS = ("until", "max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "num_beams")


class MapleModel(lmms):
    """
    A model of this package, asked through the code of `maple-trl eval`: the same prompts, frames and decoding.

    A document of ours (see [`~maple_trl.integrations.lmms_bridge.write_task`]) is read as the row that it is. Of other
    tasks the messages are read: text, paths of videos and sounds, arrays of sound, and pictures. One process; questions that cannot be asked stop the run unless `on_error="empty"`.

    Args:
        pretrained (`str`): folder, Hub id, or `builtin:tiny-omni`.
        media_root (`str`, *optional*):
            The one folder that paths of other tasks may lie in. Default: where lmms-eval unpacks media (`HF_HOME`).
        tag (`str`, *optional*):
            Signals that are fed of other tasks' media, such as `VA`: a video with its own track. Default: the blocks of
            their messages as they are, a video without its track.
        on_error (`"raise"` or `"empty"`): stop at a question whose media or fields cannot be used, or answer it with
            nothing, which counts as wrong; `errors` lists them.
        dtype, device, batch_size, num_frames, fps, max_frames, min_pixels, max_pixels, max_seconds, overlong_media, audio_in_video:
            As in `maple-trl eval`, with the same defaults but for `batch_size`. `fps` and `max_seconds` are `video_fps`
            and `max_media_seconds` there; `num_frames` and `fps` exclude each other.
        max_batch_size: not used; lmms-eval passes it.

    Attributes:
        errors (`list[str]`): questions that could not be asked, with the reason.

    Raises:
        BridgeError: for another release of lmms-eval, several processes, or an unknown `on_error`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        media_root: str | None = None,
        tag: str | None = None,
        on_error: str = "raise",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int = 64,
        min_pixels: int = MediaLimits.min_pixels,
        max_pixels: int = MediaLimits.max_pixels,
        max_seconds: float = MediaLimits.max_seconds,
        overlong_media: str = "spread",
        audio_in_video: bool = False,
        max_batch_size: Any = None,
    ):
        super().__init__()
        require_lmms_eval()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BridgeError(
                "this adapter runs in one process; `accelerate launch -m maple_trl.cli eval` takes several"
            )
        if on_error not in ("raise", "empty"):
            raise BridgeError(f"on_error must be 'raise' or 'empty', got {on_error!r}")
        self.on_error, self.tag = on_error, None if tag is None else ModalityTag.parse(tag)
        if num_frames is None and fps is None:
            num_frames = MediaLimits.num_frames
        self.limits = MediaLimits(
            num_frames=num_frames,
            fps=fps,
            max_frames=max_frames,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_seconds=max_seconds,
            overlong=overlong_media,
        )
        self.audio_in_video = bool(audio_in_video)
        self.batch_size = int(batch_size or 1)
        self.media_root = media_root or os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(pretrained, dtype=dtype).to(device).eval()
        self.family = family_for(self.model, load_processor(pretrained))
        self.errors: list[str] = []
        self._builders: dict[str, PromptBuilder] = {}
        self._written = tempfile.TemporaryDirectory(prefix="maple-lmms-")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answer requests in their order.

        Raises:
            BridgeError: for a question that cannot be asked, and for options of generation that are not read here.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        rows = []
        for number, request in enumerate(requests):
            _, doc_to_messages, options, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            if ROOT_FIELD in doc:
                root, row = doc[ROOT_FIELD], row_of(doc)
            else:
                root, row = self._foreign_row(doc_to_messages(doc), f"{task}, document {doc_id}")
            rows.append({**row, "id": f"{task}/{split}/{doc_id}"})
            groups.setdefault((root, json.dumps(options, sort_keys=True)), []).append(number)
        answers: dict[int, str] = {}
        for (root, options), numbers in groups.items():
            texts = self._ask([rows[number] for number in numbers], root, json.loads(options))
            answers |= dict(zip(numbers, texts, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answers[number])
        return [answers[number] for number in range(len(requests))]

    def _ask(self, rows: list[dict[str, Any]], root: str, options: Mapping[str, Any]) -> list[str]:
        until = _until(options.get("until"))
        evaluator = Evaluator(
            self.model,
            self._builder(root),
            rows,
            score=lambda prompts, **columns: [None] * len(prompts),
            extract=lambda text: None,
            options=_eval_options(options, self.batch_size),
        )
        lines = list(evaluator.skipped)
        for batch in evaluator.batches:
            lines += evaluator.run(batch)
        texts = [""] * len(rows)
        for line in lines:
            if line.get("completion") is not None:
                texts[line["row"]] = _cut(line["completion"], until)
                continue
            self.errors.append(f"{line['id']}: {line.get('reason')}: {line.get('detail')}")
            if self.on_error == "raise":
                raise BridgeError(f"{self.errors[-1]}. on_error=empty answers such questions with nothing")
        return texts

    def _builder(self, root: str) -> PromptBuilder:
        if root not in self._builders:
            loader = MediaLoader(root, self.limits, backend="pyav")
            self._builders[root] = PromptBuilder(self.family, loader, audio_in_video=self.audio_in_video)
        return self._builders[root]

    # Tasks of lmms-eval's own

    def _foreign_row(self, messages: Sequence[Mapping[str, Any]], place: str) -> tuple[str, dict[str, Any]]:
        """Return the media root and the row of a chat message list."""
        prompt: list[dict[str, Any]] = []
        files: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
        written = set()
        for message in messages:
            blocks = []
            for block in message["content"]:
                if block["type"] == "text":
                    blocks.append({"type": "text", "text": block["text"]})
                    continue
                kind, path, is_written = self._medium(block, place)
                written.add(is_written)
                files[kind].append(path)
                blocks.append({"type": kind, kind: path})
            prompt.append({"role": message["role"], "content": blocks})
        if len(written) > 1:
            raise BridgeError(f"{place}: it has both files and media without a file, which have no common media root")
        row: dict[str, Any] = {"prompt": prompt}
        if _media_lead(prompt):
            # As our own rows have them: then a video's track, which has no block, also stands where it was trained to.
            prompt[-1]["content"] = [block for block in prompt[-1]["content"] if block["type"] == "text"]
            row |= {kind: paths for kind, paths in files.items() if paths}
        if self.tag is not None:
            row["tag"] = self.tag.value
        return (self._written.name if True in written else self.media_root), row

    def _medium(self, block: Mapping[str, Any], place: str) -> tuple[str, str, bool]:
        """Return kind and path of a block, and whether its file was written here."""
        value = block["url"]
        if isinstance(value, Mapping) and "array" in value:  # lmms-eval takes a sound without type for a video
            return "audio", self._write_sound(value), True
        if isinstance(value, Mapping) and ("video_start" in value or "video_end" in value):
            raise BridgeError(f"{place}: it asks for a part of a clip, which is not read here")
        if block["type"] == "image":
            name = f"{len(os.listdir(self._written.name))}.png"
            if isinstance(value, str):
                value = Image.open(value)
            upright_rgb(value)[0].save(Path(self._written.name, name))
            return "image", name, True
        if not isinstance(value, str) or block["type"] not in ("video", "audio"):
            raise BridgeError(f"{place}: a block of type {block['type']!r} holds {type(value).__name__}, not a path")
        return block["type"], value, False

    def _write_sound(self, value: Mapping[str, Any]) -> str:
        samples = np.asarray(value["array"], dtype=np.float64)
        samples = samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim > 1 else samples
        name = f"{len(os.listdir(self._written.name))}.wav"
        with wave.open(os.path.join(self._written.name, name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(int(value["sampling_rate"]))
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        return name

    def clean(self) -> None:
        """Do nothing: lmms-eval would delete the model after its first run, and an instance may be asked again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: no likelihoods are computed here."""
        raise NotImplementedError("tasks that compare likelihoods are not asked; choose a task that generates")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: questions of several rounds are not asked here."""
        raise NotImplementedError("tasks of several rounds are not asked")


def _media_lead(prompt: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all media stand at the beginning of the last message: pictures, then videos, then sounds."""
    order = {"image": 0, "video": 1, "audio": 2, "text": 3}
    ranks = [[order[block["type"]] for block in message["content"]] for message in prompt]
    return (
        bool(ranks)
        and prompt[-1]["role"] == "user"
        and ranks[-1] == sorted(ranks[-1])
        and not any(rank < order["text"] for message in ranks[:-1] for rank in message)
    )


def _until(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value or ())
    # Nobody's choice, and it would cut every answer that thinks before it.
    return [] if texts == _DEFAULT_UNTIL else [text for text in texts if text]


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((text.index(end) for end in until if end in text), default=len(text))]


def _eval_options(options: Mapping[str, Any], batch_size: int) -> EvalOptions:
    unknown = [name for name in options if name not in _KNOWN_OPTIONS]
    if unknown:
        raise BridgeError(
            f"generation option {unknown[0]!r} of the task is not read here; known: {', '.join(_KNOWN_OPTIONS)}"
        )
    if (options.get("num_beams") or 1) != 1:
        raise BridgeError(f"num_beams must be 1, but the task sets {options['num_beams']}")
    temperature = float(options.get("temperature") or 0)
    sampled = temperature > 0 and options.get("do_sample", True)
    return EvalOptions(
        samples=1,
        batch_size=batch_size,
        max_new_tokens=int(options.get("max_new_tokens") or 512),
        temperature=temperature if sampled else 0.0,
        top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
        top_k=int(options.get("top_k") or 0) if sampled else 0,
        shared_prompt=False,
    )
