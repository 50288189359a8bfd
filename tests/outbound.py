"""
No test reaches beyond this machine, whatever it starts.

An audit hook, which nothing can take away again, sees every connection, datagram and look-up of a name that Python makes, in
this process and its forks; `no_network/sitecustomize.py` sets it up in the interpreters that tests start. What leads elsewhere
is refused by an error, and noted in a file, because libraries that tell others about a run keep its errors to themselves.
"""

import errno
import functools
import ipaddress
import os
import socket
import sys
import tempfile
from pathlib import Path


SITE = str(Path(__file__).parent / "no_network")
"""Stands in `PYTHONPATH` of what is started."""

NOTES = "MAPLE_TRL_TESTS_OUTBOUND"
"""Names the file in which refused attempts are noted."""

_ADDRESSES = {"socket.connect": "connect to", "socket.sendto": "send to", "socket.sendmsg": "send to"}
_NAMES = {
    "socket.getaddrinfo": "look up",
    "socket.gethostbyname": "look up",
    "socket.gethostbyaddr": "look up",
}
_OWN = {"localhost", "localhost.localdomain", "ip6-localhost", "broadcasthost", ""}


class OutboundError(OSError):
    """Something wants to reach beyond this machine."""


def refuse() -> None:
    """Refuse, from now on, what leads beyond this machine."""
    sys.addaudithook(_look)


def watch() -> None:
    """Refuse it in this process and in all interpreters that it starts, and begin a file of notes."""
    os.environ[NOTES] = tempfile.NamedTemporaryFile(prefix="outbound-", suffix=".txt", delete=False).name
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != SITE]
    os.environ["PYTHONPATH"] = os.pathsep.join([SITE, *others])
    refuse()


def noted() -> list[str]:
    """Return what has been refused so far: what was attempted, and from where."""
    path = os.environ.get(NOTES)
    return Path(path).read_text(encoding="utf-8").splitlines() if path and os.path.exists(path) else []


def forget() -> None:
    """Begin the file of notes anew: what was refused was meant to be tried."""
    Path(os.environ[NOTES]).write_text("", encoding="utf-8")


def stop() -> None:
    """Remove the file of notes."""
    Path(os.environ[NOTES]).unlink(missing_ok=True)


def _look(event: str, arguments: tuple) -> None:
    if event in _ADDRESSES:
        connection, address = arguments
        if address is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return  # of a connection that was made before; of this machine's own kinds
        host, port = address[:2]
    elif event in _NAMES:
        host, port = arguments[0], arguments[1] if len(arguments) > 1 else None
    else:
        return
    host = host.decode(errors="replace") if isinstance(host, bytes) else host or ""
    if _is_here(host) or (event in _NAMES and _address(host) is not None):  # an address is not asked for
        return
    attempt = f"{(_ADDRESSES | _NAMES)[event]} {host}" + ("" if port is None else f":{port}")
    _note(f"{attempt} from {_place()}")
    raise OutboundError(errno.ENETUNREACH, f"no test reaches beyond this machine: {attempt}")


def _is_here(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host.lower() in _OWN | {_own_name()}
    return address.is_loopback or address.is_unspecified or host in _own_addresses()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return None


@functools.cache
def _own_name() -> str:
    return socket.gethostname().lower()


@functools.cache
def _own_addresses() -> frozenset[str]:
    try:
        return frozenset(found[4][0] for found in socket.getaddrinfo(_own_name(), None))
    except OSError:
        return frozenset()


def _place() -> str:
    """Name the lines of the callers outside the standard library, the newest first."""
    frame, places = sys._getframe(2), []
    while frame is not None and len(places) < 24:
        file = frame.f_code.co_filename
        if not file.startswith((os.path.dirname(os.__file__) + os.sep, "<frozen")) or "site-packages" in file:
            places.append(f"{file.rpartition('site-packages/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places) or "the standard library"


def _note(line: str) -> None:
    path = os.environ.get(NOTES)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
