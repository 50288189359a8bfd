"""A word while torch and TRL load, which takes many seconds."""

from __future__ import annotations

import os
import sys


# Nothing heavier than the standard library up here: every command passes through this module.


class _Herald:
    """Announces the loading of torch once, when it is first imported; it finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("maple-trl: loading torch and TRL …", file=sys.stderr, flush=True)


def tell_when_loading() -> None:
    """Let the first process announce when torch begins to load; where it is loaded already, nothing is said."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        sys.meta_path.insert(0, _Herald())
