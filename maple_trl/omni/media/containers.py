"""How long a file must be by its own container: tells a whole file from one that was cut off."""

import os
import struct

from maple_trl.omni.media.clips import Source
from maple_trl.omni.media.formats import ASF_MARK, MP4_BOXES, W64_MARK


_BOXES = {*MP4_BOXES, b"mfra", b"uuid", b"udta"}
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_FLV_TAGS = (8, 9, 18)
_RIFF_SLACK = 1  # some count their first 8 bytes too, which do not count, and many forget the last pad byte


def _ebml_number(file, keep_marker: bool) -> int | None:
    """Read a variable-length number of Matroska (RFC 8794, section 4); `None` for the reserved "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = int.from_bytes(file.read(length - 1), "big")
    mask = 0xFF if keep_marker else (1 << (8 - length)) - 1
    number = ((first[0] & mask) << 8 * (length - 1)) | rest
    return None if number == (1 << 7 * length) - 1 else number


def _mp3_bytes(file) -> int | None:
    """Return the length by the Xing header in the first frame of an mp3, less a trailing tag, which some count."""
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


def _asf_bytes(file) -> int | None:
    """Return the length by the file properties of an ASF file; a broadcast leaves them open."""
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    (length,), (flags,) = struct.unpack_from("<Q", head, at + 40), struct.unpack_from("<I", head, at + 88)
    return None if flags & 1 else length


def _au_bytes(file) -> int | None:
    start, length = struct.unpack(">II", file.read(8).ljust(8, b"\0"))
    return None if length in (0, 0xFFFFFFFF) else start + length


def _caf_bytes(file, size: int) -> int | None:
    end = 8
    while end + 12 <= size:
        file.seek(end)
        _, length = struct.unpack(">4sq", file.read(12))
        if length < 0:  # up to the end of the file
            return None
        end += 12 + length
    return end


def _wavpack_bytes(file, size: int) -> int:
    end = 0
    while end + 8 <= size:
        file.seek(end)
        mark, length = struct.unpack("<4sI", file.read(8))
        if mark != b"wvpk":  # a tag
            break
        end += 8 + length
    return end


def _ogg_bytes(file, size: int) -> int | None:
    """Return where the last page ends, which is no longer than 64 KiB."""
    start = max(0, size - (1 << 17))
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0 or len(tail) < at + 27:
        return None
    count = tail[at + 26]
    return start + at + 27 + count + sum(tail[at + 27 : at + 27 + count])


def _flv_bytes(file, size: int) -> int | None:
    """Return where the last tag ends: each is followed by its length, which is read from the end of the file."""
    file.seek(max(0, size - 4))
    length = int.from_bytes(file.read(4), "big")
    if 11 <= length <= size - 13:
        file.seek(size - 4 - length)
        tag = file.read(4)
        if tag[0] in _FLV_TAGS and int.from_bytes(tag[1:], "big") + 11 == length:
            return size
    end = 13
    while end + 11 <= size:
        file.seek(end)
        tag = file.read(4)
        if tag[0] not in _FLV_TAGS:
            break
        end += 11 + int.from_bytes(tag[1:], "big") + 4
    return end


def _gif_bytes(file, size: int) -> int:
    """Return where the last block ends that has begun, or the closing byte that follows it."""
    file.seek(0)
    data = file.read()
    flags = data[10] if size > 10 else 0
    end = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while end < size and data[end] in (0x21, 0x2C):
        if data[end] == 0x21:
            end += 2
        else:
            flags = data[end + 9] if end + 9 < size else 0
            end += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        while end < size and data[end]:
            end += 1 + data[end]
        end += 1
    return end + 1


def declared_bytes(path: str) -> int | None:
    """
    Return how long the file must be by its own container; `None` where that is not said.

    Mp4 boxes, Matroska segment, RIFF chunk, Xing header of an mp3, last page or tag say it; flac, MPEG streams and
    live recordings do not. FFmpeg plays a file that was cut off up to the cut, and reports no error.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            declared = struct.unpack("<I", head[4:8])[0]
            # 0 and all ones are what a writer that cannot seek leaves.
            return None if declared in (0, 0xFFFFFFFF) else declared - _RIFF_SLACK
        if head[:4] == b"RF64":
            file.seek(12)
            kind, _, length = struct.unpack("<4sIQ", file.read(16).ljust(16, b"\0"))
            return length - _RIFF_SLACK if kind == b"ds64" else None
        if head[:4] == b"\x1aE\xdf\xa3":
            file.seek(4)
            file.seek(_ebml_number(file, keep_marker=False) or 0, os.SEEK_CUR)
            _ebml_number(file, keep_marker=True)  # the identifier of the segment
            length = _ebml_number(file, keep_marker=False)
            return None if length is None else file.tell() + length
        if head[:4] == b"FORM":
            return struct.unpack(">I", head[4:8])[0] - _RIFF_SLACK
        if head[:8] == W64_MARK:
            file.seek(16)
            return struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if head[:8] == ASF_MARK:
            return _asf_bytes(file)
        if head[:4] == b".snd":
            file.seek(4)
            return _au_bytes(file)
        for mark, walk in _WALKS.items():
            if head.startswith(mark):
                return walk(file, size)
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


_WALKS = {
    b"OggS": _ogg_bytes,
    b"FLV": _flv_bytes,
    b"GIF8": _gif_bytes,
    b"caff": _caf_bytes,
    b"wvpk": _wavpack_bytes,
}


def check_whole(source: Source) -> None:
    """Raise a MediaError, `truncated`, for a file that is shorter than its container declares."""
    declared, size = declared_bytes(source.path), os.path.getsize(source.path)
    if declared is not None and size < declared:
        raise source.error("truncated", f"has {size} bytes of the {declared} that its header declares")
