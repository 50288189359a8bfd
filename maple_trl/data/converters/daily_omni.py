"""
Daily-Omni (`liarliar/Daily-Omni`, arXiv 2505.17862), as the benchmark `daily-omni` reads its `qa.json`.

Relied on: the published `qa.json` and clips. Under a tag with S the caption of the sound that its authors' pipeline wrote stands
in for subtitles, see [`~maple_trl.data.daily_omni`].
"""

from __future__ import annotations

from collections.abc import Iterator

from maple_trl.data.benchmarks.base import Record
from maple_trl.data.benchmarks.omni import DAILY_OMNI as BENCHMARK
from maple_trl.data.converters.base import Converter, Place, Sample, of_question


_WRITTEN = tuple((name, "Daily-Omni's annotation pipeline") for name in ("question", "options", "answer"))


def _daily_omni(record: Record, place: Place) -> Iterator[Sample]:
    yield of_question(BENCHMARK.read(record), clip=record.text("video_id"), written=_WRITTEN)


DAILY_OMNI = Converter(
    name="daily-omni",
    title=BENCHMARK.title,
    source="Daily-Omni",
    read=_daily_omni,
    tables=(("qa.json", "test"),),
    media=BENCHMARK.media,
    hub=BENCHMARK.hub,
    required=BENCHMARK.required,
    tag=BENCHMARK.tag,
)
