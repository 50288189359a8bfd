"""
Tagged questions and captions from clips, written and checked by models behind OpenAI-compatible endpoints.

What MAPLE-bench was made by (arXiv 2602.11596, sections 3 and B), with prompts of our own.
"""

from maple_trl.data.curation.config import CurationConfig, make_config, read_config
from maple_trl.data.curation.curate import CurationSummary, curate
from maple_trl.data.curation.errors import CurationError, UnfinishedError


__all__ = [
    "CurationConfig",
    "CurationError",
    "CurationSummary",
    "UnfinishedError",
    "curate",
    "make_config",
    "read_config",
]
