"""Omni prompts: media, encoding, model families, and their way into a model's forward."""
