"""One budget for what a process keeps on its host: caches, and what is counted beside them."""

import gc
import pickle
import threading
from collections import OrderedDict
from concurrent.futures import wait as wait_for
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from maple_trl.omni import towers
from maple_trl.omni.host_memory import (
    HostCache,
    HostMemory,
    deep_bytes,
    hold_prompt,
    host_memory,
    read_bytes,
    readable,
)
from maple_trl.omni.machine_memory import children_of, local_processes, machine_memory, resident_bytes
from maple_trl.omni.media import loader as loader_module
from maple_trl.omni.media import workers
from maple_trl.omni.media.decoder_process import read_arrays
from maple_trl.omni.media.loader import MediaLoader


class Reference:
    """What is to happen, said as simply as it can be: one list of all entries in the order of their last use."""

    def __init__(self, limit, bounds):
        self.limit, self.bounds = limit, bounds
        self.entries = OrderedDict()  # (cache, key) -> bytes
        self.held = {}

    def taken(self, cache=None):
        return sum(size for (owner, _), size in self.entries.items() if cache in (None, owner))

    def room(self, wanted):
        while self.entries and self.taken() + sum(self.held.values()) + wanted > self.limit:
            self.entries.popitem(last=False)

    def put(self, cache, key, size):
        self.entries.pop((cache, key), None)
        if size > self.bounds[cache] or size > self.limit - sum(self.held.values()):
            return
        while self.taken(cache) + size > self.bounds[cache]:
            del self.entries[next(entry for entry in self.entries if entry[0] == cache)]
        self.room(size)
        self.entries[cache, key] = size

    def get(self, cache, key):
        if (cache, key) not in self.entries:
            return False
        self.entries.move_to_end((cache, key))
        return True

    def hold(self, name, size):
        self.held.pop(name, None)
        self.room(size)
        self.held[name] = size


class Thing:
    pass


