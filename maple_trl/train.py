"""Stands for `maple_trl.jobs.train`, under the name that scripts import."""

import sys

from maple_trl.jobs import train


sys.modules[__name__] = train
