"""
Fetch the media that the task `stamps` is made of: pictures, spoken and written names of Debian's tuxpaint-stamps-default.

    python benchmarks/claims/fetch_stamps.py [--mirror URL | --apt | --deb FILE]

The package is of one version, checked by its digest, and is unpacked (not installed) into the cache of the tasks. Its media are
under the GNU General Public License, version 2: they stay in the cache, and are no part of this project or of its packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tasks import cache_folder


COMMAND = "python benchmarks/claims/fetch_stamps.py"
MIRROR = "https://deb.debian.org/debian"
STAMP = "package.json"
"""What the folder was unpacked from; written last."""

MEDIA = PurePosixPath("usr/share/tuxpaint/stamps")
COPYRIGHT = PurePosixPath("usr/share/doc/tuxpaint-stamps-default/copyright")
SUFFIXES = (".png", ".ogg", ".txt")
CHUNK = 1 << 20


class FetchError(Exception):
    """A package that could not be had, or is not the one that was asked for."""


@dataclass(frozen=True)
class Package:
    """A file of a Debian mirror, by all that tells it from any other."""

    name: str
    version: str
    path: str
    size: int
    sha256: str
    license: str


PACKAGE = Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    path="pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
    size=160_880_444,
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    license="GPL-2",
)


def media_folder() -> Path:
    """Return where the unpacked media lie."""
    return cache_folder() / "stamps"


def unpacked() -> Path | None:
    """Return the folder of the unpacked media; `None` where they are absent, or not those of `PACKAGE`."""
    stamp = media_folder() / STAMP
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8"))["sha256"] != PACKAGE.sha256:
        return None
    return stamp.parent / MEDIA.name


def download(mirror: str, file: Path) -> None:
    """Bring the package from a mirror."""
    address = f"{mirror.rstrip('/')}/{PACKAGE.path}"
    try:
        with urllib.request.urlopen(address, timeout=60) as response, file.open("wb") as target:
            shutil.copyfileobj(response, target, CHUNK)
    except (OSError, HTTPException, ValueError) as error:
        raise FetchError(f"cannot fetch {address}: {error}. Name another with --mirror, or try --apt") from None
    if file.stat().st_size < PACKAGE.size:
        raise FetchError(f"{address} broke off after {file.stat().st_size:,} of {PACKAGE.size:,} bytes; try again")


def download_by_apt(file: Path) -> None:
    """Bring the package from the mirror that apt is set up with."""
    if shutil.which("apt-get") is None:
        raise FetchError("--apt needs apt-get, which this machine lacks; try --mirror")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        command = ["apt-get", "download", f"{PACKAGE.name}={PACKAGE.version}"]
        run = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        found = list(Path(scratch).glob("*.deb"))
        if run.returncode or not found:
            raise FetchError(f"{' '.join(command)} failed ({run.stderr.strip()}); has apt-get update been run?")
        found[0].replace(file)


def check(file: Path) -> None:
    """Refuse a file that is not the package, byte by byte."""
    with file.open("rb") as source:
        found = hashlib.file_digest(source, "sha256").hexdigest()
    if found != PACKAGE.sha256:
        raise FetchError(
            f"{file.name} is not {PACKAGE.name} {PACKAGE.version}: its SHA-256 is {found}, but {PACKAGE.sha256} was expected"
        )


def archive_members(source: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Walk through an `ar` archive: name and size of each member, at whose content `source` then stands."""
    if source.read(8) != b"!<arch>\n":
        raise FetchError("not a Debian package: it is no ar archive")
    while head := source.read(60):
        if len(head) < 60 or head[58:] != b"`\n":
            raise FetchError("not a Debian package: a broken member in its ar archive")
        size, start = int(head[48:58]), source.tell()
        yield head[:16].decode("ascii").strip().rstrip("/"), size
        source.seek(start + size + size % 2)


@contextmanager
def opened(file: Path) -> Iterator[tarfile.TarFile]:
    """Open the tree of files in a package; `dpkg-deb` helps only with a compression that Python lacks."""
    with file.open("rb") as source:
        for name, _ in archive_members(source):
            if not name.startswith("data.tar"):
                continue
            packing = name.removeprefix("data.tar").lstrip(".")
            try:
                with tarfile.open(fileobj=source, mode=f"r|{packing}") as tree:
                    yield tree
                return
            except tarfile.CompressionError:
                break
        else:
            raise FetchError(f"{file.name} has no data.tar")
    if shutil.which("dpkg-deb") is None:
        raise FetchError(f"{file.name} is compressed as {packing}, which takes Python 3.14 or dpkg-deb")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tree:
            yield tree


def unpack(file: Path, folder: Path) -> int:
    """
    Write a package's media and its copyright note into a folder; return how many files.

    Raises:
        FetchError: where a member's path leaves the folder, or a link or a device stands where a file is expected.
    """
    count = 0
    with opened(file) as tree:
        for member in tree:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise FetchError(f"{file.name} holds {member.name!r}, which would be written outside of {folder}")
            if path == COPYRIGHT:
                target = folder / "copyright"
            elif path.is_relative_to(MEDIA) and path.suffix in SUFFIXES:
                target = folder / MEDIA.name / path.relative_to(MEDIA)
            else:
                continue
            content = tree.extractfile(member) if member.isreg() else None
            if content is None:
                raise FetchError(f"{file.name} holds {member.name!r}, which is no plain file")
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as written:
                shutil.copyfileobj(content, written)
            count += 1
    if count == 0:
        raise FetchError(f"{file.name} holds nothing below {MEDIA}")
    return count


def fetch(mirror: str = MIRROR, apt: bool = False, deb: Path | None = None) -> Path:
    """Fetch, check and unpack the package; a stop at any moment leaves the folder as it was, or whole."""
    folder = media_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stamps-", dir=folder.parent) as scratch:
        file = deb or Path(scratch, PurePosixPath(PACKAGE.path).name)
        if deb is None and apt:
            download_by_apt(file)
        elif deb is None:
            download(mirror, file)
        elif not deb.is_file():
            raise FetchError(f"no file {deb}")
        check(file)
        fresh = Path(scratch, "fresh")
        told: dict[str, Any] = asdict(PACKAGE) | {"files": unpack(file, fresh)}
        (fresh / STAMP).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mirror", default=MIRROR, help="a mirror of Debian (default: %(default)s)")
    source.add_argument(
        "--apt", action="store_true", help="let apt-get fetch it, from the mirror that it is set up with"
    )
    source.add_argument("--deb", type=Path, help="a file of the package that is here already")
    options = parser.parse_args(argv)
    if unpacked() is None:
        try:
            fetch(options.mirror, options.apt, options.deb)
        except FetchError as error:
            print(f"fetch_stamps: {error}", file=sys.stderr)
            return 1
    told = json.loads((media_folder() / STAMP).read_text(encoding="utf-8"))
    print(f"{told['files']:,} files of {told['name']} {told['version']} in {media_folder()}")
    print(f"They are under the {told['license']} (see the file copyright there): do not add them to this repository.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
