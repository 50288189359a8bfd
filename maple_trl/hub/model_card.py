"""The card of a model: what it was made of and how, what it is asked with, and what was measured of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from maple_trl.files import as_json, digest, write_atomically
from maple_trl.hub.names import is_repository, published_name, shareable
from maple_trl.hub.papers import AVATAR, MAPLE, TRL_CITATION
from maple_trl.hub.results import Measured, find_results
from maple_trl.omni.families import family_class
from maple_trl.packages import installed_versions
from maple_trl.records.option_changes import read_changes


CARD, FACTS = "README.md", "model_card.json"
"""A card, and the file beside it in which this machine keeps what it is made of; the second is never published."""

_TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "cards" / "model.md.j2"
_PACKAGES = ("maple-trl", "trl", "transformers", "torch", "peft", "accelerate", "datasets", "tokenizers")
_FULL_KINDS = ("qwen2_5_omni", "qwen3_omni_moe")
_NAMES = {"image": "pictures", "video": "video", "audio": "sound"}
READING = (
    *(
        "prompt_template",
        "system_prompt",
        "subtitle_template",
        "audio_in_video",
        "max_prompt_length",
        "max_media_tokens",
    ),
    *("num_frames", "video_fps", "max_frames", "min_pixels", "max_pixels", "max_media_seconds", "overlong_media"),
    "chat_template_kwargs",
)
"""Options of a run that decide how rows are read, which the card's example repeats."""


