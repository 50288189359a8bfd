"""What `maple-trl env` reports: versions against the tested ranges, devices, codecs, and what is missing."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import PlainCommand
from maple_trl.cli.failures import FAILED


if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

DISTRIBUTION = "maple-trl"

# Import names that differ from the distribution's.
_IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "torchcodec": "torchcodec.decoders"}
# Used where it is installed, but brought by no extra: it is built against the machine's own CUDA.
_UNMANAGED = {"flash-attn": "pip install flash-attn --no-build-isolation (needs CUDA)"}
# Name, kind, encoders that can write a sample, and whether the embedded data set needs the codec.
_CODECS = (
    ("h264", "video", ("libx264", "h264"), True),
    ("aac", "audio", ("aac",), True),
    ("mp3", "audio", ("libmp3lame",), False),
    ("opus", "audio", ("libopus",), False),
)
# Extras that serve the work on this package, not its use.
_DEVELOPER_EXTRAS = {"dev", "docs"}


@dataclass
class Package:
    """
    One row of the report.

    Attributes:
        name: the distribution's name.
        version: the installed version, or `None`.
        tested: the tested range as a specifier, or `None` where this package names none.
        in_range: whether the version is in it; `None` without a version or a range.
        required: whether the core needs it.
        extra: the extra that brings it, or `None`.
        error: what its import raised, or `None`.
        note: how to get it, or what else is worth knowing.
    """

    name: str
    version: str | None
    tested: str | None = None
    in_range: bool | None = None
    required: bool = False
    extra: str | None = None
    error: str | None = None
    note: str | None = None

    @property
    def broken(self) -> bool:
        """Whether a required package is missing or cannot be imported."""
        return self.required and (self.version is None or self.error is not None)


@dataclass
class Codec:
    """Whether one codec decodes here, found out by decoding a clip; `error` says why not."""

    name: str
    kind: str
    usable: bool
    required: bool
    error: str | None = None


def collect(imports: bool = False) -> dict[str, Any]:
    """
    Find out what this machine and its packages can do.

    Args:
        imports (`bool`, *optional*, defaults to `False`):
            Also import every required package, and ask torch for the devices: half a minute, and the only way to find a
            package that is installed but broken. Without it devices are the system's word.

    Returns:
        `dict`: `python`, `platform`, `imports`, `packages`, `ffmpeg`, `devices`, `codecs` (plain data, ready for JSON),
        `missing` (what could be added, each with the command that brings it), `warnings` (works, but outside the tested
        ranges) and `problems` (required things that are broken; empty on a sound machine).
    """
    packages = _packages(imports)
    codecs = _codecs()
    problems = [f"{p.name}: {p.error or 'not installed'}" + _hint(p) for p in packages if p.broken]
    undecodable = [(f"{c.name} ({c.kind}) can't be decoded: {c.error}", c.required) for c in codecs if not c.usable]
    problems += [text for text, required in undecodable if required]
    warnings = [
        f"{p.name} {p.version} is outside the tested range {p.tested}" for p in packages if p.in_range is False
    ]
    warnings += [f"{p.name} does not work: {p.error}" for p in packages if p.error and not p.required]
    warnings += [text for text, required in undecodable if not required]
    if not any(p.tested for p in packages):
        warnings.append(
            f"{DISTRIBUTION} is not installed as a package, so the tested ranges are unknown: pip install -e ."
        )
    missing = [
        {"name": p.name, "brings_it": p.note or f'pip install "{DISTRIBUTION}[{p.extra}]"'}
        for p in packages
        if p.version is None and not p.required
    ]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "imports": imports,
        "packages": [asdict(p) for p in packages],
        "ffmpeg": _ffmpeg_version(),
        "devices": _torch_devices() if imports else _system_devices(),
        "codecs": [asdict(codec) for codec in codecs],
        "missing": missing,
        "warnings": warnings,
        "problems": problems,
    }


def _hint(package: Package) -> str:
    return "" if package.version else f" (pip install {DISTRIBUTION})"


def _requirements() -> dict[str, tuple[Requirement, str | None]]:
    """Return the requirements of this package by name, each with the extra that brings it (`None`: the core)."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, tuple[Requirement, str | None]] = {}
    for line in lines:
        requirement = Requirement(line)
        candidates = [None, *(extra for extra in extras if extra not in _DEVELOPER_EXTRAS)]
        for extra in candidates:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
                found.setdefault(requirement.name.lower(), (requirement, extra))
                break
    return found


