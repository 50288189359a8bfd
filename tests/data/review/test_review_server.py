"""What the server of the page gives away, and what it does not, asked over the network."""

import io
import json
import os
import shutil
import time
from urllib.parse import quote

import av
import pyarrow.parquet as pq
import pytest
from review_server import Served, needs_gradio
from review_sets import question_row, write_rows


pytestmark = [pytest.mark.slow, needs_gradio]

SECRET = b"this must not be told"
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def served(clips, tmp_path_factory):
    """A set whose rows name media of all kinds; beside them lie files that no row names."""
    folder = tmp_path_factory.mktemp("served")
    media = folder / "media"
    shutil.copytree(clips, media)
    (media / "secret.mp4").write_bytes(SECRET)
    (folder / "outside.txt").write_bytes(SECRET)
    shutil.copy(media / "train" / "clip-000.mp4", folder / "outside.mp4")
    (media / "link.mp4").symlink_to(folder / "outside.mp4")
    (media / "linked").symlink_to(folder)
    (media / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{folder}/outside.mp4\n#EXT-X-ENDLIST\n")
    (media / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {folder}/outside.mp4\n")
    (media / "picture.png").write_bytes(SECRET)
    (media / "words.srt").symlink_to(folder / "outside.txt")
    os.mkfifo(media / "pipe.mp4")
    names = ["train/clip-000.mp4", "../outside.mp4", "link.mp4", "linked/outside.mp4", str(folder / "outside.mp4")]
    names += [
        "playlist.mp4",
        "concat.mp4",
        "secret.mp4",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x.mp4",
    ]
    names += ["pipe.mp4", "gone.mp4", "train", "a\0b.mp4", ""]
    rows = [question_row(number, "VA", video=name) for number, name in enumerate(names)]
    rows.append(question_row(len(rows), "V", image="picture.png"))
    rows.append(question_row(len(rows), "V", image="../outside.txt"))
    rows.append(question_row(len(rows), "S", subtitle="words.srt"))
    rows.append(question_row(len(rows), "S", subtitle="../outside.txt"))
    rows.append(question_row(len(rows), "VAS", video="train/clip-001.mp4", subtitle="spoken words"))
    write_rows(media / "rows.parquet", rows)
    made = Served(folder, media / "rows.parquet", "--log", media / "review.log", "--reviewer", "ann", "--cache_mb", 1)
    made.media, made.rows = media, rows
    yield made
    assert made.stop() == 0 and list((made.cache / "maple_trl" / "review").iterdir()) == []


def tracks(data: bytes) -> list[str]:
    with av.open(io.BytesIO(data)) as container:
        return sorted(stream.type for stream in container.streams)


def test_each_tag_gives_its_own_tracks(served):
    """Without sound means: there is no track of sound in what the browser gets."""
    given = {}
    for tag in ("V", "A", "VA", "VS", "AS", "VAS"):
        status, headers, data = served.ask(f"/media/0/{tag}/clip")
        given[tag] = (status, headers["content-type"], tracks(data))
    assert given["VA"] == given["VAS"] == (200, "video/mp4", ["audio", "video"])
    assert given["V"] == given["VS"] == (200, "video/mp4", ["video"])
    assert given["A"] == given["AS"] == (200, "audio/mp4", ["audio"])
    assert served.ask("/media/0/S/clip")[0] == 404
    status, headers, data = served.ask("/media/0/V/clip", range="bytes=0-99")
    assert status == 206 and len(data) == 100, "a player can seek"


def test_media_that_lead_elsewhere_are_not_served(served):
    for number, row in enumerate(served.rows):
        kind = "image" if row["image"] else "clip"
        status, _, data = served.ask(f"/media/{number}/V/{kind}")
        fine = row["video"] in ("train/clip-000.mp4", "train/clip-001.mp4")
        assert (status == 200) == fine, (row["video"], status, data[:200])
        assert SECRET not in data and b"root:x:" not in data
    said = {
        row["video"]: served.ask(f"/media/{number}/V/clip")[2].decode(errors="replace")
        for number, row in enumerate(served.rows)
    }
    for name in ("../outside.mp4", "link.mp4", "linked/outside.mp4", "/etc/passwd"):
        assert said[name].startswith("outside-media-root"), said[name]
    assert "a playlist (HLS)" in said["playlist.mp4"] and "a concat script" in said["concat.mp4"]
    assert said["file:///etc/passwd"].startswith("network-not-allowed")


PATHS = [
    "/etc/passwd",
    "/../../../../etc/passwd",
    "/media/0/V/../../../rows.parquet",
    "/media/../rows.parquet",
    "/media/secret.mp4",
    "/media/0/V/clip/../../../../etc/passwd",
    "/media/0/V/clip%2f..%2f..%2fsecret.mp4",
    "/media/0/V/%2e%2e/clip",
    "/media/-1/V/clip",
    "/media/99999/V/clip",
    "/media/0/VV/clip",
    "/media/0/SV/clip",
    "/media/0/V/secret.mp4",
    "/assets/../../../../../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/assets/%2e%2e/%2e%2e/routes.py",
    "/static/../routes.py",
    "/static/..%5c..%5croutes.py",
    "/static//etc/passwd",
    "/assets//etc/passwd",
    "/file=/etc/passwd",
    "/file/etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../../../etc/passwd",
    "/gradio_api/file%3D/etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/gradio_api//file=/etc/passwd",
    "/gradio_api/run/../file=/etc/passwd",
    "//gradio_api/file=/etc/passwd",
    "/./gradio_api/file=/etc/passwd",
    "/GRADIO_API/file=/etc/passwd",
    "/gradio_api/file=http://127.0.0.1:{port}/",
    "/gradio_api/proxy=http://127.0.0.1:{port}/",
    "/gradio_api/stream/x/y/z/playlist.m3u8",
    "/gradio_api/upload_progress?upload_id=1",
    "/gradio_api/deep_link",
    "/gradio_api/openapi.json",
    "/gradio_api/runs",
    "/gradio_api/vibe-code/",
    "/gradio_api/dev/reload",
    "/custom_component/x/client/component/../../../../etc/passwd",
    "/gradio_api/custom_component/x/client/component/index.js",
    "/monitoring",
    "/docs",
    "/openapi.json",
    "/pwa_icon",
    "/svelte/../../../etc/passwd",
]


def test_nothing_else_can_be_asked_for(served):
    media = str(served.media)
    paths = [path.format(port=served.port) for path in PATHS]
    for name in ("secret.mp4", "rows.parquet", "review.log", "train/clip-002.mp4", "link.mp4", "words.srt"):
        whole = f"{media}/{name}"
        paths += [f"/gradio_api/file={whole}", f"/gradio_api/file={quote(whole, safe='')}", f"/file={whole}", whole]
    for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE"):
        for path in paths:
            status, _, data = served.ask(path, method, body=b"" if method in ("POST", "PUT") else None)
            assert status in (403, 404, 405), (method, path, status, data[:200])
            assert SECRET not in data and b"root:x:" not in data
    for path in (
        "/gradio_api/upload",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-edit",
        "/gradio_api/call/v2/x",
    ):
        assert served.ask(path, "POST", b"{}", content_type="application/json")[0] == 404, path
    raw = served.ask_raw(b"GET /gradio_api/file=/etc/passwd HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
    assert raw.split(b"\r\n")[0].split()[1] == b"404"
    raw = served.ask_raw(
        b"GET http://127.0.0.1/gradio_api/file=/etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    assert raw.split()[1] in (b"400", b"404") and b"root:x:" not in raw


def test_the_same_paths_are_found_without_the_gate(served, tmp_path, monkeypatch):
    """Negative control: Gradio left to itself gives away what the gate refuses."""
    import gradio
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML("x")
    app = gradio.mount_gradio_app(FastAPI(), blocks, path="/", allowed_paths=[str(served.media)])
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get(f"/gradio_api/file={served.media}/secret.mp4").content == SECRET
    assert client.get("/gradio_api/openapi.json").status_code == 200


def run(served, view="", name="ann", call=None, **headers):
    """What the page sends when a button is clicked, made by hand."""
    config = json.loads(served.ask("/config")[2])
    number = next(item["id"] for item in config["dependencies"] if call is None or call(item))
    data = {"data": [view, name, "all", "all"], "fn_index": number, "session_hash": "abc"}
    headers = {"content_type": "application/json", **headers}
    return served.ask("/gradio_api/run/predict", "POST", json.dumps(data).encode(), **headers)


def test_the_answer_is_not_in_the_page_before_it_is_asked_for(served):
    status, _, data = run(served)
    assert status == 200 and b"Which colour has shape 0" in data
    assert b"right-answer" not in data and b'class=\\"right' not in data


def test_files_cannot_be_handed_in(served):
    """A value that Gradio would take for a file of this machine, and copy to where it serves files from."""
    for path in ("/etc/passwd", str(served.media / "secret.mp4")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x"}
        assert run(served, view=file)[0] == run(served, view=[file])[0] == run(served, name={"a": file})[0] == 400
    left = [
        path.name
        for path in served.cache.rglob("*")
        if path.is_file() and path.suffix not in (".mp4", ".lock", ".jpg")
    ]
    assert left == []


def test_other_sites_in_the_same_browser_are_refused(served):
    host = f"127.0.0.1:{served.port}"
    assert run(served)[0] == 200
    assert run(served, origin=f"http://{host}", sec_fetch_site="same-origin")[0] == 200
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"http://127.0.0.1:{served.port + 1}"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        assert run(served, **headers)[0] == 403, headers
    assert served.ask("/media/0/V/clip", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert served.ask("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200, "a link leads here"
    # A name of elsewhere that was made to lead to this machine.
    assert (
        served.ask("/", host="evil.example")[0] == served.ask("/config", host=f"evil.example:{served.port}")[0] == 403
    )
    assert served.ask("/", host=f"localhost:{served.port}")[0] == 200
    _, headers, _ = served.ask("/")
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in served.ask("/config", origin="http://evil.example")[1]


def test_what_is_sent_has_a_bound(served):
    assert served.ask("/gradio_api/run/predict", "POST", b"x" * (1 << 20 | 1))[0] == 413
    assert served.ask("/login", "POST", b"")[0] == 303
    raw = served.ask_raw(
        b"POST /gradio_api/run/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert raw.split()[1] == b"413"
    for view in (
        "{",
        "[]",
        '{"row": 5}',
        json.dumps({"row": "row-0", "seconds": "x"}),
        json.dumps({"looked": 7}),
        "9" * 5000,
    ):
        assert run(served, view=view)[0] == 200, view


def test_copies_take_no_more_than_their_bound(served):
    """Of 1 MiB, with clips of some 10 KiB that are asked for over and over; a bound of its own is tested with the shelf."""
    for tag in ("V", "A", "VA") * 3:
        assert served.ask(f"/media/20/{tag}/clip")[0] == 200
    (folder,) = [path for path in (served.cache / "maple_trl" / "review").iterdir() if path.is_dir()]
    assert 0 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1 << 20
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_the_token(clips, tmp_path):
    file = tmp_path / "token.txt"
    file.write_text(TOKEN + "\n", encoding="utf-8-sig")
    served = Served(tmp_path, clips, "--log", tmp_path / "review.log", "--token_file", file)
    try:
        assert served.ask("/")[0] == 303 and served.ask("/")[1]["location"] == "/login"
        for path in (
            "/config",
            "/media/0/V/clip",
            "/theme.css",
            "/assets/x.js",
        ):
            assert served.ask(path)[0] == 401, path
            assert served.ask(f"{path}?token={TOKEN}")[0] == 401, "a token in an address is none"
            assert served.ask(path, cookie=f"maple_review={TOKEN}", authorization=f"Bearer {TOKEN}")[0] == 401
        assert served.ask("/gradio_api/run/predict", "POST", b"{}", content_type="application/json")[0] == 401
        assert served.ask("/gradio_api/file=/etc/passwd")[0] == 404
        for wrong in ("", "a", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ä" * 24):
            before = time.monotonic()
            status, headers, _ = served.ask("/login", "POST", f"token={quote(wrong)}".encode())
            assert status == 401 and "set-cookie" not in headers and time.monotonic() - before > 0.9
        assert served.ask("/login", "POST", f"token={TOKEN}".encode(), origin="http://evil.example")[0] == 403
        status, headers, _ = served.ask("/login", "POST", f"token={TOKEN}".encode())
        cookie, *rest = headers["set-cookie"].split("; ")
        assert (
            status == 303 and TOKEN not in cookie and "HttpOnly" in rest and "samesite=strict" in map(str.lower, rest)
        )
        for path in ("/", "/config", "/media/0/V/clip"):
            assert served.ask(path, cookie=cookie)[0] == 200
            assert served.ask(path, cookie=cookie[:-1] + "x")[0] in (303, 401)
        assert served.ask(f"/gradio_api/file={tmp_path}/token.txt", cookie=cookie)[0] == 404
    finally:
        assert served.stop() == 0
    assert TOKEN not in served.output.read_text(), "neither the address nor anything else tells it"


def test_rows_of_the_set_are_those_that_are_shown(served):
    assert pq.read_table(served.media / "rows.parquet").num_rows == len(served.rows)
    assert not (served.media / "review.log").exists(), "looking writes nothing"
