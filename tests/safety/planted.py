"""Pickles that make a folder when they are read in full."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch


class Planted:
    """Becomes, when it is unpickled, a call that leaves a folder behind."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def planted_bytes(mark: Path) -> bytes:
    return pickle.dumps(Planted(mark))


def plant_torch(file: Path, mark: Path, value: object = None) -> Path:
    """A file of `torch.save` that holds a value, if one is given, beside what writes the mark."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"value": value, "more": Planted(mark)}, file)
    return file


def plant_legacy(file: Path, mark: Path) -> Path:
    """As `torch.save` wrote files before it made archives."""
    torch.save({"more": Planted(mark)}, file, _use_new_zipfile_serialization=False)
    return file


def twice(data: bytes, other: bytes) -> bytes:
    """An archive with two records of one name, of which readers take one or the other."""
    found = io.BytesIO(data)
    with zipfile.ZipFile(found) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    with zipfile.ZipFile(found, "a") as archive:
        archive.writestr(name, other)
    return found.getvalue()
