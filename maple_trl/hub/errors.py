"""What stops an upload, in words that hold no key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError


HUB_ERRORS = (HfHubHTTPError.__bases__[0], OSError, RuntimeError)
"""
What uploads raise: errors of the HTTP library, whichever the Hub's client is built on, of files and sockets, and of threads that
upload.
"""


class PublishError(ValueError):
    """Something cannot be uploaded; the message says why."""


def told(error: BaseException) -> str:
    """Return what the Hub, or the way to it, says, in one line: without what addresses of uploads are signed with."""
    status = getattr(
        getattr(error, "response", None) or getattr(error.__cause__, "response", None), "status_code", None
    )
    if status in (401, 403):
        return f"the Hub refuses it (HTTP {status}): is there a key that may write (hf auth login, or HF_TOKEN)?"
    said = re.sub(r"\?\S+", "?…", " ".join(str(error).split()))
    return (said or type(error).__name__) + (f" (HTTP {status})" if status and str(status) not in said else "")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Raise PublishError, one line that holds no key, where the Hub cannot be reached, refuses, or breaks off."""
    from maple_trl.omni.checkpoints import hub_is_silent  # with transformers, which errors alone need not wait for

    if (silent := hub_is_silent()) is not None:
        raise PublishError(f"{what}: {silent}")
    try:
        yield
    except PublishError:
        raise
    except HUB_ERRORS as error:
        raise PublishError(f"{what}: {told(error)}") from error
