"""The one error that every media problem becomes, with the closed list of its reasons; and that of a row."""

REASONS: dict[str, str] = {
    # where the file is
    "not-found": "no regular file is at this path under the media root",
    "outside-media-root": "the path, links resolved, leaves the media root",
    "network-not-allowed": "the path is a URL; allow_network is off, or the scheme is not http or https",
    # what the file is
    "empty-file": "the file has no bytes",
    "not-media": "the content is none of the accepted containers, which docs/media.md lists, or of the formats of pictures",
    "unreadable": "an accepted container that cannot be parsed or decoded: index missing, data damaged, no decoder",
    "truncated": "the data end before the length that the container declares",
    # what is in it
    "no-video-track": "a video was asked for and the file has none (cover art does not count)",
    "no-frames": "the video track holds no picture",
    "audio-too-short": "the audio track is no longer than 0.02 s, less than one step of an audio encoder",
    "non-finite-audio": "the audio holds NaN or infinite samples",
    "bad-subtitle": "the subtitle file has no readable text: wrong encoding, broken structure, or no cue with text",
    "segment-outside": "the segment that the row asks for lies outside of the clip",
    # limits
    "too-long": "longer than max_seconds, and overlong media are quarantined rather than trimmed",
    "frame-too-large": "the coded picture is larger than any frame this library decodes",
    "bad-aspect-ratio": "no size with the picture's aspect ratio fits the pixel budget",
    "decode-timeout": "decoding took longer than decode_timeout",
    "decoder-crashed": "the decoder process ended while it decoded the file",
    "decoder-memory": "decoding needs more memory than a decoder process may have",
    "media-tokens": "the row's media take more tokens than the budget of one prompt",
    # rows
    "no-signal": "nothing that the row's tag asks for is left, or no cue of its subtitle in the part of the clip",
    "prompt-too-long": "the prompt does not fit, and media placeholders are never cut",
    "engine-failed": "the engine that samples completions failed on the prompt twice",
}


class MediaError(ValueError):
    """
    A medium that cannot be used as asked. The row it belongs to is quarantined under `reason`.

    Args:
        reason (`str`):
            A key of [`REASONS`].
        path (`str` or `None`):
            The file as the row names it.
        detail (`str`):
            What was found, and where it helps, what would be right.

    Raises:
        KeyError: if `reason` is not one of [`REASONS`]; an undocumented reason is a bug here, not in the media.
    """

    def __init__(self, reason: str, path: str | None, detail: str):
        super().__init__(f"{reason}: {path or '<no file>'}: {detail or REASONS.get(reason)}")
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is not a documented reason; known: {sorted(REASONS)}")
        self.reason = reason
        self.path = path
        self.detail = detail or REASONS[reason]

    def __reduce__(self):  # so that it crosses process borders (data loader workers, multiprocess map)
        return type(self), (self.reason, self.path, self.detail)


class RowError(ValueError):
    """A row of the data set that cannot be a prompt, whatever its files hold."""
