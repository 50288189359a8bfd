"""Signals that reach decoder processes while they decode a certain file: from outside, and without a hook in what is tested."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path


PROGRAM = b"maple_trl.omni.media.decoder_process"


def decoders(parent: int | None = None) -> list[int]:
    """Decoder processes on this machine, of one parent or of all."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes()
            status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # Unlike a shell or this module, a decoder has the name in the program that stands in its command.
        if PROGRAM in words and b"settings" in words and status[0] != "Z" and parent in (None, int(status[1])):
            found.append(int(process))
    return found


def reads(process: int, path: str) -> bool:
    try:
        return any(os.readlink(entry.path) == path for entry in os.scandir(f"/proc/{process}/fd"))
    except OSError:
        return False


def strike(path: str, number: int, most: int) -> None:
    """Sends the signal to every decoder that has the file open, once each, and to no more than `most`."""
    struck: set[int] = set()
    print("watching", flush=True)
    known, looked = [], 0.0
    while True:
        if time.monotonic() - looked > 0.02:
            known, looked = decoders(), time.monotonic()
        for process in known:
            if len(struck) < most and process not in struck and reads(process, path):
                # A watch that is ended between the two would have struck and not said so.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                os.kill(process, number)
                print(process, flush=True)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
                struck.add(process)
        time.sleep(0.001)


def write_long_sound(path: Path) -> Path:
    """Four minutes of silence, which take a while to decode and little to write."""
    import av  # not where this is run as a program
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=48000, layout="stereo")
        silence = np.zeros((1, 2 * 48000), dtype=np.int16)
        for second in range(240):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48000, second * 48000, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@contextmanager
def struck(path: Path, number: int, most: int = 1000):
    """Within it, decoders that read `path` get the signal. Yields a function that tells how many did."""
    command = [sys.executable, "-I", "-S", __file__, os.path.realpath(path), str(int(number)), str(most)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout.readline() == "watching\n"
        hits: list[str] = []

        def count() -> int:
            if watch.poll() is None:
                watch.terminate()
            hits.extend(watch.stdout.readlines())
            return len(hits)

        try:
            yield count
        finally:
            watch.terminate()


if __name__ == "__main__":
    strike(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
