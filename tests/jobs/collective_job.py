"""`collective_job.py RANK HOW`: five collective calls, in the fourth of which a rank `sleeps`, or which it `skips`."""

import sys
import time

import torch
import torch.distributed as dist
from watchdog import Watchdog


if __name__ == "__main__":
    odd, how = int(sys.argv[1]), sys.argv[2]
    with Watchdog(2):
        for call in range(5):
            if call == 3 and dist.get_rank() == odd:
                if how == "skips":
                    continue
                time.sleep(600)
            dist.all_reduce(torch.ones(4))
