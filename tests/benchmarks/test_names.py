"""Benchmarks are scripts, whose modules have no package: each needs a name of its own."""

import sys
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "benchmarks/claims", "tests")


def test_no_two_modules_that_tests_import_share_a_name():
    names = Counter(file.stem for folder in FOLDERS for file in (ROOT / folder).glob("[!_]*.py"))
    names.update(set(sys.stdlib_module_names) & set(names))
    assert {"page", "report", "soak", "claim_sets"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []
