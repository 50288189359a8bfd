"""Files that one process holds: a second process is refused, a killed one leaves none held, file systems without locks."""

import errno
import fcntl
import subprocess
import sys

import pytest

from maple_trl.data.shards import hold_split
from maple_trl.locks import LockedError, held_file, lock_file


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the file."""
    code = "import sys; from pathlib import Path; from maple_trl.locks import held_file\n"
    code += "with held_file(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, tmp_path / "a.lock"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_at_a_time(tmp_path, holder):
    with pytest.raises(LockedError, match="a.lock is held by another process"):
        lock_file(tmp_path / "a.lock")
    holder.communicate("")  # it ends by itself, and takes its file along
    assert list(tmp_path.iterdir()) == []
    with held_file(tmp_path / "a.lock"):
        with pytest.raises(LockedError):
            lock_file(tmp_path / "a.lock")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_file_held(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "a.lock").exists()
    with held_file(tmp_path / "a.lock"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(code):
        def flock(*_):
            raise OSError(code, "flock")

        monkeypatch.setattr(fcntl, "flock", flock)

    for code in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
        refuse(code)
        with hold_split(tmp_path / "rows", "train"), held_file(tmp_path / "a.lock"):
            pass
        assert list(tmp_path.iterdir()) == []
    refuse(errno.EIO)  # Negative control: any other error is one
    with pytest.raises(OSError):
        lock_file(tmp_path / "a.lock")