def _packages(imports: bool) -> list[Package]:
    requirements = _requirements()
    rows = []
    for name, (requirement, extra) in requirements.items():
        tested = str(requirement.specifier) or None
        rows.append(_package(name, imports, tested=tested, required=extra is None, extra=extra))
    if not requirements:
        rows = [
            _package(name, imports, required=True) for name in ("torch", "transformers", "trl", "accelerate", "av")
        ]
    rows += [_package(name, imports, note=note) for name, note in _UNMANAGED.items()]
    return rows


def _package(name: str, imports: bool, *, tested: str | None = None, **fields: Any) -> Package:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, tested, **fields)
    # A local part, as in 2.15.0+cpu, says how a version was built and not which one it is.
    in_range = SpecifierSet(tested).contains(version.split("+")[0], prereleases=True) if tested else None
    package = Package(name, version, tested, in_range, **fields)
    # Other optional packages are not imported: some take seconds, and nothing here depends on them. torchcodec is often
    # installed without the FFmpeg libraries that it needs.
    if imports and (package.required or name == "torchcodec"):
        package.error = _import_error(_IMPORT_NAMES.get(name, name))
    return package


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything, from ImportError to OSError and RuntimeError
        return f"import {module} fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None


def _ffmpeg_version() -> str | None:
    """Return the version of the FFmpeg libraries that PyAV brings along, or `None` without PyAV."""
    try:
        import av
    except Exception:
        return None
    libraries = ", ".join(f"{name} {'.'.join(map(str, v))}" for name, v in av.library_versions.items())
    return f"{getattr(av, 'ffmpeg_version_info', 'unknown')} ({libraries})"


def _system_devices() -> list[dict[str, Any]]:
    """List devices that the system names: whether torch can use them, and bfloat16 there, only torch can tell."""
    devices = []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]):
        shown = subprocess.run(query, capture_output=True, text=True, timeout=60)
        for line in shown.stdout.splitlines() if shown.returncode == 0 else ():
            index, name, mebibytes = (part.strip() for part in line.split(","))
            memory = int(mebibytes) << 20 if mebibytes.isdigit() else None
            devices.append({"device": f"cuda:{index}", "name": name, "memory": memory, "bf16": None})
    return [*devices, {"device": "cpu", "name": _processor(), "memory": _memory(), "bf16": None}]


def _processor() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _torch_devices() -> list[dict[str, Any]]:
    """List devices that torch can use, fastest first: name, memory in bytes, and whether bfloat16 works there."""
    try:
        import torch
    except Exception:
        return []
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported()
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory, "bf16": bf16}
        )
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        devices.append({"device": "mps", "name": "Apple GPU", "memory": memory, "bf16": _multiplies_bf16("mps")})
    devices.append(
        {
            "device": "cpu",
            "name": f"{_processor()}, {torch.get_num_threads()} used",
            "memory": _memory(),
            "bf16": _multiplies_bf16("cpu"),
        }
    )
    return devices


def _multiplies_bf16(device: str) -> bool:
    import torch

    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((ones @ ones == 2).all())
    except (RuntimeError, TypeError):
        return False


