"""A small Hugging Face Hub on this machine, in memory: repositories are made, uploaded to in commits, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """Its commits, the newest last: paths with the SHA-256 of their content; and the newest of each branch."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, str], branch: str = "main") -> str:
        name = hashlib.sha1(json.dumps([files, len(self.commits)], sort_keys=True).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    @property
    def head(self) -> str:
        return self.branches["main"]


@dataclass
class Hub:
    """
    What the server holds, and what it was asked: `requests` has method, path and the key of each.

    An upload of a blob in `broken_uploads` ends in the middle of its content, and so do the next `broken_downloads` of files.
    """

    key: str
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    broken_uploads: set[str] = field(default_factory=set)
    broken_downloads: int = 0
    closed: bool = False

    def put(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.blobs[name] = data
        return name

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        """Hold these files as the newest commit of a public repository; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(private=False))
        return repository.commit({path: self.put(data) for path, data in files.items()})

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """The files of the newest commit."""
        found = self.repositories[repository]
        return {path: self.blobs[blob] for path, blob in found.commits[found.branches[branch]].items()}


class _Refusal(Exception):
    pass


def _lfs(path: str) -> bool:
    return path.endswith((".parquet", ".safetensors", ".bin", ".pt", ".pth"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    lock = RLock()

    def log_message(self, *args) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        if self.hub.closed:  # on a connection that was kept
            self.close_connection = True
            return
        if self.command == "PUT" and parts.path.removeprefix("/_lfs/") in self.hub.broken_uploads:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hub.requests.append((self.command, f"{parts.path} broken", None))
            self.close_connection = True
            return
        body = self._body()
        self.query = parse_qs(parts.query)
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, parts.path, key))
        try:
            with self.lock:
                status, data, headers = self._route(parts.path, body, key == self.hub.key)
        except _Refusal as refusal:
            status, code = refusal.args
            status, data, headers = status, {"error": code}, {"X-Error-Code": code}
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.broken_downloads and isinstance(data, bytes):
            self.hub.broken_downloads -= 1
            raw, self.close_connection = raw[: len(raw) // 2], True
        self.wfile.write(raw)

    do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, path: str, body: bytes, known: bool):
        if path == "/":
            return 200, {}, {}
        free = path.startswith("/_lfs/") or "paths-info" in path  # the address of an upload is its key
        if self.command in ("POST", "PUT") and not known and not free:
            raise _Refusal(401, "Unauthorized")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/_lfs/(\w{64})", path):
            return (200, {}, {}) if self.hub.put(body) == found[1] else (400, {"error": "other content"}, {})
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]}, {}
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._content(self._repository(found[1], known), unquote(found[2]), unquote(found[3]))
        if found := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            repository = self._repository(found[1], known)
            operation = getattr(self, f"_{(found[2] or 'revision').replace('-', '_')}", None)
            if operation is not None:
                return operation(found[1], repository, unquote(found[3] or "main"), unquote(found[4] or ""), body)
        raise _Refusal(404, "NotFound")

    def _repository(self, name: str, known: bool) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not known):
            raise _Refusal(401 if not known else 404, "RepoNotFound")
        return found

    def _create(self, wanted: dict):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        folder = "" if wanted.get("type", "model") == "model" else f"{wanted['type']}s/"
        url = {"url": f"{self.hub.endpoint}/{folder}{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return 409, {"error": "You already created this repo", **url}, {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[name] = Repository(private)
        repository.commit({})
        return 200, url, {}

    def _lfs(self, wanted: dict) -> dict:
        upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/_lfs/{wanted['oid']}"}}}
        return {"oid": wanted["oid"], "size": wanted["size"], **({} if wanted["oid"] in self.hub.blobs else upload)}

    def _at(self, repository: Repository, revision: str) -> tuple[str, dict[str, str]]:
        name = repository.branches.get(revision, revision)
        if name not in repository.commits:
            raise _Refusal(404, "RevisionNotFound")
        return name, repository.commits[name]

    def _content(self, repository: Repository, revision: str, path: str):
        name, files = self._at(repository, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound")
        data = self.hub.blobs[files[path]]
        headers = {"X-Repo-Commit": name, "ETag": f'"{files[path]}"', "Content-Type": "application/octet-stream"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            return 206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return 200, data, headers

    def _entry(self, path: str, blob: str) -> dict:
        size = len(self.hub.blobs[blob])
        lfs = {"lfs": {"oid": blob, "size": size, "pointerSize": 134}} if _lfs(path) else {}
        return {"type": "file", "path": path, "size": size, "oid": blob[:40], **lfs}

    def _revision(self, name: str, repository: Repository, revision: str, below: str, body: bytes):
        commit, files = self._at(repository, revision)
        about = {"_id": name, "id": name, "author": name.split("/")[0], "sha": commit, "private": repository.private}
        about |= {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        about |= {"lastModified": _DATE, "createdAt": _DATE}
        return 200, {**about, "siblings": [{"rfilename": path} for path in sorted(files)]}, {}

    def _refs(self, name: str, repository: Repository, *_):
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in repository.branches.items()
        ]
        return 200, {"branches": branches, "tags": [], "converts": []}, {}

    def _branch(self, name: str, repository: Repository, branch: str, below: str, body: bytes):
        if branch in repository.branches:
            return 409, {"error": "Reference already exists"}, {}
        repository.branches[branch] = repository.head
        return 200, {}, {}

    def _tree(self, name: str, repository: Repository, revision: str, below: str, body: bytes):
        _, files = self._at(repository, revision)
        start = f"{below.strip('/')}/" if below.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(start)}
        if start and not inside:
            raise _Refusal(404, "EntryNotFound")
        entries, folders = [], {}
        for path, blob in inside.items():
            parts = path.removeprefix(start).split("/")
            folders |= {
                start + "/".join(parts[:depth]): None
                for depth in range(1, len(parts) if recursive else min(2, len(parts)))
            }
            entries += [self._entry(path, blob)] if recursive or len(parts) == 1 else []
        return 200, [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + entries, {}

    def _paths_info(self, name: str, repository: Repository, revision: str, below: str, body: bytes):
        _, files = self._at(repository, revision)
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
        return 200, [self._entry(path, files[path]) for path in asked if path in files], {}

    def _preupload(self, name: str, repository: Repository, revision: str, below: str, body: bytes):
        files = [
            {"path": file["path"], "uploadMode": "lfs" if _lfs(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def _commit(self, name: str, repository: Repository, revision: str, below: str, body: bytes):
        _, before = self._at(repository, revision)
        files = dict(before)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.hub.put(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        missing = [path for path, blob in files.items() if blob not in self.hub.blobs]
        if missing:
            raise _Refusal(400, f"{missing[0]} points to content that was not uploaded")
        made = repository.commit(files, revision)
        folder = "datasets/" if self.path.startswith("/api/datasets/") else ""
        url = f"{self.hub.endpoint}/{folder}{name}/commit/{made}"
        return 200, {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}, {}


@contextmanager
def local_hub(key: str = "hf_key") -> Iterator[Hub]:
    """Serve a hub on a port of this machine; only who sends the key may write, or see what is private."""
    hub = Hub(key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed = True
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def taken_for_the_hub(monkeypatch, cache, key: str | None = None) -> Iterator[Hub]:
    """Serve a hub from which models are fetched by name, with a cache of its own; with a key, one may write to it."""
    import transformers
    from huggingface_hub import constants

    from maple_trl.omni import checkpoints

    with local_hub(*([key] if key else [])) as hub:
        if key:
            monkeypatch.setenv("HF_TOKEN", key)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        changed = {"ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
        for name, value in (changed | {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(checkpoints, "_reached", set())
        # It keeps the endpoint that it was made with.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield hub