@dataclass
class CardFacts:
    """
    What a card is made of.

    Attributes:
        name: of the model.
        repository: its Hub id, where it has one.
        trained_from: the model that was trained, by the name that this machine knows it under; it may be a path.
        adapter: whether the weights are those of an adapter.
        architecture, model_type: of the model, as its config names them.
        trainer: the method's name; `None` of a model that was not trained here.
        papers: what to cite, each with `title`, `id` and `citation`.
        tags: for the Hub.
        dataset: as the job names it; it may be a path.
        steps: optimizer steps.
        recipe: options of the run that decide its result.
        rewards: names and weights.
        reading: how rows are read, where it is not the default.
        versions: of packages.
        links: to the run in trackers, by their names.
        license: as the Hub calls it.
        parts: of an Omni model that was exported whole: `full`.
        measured: what was measured of it elsewhere, as mappings of [`~maple_trl.hub.results.Measured`].
    """

    name: str
    repository: str | None = None
    trained_from: str | None = None
    adapter: bool = False
    architecture: str | None = None
    model_type: str | None = None
    trainer: str | None = None
    papers: list[dict[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    dataset: str | None = None
    steps: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    parts: str | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> CardFacts:
        """Return what is known of the model in a folder: what its run wrote down, else what its config says."""
        folder = Path(folder)
        try:
            kept = json.loads((folder / FACTS).read_text(encoding="utf-8"))["facts"]
            return cls(**{part.name: kept[part.name] for part in fields(cls) if part.name in kept})
        except (OSError, ValueError, KeyError, TypeError):
            return cls._of_config(folder)

    @classmethod
    def _of_config(cls, folder: Path) -> CardFacts:
        config, adapter = (_json(folder / name) for name in ("config.json", "adapter_config.json"))
        whole = bool(config)
        return cls(
            name=folder.resolve().name,
            trained_from=None if whole else adapter.get("base_model_name_or_path"),
            adapter=not whole,
            architecture=next(iter(config.get("architectures") or []), None),
            model_type=config.get("model_type"),
            tags=["maple-trl"],
            versions=versions(),
        )

    def write(self, folder: str | os.PathLike[str], card: ModelCard) -> None:
        """Write a card and the facts that it was made of into a folder."""
        write_atomically(Path(folder, CARD), str(card), remade=True)
        kept = {"facts": as_json(asdict(self)), "card": digest(str(card))}
        write_atomically(Path(folder, FACTS), json.dumps(kept, indent=2, default=str) + "\n")

    @property
    def base_model(self) -> str | None:
        """The public name of the model that was trained: a Hub id or `builtin:NAME`."""
        return published_name(self.trained_from)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model reads, of `image`, `video` and `audio`."""
        kind = self.model_type or ""
        family = family_class(kind) or family_class(f"{kind}_thinker")
        return () if family is None else tuple(family.placeholders)

    @property
    def pipeline_tag(self) -> str:
        """The Hub's task for what goes in and comes out."""
        if self.parts == "full" or self.model_type in _FULL_KINDS:
            return "any-to-any"
        tasks = {"video": "video-text-to-text", "image": "image-text-to-text", "audio": "audio-text-to-text"}
        return next((task for kind, task in tasks.items() if kind in self.kinds), "text-generation")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run depends on."""
    return {name: version for name, version in installed_versions(_PACKAGES).items() if version is not None}


def is_edited(folder: str | os.PathLike[str]) -> bool:
    """Return whether the card in a folder is not, or no longer, the one that was made here."""
    try:
        text = Path(folder, CARD).read_text(encoding="utf-8")
        return bool(json.loads(Path(folder, FACTS).read_text(encoding="utf-8"))["card"] != digest(text))
    except (OSError, ValueError, KeyError, TypeError):
        return Path(folder, CARD).is_file()


def render_model_card(
    facts: CardFacts, folder: str | os.PathLike[str] | None = None, measured: Sequence[Measured] = ()
) -> ModelCard:
    """
    Render a card. Nothing that is only of this machine is in it.

    Args:
        facts: of the model.
        folder: of the run, in which evaluations and the plot of training are looked for.
        measured: further results.
    """
    kept = map(Measured.of, facts.measured)
    results = [*measured, *kept, *(find_results(folder, facts.dataset) if folder is not None else ())]
    base = facts.base_model
    on_hub = base if base is not None and is_repository(base) else None
    dataset = published_name(facts.dataset)
    data = ModelCardData(
        base_model=on_hub,
        base_model_relation=None if on_hub is None else "adapter" if facts.adapter else "finetune",
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=facts.pipeline_tag,
        license=facts.license,
        datasets=[dataset] if dataset is not None and is_repository(dataset) else None,
        tags=_tags(facts),
        metrics=["accuracy"] if results else None,
        model_name=facts.repository or facts.name if results else None,
        eval_results=[one for table in results for one in table.eval_results(facts.pipeline_tag)] or None,
    )
    cited = [paper for paper in (*facts.papers, MAPLE, AVATAR) if paper.get("citation")]
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        base=base,
        base_on_hub=on_hub,
        dataset=dataset,
        dataset_on_hub=dataset is not None and is_repository(dataset),
        reads=_joined([_NAMES[kind] for kind in facts.kinds] + (["subtitles"] if facts.kinds else ["text"])),
        snippet=snippet(facts),
        recipe=_yaml(shareable(facts.recipe)),
        changed=[] if folder is None else read_changes(folder),
        rewards=facts.rewards,
        results=results,
        citations=[*dict.fromkeys(paper["citation"] for paper in cited), TRL_CITATION],
        plot=folder is not None and Path(folder, "training.png").is_file(),
    )


def snippet(facts: CardFacts) -> str:
    """Return Python that asks the model about a clip, with each kind of media that it reads and subtitles."""
    name = facts.repository or facts.name
    if not facts.kinds:
        return (
            "from transformers import pipeline\n\n"
            f'ask = pipeline("text-generation", model="{name}")\n'
            'answer = ask([{"role": "user", "content": "What is a chord?"}], max_new_tokens=256, return_full_text=False)\n'
            'print(answer[0]["generated_text"])'
        )
    told = {option: shareable(value, option) for option, value in facts.reading.items() if option in READING}
    arguments = [repr(name)]
    if facts.adapter and facts.base_model is None:
        arguments.append('base_model="BASE_MODEL"')  # a path of this machine, which is not told
    arguments += [f"{option}={value!r}" for option, value in told.items()]
    row = {"prompt": "What is shown, what is heard, and what is said?"}
    if told.get("prompt_template") is not None:
        row = {"question": row["prompt"], "options": ["a song", "a speech"]}
    row |= (
        {"video": "clip.mp4"} if "video" in facts.kinds else {"image": "picture.png"} if "image" in facts.kinds else {}
    )
    row |= {"audio": "clip.mp4" if "video" in row else "clip.wav"} if "audio" in facts.kinds else {}
    row |= {"subtitle": "clip.srt"}
    row |= {"tag": ("V" if {"video", "image"} & row.keys() else "") + ("A" if "audio" in row else "") + "S"}
    lines = ["from maple_trl import OmniPipeline", "", "ask = OmniPipeline.from_pretrained("]
    lines += [f"    {argument}," for argument in arguments] + [")", "answer = ask(", "    {"]
    lines += [f"        {key!r}: {value!r}," for key, value in row.items()]
    return "\n".join([*lines, "    },", "    max_new_tokens=256,", ")", "print(answer)"]).replace("'", '"')


def _tags(facts: CardFacts) -> list[str]:
    subtitles = ["subtitles"] if facts.kinds else []
    more = ["lora"] if facts.adapter else []
    return list(dict.fromkeys([*facts.tags, *facts.kinds, *subtitles, *more, "maple-trl"]))


def _yaml(options: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(as_json(options), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).strip()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]
