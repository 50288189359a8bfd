"""
A client for OpenAI-compatible chat endpoints that outlives their faults.

A batch of requests goes in, as many results come out, in order, and none of them is an exception.

The `openai` package and what else a request needs come with the extra `judge`; importing this package needs none of them.
"""

from maple_trl.chat.client import ChatClient
from maple_trl.chat.messages import ChatRequest, audio_block, fence, image_block, jpeg_block, text_block, wav_block
from maple_trl.chat.options import ChatOptions, ChatSetupError
from maple_trl.chat.results import REASONS, ChatResult, ChatUsage


__all__ = [
    "REASONS",
    "ChatClient",
    "ChatOptions",
    "ChatRequest",
    "ChatResult",
    "ChatSetupError",
    "ChatUsage",
    "audio_block",
    "fence",
    "image_block",
    "jpeg_block",
    "text_block",
    "wav_block",
]
