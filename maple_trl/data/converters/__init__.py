"""Published sets as tables of rows of one form, in Parquet shards."""

from maple_trl.data.converters.avatar import AVATAR
from maple_trl.data.converters.ave import AVE, AVE_INTERVALS
from maple_trl.data.converters.avqa import AVQA
from maple_trl.data.converters.avsbench import AVSBENCH, AVSBENCH_BOXES
from maple_trl.data.converters.base import CONVERTERS, Converter, Place, Sample, register_converter
from maple_trl.data.converters.convert import ConversionError, ConversionSummary, ConvertOptions, convert
from maple_trl.data.converters.daily_omni import DAILY_OMNI
from maple_trl.data.converters.humanomni import HUMAN_OMNI
from maple_trl.data.converters.sharegpt import SHARE_GPT
from maple_trl.data.converters.tpo import TPO
from maple_trl.data.converters.vast import VAST
from maple_trl.data.converters.video_r1 import VIDEO_R1, VIDEO_R1_COT


for _converter in (DAILY_OMNI, HUMAN_OMNI, VIDEO_R1, VIDEO_R1_COT, TPO, AVQA, AVE, AVE_INTERVALS):
    register_converter(_converter)
for _converter in (AVSBENCH, AVSBENCH_BOXES, AVATAR, VAST, SHARE_GPT):
    register_converter(_converter)

__all__ = [
    "CONVERTERS",
    "ConversionError",
    "ConversionSummary",
    "ConvertOptions",
    "Converter",
    "Place",
    "Sample",
    "convert",
    "register_converter",
]
