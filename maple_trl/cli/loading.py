"""A word while torch and TRL load, which takes many seconds."""

from __future__ import annotations

import os
import sys


# Nothing heavier than the standard library up here: every command passes through this module.


class _Herald:
    """Says the word when torch is first asked for, and goes; it finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            print("maple-trl: loading torch and TRL …", file=sys.stderr, flush=True)


def tell_when_loading() -> None:
    """Has the first process say so when torch begins to load; where it is loaded already, nothing is said."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        sys.meta_path.insert(0, _Herald())
