"""The parts of an omni model that can be trained or frozen apart. No imports: the command line's help reads them."""

SCOPES = ("vision", "audio", "projectors", "llm")
