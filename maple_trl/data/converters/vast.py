"""
Captions of clips in VAST's form (VAST-27M, arXiv 2305.18500): of what is seen, what is heard, what is said, and of all together.

Relied on: the paper (five captions of vision and five of audio a clip, the subtitles, and one omni-modal caption that Vicuna-13b wrote of them) and
code of others that reads `{"clip_id" or "video_id", "vision_cap", "audio_cap", "subtitle", "vast_cap"}`.

Guesses: captions may be a text or a list, of which the first is taken (`desc` and `caption` count as captions of vision); clips lie in
`videos/{id}.mp4`; `split`, where it is there, is one.

A clip becomes a row for each of the tags whose signals all have a caption, up to seven. `reference_v`, `reference_a` and `reference_s` are what single
signals tell: of subtitles, which have no caption, the text itself. `reference` of one signal is the same; of VAS it is the omni-modal caption
where there is one; of two signals it is their two texts after each other, since none is published that tells them together.
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import FieldError, LeaveOut, Record, clips, file_name
from maple_trl.data.benchmarks.options import described
from maple_trl.data.converters.base import Converter, Place, Sample, first_of, optional_text
from maple_trl.modalities import ModalityTag


_FIELDS = {"V": ("vision_cap", "vision_captions", "desc", "caption"), "A": ("audio_cap", "audio_captions")}
_OMNI = ("vast_cap", "omni_cap")
_MODELS = {
    "V": "VAST's vision captioner",
    "A": "VAST's audio captioner",
    "all": "Vicuna-13b",
}
_ASKED = {"V": "what is to be seen", "A": "what is to be heard", "S": "what the subtitles say"}


def caption_prompt(tag: ModalityTag) -> str:
    """Return what a model is asked for a caption of a tag's signals."""
    parts = [_ASKED[letter] for letter in tag]
    what = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    together = "" if len(parts) == 1 else ", and how it belongs together"
    return f"Describe this clip in one paragraph: {what}{together}. Tell nothing that it does not show or say."


def _vast(record: Record, place: Place) -> Iterator[Sample]:
    clip = record.read(first_of(record, "clip_id", "video_id"), file_name)
    texts = {signal: text for signal, names in _FIELDS.items() if (text := _caption(record, names)) is not None}
    subtitle, omni = optional_text(record, "subtitle"), _caption(record, _OMNI)
    if subtitle is not None:
        texts["S"] = subtitle
    if not texts:
        raise LeaveOut("no caption of a single signal and no subtitle")
    for tag in ModalityTag:
        if set(tag) <= set(texts):
            whole = omni if tag == ModalityTag.VAS and omni else " ".join(texts[signal] for signal in tag)
            yield Sample(
                clip=clip,
                name=f"{clip}-{tag}",
                tag=tag,
                video=clips(clip, "videos", "video"),
                text=subtitle,
                reference=whole,
                references={signal: texts[signal] for signal in tag},
                question_type="caption",
                messages=({"role": "user", "content": caption_prompt(tag)},),
                written=_written(tag, whole is omni),
                split=optional_text(record, "split"),
            )


def _written(tag: ModalityTag, is_omni: bool) -> tuple[tuple[str, str], ...]:
    models = {signal: _MODELS[signal] for signal in tag if signal in _MODELS}
    own = tuple((f"reference_{signal.lower()}", model) for signal, model in models.items())
    whole = [_MODELS["all"]] if is_omni else list(models.values())
    return (*own, *(("reference", model) for model in whole))


def _caption(record: Record, names: tuple[str, ...]) -> str | None:
    name = next((name for name in names if record.get(name)), None)
    if name is None:
        return None
    value = record.get(name)
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, str) or not value.strip():
        raise FieldError(name, f"must be a text or a list of texts, but is {described(record.get(name))}")
    return value.strip()


VAST = Converter(
    name="vast",
    title="Captions in VAST's form",
    source="VAST",
    read=_vast,
    tables=(("annotations.json", "train"), ("*.jsonl", "train"), ("*.json", "train")),
    media="put the clips into videos/, as {clip_id}.mp4",
    hub="https://github.com/TXH-mercury/VAST",
)
