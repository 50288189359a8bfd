"""Requests: messages, pictures and sound in them, foreign text fenced off, and the digest that tells two requests apart."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maple_trl.chat.options import ChatOptions, check_sampling
from maple_trl.chat.structured import NoObjectError, read_object


if TYPE_CHECKING:
    import numpy as np

# For estimates only: bytes of UTF-8 text per token, and tokens of a picture of a few hundred pixels a side.
BYTES_PER_TOKEN = 4
TOKENS_PER_IMAGE = 800
AUDIO_TOKENS_PER_BYTE = 25 / (2 * 16_000)  # of 16-bit sound at 16 kHz: 25 tokens a second, as Qwen's encoders give
DEFAULT_ANSWER_TOKENS = 1024

SCHEMA_PROMPT = "Answer with one JSON object and nothing else, neither before nor after it. It must match this JSON schema:\n{schema}"


@dataclass(frozen=True)
class ChatRequest:
    """
    One request.

    Args:
        messages (`Sequence[Mapping]`):
            Messages as the API takes them: `role`, and `content` that is text or a list of blocks ([`text_block`],
            [`image_block`], [`audio_block`]).
        json_schema (`Mapping`, *optional*):
            JSON schema of the answer, an object; the result then holds the object that was read, as `data`.
        sampling (`Mapping`, *optional*):
            Fields of the body that win over those of the options.
        sample (`int`, *optional*, defaults to 0):
            Tells requests apart that are equal on purpose, to get several answers. It is not sent.
        reader (`Callable`, *optional*):
            Takes the text of an answer, and as `cut` whether it ends at the token limit, and gives `data`, where the last
            object that matches `json_schema` is not what is wanted; raises
            [`~maple_trl.chat.structured.NoObjectError`] for a text that holds no answer. It is not sent, and no part of
            what tells two requests apart.

    Raises:
        ValueError: for a field of `sampling` that the client sets itself.
    """

    messages: Sequence[Mapping[str, Any]]
    json_schema: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    reader: Callable[..., Any] | None = None

    def __post_init__(self):
        check_sampling(self.sampling)

    def read(self, text: str, finish_reason: str | None = None) -> Any:
        """
        Read what was asked for out of the text of an answer; `None` for a request of plain text.

        Args:
            text (`str`):
                What the model wrote.
            finish_reason (`str`, *optional*):
                Why it ended; `"length"` for one that was cut at the token limit, in which drafts do not count.

        Raises:
            NoObjectError: when it is not there.
        """
        cut = finish_reason == "length"
        try:
            if self.reader is not None:
                return self.reader(text, cut=cut)
            return None if self.json_schema is None else read_object(text, self.json_schema, cut)
        except NoObjectError as error:
            if cut:
                raise NoObjectError(f"cut at the token limit: {error}") from None
            raise


def text_block(text: str) -> dict[str, Any]:
    """Return a content block with text."""
    return {"type": "text", "text": text}


def image_block(picture: np.ndarray, quality: int = 90) -> dict[str, Any]:
    """
    Return a content block with a picture as a data URL (JPEG).

    Args:
        picture (`np.ndarray`):
            uint8, shape (H, W, 3), RGB.
        quality (`int`, *optional*, defaults to 90):
            JPEG quality.
    """
    return jpeg_block(jpeg_bytes(picture, quality))


def jpeg_block(data: bytes) -> dict[str, Any]:
    """Return a content block with a picture as a data URL; `data` is a JPEG file."""
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def jpeg_bytes(picture: np.ndarray, quality: int = 90) -> bytes:
    """Return a JPEG file of a picture: uint8, shape (H, W, 3), RGB."""
    from PIL import Image

    if picture.ndim != 3 or picture.shape[2] != 3 or str(picture.dtype) != "uint8":
        raise ValueError(f"a picture is uint8 of shape (H, W, 3), got {picture.dtype} of shape {picture.shape}")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def audio_block(waveform: np.ndarray, sampling_rate: int) -> dict[str, Any]:
    """
    Return a content block with a sound (16-bit WAV).

    Args:
        waveform (`np.ndarray`):
            float32, shape (n,), in [-1, 1]; what lies beyond is cut.
        sampling_rate (`int`):
            Samples per second.
    """
    return wav_block(wav_bytes(waveform, sampling_rate))


def wav_block(data: bytes) -> dict[str, Any]:
    """Return a content block with a sound; `data` is a WAV file."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode("ascii"), "format": "wav"}}


def wav_bytes(waveform: np.ndarray, sampling_rate: int) -> bytes:
    """Return a WAV file of 16 bits a sample: float32 of shape (n,), in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(sampling_rate)
        sound.writeframes((waveform.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def fence(name: str, text: str) -> str:
    """
    Put `text` between two marks that it cannot hold, so that a prompt can say where foreign text begins and ends.

    The marks carry a digest of the text: whoever wrote the text could not have closed the fence inside it.

    Args:
        name (`str`):
            What the text is, in letters, digits and `_`.
        text (`str`):
            The foreign text.
    """
    mark = hashlib.sha256(f"{name}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"<data-{mark} name={json.dumps(name)}>\n{text}\n</data-{mark}>"


def request_body(request: ChatRequest, options: ChatOptions, structured: bool) -> dict[str, Any]:
    """
    Return the JSON body of a request.

    Args:
        structured (`bool`):
            Send the schema as `response_format` as well. It always stands in the last user message.
    """
    messages = [dict(message) for message in request.messages]
    body: dict[str, Any] = {"model": options.model, "messages": messages, **options.sampling, **request.sampling}
    if request.json_schema is None:
        return body
    schema = SCHEMA_PROMPT.format(schema=json.dumps(request.json_schema, sort_keys=True))
    last = next((i for i in range(len(messages) - 1, -1, -1) if messages[i].get("role") == "user"), None)
    if last is None:
        messages.append({"role": "user", "content": schema})
    else:
        content = messages[last]["content"]
        joined = f"{content}\n\n{schema}" if isinstance(content, str) else [*content, text_block(schema)]
        messages[last]["content"] = joined
    if structured:
        wanted = {"name": "answer", "schema": request.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return body


def request_key(request: ChatRequest, options: ChatOptions) -> str:
    """
    Return the SHA-256 under which an answer is kept: of model, messages, pictures, sampling, schema and sample.

    The server's address is not part of it, so that answers outlive a local server's port.

    Raises:
        TypeError, ValueError: when the request is no JSON.
    """
    content = [request_body(request, options, structured=False), request.json_schema, request.sample]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens that a request may take, prompt and longest answer together, for the rate limit."""
    return estimate_prompt_tokens(body) + longest_answer(body)


def estimate_prompt_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request's messages."""
    contents = [message.get("content") or "" for message in body["messages"]]
    blocks = [[text_block(content)] if isinstance(content, str) else content for content in contents]
    return sum(_block_tokens(block) for content in blocks for block in content)


def longest_answer(body: Mapping[str, Any]) -> int:
    """Return the tokens that an answer may have, or what is taken for them where the request sets no limit."""
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_ANSWER_TOKENS)


def _block_tokens(block: Mapping[str, Any]) -> int:
    if block.get("text") is not None:
        return len(block["text"].encode("utf-8", "replace")) // BYTES_PER_TOKEN + 4
    if block.get("type") == "input_audio":
        return int(len(block["input_audio"]["data"]) * 3 / 4 * AUDIO_TOKENS_PER_BYTE) + 4
    return TOKENS_PER_IMAGE
