"""How long a file must be by its own container: tells a whole file from one that was cut off."""

import os
import struct


_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"uuid", b"udta"}


def looks_like_media(path: str) -> bool:
    """Whether the first bytes are those of an accepted container: tells a broken clip from what never was one."""
    with open(path, "rb") as file:
        head = file.read(12)
    riff = head[:4] == b"RIFF" and head[8:12] == b"WAVE"
    mp3 = head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    return riff or mp3 or head[4:8] in _BOXES or head[:4] in (b"\x1aE\xdf\xa3", b"fLaC")


def _ebml_number(file, keep_marker: bool) -> int | None:
    """A variable-length number of Matroska (RFC 8794, section 4); `None` for the reserved "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = int.from_bytes(file.read(length - 1), "big")
    mask = 0xFF if keep_marker else (1 << (8 - length)) - 1
    number = ((first[0] & mask) << 8 * (length - 1)) | rest
    return None if number == (1 << 7 * length) - 1 else number


def _mp3_bytes(file) -> int | None:
    """Length by the Xing header in the first frame of an mp3, less a trailing tag, which some count."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3":  # a tag before the sound, its length in 7-bit bytes
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(192)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or len(frame) < at + 16:
        return None
    flags, _, length = struct.unpack(">III", frame[at + 4 : at + 16])
    return start + length - 128 if flags & 3 == 3 else None


def declared_bytes(path: str) -> int | None:
    """
    How long the file must be by its own container (mp4 boxes, Matroska segment, RIFF chunk, Xing header of an mp3);
    `None` where that is not said (flac, live recordings). FFmpeg plays a file that was cut off up to the cut, and
    reports no error.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            declared = struct.unpack("<I", head[4:8])[0]
            # 0 and all ones are what a writer that cannot seek leaves; the last pad byte is often forgotten.
            return None if declared in (0, 0xFFFFFFFF) else declared + 7
        if head[:4] == b"\x1aE\xdf\xa3":
            file.seek(4)
            file.seek(_ebml_number(file, keep_marker=False) or 0, os.SEEK_CUR)
            _ebml_number(file, keep_marker=True)  # the identifier of the segment
            length = _ebml_number(file, keep_marker=False)
            return None if length is None else file.tell() + length
        if head[4:8] not in _BOXES:
            return _mp3_bytes(file) if head[:3] == b"ID3" or head[:1] == b"\xff" else None
        end = 0
        while end + 8 <= size:
            file.seek(end)
            length, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            length = large if length == 1 else length
            if kind not in _BOXES or length < 8:  # 0: up to the end of the file
                break
            end += length
        return end
