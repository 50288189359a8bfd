"""A decoder that is killed, hangs or eats memory costs the file's row; runs, and the processes themselves, end well."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import faults
import media_files as files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.omni.errors import REASONS, MediaError
from maple_trl.omni.media import workers
from maple_trl.omni.media.clips import AudioClip, ClipRequest, MediaInfo, Source, VideoClip
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.media.tasks import Task
from maple_trl.omni.media.wire import pack, unpack


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at through /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    for i in range(4):
        files.write_video(root / f"good{i}.mp4", frames=24, audio=files.tone(0.5 + 0.1 * i, 16000))
    files.write_video(root / "large.mp4", frames=64)
    faults.write_long_sound(root / "victim.flac")
    return root


def reading_a_header(folder) -> Task:
    return Task("probe", Source("good0.mp4", str(folder / "good0.mp4")), options=(ClipRequest(),))


def refused(call) -> MediaError:
    with pytest.raises(MediaError) as caught:
        call()
    assert caught.value.reason in REASONS
    return caught.value


# What comes out of a process is what comes out without one


def test_the_same_arrays_with_and_without_processes(folder):
    inside, outside = (MediaLoader(folder, backend="pyav", workers=n) for n in (0, 2))
    for kind in ("video", "audio", "probe"):
        ours, theirs = (getattr(loader, kind)("good1.mp4") for loader in (inside, outside))
        assert type(ours) is type(theirs) and repr(ours) == repr(theirs)
        for name in ("frames", "timestamps", "waveform"):
            if hasattr(ours, name):
                one, other = getattr(ours, name), getattr(theirs, name)
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype and not one.flags.writeable and not other.flags.writeable
    assert outside.decodes == inside.decodes and outside.notes == inside.notes
    assert os.getpid() not in workers.decoder_pool(2, backend="pyav").pids != []


@dataclass(frozen=True)
class Elsewhere:
    x: int = 0


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
arrays = st.tuples(st.sampled_from(["u1", "<f4", "<f8", "<i8"]), st.lists(st.integers(0, 3), max_size=3)).map(
    lambda pair: np.arange(np.prod(pair[1], dtype=int)).reshape(pair[1]).astype(pair[0])
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(values)
def test_values_cross_unchanged(value):
    from maple_trl.omni.media.decoder_process import read_arrays, write_arrays

    sent = []
    text = json.dumps(pack(value, sent))
    descriptor, places = write_arrays(sent)
    got = unpack(json.loads(text), read_arrays(descriptor, json.loads(json.dumps(places))))
    os.close(descriptor)

    def same(a, b):
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return type(a) is type(b) and a == b

    assert same(value, got)


def test_clips_and_tasks_cross_and_nothing_else_does():
    task = Task(
        "video",
        Source("a\udcff.mp4", "/x/a\udcff.mp4", (1, 2)),
        MediaLimits(fps=2.5, num_frames=None),
        (28, 4, 8, ClipRequest(start=1.5, end=2.5, num_frames=2)),
    )
    assert unpack(json.loads(json.dumps(pack(task, []))), ()) == task
    for clip in (
        VideoClip(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2.0), 2.0, 1.0, "a", ("resized",)),
        AudioClip(np.zeros(5, np.float32), 16000, 0.1, "a"),
        MediaInfo("a", True, False, None, 4, 4, "mov"),
    ):
        sent = []
        assert repr(unpack(json.loads(json.dumps(pack(clip, sent))), sent)) == repr(clip)
    for value in (Elsewhere(), object(), {1}, b"x"):
        with pytest.raises(TypeError, match="cannot be sent"):
            pack(value, [])
    for name in (["os", "system"], ["subprocess", "Popen"], ["maple_trl.omni.media.loader", "MediaLoader"]):
        with pytest.raises(TypeError, match="no dataclass"):
            unpack({"class": name, "fields": {}}, ())


# A file that ends its decoder


@pytest.mark.matrix(cases=1)
@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_signal_costs_the_file_alone(folder, number):
    loader = MediaLoader(folder, backend="pyav")
    assert loader.audio("good0.mp4")
    before = set(workers.decoder_pool(2).pids)
    with faults.struck(folder / "victim.flac", number) as count:
        error = refused(lambda: loader.audio("victim.flac"))
        assert count() == 1
    assert error.reason == "decoder-crashed" and error.path == "victim.flac" and number.name in error.detail
    assert loader.audio("good1.mp4") and loader.video("good1.mp4")
    assert not before <= set(workers.decoder_pool(2).pids)
    again = refused(lambda: loader.audio("victim.flac"))  # what crashed once is not tried again
    assert str(again) == str(error) and loader.decodes["audio", str(folder / "victim.flac")] == 1
    if number == signal.SIGKILL:  # negative control: without a signal nothing is wrong with it
        assert MediaLoader(folder, backend="pyav").audio("victim.flac").duration == 240


@linux
def test_a_hang_costs_the_file_alone(folder):
    loader = MediaLoader(folder, MediaLimits(decode_timeout=2), backend="pyav")
    with faults.struck(folder / "victim.flac", signal.SIGSTOP) as count:
        error = refused(lambda: loader.audio("victim.flac"))
        assert count() == 1
    assert str(refused(lambda: loader.audio("victim.flac"))) == str(error)  # and is not waited for again
    assert loader.decodes["audio", str(folder / "victim.flac")] == 1
    assert error.reason == "decode-timeout" and "2 s" in error.detail and "was ended" in error.detail
    assert loader.audio("good1.mp4")
    stopped = [p for p in faults.decoders(os.getpid()) if "\nState:\tT" in Path(f"/proc/{p}/status").read_text()]
    assert not stopped


@linux
def test_a_file_that_needs_much_memory_costs_itself_alone(folder):
    large = MediaLimits(num_frames=64, min_pixels=1 << 20, max_pixels=1 << 21)  # 64 pictures of 3 MiB, twice
    loader = MediaLoader(folder, large, backend="pyav", worker_bytes=workers.LEAST_BYTES)
    error = refused(lambda: loader.video("large.mp4"))
    assert error.reason == "decoder-memory" and "256 MiB" in error.detail and "media_worker_bytes" in error.detail
    assert loader.audio("good0.mp4")
    enough = MediaLoader(folder, large, backend="pyav")
    assert enough.video("large.mp4").frames.nbytes > 192 << 20  # negative control
    with pytest.raises(ValueError, match="worker_bytes must be at least"):
        MediaLoader(folder, worker_bytes=1 << 20)


@linux
def test_a_process_that_ends_or_stops_while_idle_blames_no_file(folder, monkeypatch):
    monkeypatch.setattr(workers, "_BEGIN_SECONDS", 1.0)
    loader = MediaLoader(folder, backend="pyav")
    for number in (signal.SIGKILL, signal.SIGSTOP):
        assert loader.probe("good0.mp4")
        for process in workers.decoder_pool(2).pids:
            os.kill(process, number)
        assert loader.audio("good2.mp4", sampling_rate=8000 + number)


# Threads, forks, ends


@pytest.mark.long
@linux
def test_threads_keep_all_processes_busy_and_decode_a_clip_once(folder):
    loader, clips = MediaLoader(folder, backend="pyav", cache_bytes=1 << 30), []
    barrier = threading.Barrier(8)

    def ask(i):
        barrier.wait()
        clips.extend([loader.video(f"good{i % 4}.mp4"), loader.audio(f"good{i % 4}.mp4")])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clips) == 16 and len({id(clip) for clip in clips}) == 8 and set(loader.decodes.values()) == {1}
    assert len(workers.decoder_pool(2).pids) == 2


@linux
def test_an_interrupt_while_decoding_leaves_the_pool_whole(folder):
    loader = MediaLoader(folder, backend="pyav")
    loader.probe("good0.mp4")

    def interrupt():
        while not any(faults.reads(p, str(folder / "victim.flac")) for p in workers.decoder_pool(2).pids):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loader.audio("victim.flac", sampling_rate=7000)
    thread.join()
    assert loader.audio("good3.mp4", sampling_rate=7000).sampling_rate == 7000
    pool = workers.decoder_pool(2)
    pool.close()
    assert pool.pids == [] and loader.audio("good3.mp4", sampling_rate=7001) and len(pool.pids) == 1


@linux
def test_a_fork_has_processes_of_its_own(folder):
    from forks import start, status_of

    loader = MediaLoader(folder, backend="pyav")
    loader.probe("good0.mp4")
    ours = workers.decoder_pool(2).pids

    def in_fork():
        clip = loader.audio("good0.mp4", sampling_rate=9000)
        theirs = workers.decoder_pool(2).pids
        return 0 if clip.sampling_rate == 9000 and theirs and not set(theirs) & set(ours) else 1

    forks = [start(in_fork) for _ in range(2)]
    assert [status_of(fork) for fork in forks] == [0, 0]
    assert loader.audio("good0.mp4", sampling_rate=9001) and workers.decoder_pool(2).pids == ours


@linux
@pytest.mark.parametrize("count", [0, 2])
def test_a_fork_does_not_wait_for_what_its_parent_decodes(folder, count):
    """As a DataLoader's workers are forked while clips are prefetched."""
    from forks import start, status_of

    loader = MediaLoader(folder, backend="pyav", workers=count)
    loader.prefetch([lambda: loader.audio("victim.flac", sampling_rate=6000)])
    while not loader.decodes:
        time.sleep(0.002)

    def in_fork():
        signal.alarm(60)
        return 0 if loader.audio("victim.flac", sampling_rate=6000).sampling_rate == 6000 else 1

    assert status_of(start(in_fork)) == 0
    loader.close()


