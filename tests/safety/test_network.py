"""Nothing that a test starts reaches beyond this machine, and no command makes a request that nobody asked for."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import aiohttp
import datasets
import outbound
import planted_tests
import programs
import pytest
import requests
from huggingface_hub import constants

from maple_trl.jobs.tables import read_tables, stream_tables
from maple_trl.rollout.server import serve


TESTS = Path(__file__).resolve().parents[1]
# Addresses for documentation (RFC 5737, RFC 3849): nobody has them.
OUTSIDE, OUTSIDE_6 = ("192.0.2.1", 80), ("2001:db8::1", 80)
ATTEMPT = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as e: print(type(e).__name__, e)"


async def over_aiohttp():
    async with aiohttp.ClientSession() as session:
        await session.get("http://192.0.2.1/")


def send_datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.sendto(b"x", OUTSIDE)


WAYS = {
    "connection": (lambda: socket.create_connection(OUTSIDE, 1), "connect to 192.0.2.1:80"),
    "IPv6": (lambda: socket.socket(socket.AF_INET6).connect(OUTSIDE_6), "connect to 2001:db8::1:80"),
    "no exception": (lambda: socket.socket().connect_ex(OUTSIDE), "connect to 192.0.2.1:80"),
    "datagram": (send_datagram, "send to 192.0.2.1:80"),
    "name": (lambda: socket.getaddrinfo("huggingface.co", 443), "look up huggingface.co:443"),
    "older look-up": (lambda: socket.gethostbyname("huggingface.co"), "look up huggingface.co"),
    "urllib": (lambda: urllib.request.urlopen("http://huggingface.co", timeout=1), "look up huggingface.co:80"),
    "requests": (lambda: requests.get("http://192.0.2.1/", timeout=1), "connect to 192.0.2.1:80"),
    "asyncio": (lambda: asyncio.run(over_aiohttp()), "connect to 192.0.2.1:80"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_leads_elsewhere_is_refused_and_named(way, refused, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    call, attempt = WAYS[way]
    with pytest.raises((OSError, aiohttp.ClientError), match="no test reaches beyond this machine"):
        call()
    assert refused()[0].startswith(f"{attempt} from ")
    assert "test_network.py" in refused()[0]


def test_this_machine_is_reached_by_its_names():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("127.0.0.1", "localhost"):
            socket.create_connection((name, server.getsockname()[1]), 5).close()
    socket.getaddrinfo(socket.gethostname(), None)
    one, other = socket.socketpair()
    one.close(), other.close()


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ATTEMPT], capture_output=True, text=True).stdout,
        lambda: programs.run(["-c", ATTEMPT]).stdout,
    ],
    ids=["an interpreter", "a copy of the server"],
)
def test_what_a_test_starts_is_held_to_it(start, refused):
    assert "OutboundError [Errno 101] no test reaches beyond this machine: connect to 192.0.2.1:80" in start()
    assert len(refused()) == 1 and refused()[0].startswith("connect to 192.0.2.1:80 from <string>")


SWALLOWED = """
import socket

def test_of_a_library_that_keeps_its_errors_to_itself():
    try:
        socket.create_connection(("192.0.2.1", 80), 1)
    except OSError:
        pass
"""


def test_an_attempt_fails_the_test_even_if_its_error_is_swallowed(tmp_path):
    shown = planted_tests.run(tmp_path, SWALLOWED, "-q")
    assert shown.returncode == 1 and "1 passed, 1 error" in shown.stdout
    assert "reached for what is not on this machine:" in shown.stdout and "connect to 192.0.2.1:80" in shown.stdout


def test_a_local_table_is_read_without_telling_anyone(tmp_path, refused, monkeypatch):
    """The control: `load_dataset` counts that it was called, at an address of its own."""
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    table = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(table)
    assert read_tables([table])["a"][:] == [row["a"] for row in stream_tables([table])] == [1, 2]
    assert refused() == []
    datasets.load_dataset("parquet", data_files=str(table))
    assert refused()[0].startswith("look up s3.amazonaws.com:443 from ")


@pytest.mark.slow
def test_commands_make_no_request_that_nobody_asked_for(tmp_path):
    """Where nobody has said that the machine is offline. What is refused is noted, whoever swallows the error."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "TRL_"))}
    kept.pop("DISABLE_TELEMETRY", None)
    notes = tmp_path / "notes.txt"
    environment = kept | {
        outbound.NOTES: str(notes),
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": os.pathsep.join([outbound.SITE, str(TESTS.parent), str(TESTS)]),
        "ACCELERATE_USE_CPU": "true",
    }
    script = Path(__file__).with_name("commands_without_network.py")
    command = [sys.executable, str(script), str(tmp_path)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=programs.LIMIT)
    found = dict(line.split(" ", 1) for line in shown.stdout.splitlines() if line.startswith(("STATUSES", "NAMED")))
    assert set(json.loads(found["STATUSES"])) == {0}, shown.stdout[-2000:] + shown.stderr[-4000:]
    attempts = notes.read_text().splitlines()
    # The control is the last command alone: it names a model of the Hub.
    assert found["NAMED"] == "2" and "a-model-that-is-named" in shown.stderr
    assert len(attempts) == 1 and attempts[0].startswith("look up huggingface.co:443 from "), attempts


SERVER = "import os; print('usage told:', os.environ.get('VLLM_NO_USAGE_STATS') != '1')"


def test_a_server_that_is_started_tells_nobody_of_its_use(tmp_path, monkeypatch, capfd):
    """vLLM does unless its environment says no. In its place stands what shows its environment."""
    (tmp_path / "vllm" / "entrypoints" / "cli").mkdir(parents=True)
    for folder in ("", "entrypoints", "entrypoints/cli"):
        (tmp_path / "vllm" / folder / "__init__.py").touch()
    (tmp_path / "vllm" / "entrypoints" / "cli" / "main.py").write_text(SERVER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    before = signal.getsignal(signal.SIGTERM)
    try:
        for value, told in ((None, False), ("0", True)):  # the control: who asks for it
            if value is not None:
                monkeypatch.setenv("VLLM_NO_USAGE_STATS", value)
            assert serve("builtin:tiny-omni", "auto", "127.0.0.1", 0, None, []) == 0
            assert f"usage told: {told}" in capfd.readouterr().out
    finally:
        signal.signal(signal.SIGTERM, before)
