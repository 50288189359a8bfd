"""Stage 2: a clip becomes signals: pictures (V), the sound track (A), and the words (S)."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from maple_trl.chat.messages import jpeg_bytes, wav_bytes
from maple_trl.data.curation.evidence import CHARACTERS_PER_SECOND
from maple_trl.data.curation.stage import Outcome, Row, Stage, Tools
from maple_trl.modalities import Modality
from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.subtitles import is_subtitle_file


async def split(row: Row, tools: Tools) -> Outcome:
    """Write a clip's signals below the output folder; one that cannot be decoded drops it by the medium's reason."""
    outcome = Outcome()
    if tools.planning:
        signals, provenance = _planned(row, tools), []
    else:
        try:
            signals, provenance = await asyncio.to_thread(_split, row, tools)
        except MediaError as error:
            outcome.drop(row["clip"], f"media:{error.reason}", error.detail)
            return outcome
    for modality in Modality:
        outcome.notes[f"without {modality}"] += modality not in signals
    media = {"video": None, "audio": None, "subtitle": None} | {
        {"V": "video", "A": "audio", "S": "subtitle"}[modality]: signal["file"] for modality, signal in signals.items()
    }
    made = {"clip": row["clip"], "seconds": row["seconds"], "media": media, "signals": signals}
    outcome.rows.append({**made, "provenance": provenance})
    return outcome


def _split(row: Row, tools: Tools) -> tuple[dict, list]:
    folder = Path("media", folder_name(row["clip"]))
    for part in (folder, Path("work", "frames", folder.name)):
        (tools.root / part).mkdir(parents=True, exist_ok=True)
    signals, provenance = {}, []
    if row["has_video"]:
        signals[Modality.VIDEO.value] = _pictures(row, tools, folder)
    if row["has_audio"]:
        clip = tools.loader.audio(row["audio"] or row["video"])
        if clip is not None:
            data = wav_bytes(clip.waveform, clip.sampling_rate)
            signals[Modality.AUDIO.value] = _written(tools.root, folder / "sound.wav", data)
    if row["subtitle"]:
        signals[Modality.SUBTITLE.value] = _subtitle(row, tools, folder)
    elif tools.transcriber is not None and Modality.AUDIO.value in signals:
        segments = tools.transcriber.transcribe(tools.root / signals[Modality.AUDIO.value]["file"])
        if segments:
            signals[Modality.SUBTITLE.value] = _segments(tools.root, folder, segments)
            about = {"model": tools.transcriber.name, "prompt_hash": None, "reviewer": None}
            provenance.append({"field": "subtitle", **about})
    return signals, provenance


def _pictures(row: Row, tools: Tools, folder: Path) -> Row:
    """Write the sampled pictures, and the clip itself under a name that says nothing."""
    clip = tools.loader.video(row["video"])
    count = tools.config.split.frames  # one more where the loader makes their number even
    frames = []
    for index, picture in enumerate(clip.frames[:count]):
        data = jpeg_bytes(picture)
        frames.append(_written(tools.root, Path("work", "frames", folder.name, f"{index:03}.jpg"), data))
    source = tools.loader.resolve(row["video"])
    target = folder / f"clip{Path(source).suffix.lower()}"
    _place(source, tools.root / target)
    digests = hashlib.sha256("".join(frame["digest"] for frame in frames).encode()).hexdigest()[:16]
    times = [round(float(time), 2) for time in clip.timestamps[:count]]
    return {
        "file": target.as_posix(),
        "frames": [frame["file"] for frame in frames],
        "times": times,
        "digest": digests,
    }


def _subtitle(row: Row, tools: Tools, folder: Path) -> Row:
    if not is_subtitle_file(row["subtitle"]):
        return _segments(tools.root, folder, [{"start": 0, "end": row["seconds"] or 0, "text": row["subtitle"]}])
    source = Path(tools.loader.resolve(row["subtitle"]))
    return _written(tools.root, folder / f"subtitle{source.suffix.lower()}", source.read_bytes())


def _segments(root: Path, folder: Path, segments: list[Row]) -> Row:
    return _written(root, folder / "subtitle.json", json.dumps(segments, indent=1).encode())


def _written(root: Path, name: Path, data: bytes) -> Row:
    """Write a file whole, and return its name with its digest."""
    path = root / name
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    scratch.write_bytes(data)
    os.replace(scratch, path)
    return {"file": name.as_posix(), "digest": hashlib.sha256(data).hexdigest()[:16]}


def _place(source: str, target: Path) -> None:
    """Put a clip into the output folder: a second name of the file, or a copy where that cannot be."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".", suffix=".partial") as scratch:
        part = Path(scratch, target.name)
        try:
            os.link(source, part)
        except OSError:  # another file system, or one without such names
            shutil.copyfile(source, part)
        os.replace(part, target)


def folder_name(clip: str) -> str:
    """Return the folder of a clip's files: readable, and safe whatever its name holds."""
    readable = re.sub(r"[^\w.-]+", "_", clip, flags=re.ASCII).strip("._")[:60]
    return f"{readable or 'clip'}-{hashlib.sha256(clip.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _planned(row: Row, tools: Tools) -> dict:
    """Return what the signals may be, without decoding any."""
    seconds, count = row["seconds"] or 30.0, tools.config.split.frames
    signals: dict = {}
    if row["has_video"]:
        times = [seconds * index / count for index in range(count)]
        signals["V"] = {"file": None, "frames": [None] * count, "times": times, "planned": count}
    if row["has_audio"]:
        signals["A"] = {"file": None, "planned": int(seconds * 2 * 16_000)}
    if row["subtitle"] or (row["has_audio"] and tools.transcriber is not None):
        signals["S"] = {"file": None, "planned": int(seconds * CHARACTERS_PER_SECOND)}
    return signals


def _intact(rows: Sequence[Row], root: Path) -> bool:
    files = [name for row in rows for name in row["media"].values() if name]
    files += [name for row in rows for name in row["signals"].get("V", {}).get("frames", ())]
    return all((root / name).is_file() for name in files)


STAGE = Stage(
    "split",
    "collect",
    split,
    decides=lambda config: dataclasses.asdict(dataclasses.replace(config.split, workers=0)),
    intact=_intact,
)