sizes = st.integers(0, 60)
steps = st.lists(
    st.one_of(
        *[st.tuples(st.just("put"), st.integers(0, 2), st.integers(0, 5), sizes)] * 3,
        st.tuples(st.just("get"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("hold"), st.integers(0, 2), sizes),
        st.tuples(st.just("free"), st.integers(0, 2)),
        st.tuples(st.just("limit"), st.integers(1, 120)),
    ),
    min_size=12,
    max_size=40,
)


def play(memory, limit, bounds, done):
    """Do the same with a budget and with the reference; after each step both must hold the same."""
    caches = [memory.cache("abc"[i], bound, lambda key, size: size) for i, bound in enumerate(bounds)]
    expected, owners = Reference(limit, bounds), {}
    for what, *how in done:
        if what == "put":
            cache, key, size = how
            caches[cache][key] = size
            expected.put(cache, key, size)
        elif what == "get":
            cache, key = how
            assert (caches[cache].get(key) is not None) == expected.get(cache, key)
        elif what == "hold":
            name, size = how
            memory.hold("held", owners.setdefault(name, Thing()), size)
            expected.hold(name, size)
        elif what == "free":
            owners.pop(how[0], None)
            expected.held.pop(how[0], None)
        else:
            memory.set_limit(how[0])
            expected.limit = how[0]
            expected.room(0)
        kept = {(i, key): size for i, cache in enumerate(caches) for key, (size, *_) in cache._entries.items()}
        assert kept == expected.entries
        assert [cache.currsize for cache in caches] == [expected.taken(i) for i in range(3)]
        assert all(cache.currsize <= bound for cache, bound in zip(caches, bounds, strict=True))
        held = sum(expected.held.values())
        assert (memory.cached, memory.held) == (expected.taken(), held)
        assert memory.cached + held <= max(expected.limit, held)
        assert sum(memory.parts().values()) == memory.cached + held


FEW = [("put", 0, 0, 40), ("put", 1, 0, 40), ("get", 0, 0), ("put", 1, 1, 40)]


@given(st.integers(1, 120), st.tuples(sizes, sizes, sizes), steps)
@example(80, (80, 80, 80), FEW)
@example(80, (80, 80, 80), [("put", 0, 0, 30), ("put", 0, 1, 30), ("get", 0, 0), ("put", 0, 2, 30)])
@example(80, (80, 80, 80), [("put", 0, 0, 40), ("put", 1, 0, 30), ("get", 0, 0), ("hold", 0, 20)])
def test_caches_share_a_budget_as_a_list_of_all_entries_would(limit, bounds, done):
    play(HostMemory(limit), limit, bounds, done)


class Newest(HostMemory):
    """Lets go the entry that was used last."""

    def _evict(self, cache):
        cache._entries.move_to_end(next(reversed(cache._entries)), last=False)
        super()._evict(max((c for c in self._caches if len(c)), key=lambda c: c.oldest))


class Forgetful(HostMemory):
    """Counts nothing beside the caches."""

    held = 0


class Separate(HostMemory):
    """Each cache has its own bound alone."""

    def _shrink(self, wanted, held=None):
        pass


@pytest.mark.parametrize(
    ("wrong", "done"), [(Newest, FEW), (Separate, FEW), (Forgetful, [("put", 0, 0, 40), ("hold", 0, 60), FEW[1]])]
)
def test_a_budget_that_does_not_hold_is_found(wrong, done):
    play(HostMemory(80), 80, (80, 80, 80), done)
    with pytest.raises(AssertionError):
        play(wrong(80), 80, (80, 80, 80), done)


def test_the_sum_is_below_the_budget_at_every_moment(monkeypatch):
    """Also within an insertion, and with several threads."""
    sums = []

    class Watched(HostCache):
        @property
        def currsize(self):
            return self._currsize

        @currsize.setter
        def currsize(self, size):
            self._currsize = size
            sums.append(sum(cache.currsize for cache in caches))

    monkeypatch.setattr("maple_trl.omni.host_memory.HostCache", Watched)
    memory, caches = HostMemory(1000), []
    caches += [memory.cache(str(i), 700, lambda key, value: value) for i in range(3)]

    def fill(cache):
        for i in range(500):
            cache[i % 37] = 1 + (i * 7919) % 211
            cache.get(i % 11)

    threads = [threading.Thread(target=fill, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) > 2000 and 700 < max(sums) <= 1000 and memory.evictions > 500
    assert [sum(dict(cache).values()) for cache in caches] == [cache.currsize for cache in caches]


def test_what_is_gone_is_not_counted():
    memory = HostMemory(100)
    cache = memory.cache("clips", 100, lambda key, size: size)
    cache["a"] = 60
    thing = Thing()
    memory.hold("prompts", thing, 30)
    memory.hold("prompts", thing, 20)
    assert memory.parts() == {"clips": 60, "prompts": 20}
    thing.itself = thing
    del thing
    gc.collect()
    assert memory.parts() == {"clips": 60}
    with memory.reserved("decoding", 70):
        assert memory.parts() == {"clips": 0, "decoding": 70} and memory.evictions == 1
    del cache
    gc.collect()
    assert memory.parts() == {}


def test_what_does_not_fit_is_told_once_with_numbers(caplog):
    memory = HostMemory(3 << 20)
    cache = memory.cache("media", 2 << 20, lambda key, size: size)
    for _ in range(2):
        cache["long"] = 5 << 19
    (told,) = [record.getMessage() for record in caplog.records]
    assert "an entry of 2.5 MiB does not fit into the 2.0 MiB that 'media' may have" in told
    assert "host memory of this process: 3.0 MiB" in told and "long" not in cache
    caplog.clear()
    thing, cache["short"] = Thing(), 1 << 20
    for _ in range(2):
        memory.hold("replay", thing, 4 << 20)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "takes 4.0 MiB (replay 4.0 MiB), more than the 3.0 MiB" in told and not len(cache)
    caplog.clear()
    HostMemory().cache("media", 1, lambda key, size: size)["long"] = (
        2  # without a budget each bound is its owner's choice
    )
    assert not caplog.records


def test_what_nobody_uses_any_more_is_collected_before_it_counts(caplog):
    """A trainer is in cycles: one that is done must not take the room of the next."""
    memory = HostMemory(100)

    def leave_behind():
        thing = Thing()
        thing.itself = thing
        memory.hold("prompts", thing, 80)

    gc.disable()
    try:
        leave_behind()
        assert memory.held == 80
        memory.set_limit(100)
        assert memory.held == 0
        leave_behind()
        thing = Thing()
        memory.hold("prompts", thing, 30)
        assert memory.held == 30 and not caplog.records
        memory.hold("prompts", thing, 101)
        assert "more than the 100 B" in caplog.text
    finally:
        gc.enable()


def test_prompts_count_while_they_are_used():
    prompt = Thing()
    prompt.ids, prompt.media = torch.zeros(10), {"pixels": torch.zeros(5, 5), "count": 3}
    before = host_memory().parts().get("prompts", 0)
    assert hold_prompt(prompt) is prompt
    assert host_memory().parts()["prompts"] == before + 4 * (10 + 25)
    prompt.messages = [{"role": "user", "content": "p" * 5000}]
    hold_prompt(prompt)
    assert host_memory().parts()["prompts"] > before + 4 * (10 + 25) + 5000
    del prompt
    assert host_memory().parts().get("prompts", 0) == before


def test_features_that_another_thread_pushes_out_are_not_missed():
    """Threads that decode ahead share the budget: an entry may go between two looks at it."""

    class Fleeting(HostCache):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    cache = towers.TowerCache(1 << 20)
    cache._memory = Fleeting(HostMemory(1 << 20), "encoder", 1 << 20, towers._size)
    cache._remember("clip", {"features": torch.ones(4)})
    assert cache._read("clip")["features"].sum() == 4
    cache._memory.clear()
    assert cache._read("clip") is None


def test_a_copy_of_a_cache_is_empty():
    cache = host_memory().cache("judges", 1 << 20)
    cache["question"] = "answer"
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.part, copy.maxsize, len(copy), len(cache)) == ("judges", 1 << 20, 0, 1)


def test_sizes_of_texts():
    assert deep_bytes({"a": ["b" * 1000, 2.0]}) > 1000 + 3 * 50
    assert deep_bytes("b" * 2000) - deep_bytes("b" * 1000) == 1000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("1.5 gb", 1_500_000_000),
        ("500mib", 500 << 20),
        (4096, 4096),
        ("4096", 4096),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert read_bytes(text, "host_memory_bytes") == size


@pytest.mark.parametrize("text", ["8 elephants", "-1", "", "GiB", True, "1e9", "0", "0.1B"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="host_memory_bytes must be"):
        read_bytes(text, "host_memory_bytes")


def test_sizes_are_said_as_people_read_them():
    assert [readable(n) for n in (12, 1536, 3 << 30, 5 << 40)] == ["12 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]


def test_a_clip_counts_twice_while_it_is_handed_over(seven_tags, monkeypatch):
    folder, rows = seven_tags
    counted = []

    def read(descriptor, places):
        counted.append(host_memory().parts()["decoding"])
        return read_arrays(descriptor, places)

    monkeypatch.setattr(workers, "read_arrays", read)
    with MediaLoader(folder, workers=1) as loader:
        clip = loader.video(rows[0]["video"] or next(row["video"] for row in rows if row["video"]))
        assert counted == [2 * clip.nbytes] and "decoding" not in host_memory().parts()
        assert host_memory().parts()["media"] >= clip.nbytes and loader._load.cache.currsize == clip.nbytes
        loader.close()
        assert loader._load.cache.currsize == 0


def test_pinned_memory_counts_as_what_pytorch_takes():
    class Pinned:
        nbytes = 5000

        def is_pinned(self):
            return True

    assert towers._size("key", {"tokens": Pinned(), "deepstack.0": torch.zeros(10)}) == 8192 + 40


# What is no cache, and must not grow either


def test_calls_that_wait_to_decode_ahead_are_few(tmp_path, monkeypatch):
    """A run that is faster than its decoders would add to them for ever."""
    monkeypatch.setattr(loader_module, "_QUEUED", 10)
    with MediaLoader(tmp_path, workers=0) as loader:
        begun, go_on, made = threading.Event(), threading.Event(), []

        def wait():
            begun.set()
            go_on.wait(60)

        loader.prefetch([wait])
        begun.wait(60)
        for first in range(0, 400, 20):
            loader.prefetch([partial(made.append, i) for i in range(first, first + 20)])
            assert sum(not call.done() for call in loader._queued) <= 10 + 4  # and those that threads are at
        go_on.set()
        wait_for(loader._queued)
        assert set(range(390, 400)) <= set(made) and len(made) < 400


def test_files_of_an_endless_stream_are_not_remembered_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_REMEMBERED", 5)
    with MediaLoader(tmp_path, workers=0, cache_bytes=1) as loader:
        for i in range(12):
            (tmp_path / f"{i}.srt").write_bytes(f"1\n00:00:01,000 --> 00:00:02,000\nsaid {i}\n".encode("utf-16"))
            loader.subtitle(f"{i}.srt")
        assert [Path(path).stem for _, path in loader.decodes] == ["7", "8", "9", "10", "11"]
        assert len(loader._noted) <= 5 and len(loader._load.cache) == 0
        for i in range(12):
            loader.expect(f"{i}.srt", (0, 0))
        assert len(loader._identities) == 5


def test_a_file_that_has_gone_is_expected_to_be_nothing(tmp_path):
    with MediaLoader(tmp_path, workers=0) as loader:
        loader.expect("gone.mp4", (1, 2))  # since another process has read it
        assert loader.identity("gone.mp4") is None and loader.identity("another.mp4") is None


# The machine


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n"}
UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16 << 30),
        # Version 2, in a container.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4294967296\n"}, 4 << 30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 16 << 30),
        # The group around is the tighter one.
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "sys/fs/cgroup/slurm/job_1/memory.max": "2147483648\n",
                "sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max\n",
            },
            2 << 30,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.high": "1073741824\n"}, 1 << 30),
        # Version 1; of controllers the one of memory counts.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3221225472\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1\n",
            },
            3 << 30,
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED},
            16 << 30,
        ),
    ],
)
def test_memory_that_a_control_group_allows(tmp_path, files, expected):
    assert machine_memory(write(tmp_path, MACHINE | files)) == expected


def test_a_system_that_tells_nothing(tmp_path):
    assert machine_memory(tmp_path) is None


def test_processes_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (local_processes(), local_processes(4)) == (1, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_processes(16) == 8


def test_what_processes_take():
    import os
    import subprocess
    import sys

    program = "import sys; kept = bytearray(64 << 20); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        assert process.pid in children_of(os.getpid())
        assert 64 << 20 < resident_bytes(process.pid) < 256 << 20
        found = host_memory().metrics()
        assert found["memory/host_rss_children"] > 64 << 20 and found["memory/host_rss"] > 1 << 20
        process.stdin.close()
    assert process.pid not in children_of(os.getpid()) and resident_bytes(2**22 + 1) is None
