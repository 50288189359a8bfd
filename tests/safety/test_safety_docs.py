"""docs/safety.md: what it names is there, and its numbers are those of the code."""

import dataclasses
import re
from pathlib import Path

from maple_trl import OmniGRPOConfig
from maple_trl.cli import command
from maple_trl.omni.errors import REASONS
from maple_trl.omni.media import opening, sampling, subtitles, workers


ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")


def test_what_it_names_is_there():
    words = set(re.findall(r"`([^`\n]+)`", PAGE))
    tests = {word for word in words if word.startswith("tests/")}
    assert len(tests) >= 6 and all((ROOT / name).is_file() for name in tests)
    options = {field.name for field in dataclasses.fields(OmniGRPOConfig)}
    assert {word for word in words if re.fullmatch(r"(media|max_media|overlong)_\w+", word)} <= options
    reasons = {word for word in words if re.fullmatch(r"(too|frame|decode|decoder)-\w+(-\w+)?", word)}
    assert reasons and reasons <= set(REASONS)
    assert "test-fuzz:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_it_names_every_command():
    table = PAGE.partition("| command |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([^`]+)`", table))
    known = {one.name for group in command.GROUPS.values() for one in group}
    assert known <= named, known - named


def test_its_numbers_are_those_of_the_code():
    limits = sampling.MediaLimits()
    for number in (
        f"{workers.WORKER_BYTES >> 30} GiB, else `decoder-memory`",
        f"{limits.decode_timeout:g} s and one more",
        f"{int(opening.MAX_SOURCE_PIXELS**0.5)} x {int(opening.MAX_SOURCE_PIXELS**0.5)}",
        f"over {limits.max_seconds:g} s",
        f"{sampling.MAX_ASPECT_RATIO:g} : 1",
        f"{subtitles.MAX_BYTES >> 20} MiB; no more of it is read",
    ):
        assert number in PAGE, number
