"""What stops an upload, in words that hold no key."""

from __future__ import annotations

import re

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
