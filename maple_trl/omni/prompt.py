"""From a row of the data set to an encoded prompt: which signals it is fed, and in what order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from maple_trl.modalities import IMAGE_COLUMNS, SUBTITLE_SUFFIXES, Modality, ModalityTag
from maple_trl.omni.content import (
    MARK,
    Content,
    MediaFile,
    check_places,
    in_block_words,
    path_of,
    place_blocks,
    read_content,
    subtitle_parts,
    with_tracks,
)
from maple_trl.omni.encoded import KINDS, EncodedPrompt
from maple_trl.omni.errors import MediaError, RowError
from maple_trl.omni.families import PromptEncoder
from maple_trl.omni.host_memory import hold_prompt
from maple_trl.omni.media.clips import (
    NO_AUDIO,
    NO_CUE,
    SOUND_SPREAD,
    TRIMMED,
    AudioClip,
    ClipRequest,
    Picture,
    PromptMedia,
    VideoClip,
)
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.subtitles import Part, in_parts, is_subtitle_file, unread_file
from maple_trl.omni.prompt_media import MediaReader, noise_media
from maple_trl.omni.prompt_spec import PromptSpec
from maple_trl.omni.templates import Asking


__all__ = ["PromptBuilder", "PromptSpec", "RowError"]

SUBTITLE_SHORTENED = "subtitle-shortened"
"""The note of a prompt whose subtitle was too long for it."""

_PROBE_TEXT = "Which of the two do you see, and what do you hear? Answer with one word."

_COLUMNS = {"image": IMAGE_COLUMNS, "video": ("video",), "audio": ("audio",)}


class PromptBuilder:
    """
    Builds prompts from rows.

    A row has a `prompt` (text or conversational messages) and may have `image` or `images`, `video`, `audio` and `subtitle`
    (paths below the media root; `subtitle` may be the text itself), `tag` and `audio_in_video`. Pictures, video and audio
    may also stand as content blocks in the messages, each with a size or a part of its file; files of columns stand at the marks
    `<image>`, `<video>` and `<audio>` of the texts, where there are any, and the subtitle at the mark `<subtitle>`. Audio without
    a file of its own is the video's track. Pictures and videos are one signal, `V`.

    `spec` and `encode` take rows as [`asked`] returns them.

    Args:
        family ([`~maple_trl.omni.families.PromptEncoder`]):
            The model's. With one of the limits on tokens it has to be an [`~maple_trl.omni.families.OmniFamily`].
        loader ([`~maple_trl.omni.media.MediaLoader`]): what reads the media of rows.
        modality_access (`"required"` or `"all"`):
            Feed a row exactly the signals of its tag (MAPLE's modality-aware input), or every signal it has. A row
            without a tag is fed all it has.
        audio_in_video (`bool`):
            Interleave audio tokens with the video's, unless the row's own column says otherwise.
        subtitle_template (`str`): text around a subtitle without a mark; holds `{subtitle}`.
        max_prompt_length (`int`, *optional*):
            Tokens per prompt. Only the subtitle is ever shortened; media, question and template are never cut.
        max_media_tokens (`int`, *optional*):
            Tokens of pictures, video and audio per prompt. Pictures and frames are made smaller until they fit.
        chat_template_kwargs (`Mapping`, *optional*): further variables of the model's chat template.
        template ([`~maple_trl.omni.templates.Asking`], *optional*): makes prompts of the rows' columns.
        system_prompt (`str`, *optional*): leads conversations that have no system message of their own.
        max_completion_length (`int`):
            Tokens that will follow a prompt. They count for a family with a limit on both together.
    """

    def __init__(
        self,
        family: PromptEncoder,
        loader: MediaLoader,
        modality_access: Literal["required", "all"] = "required",
        audio_in_video: bool = False,
        subtitle_template: str = "Subtitles:\n{subtitle}\n",
        max_prompt_length: int | None = None,
        max_media_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template: Asking | None = None,
        system_prompt: str | None = None,
        max_completion_length: int = 0,
    ):
        self.family = family
        self.loader = loader
        self.modality_access = modality_access
        self.audio_in_video = audio_in_video
        self.subtitle_template = subtitle_template
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.max_media_tokens = max_media_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.template = template
        self.system_prompt = system_prompt

    # What a row is asked

    @property
    def rewords(self) -> bool:
        """Whether rows are asked something else than their own `prompt`."""
        return self.template is not None or self.system_prompt is not None

    def asked(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Return a row with the prompt that it is asked; once more, it stays as it is.

        The template's text is chosen by the signals that the row is fed, and takes the place of its only user message. System
        messages of its own are kept.

        Raises:
            RowError: when the template cannot be filled, or would take the place of more than one message.
        """
        prompt = row.get("prompt")
        if self.template is not None:
            system = _leading_system(prompt)
            text = self.template.render(row, self._fed_tag(row))
            # Blocks where the table's own prompts are blocks: a column has one type.
            blocks = isinstance(prompt, list) and isinstance(prompt[0].get("content"), list)
            content = [{"type": "text", "text": text}] if blocks else text
            prompt = [*system, {"role": "user", "content": content}]
        if self.system_prompt is not None:
            prompt = _with_system(prompt, self.system_prompt)
        return {**row, "prompt": prompt}

    def _fed_tag(self, row: Mapping[str, Any]) -> ModalityTag | None:
        """Return what a row is fed, whatever it is asked."""
        fed = self.spec({**row, "prompt": [{"role": "user", "content": "."}]}).fed
        return ModalityTag.from_modalities(fed) if fed else None

    # The row's content

    def spec(self, row: Mapping[str, Any]) -> PromptSpec:
        """
        Decide what a row is fed.

        Raises:
            RowError: naming the field, when the row cannot be a prompt or lacks what its tag needs.
        """
        content = read_content(row.get("prompt"))
        tag = None if row.get("tag") is None else _parse_tag(row["tag"])
        images, videos, own_audios = (self._files(row, kind, content) for kind in _COLUMNS)
        subtitle = self._checked_subtitle(row.get("subtitle") or None)
        self._check_text(content.messages, subtitle)
        if isinstance(content.messages, str) and (images or videos or own_audios or subtitle):
            raise RowError("a row with media needs a conversational 'prompt' (a list of messages), not plain text")
        # A place for sound in a row with none of its own is for the video's track.
        given = {"image": len(images), "video": len(videos), "audio": len(own_audios or videos)}
        check_places(content, given | {"subtitle": int(subtitle is not None)})
        interleaved = self.audio_in_video if row.get("audio_in_video") is None else row["audio_in_video"]
        if not isinstance(interleaved, bool):
            raise RowError(f"field 'audio_in_video' is {interleaved!r}; it must be true, false or empty")

        # Without a tag the row says itself what it has: a video's track is used only where it is asked for. Nor is it
        # assumed for a model that cannot hear.
        hears = "audio" in self.family.placeholders or (tag is not None and Modality.AUDIO in tag.modalities)
        track_wanted = tag is not None or interleaved or content.places["audio"]
        audio_source = own_audios or (tuple(map(_track, videos)) if hears and track_wanted else ())
        sources = {Modality.VIDEO: images or videos, Modality.AUDIO: audio_source, Modality.SUBTITLE: subtitle}
        present = frozenset(m for m, source in sources.items() if source)
        if tag is not None and not tag.modalities <= present:
            names = {Modality.VIDEO: "video or image"}
            lacking = sorted(names.get(m, m.name.lower()) for m in tag.modalities - present)
            raise RowError(f"tag {tag} needs {' and '.join(lacking)}, but the row has no such field or content block")
        fed = tag.modalities if tag is not None and self.modality_access == "required" else present
        parts = subtitle_parts(videos, own_audios) if subtitle is not None and is_subtitle_file(subtitle) else ()
        images, videos = (files if Modality.VIDEO in fed else () for files in (images, videos))
        audios = audio_source if Modality.AUDIO in fed else ()
        self._check_family({"image": images, "video": videos, "audio": audios}, tag)
        interleaved = bool(interleaved and videos and audios and self.family.interleaves_audio)
        # `OmniFamily.interleave` places the tokens of one video among those of one sound.
        if interleaved and (len(videos), len(audios)) != (1, 1):
            raise RowError(
                "audio_in_video interleaves one video with one audio, but the row has "
                f"{len(videos)} video(s) and {len(audios)} audio(s)"
            )
        messages = content.messages
        if fed and not any(message["role"] == "user" for message in messages):
            raise RowError("field 'prompt' has no user message to put the media into")
        # A track stands behind its video, also in a row that hears it without seeing the video.
        if audios and not own_audios and not content.places["audio"] and not interleaved:
            messages = with_tracks(messages)
        return PromptSpec(
            messages=messages,
            videos=tuple(file.path for file in videos),
            audios=tuple(file.path for file in audios),
            video_requests=tuple(file.request for file in videos),
            audio_requests=tuple(file.request for file in audios),
            subtitle=subtitle if Modality.SUBTITLE in fed else None,
            interleaved=interleaved,
            tag=tag,
            fed=fed,
            images=tuple(file.path for file in images),
            image_requests=tuple(file.request for file in images),
            subtitle_parts=parts if Modality.SUBTITLE in fed else (),
        )

    def _files(self, row: Mapping[str, Any], kind: str, content: Content) -> tuple[MediaFile, ...]:
        """Return the files of a kind that a row names, in its blocks or in its column."""
        named = [column for column in _COLUMNS[kind] if row.get(column)]
        if len(named) > 1:
            raise RowError(f"fields {' and '.join(map(repr, named))} both name files; keep one")
        if content.files[kind] and named:
            raise RowError(f"field '{named[0]}' and a '{kind}' block of field 'prompt' both name a file; keep one")
        for file in content.files[kind]:
            self._check_request(file.request, kind)
        return tuple(content.files[kind]) or (_as_files(row[named[0]], named[0]) if named else ())

    def _check_request(self, request: ClipRequest, kind: str) -> None:
        """Check what can be asked of no clip before one is decoded."""
        try:
            request.limits(self.loader.limits)
            if request.max_pixels is not None and kind in self.family.placeholders:
                self.family.check_pixels(request.max_pixels)
        except ValueError as error:
            raise RowError(f"a '{kind}' block of field 'prompt': {in_block_words(str(error), kind)}") from error

    def _checked_subtitle(self, subtitle: Any) -> str | None:
        if subtitle is None:
            return None
        if not isinstance(subtitle, str):
            raise RowError(f"field 'subtitle' is {type(subtitle).__name__}; it must be text or a path")
        if is_subtitle_file(subtitle.strip()):
            return subtitle.strip()
        reason = unread_file(subtitle.strip(), self.loader.root)
        if reason:
            raise RowError(
                f"field 'subtitle' is {subtitle!r}, which {reason}; files that are read end in "
                f"{', '.join(SUBTITLE_SUFFIXES)} (convert it), and text must not look like a name (end it with a full stop)"
            )
        return subtitle

    def _check_text(self, messages: tuple[dict[str, Any], ...] | str, subtitle: str | None) -> None:
        """Refuse text that spells a media token, which would be read as media."""
        if isinstance(messages, str):
            prompt_texts = [messages]
        else:
            prompt_texts = [block["text"] for m in messages for block in m["content"] if block["type"] == "text"]
        for field_name, parts in (("prompt", prompt_texts), ("subtitle", [subtitle or ""])):
            token = self._media_token_in(parts)
            if token:
                raise RowError(
                    f"field '{field_name}' holds the text {token!r}, which the model reads as media; remove it"
                )

    def _media_token_in(self, texts: Iterable[str]) -> str | None:
        return next((token for text in texts for token in self.family.media_tokens if token in text), None)

    def _check_family(self, fed: Mapping[str, Sequence[MediaFile]], tag: ModalityTag | None) -> None:
        foreign = [kind for kind, files in fed.items() if files and kind not in self.family.placeholders]
        if foreign:
            raise RowError(
                f"{type(self.family).__name__} reads no {' and '.join(foreign)}, which the row"
                f"{f' (tag {tag})' if tag else ''} feeds; filter such rows out or choose an omni model"
            )

    # Encoding

    def decode(self, row: Mapping[str, Any] | PromptSpec) -> None:
        """Decode the clips of a row, or of its spec, into the loader's cache."""
        self._read_media(row if isinstance(row, PromptSpec) else self.spec(row))

    def check_image(self, path: str, request: ClipRequest) -> None:
        """
        Check the picture at `path` by its header, as far as that tells, for the size that a `request` gives it.

        Raises:
            MediaError: for a file that cannot be used, or a picture too long and narrow for the limits.
        """
        self.loader.check_image(path, multiple=self.family.frame_multiple, request=request)

    def stand_in(self) -> EncodedPrompt:
        """Return the shortest of prompts, for where one has to be passed and there is none."""
        return self.encode({"prompt": [{"role": "user", "content": "."}]})

    def probe(self) -> EncodedPrompt:
        """Return a short prompt with a moment of noise of each kind of media that the chat template shows to the model."""
        content = [*({"type": kind} for kind in self.family.placeholders), {"type": "text", "text": _PROBE_TEXT}]
        try:
            text = self._rendered([{"role": "user", "content": content}])
        except RowError:  # there is no template, or it takes other conversations
            text = _PROBE_TEXT
        shown = {kind for kind, token in self.family.placeholders.items() if token in text}
        return self.family.encode("probe", text, noise_media(self.family, shown))

    def encode(self, row: Mapping[str, Any] | PromptSpec) -> EncodedPrompt:
        """
        Decode and encode one row, or its spec.

        Raises:
            RowError: when the row cannot be a prompt.
            MediaError: when a file cannot be used, with the reason.
        """
        spec = row if isinstance(row, PromptSpec) else self.spec(row)
        images, videos, audios = self._read_media(spec)
        if spec.fed == {Modality.AUDIO} and not any(audios):
            raise MediaError("no-signal", spec.audios[0], "the row is fed audio alone and its file has no audio track")
        notes = (NO_AUDIO,) if None in audios else ()
        heard = [clip for clip in audios if clip is not None]
        seen = PromptMedia(images, videos)
        parts = any(clip.source_seconds is not None for clip in heard)
        notes += (SOUND_SPREAD,) if parts else ()
        interleaved = spec.interleaved and None not in audios
        if interleaved and parts:  # which no longer stand at the times of the pictures
            interleaved, spec = False, _with_own_place(spec)
        subtitle = whole_subtitle = self._subtitle_text(
            spec, trimmed=any(TRIMMED in c.notes for c in (*videos, *heard))
        )
        notes += (NO_CUE,) if spec.subtitle_file and not subtitle else ()

        prompt = self._encode_text(spec, seen, audios, subtitle, interleaved)
        while self._longest is not None and len(prompt) > self._longest:
            subtitle = self._shortened(subtitle, len(prompt), spec)
            prompt = self._encode_text(spec, seen, audios, subtitle, interleaved)
        if subtitle != whole_subtitle:
            notes += (SUBTITLE_SHORTENED,)
        if subtitle:
            prompt.media_tokens["subtitle"] = len(self.family.tokens(subtitle))
        return hold_prompt(replace(prompt, tag=spec.tag, notes=(*prompt.notes, *notes), sound=_seconds_of(heard)))

    def _encode_text(
        self,
        spec: PromptSpec,
        seen: PromptMedia,
        audios: list[AudioClip | None],
        subtitle: str,
        interleaved: bool,
    ) -> EncodedPrompt:
        text = spec.messages
        if not isinstance(text, str):
            own_place = {
                "image": [True] * len(seen.images),
                "video": [True] * len(seen.videos),
                "audio": [clip is not None and not interleaved for clip in audios],
            }
            text = self._rendered(place_blocks(text, own_place, subtitle, self.subtitle_template))
        heard = [clip for clip in audios if clip is not None]
        try:
            return self.family.encode(spec.key, text, replace(seen, audios=heard), interleaved)
        except MediaError as error:  # a family knows clips by where they lie
            names = {self.loader.resolve(file): file for file in spec.files}
            raise MediaError(error.reason, names.get(error.path or "", error.path), error.detail) from error

    def check_template(self, spec: PromptSpec) -> None:
        """
        Check that the chat template shows what a row asks (its `spec`); nothing is decoded for that.

        Raises:
            RowError: when it fails, or leaves out the last message's text, or a medium of any message.
        """
        if isinstance(spec.messages, str):
            return
        own_place = {"image": [True] * len(spec.images), "video": [True] * len(spec.videos)}
        own_place["audio"] = [not spec.interleaved] * len(spec.audios)
        placed = place_blocks(spec.messages, own_place, "")
        text = self._rendered(placed)
        asked = [block["text"].strip() for block in spec.messages[-1]["content"] if block["type"] == "text"]
        lost = next((part for part in asked if part not in text), None)
        if lost is not None:
            raise RowError(
                f"the model's chat template leaves out {lost!r:.100} of field 'prompt': it makes {text!r:.200} of it"
            )
        for number, message in enumerate(placed):
            for place, block in enumerate(message["content"]):
                others = message["content"][:place] + message["content"][place + 1 :]
                less = [*placed[:number], {**message, "content": others}, *placed[number + 1 :]]
                if block["type"] in KINDS and self._is_same(less, text):
                    raise RowError(
                        f"the model's chat template leaves out the {block['type']} in a message of the {message['role']} "
                        "of field 'prompt': put it into one of the user"
                    )

    def _is_same(self, messages: list[dict[str, Any]], text: str) -> bool:
        """Return whether messages become a text, but for space, which templates trim where a message begins."""
        with suppress(RowError):  # it may take no message without content
            return self._rendered(messages).split() == text.split()
        return False

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self.family.render(messages, **self.chat_template_kwargs)
        except Exception as error:  # a template is a program of its own
            told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RowError(f"the model's chat template cannot show field 'prompt': {told}") from error

    def _read_media(self, spec: PromptSpec) -> tuple[list[Picture], list[VideoClip], list[AudioClip | None]]:
        return MediaReader(self.family, self.loader).read(spec, self.max_media_tokens)

    def check_subtitle(self, file: str, parts: tuple[Part, ...] = (), needed: bool = False) -> str:
        """
        Read what a row is fed of a subtitle file, as [`~maple_trl.omni.media.loader.MediaLoader.subtitle`] does.

        Args:
            file: path of the subtitle file.
            parts: of the clips that the row is about; none: of the whole clip.
            needed: whether the row's tag asks for a subtitle.

        Raises:
            MediaError: for a file that cannot be used, and as `no-signal` where a subtitle is needed and nothing is said.
        """
        text = self.loader.subtitle(file, parts)
        if needed and not text:
            raise MediaError(
                "no-signal", file, f"no cue is shown {in_parts(parts)}, the part of the clip that the row is about"
            )
        return text

    def _subtitle_text(self, spec: PromptSpec, trimmed: bool) -> str:
        """Return what is fed of the subtitle; of a row with a clip that was `trimmed`, what is shown before it ends."""
        if not spec.subtitle_file:
            return spec.subtitle or ""
        parts = spec.subtitle_parts
        if trimmed:
            most = self.loader.limits.max_seconds
            parts = parts or tuple(request.part for request in spec.video_requests or spec.audio_requests)
            parts = tuple((start, min(end, start + most)) for start, end in parts)
        text = self.check_subtitle(spec.subtitle, parts, spec.needs_subtitle)
        token = self._media_token_in([text])
        if token:
            raise MediaError(
                "bad-subtitle", spec.subtitle, f"it holds the text {token!r}, which the model reads as media"
            )
        return text

    @property
    def _longest(self) -> int | None:
        """The most tokens that a prompt may have."""
        if self.family.max_tokens is None:
            return self.max_prompt_length
        room = self.family.max_tokens - self.max_completion_length
        return room if self.max_prompt_length is None else min(self.max_prompt_length, room)

    def _shortened(self, subtitle: str, length: int, spec: PromptSpec) -> str:
        """Cut as many tokens off the end of the subtitle as the prompt is too long."""
        tokens = self.family.tokens(subtitle)
        kept = self.family.tokenizer.decode(tokens[: max(0, len(tokens) - (length - self._longest))])
        kept = kept.rstrip("\ufffd").rstrip()  # a token can end within a character
        if not kept or len(kept) >= len(subtitle):
            limit = f"max_prompt_length is {self.max_prompt_length}"
            if self._longest != self.max_prompt_length:
                takes = f"{type(self.family).__name__} takes {self.family.max_tokens} with the completion"
                limit = f"may have {self._longest}, for {takes}"
            raise MediaError(
                "prompt-too-long",
                next(iter(spec.files), None),
                f"the prompt has {length} tokens and {limit}; only a subtitle can be shortened, and that is not enough",
            )
        return kept


def _with_own_place(spec: PromptSpec) -> PromptSpec:
    """Return the spec of a row whose sound is not interleaved after all: it stands behind the pictures."""
    blocks = (block for message in spec.messages if isinstance(message, dict) for block in message["content"])
    if any(block["type"] == "audio" for block in blocks) or isinstance(spec.messages, str):
        return spec
    return replace(spec, messages=with_tracks(spec.messages))


def _seconds_of(sounds: Sequence[AudioClip]) -> tuple[float, float] | None:
    """Return the seconds of sounds, and of what they are taken from."""
    if not sounds:
        return None
    whole = [clip.duration if clip.source_seconds is None else clip.source_seconds for clip in sounds]
    return sum(clip.duration for clip in sounds), sum(whole)


def check_template(builder: PromptBuilder, prompts: Iterable[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Render one row of each sequence of roles, and of media in them, by the model's chat template, which may take only some.

    Args:
        prompts: the rows' field `prompt`. Rows that cannot be prompts are passed over.

    Raises:
        RowError: with the row's number, when the template fails or leaves the question out.
    """
    seen = set()
    for number, prompt in enumerate(prompts):
        layout = tuple(map(_role_and_media, filter(_is_message, prompt or ())))
        if not layout or layout in seen:
            continue
        try:
            spec = builder.spec(rows[number])
        except RowError:
            continue
        seen.add(layout)
        try:
            builder.check_template(spec)
        except RowError as error:
            raise RowError(f"row {number}: {error}") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping)


def _role_and_media(message: Mapping[str, Any]) -> tuple[Hashable, frozenset[Any]]:
    """Return a message's role, and the kinds of media that it has places for."""
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    kinds = {block.get("type") for block in blocks if isinstance(block, Mapping)}
    texts = (block.get("text") for block in blocks if isinstance(block, Mapping))
    return message.get("role"), frozenset(
        kinds.union(*(MARK.findall(text) for text in texts if isinstance(text, str)))
    )


def _leading_system(prompt: Any) -> list[Mapping[str, Any]]:
    """Return the system messages of a prompt that a template replaces: of one user message, or of none."""
    if prompt is None or isinstance(prompt, str):
        return []
    content = read_content(prompt)
    if any(content.files.values()):
        raise RowError("prompt_template would drop the media blocks of field 'prompt'; name the files in columns")
    roles = [message["role"] for message in content.messages]
    if roles not in (["user"], ["system", "user"]):
        raise RowError(
            f"prompt_template takes the place of one user message, and field 'prompt' has {', '.join(roles)}; leave the "
            "template out, or the column"
        )
    return list(prompt[:-1])


def _with_system(prompt: Any, text: str) -> list[Any]:
    if not isinstance(prompt, list):
        raise RowError(
            "system_prompt leads a conversation, and field 'prompt' is none; give messages with role and content, or a "
            "prompt_template"
        )
    if any(isinstance(message, Mapping) and message.get("role") == "system" for message in prompt):
        return prompt
    blocks = isinstance(prompt[0], Mapping) and isinstance(prompt[0].get("content"), list) if prompt else False
    return [{"role": "system", "content": [{"type": "text", "text": text}] if blocks else text}, *prompt]


def _parse_tag(value: Any) -> ModalityTag:
    try:
        return ModalityTag.parse(value)
    except ValueError as error:
        raise RowError(f"field 'tag': {error}") from error


def _track(video: MediaFile) -> MediaFile:
    """Return the sound of a video: of the same segment, and nothing else that is asked of its pictures."""
    return MediaFile(video.path, ClipRequest(start=video.request.start, end=video.request.end))


def _described(value: Any) -> str:
    """Return the type of a value, and one that is empty itself."""
    return repr(value) if value is None or value == "" else type(value).__name__


def _as_files(value: Any, name: str) -> tuple[MediaFile, ...]:
    values = [path_of(item) for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(file, str) and file for file in values):
        wrong = next(item for item in values if not (isinstance(item, str) and item))
        raise RowError(
            f"field '{name}' {'holds' if isinstance(value, list) else 'is'} {_described(wrong)}; it must be a path below "
            "the media root, or a list of paths "
            "(keep decoded arrays out of the table: they turn into nested lists)"
        )
    return tuple(map(MediaFile, values))
