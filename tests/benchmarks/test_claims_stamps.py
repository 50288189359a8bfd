"""The task of real media: its package is fetched whole or refused in one line, its splits share nothing, and a run trains on it."""

import dataclasses
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
MODULES = ("fetch_stamps", "stamps_media", "tasks", "tasks.stamps", "runs", "instruments", "worker")
STAMPS = "usr/share/tuxpaint/stamps"
COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
FOLDERS = {
    "animal": "animals/birds",
    "vehicle": "vehicles/auto",
    "hand": "symbols/alphabets/asl",
    "letter": "symbols/alphabets/english/filled",
}
CONTROL = "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: made up\n"
CODES = ("es", "ro", "bg", "el")
NAMES = ("abel", "bara", "cova", "dulu", "efen")
"""Objects of each kind; each split gets one at least."""


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 4), np.uint8)
    pixels[..., 3] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def voice(number):
    file, rate = io.BytesIO(), 16_000
    wave = 0.5 * np.sin(2 * np.pi * (200 + 20 * number) * np.arange(rate // 2) / rate)
    with av.open(file, "w", format="ogg") as container:
        stream = container.add_stream("flac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32_000).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@cache
def stamps():
    """Return the files of a made-up package, by path below the stamps."""
    files = {}
    for kind, folder in FOLDERS.items():
        for name in (f"{kind}{name}" for name in NAMES):
            files[f"{folder}/{name}.png"] = picture(len(files))
            said = {"de": "der", "fr": "le", "it": "il"}
            lines = [f"a {name}", *(f"{code}.utf8={word} {name}" for code, word in said.items())]
            files[f"{folder}/{name}.txt"] = ("\n".join(lines) + "\n").encode()
            if "alphabets" not in folder:
                files |= {f"{folder}/{name}_desc_{code}.ogg": voice(len(files) + i) for i, code in enumerate(CODES)}
    return files


def archive(members):
    """Return an ar archive."""
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts += [
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode(),
            content,
            b"\n" * (len(content) % 2),
        ]
    return b"".join(parts)


def deb(files, packing="xz", extra=()):
    """Return a Debian package with the given files, and further members of its tree of files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{packing}") as tree:
        for path, content in {f"./{path}": content for path, content in files.items()}.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tree.addfile(member, io.BytesIO(content))
        for member in extra:
            tree.addfile(member, io.BytesIO(b"x" * member.size))
    return archive({"debian-binary": b"2.0\n", "control.tar.xz": b"", f"data.tar.{packing}": file.getvalue()})


@pytest.fixture(scope="module")
def package():
    return deb({f"{STAMPS}/{path}": content for path, content in stamps().items()} | {COPYRIGHT: b"GPL-2"})


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CLAIMS))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def fetcher(modules, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return modules["fetch_stamps"]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Serve a folder as a mirror over HTTP: (address, folder)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = type("Silent", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def publish(fetcher, monkeypatch, folder, content, told=None):
    """Put a package on the mirror, and have it asked for by the size and digest of `told`, or its own."""
    told = content if told is None else told
    pinned = dataclasses.replace(
        fetcher.PACKAGE, path="pool/stamps.deb", size=len(told), sha256=hashlib.sha256(told).hexdigest()
    )
    monkeypatch.setattr(fetcher, "PACKAGE", pinned)
    (folder / "pool").mkdir()
    (folder / "pool" / "stamps.deb").write_bytes(content)


def refusal(fetcher, capsys, *words):
    """Return the one line with which a fetch ends that leaves nothing behind."""
    assert fetcher.main([*words]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert fetcher.unpacked() is None and os.listdir(fetcher.media_folder().parent) == []
    return told.err


def test_the_package_is_fetched_once_and_its_licence_is_told(fetcher, mirror, package, monkeypatch, capsys):
    address, folder = mirror
    publish(fetcher, monkeypatch, folder, package)
    assert fetcher.main(["--mirror", address]) == 0
    told = capsys.readouterr().out
    assert f"{len(stamps()) + 1} files" in told and "GPL-2" in told and "do not add them" in told
    for path, content in stamps().items():
        assert (fetcher.unpacked() / path).read_bytes() == content
    assert (fetcher.media_folder() / "copyright").read_text() == "GPL-2"
    (folder / "pool" / "stamps.deb").unlink()
    assert fetcher.main(["--mirror", address]) == 0  # from the cache


def test_a_file_that_is_here_already_and_another_compression_serve_as_well(fetcher, monkeypatch, tmp_path):
    publish(fetcher, monkeypatch, tmp_path, deb({f"{STAMPS}/animals/a.txt": b"a"}, packing="gz"))
    assert fetcher.main(["--deb", str(tmp_path / "pool" / "stamps.deb")]) == 0
    assert (fetcher.unpacked() / "animals" / "a.txt").read_bytes() == b"a"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="Debian's own tool makes the package")
def test_a_compression_that_python_may_lack_is_read_too(fetcher, monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    for path, content in {"DEBIAN/control": CONTROL, f"{STAMPS}/animals/a.txt": "a"}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)
    subprocess.run(
        ["dpkg-deb", "-Zzstd", "--build", str(tree), str(tmp_path / "a.deb")], check=True, capture_output=True
    )
    content = (tmp_path / "a.deb").read_bytes()
    assert b"data.tar.zst" in content
    publish(fetcher, monkeypatch, tmp_path, content)
    assert fetcher.main(["--deb", str(tmp_path / "a.deb")]) == 0
    assert (fetcher.unpacked() / "animals" / "a.txt").read_text() == "a"


def test_a_package_with_another_digest_is_refused(fetcher, mirror, package, monkeypatch, capsys):
    address, folder = mirror
    publish(fetcher, monkeypatch, folder, package[:-1] + bytes([package[-1] ^ 1]), told=package)
    told = refusal(fetcher, capsys, "--mirror", address)
    assert "its SHA-256 is" in told and fetcher.PACKAGE.sha256 in told


def test_a_download_that_breaks_off_is_refused(fetcher, mirror, package, monkeypatch, capsys):
    address, folder = mirror
    publish(fetcher, monkeypatch, folder, package[:1000], told=package)
    assert f"broke off after 1,000 of {len(package):,} bytes" in refusal(fetcher, capsys, "--mirror", address)


def test_an_absent_file_and_an_absent_mirror_are_refused(fetcher, mirror, capsys):
    told = refusal(fetcher, capsys, "--mirror", mirror[0])
    assert "HTTP Error 404" in told and fetcher.PACKAGE.path in told and "--mirror" in told
    assert "cannot fetch" in refusal(fetcher, capsys, "--mirror", "http://127.0.0.1:1")
    assert "no file" in refusal(fetcher, capsys, "--deb", "absent.deb")


@pytest.mark.parametrize("path", ["../../escaped.txt", f"./{STAMPS}/../../../../../escaped.txt", "/tmp/escaped.txt"])
def test_a_path_that_leaves_the_folder_is_refused(fetcher, mirror, monkeypatch, capsys, path):
    member = tarfile.TarInfo(path)
    member.size = 1
    publish(fetcher, monkeypatch, mirror[1], deb({f"{STAMPS}/animals/a.txt": b"a"}, extra=[member]))
    told = refusal(fetcher, capsys, "--mirror", mirror[0])
    assert path in told and "outside" in told
    assert not any(Path(place, "escaped.txt").exists() for place in (mirror[1], mirror[1].parent, "/tmp", "/"))


def test_a_link_in_place_of_a_picture_is_refused(fetcher, mirror, monkeypatch, capsys):
    member = tarfile.TarInfo(f"./{STAMPS}/animals/b.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    publish(fetcher, monkeypatch, mirror[1], deb({f"{STAMPS}/animals/a.txt": b"a"}, extra=[member]))
    assert "no plain file" in refusal(fetcher, capsys, "--mirror", mirror[0])


@pytest.mark.parametrize("content", [b"<html>", archive({"debian-binary": b"2.0\n"}), deb({"usr/bin/x": b""})])
def test_what_is_no_package_of_stamps_is_refused(fetcher, mirror, monkeypatch, capsys, content):
    publish(fetcher, monkeypatch, mirror[1], content)
    assert refusal(fetcher, capsys, "--mirror", mirror[0]).startswith("fetch_stamps: ")


def test_without_the_media_one_line_names_the_command(fetcher, modules, tmp_path):
    with pytest.raises(FileNotFoundError, match="GPL-2.*run: python benchmarks/claims/fetch_stamps.py"):
        modules["tasks.stamps"].prepare(tmp_path)


@pytest.fixture
def tiny(fetcher, modules, monkeypatch, tmp_path, package):
    """The task on the made-up package, at the smallest sizes."""
    publish(fetcher, monkeypatch, tmp_path, package)
    fetcher.fetch(deb=tmp_path / "pool" / "stamps.deb")
    task = modules["tasks.stamps"]
    monkeypatch.setattr(task, "PACKAGE", fetcher.PACKAGE)
    rows, clips = (
        {"cold_rows": 4, "train_rows": 4, "test_rows": 2},
        {"cold_clips": 1, "train_clips": 1, "test_clips": 1},
    )
    monkeypatch.setattr(task, "SIZES", task.Sizes(**rows, **clips, batch=4))
    monkeypatch.setattr(task, "COLD_STEPS", 2)
    monkeypatch.setattr(task, "QUESTIONS", 1)
    monkeypatch.setattr(task, "SAMPLES", 1)
    return task


def shared(one, other, column, digest):
    """Return what two tables have in common in a column, by name or by the content of files."""
    return {digest(value) for value in one[column]} & {digest(value) for value in other[column]}


def test_splits_share_no_object_no_picture_no_voice_and_no_name(tiny, fetcher, modules, tmp_path):
    media, root = modules["stamps_media"], fetcher.unpacked()
    # The same bytes under a second name, and a second stamp of the same thing.
    (root / "animals/birds/twin.png").write_bytes((root / "animals/birds/animalabel.png").read_bytes())
    (root / "animals/birds/animalabel_2.png").write_bytes(picture(999))
    pools = media.read_pools(root)
    tables = {split: media.write_split(root, pools, tmp_path, split, 64, 1) for split in media.SHARES}
    by_content = lambda path: hashlib.sha256((root / path).read_bytes()).hexdigest()  # noqa: E731
    written = lambda path: (tmp_path / path).read_text().splitlines()[2]  # noqa: E731
    of = [
        *((f"thing_{m}", str) for m in "VAS"),
        ("file_V", by_content),
        ("file_A", by_content),
        ("subtitle", written),
        ("video", lambda path: (tmp_path / path).read_bytes()),
    ]
    for one, other in (("cold", "train"), ("cold", "test"), ("train", "test")):
        objects = [{thing for m in "VAS" for thing in tables[split][f"thing_{m}"]} for split in (one, other)]
        assert not objects[0] & objects[1]
        for column, digest in of:
            assert not shared(tables[one], tables[other], column, digest), (one, other, column)
    assert shared(tables["cold"], tables["cold"], "file_V", by_content)  # the comparison can find something
    assert len({media.thing_of(f"animals/x/bird{end}.png") for end in ("", "_2", "_outline", "_desc_fr")}) == 1
    assert (
        len(
            {signal.file for own in pools.values() for signal in own}
            & {"animals/birds/twin.png", "animals/birds/animalabel.png"}
        )
        == 1
    )


def test_no_part_of_the_signals_tells_the_answer(tiny, fetcher, modules, tmp_path):
    media, root = modules["stamps_media"], fetcher.unpacked()
    rows = media.write_split(root, media.read_pools(root), tmp_path, "test", 64, 1)
    for tag in ("V", "AS", "VAS"):
        own = [row for row in rows if row["tag"] == tag]
        assert len(own) == 64 and all(row["video"] and row["subtitle"] for row in own)
        for signals in ("", *tag) if len(tag) > 1 else ("",):
            seen = {}
            for row in own:
                seen.setdefault(tuple(row[f"truth_{m}"] for m in signals), []).append(row["answer"])
            assert all(sorted(set(answers)) == list("ABCD") for answers in seen.values())
            assert all(answers.count(letter) * 4 == len(answers) for answers in seen.values() for letter in "ABCD")
    for row in rows.select(range(20)):
        indices = [media.ATTRIBUTES[m].index(row[f"truth_{m}"]) for m in row["tag"]]
        assert row["solution"] == "ABCD"[sum(indices) % 4]


def test_names_that_two_languages_share_are_left_out(tiny, fetcher, modules):
    media, root = modules["stamps_media"], fetcher.unpacked()
    (root / "animals/birds/animalabel.txt").write_text("Taxi\nfr.utf8=Taxi\nde.utf8=ein Taxi\nit.utf8=un taxi\n")
    pools = media.read_pools(root)
    texts = {(text, signal.text) for (m, text, _), own in pools.items() if m == "S" for signal in own}
    assert {("german", "ein Taxi"), ("italian", "un taxi")} <= texts
    assert not any(name == "Taxi" for _, name in texts)


@pytest.mark.long
@pytest.mark.slow
def test_runs_train_on_it(tiny, modules, tmp_path):
    few = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    shuffled = {"reward_funcs": ["tasks.stamps:shuffled_reward"], "reward_weights": [1.0]}
    results = []
    for recipe, options in (("tiny/mapo_token", few), ("tiny/base", few | shuffled)):
        told, file = {"task": "stamps", "recipe": recipe, "seed": 100, "options": options}, tmp_path / "run.json"
        file.write_text(json.dumps(told))
        written = tmp_path / f"result-{len(results)}.json"
        modules["worker"].main([str(file), str(written)])
        results.append(json.loads(written.read_text()))
    for result in results:
        assert result["task_version"] == tiny.VERSION
        assert set(result["after"]) == {"trained", "required", "all"}
        assert len(result["after"]["trained"]["accuracy"]) == 8 and result["cost"]["completions"] == 16
    test = tiny.held_out(modules["tasks"].prepared("stamps"))  # made already
    assert isinstance(test, Dataset) and set(test["tag"]) == {"V", "A", "S", "VA", "VS", "AS", "VAS"}


def test_shuffled_rewards_are_as_many_and_know_nothing(tiny):
    texts = [f"<think> x</think><answer>{letter}</answer>" for letter in "ABCD" * 50]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"completions": completions, "solution": ["A"] * 200, "options": [list("ABCD")] * 200}
    dealt = tiny.shuffled_reward(**columns)
    assert sum(dealt) == pytest.approx(50 * 1.0 + 200 * 0.1) and dealt == tiny.shuffled_reward(**columns)
    assert 0 < sum(score > 1 for score, text in zip(dealt, texts, strict=True) if ">A<" in text) < 30


def test_the_script_runs_by_itself(tmp_path):
    run = subprocess.run(
        [sys.executable, str(CLAIMS / "fetch_stamps.py"), "--mirror", "http://127.0.0.1:1"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert run.returncode == 1 and run.stderr.startswith("fetch_stamps: cannot fetch http://127.0.0.1:1/pool/main/t/")
