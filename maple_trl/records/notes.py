"""Words that one part writes and another one reads."""

FAILED = "the reward function"
"""How the note begins that an exception of a user's reward function has."""
