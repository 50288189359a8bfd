"""
The containers that are read: each carries its own data.

Playlists, scripts and descriptions of streams, which name other files and addresses, are none of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """
    A container.

    Attributes:
        demuxer: FFmpeg's name of what reads it (the first, where it has several).
        title: what people call it.
        suffixes: endings of file names, the usual one first.
        marks: what its files begin with, as bytes and where they stand.
        video: whether it usually holds pictures.
        says_length: whether its header says how long a track is. Elsewhere FFmpeg guesses from the bit rate, or by what the
            end of the file says, and neither tells a cut file from a whole one.
    """

    demuxer: str
    title: str
    suffixes: tuple[str, ...]
    marks: tuple[tuple[int, bytes], ...] = ()
    video: bool = False
    says_length: bool = True


_MXF = bytes.fromhex("060e2b34020501010d010201")
ASF_MARK = bytes.fromhex("3026b2758e66cf11")
_TS_PACKETS = ((0, 188), (4, 192))  # where a packet of a transport stream begins, and how long it is
W64_MARK = bytes.fromhex("726966662e91cf11")
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx")

TABLE = (
    Format(
        "mov",
        "MP4, QuickTime, 3GP",
        ("mp4", "m4v", "mov", "qt", "3gp", "3g2", "mj2", "m4a", "m4b", "f4v"),
        tuple((4, box) for box in MP4_BOXES),
        video=True,
    ),
    Format("matroska", "Matroska, WebM", ("mkv", "webm", "mka", "mk3d"), ((0, b"\x1aE\xdf\xa3"),), video=True),
    Format("avi", "AVI", ("avi", "divx"), ((8, b"AVI "),), video=True),
    Format(
        "mpegts",
        "MPEG transport stream",
        ("ts", "mts", "m2ts", "m2t", "tp"),
        video=True,
        says_length=False,
    ),
    Format(
        "mpeg",
        "MPEG program stream",
        ("mpg", "mpeg", "vob", "m2p", "evo"),
        ((0, b"\0\0\1\xba"),),
        video=True,
        says_length=False,
    ),
    Format("mpegvideo", "MPEG-1/2 video", ("m1v", "m2v", "mpv"), ((0, b"\0\0\1\xb3"),), video=True, says_length=False),
    Format("asf", "Windows Media", ("wmv", "asf", "wma"), ((0, ASF_MARK),), video=True),
    Format("flv", "Flash Video", ("flv",), ((0, b"FLV"),), video=True, says_length=False),
    Format("gif", "GIF", ("gif",), ((0, b"GIF8"),), video=True, says_length=False),
    Format("ogg", "Ogg", ("ogg", "ogv", "oga", "opus", "spx", "ogx"), ((0, b"OggS"),), video=True, says_length=False),
    Format("mxf", "MXF", ("mxf",), ((0, _MXF),), video=True),
    Format("dv", "DV", ("dv", "dif"), ((0, b"\x1f\x07\0"),), video=True, says_length=False),
    Format("ivf", "IVF", ("ivf",), ((0, b"DKIF"),), video=True, says_length=False),
    Format("nut", "NUT", ("nut",), ((0, b"nut/multimedia"),), video=True, says_length=False),
    Format("wav", "WAV", ("wav", "wave", "rf64", "bwf"), ((8, b"WAVE"),)),
    Format("w64", "Wave64", ("w64",), ((0, W64_MARK),)),
    Format("mp3", "MP3", ("mp3", "mp2", "mpga"), ((0, b"ID3"), (0, b"\xff\xfb"), (0, b"\xff\xf3"), (0, b"\xff\xfd"))),
    Format("flac", "FLAC", ("flac",), ((0, b"fLaC"),)),
    Format("aac", "AAC (ADTS)", ("aac", "adts"), ((0, b"\xff\xf1"), (0, b"\xff\xf9")), says_length=False),
    Format("aiff", "AIFF", ("aiff", "aif", "aifc"), ((8, b"AIFF"), (8, b"AIFC"))),
    Format("amr", "AMR", ("amr", "awb"), ((0, b"#!AMR"),), says_length=False),
    Format("caf", "Core Audio", ("caf",), ((0, b"caff"),)),
    Format("au", "AU", ("au", "snd"), ((0, b".snd"),)),
    Format("ac3", "AC-3", ("ac3",), ((0, b"\x0bw"),), says_length=False),
    Format("eac3", "E-AC-3", ("eac3", "ec3"), ((0, b"\x0bw"),), says_length=False),
    Format("dts", "DTS", ("dts",), ((0, b"\x7f\xfe\x80\x01"),), says_length=False),
    Format("wv", "WavPack", ("wv",), ((0, b"wvpk"),)),
    Format("tta", "True Audio", ("tta",), ((0, b"TTA1"),)),
    Format("ape", "Monkey's Audio", ("ape",), ((0, b"MAC "),)),
    Format("voc", "Creative Voice", ("voc",), ((0, b"Creative Voice File"),), says_length=False),
)

FORMATS = {entry.demuxer: entry for entry in TABLE}
VIDEO_SUFFIXES = tuple(f".{suffix}" for entry in TABLE if entry.video for suffix in entry.suffixes)

# What people give by mistake, and what FFmpeg would open and follow: it is named in the error.
_OTHERS = (
    (0, b"#EXTM3U", "a playlist (HLS)"),
    (0, b"ffconcat", "a concat script"),
    (0, b"[playlist]", "a playlist (PLS)"),
    (0, b"<mpd", "a description of streams (DASH)"),
    (0, b"<?xml", "an XML document"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"<svg", "a drawing (SVG); convert it to PNG"),
    (0, b"v=0", "a description of streams (SDP)"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with `git lfs pull`"),
    (0, b"\x89PNG", "a picture (PNG), which field 'image' takes"),
    (0, b"\xff\xd8\xff", "a picture (JPEG), which field 'image' takes"),
    (8, b"WEBP", "a picture (WebP), which field 'image' takes"),
    (0, b"BM", "a picture (BMP), which field 'image' takes"),
    (0, b"II*\0", "a picture (TIFF), which field 'image' takes"),
    (0, b"MM\0*", "a picture (TIFF), which field 'image' takes"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"MThd", "MIDI, which holds notes and no sound"),
    (0, b"FWS", "Flash (SWF)"),
    (0, b"CWS", "Flash (SWF)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PAR1", "a Parquet table"),
)


def accepted() -> str:
    """Return what is read, as one line."""
    return ", ".join(f"{entry.title} (.{entry.suffixes[0]})" for entry in TABLE)


def format_of(path: str) -> Format | None:
    """Return the accepted container whose first bytes the file has; they say little of headerless ones such as MP3."""
    head = _head(path)
    if any(head[at : at + 1] == head[at + packet : at + packet + 1] == b"G" for at, packet in _TS_PACKETS):
        return FORMATS["mpegts"]
    return next((entry for entry in TABLE if any(head.startswith(mark, at) for at, mark in entry.marks)), None)


def found_in(path: str) -> str:
    """Say what a file that is no medium seems to be."""
    head = _head(path)
    markup = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    known = next(
        (what for at, mark, what in _OTHERS if (markup if mark.startswith(b"<") else head).startswith(mark, at)), None
    )
    if known is not None:
        return known
    if not head.strip(b"\0"):
        return "zeros"
    return (
        "text" if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) else "data of a kind that is not known here"
    )


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def markdown_table() -> str:
    """Return the table of docs/media.md."""
    lines = ["| container | endings of file names |", "|---|---|"]
    for entry in TABLE:
        lines.append(f"| {entry.title} | {', '.join(f'`.{suffix}`' for suffix in entry.suffixes)} |")
    return "\n".join(lines)
