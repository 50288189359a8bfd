"""Ends the ranks of a distributed program at the first collective call to which some of them do not come, and says which."""

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


class Watchdog:
    """
    Joins the ranks, of which none waits longer than some seconds for the others.

    A rank that waited in vain, or met another error, calls the roll in the store in which the ranks have found each other:
    a line that begins with `watchdog:` tells how many collective calls each rank has made, and what has become of it.
    """

    def __init__(self, seconds: float):
        limit = timedelta(seconds=seconds)
        self.seconds = seconds
        distributed_c10d.default_pg_timeout = limit  # of groups that other libraries make
        dist.init_process_group("gloo", timeout=limit)
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        rank = dist.get_rank()
        calls = dist.group.WORLD._get_sequence_number_for_group()
        end = "ended" if error is None else f"was stopped by {kind.__name__}: {' '.join(str(error).split())[:200]}"
        self.store.set(f"watchdog/{rank}", f"made {calls} collective calls and {end}")
        if error is not None:
            print(
                f"watchdog: {'; '.join(map(self._told_of, range(dist.get_world_size())))}", file=sys.stderr, flush=True
            )

    def _told_of(self, rank: int) -> str:
        """What a rank has said; those that wait for it may have begun to wait a little later than this one."""
        end = time.monotonic() + self.seconds
        while not self.store.check([f"watchdog/{rank}"]):
            if time.monotonic() > end:
                return f"rank {rank} did not come"
            time.sleep(0.05)
        return f"rank {rank} {self.store.get(f'watchdog/{rank}').decode()}"