@linux
def test_a_working_folder_that_was_deleted_is_no_hindrance(folder, tmp_path):
    from forks import start, status_of

    def in_fork():
        sys.path.insert(0, "")  # as in a notebook
        (tmp_path / "here").mkdir()
        os.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        MediaLoader(folder, backend="pyav").probe("good0.mp4")
        return 0 if workers.decoder_pool(2).pids else 1

    assert status_of(start(in_fork)) == 0


SCRIPT = """
import sys, threading, time
from maple_trl.omni.media.loader import MediaLoader
loader = MediaLoader(sys.argv[1], backend="pyav")
assert "torch" not in sys.modules, "decoding needs no torch"
thread = threading.Thread(target=loader.probe, args=("good0.mp4",))  # started by a thread that ends
thread.start()
thread.join()
print(loader.audio("good0.mp4").duration, flush=True)
from maple_trl.omni.media.workers import decoder_pool
print(*decoder_pool(2).pids, flush=True)
for line in sys.stdin:  # the script itself came through another pipe
    pass
loader.prefetch([lambda r=rate: loader.audio("victim.flac", sampling_rate=r) for rate in range(4000, 4020)])
print("busy", flush=True)
time.sleep(600)
"""


def started(folder):
    """A script without a main guard, given as a notebook's cell or a here-document is: not as a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert float(process.stdout.readline()) == pytest.approx(0.5, abs=0.1)
    return process, [int(pid) for pid in process.stdout.readline().split()]


def gone(processes):
    for _ in range(500):
        if not set(processes) & set(faults.decoders()):
            return True
        time.sleep(0.02)
    return False


@linux
def test_processes_end_with_a_parent_that_is_killed_even_while_they_hang(folder):
    process, pids = started(folder)
    assert len(pids) == 1
    process.stdin.close()
    assert process.stdout.readline() == "busy\n"
    for _ in range(1000):
        pids = faults.decoders(process.pid)
        if len(pids) == 2 and all(faults.reads(pid, str(folder / "victim.flac")) for pid in pids):
            break
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    assert len(pids) == 2 and gone(pids)


@linux
def test_processes_ignore_an_interrupt_and_import_neither_torch_nor_the_script(folder):
    process, [pid] = started(folder)
    os.kill(pid, signal.SIGINT)
    assert os.getsid(pid) != os.getsid(process.pid)  # Ctrl-C and Ctrl-Z of a terminal do not reach it
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libavcodec" in maps and "torch" not in maps and "transformers" not in maps
    assert faults.decoders(process.pid) == [pid]
    process.kill()
    process.wait()
    assert gone([pid])


def test_what_decodes_is_imported_without_torch():
    code = "import sys, maple_trl.omni.media.decoder_process, maple_trl.omni.media.tasks; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert not {"torch", "transformers", "trl", "datasets", "pandas"} & set(loaded.stdout.split())


def test_a_process_that_leaves_after_a_while_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(
        workers,
        "_PROGRAM",
        workers._PROGRAM.replace(
            "main(**", "sys.modules['maple_trl.omni.media.decoder_process'].IDLE_SECONDS = 0.05; main(**"
        ),
    )
    pool = workers.DecoderPool(1)
    task = reading_a_header(folder)
    assert pool.run(task).has_video
    [first] = pool.pids
    time.sleep(0.5)
    assert pool.run(task).has_video and pool.pids != [first]
    pool.close()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise ImportError('no av here')", "ImportError: no av here"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
)
def test_where_no_process_can_be_started_it_is_said_once(folder, monkeypatch, caplog, program, words):
    monkeypatch.setattr(workers, "_PROGRAM", program)
    pool = workers.DecoderPool(2)
    task = reading_a_header(folder)
    with caplog.at_level(logging.WARNING):
        assert [pool.run(task).has_video for _ in range(3)] == [True] * 3
    [message] = [record.getMessage() for record in caplog.records if record.name == workers.__name__]
    assert words in message and "media_workers=0" in message and "in this process" in message


def test_without_an_interpreter_it_is_said_once_too(folder, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pool = workers.DecoderPool(2)
    task = reading_a_header(folder)
    with caplog.at_level(logging.WARNING):
        assert all(pool.run(task).has_video for _ in range(2))
    assert [record.name for record in caplog.records] == [workers.__name__]


def test_options_are_checked():
    from maple_trl.jobs.eval_job import EvalMedia

    assert (EvalMedia().media_workers, EvalMedia().media_worker_bytes) == (workers.WORKERS, workers.WORKER_BYTES)
    for name in ("media_workers", "media_worker_bytes"):
        with pytest.raises(ValueError, match=name):
            EvalMedia(**{name: -1})
    with pytest.raises(ValueError, match="workers must be"):
        MediaLoader(".", workers=-1)