def _memory() -> int | None:
    """Return the machine's memory in bytes, or `None` where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _codecs() -> list[Codec]:
    """Write clips of a quarter of a second into memory, and read them back: the whole way, not a list of names."""
    found = []
    for name, kind, encoders, required in _CODECS:
        error = None
        try:
            _round_trip(name, kind, encoders)
        except Exception as caught:  # whatever a crippled FFmpeg throws is the finding
            error = f"{type(caught).__name__}: {caught}"
        found.append(Codec(name, kind, error is None, required, error))
    return found


def _round_trip(name: str, kind: str, encoders: tuple[str, ...]) -> None:
    """
    Encode and decode one clip.

    Raises:
        Exception: when PyAV is missing, the codec is not built in, or nothing comes back.
    """
    import av
    import numpy as np

    encoder = next((e for e in encoders if e in av.codecs_available and av.Codec(e, "w").is_encoder), None)
    if encoder is None:
        av.Codec(name, "r")  # raises where the decoder is missing; without an encoder that is all that can be asked
        return
    stream_of_bytes = io.BytesIO()
    with av.open(stream_of_bytes, "w", format="matroska") as container:
        stream = container.add_stream(encoder, rate=4 if kind == "video" else 48_000)
        if kind == "video":
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")]
        else:
            tone = (0.5 * np.sin(np.arange(12_000) * 0.05)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate = 48_000
            stream.layout = "mono"
            resampler = av.AudioResampler(
                format=stream.codec_context.codec.audio_formats[0], layout="mono", rate=48_000
            )
            frames = resampler.resample(frame)
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    stream_of_bytes.seek(0)
    with av.open(stream_of_bytes) as container:
        decoded = [frame.to_ndarray() for frame in container.decode(**{kind: 0})]
    if not decoded or not any(array.any() for array in decoded):
        raise ValueError("decoding gave no signal")


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print what [`collect`] found, as a person reads it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    console.print(f"Python {report['python']} ({sys.executable})\n{report['platform']}", highlight=False)
    table = Table(title="Packages", title_justify="left")
    for column in ("package", "installed", "tested", "state"):
        table.add_column(column)
    for package in report["packages"]:
        table.add_row(package["name"], package["version"] or "-", package["tested"] or "-", _state(package))
    console.print(table)
    console.print(f"FFmpeg (in PyAV): {report['ffmpeg'] or 'none'}", highlight=False)
    table = Table(title="Devices", title_justify="left")
    for column in ("device", "name", "memory", "bfloat16"):
        table.add_column(column)
    for device in report["devices"]:
        memory = f"{device['memory'] / 2**30:.1f} GiB" if device["memory"] else "?"
        table.add_row(device["device"], device["name"], memory, {True: "yes", False: "no", None: "?"}[device["bf16"]])
    console.print(table)
    codecs = [f"{c['name']} {'yes' if c['usable'] else 'NO'}" for c in report["codecs"]]
    console.print(f"Codecs that decoded a clip just now: {', '.join(codecs)}", highlight=False)
    for item in report["missing"]:
        console.print(f"optional, not installed: {item['name']}: {escape(item['brings_it'])}", highlight=False)
    for text in report["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)
    for text in report["problems"]:
        console.print(f"[red]problem:[/] {escape(text)}", highlight=False)
    if not report["imports"]:
        console.print(
            "Nothing was imported: `maple-trl env --imports` tries every package and asks torch for devices."
        )
    console.print("Nothing required is broken." if not report["problems"] else "Something required is broken.")


def _state(package: dict[str, Any]) -> str:
    if package["error"]:
        return "[red]broken[/]"
    if package["version"] is None:
        return "[red]missing[/]" if package["required"] else "optional"
    return "[yellow]outside[/]" if package["in_range"] is False else "ok"


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    report = collect(arguments.imports)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return FAILED if report["problems"] else 0


COMMAND = PlainCommand(
    name="env",
    help="show versions, devices and codecs, and what is missing",
    run=run,
    description="""\
Shows versions against the tested ranges, devices, and codecs that really decode; says what is missing and what would bring
it.""",
    examples=("maple-trl env", "maple-trl env --imports", "maple-trl env --json"),
    statuses={FAILED: "something required is broken"},
    options={
        "imports": {
            "action": "store_true",
            "help": "import every required package too, and ask torch for devices",
        },
        "json": {"action": "store_true", "help": "print the report as JSON"},
    },
)
