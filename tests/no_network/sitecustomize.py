"""Refuses, in an interpreter that a test has started, what leads beyond this machine; see `outbound.py`."""

import importlib.util
from pathlib import Path


_found = importlib.util.spec_from_file_location("outbound", Path(__file__).parents[1] / "outbound.py")
_outbound = importlib.util.module_from_spec(_found)
_found.loader.exec_module(_outbound)
_outbound.refuse()
