"""A small Hugging Face Hub on loopback, for the real `huggingface_hub` client: repositories, files, commits, downloads.

With a folder for Xet, large files go by hf_xet into its own local store there; without one, this is a Hub of before
Xet: it has no such routes. Faults can be planned: the next requests that match a pattern are dropped, half answered or
refused.
"""

import base64
import hashlib
import json
import re
import shutil
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import hf_xet

TOKEN = "hf_" + "writeTokenOfTheTests1234"
READ_ONLY_TOKEN = "hf_" + "readTokenOfTheTests56789"


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]
    lfs: set[str]

    @property
    def sha(self) -> str:
        content = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(self.files.items()))
        return hashlib.sha1((self.title + content).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {}, set())]})

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


@dataclass
class Fault:
    """`times` requests whose "METHOD /path" matches.

    A status is answered; "drop" closes the connection unanswered, "hang" keeps it until the Hub itself ends.
    """

    pattern: str
    action: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    says: str = "planned"


class Hub:
    """The server; use as a context manager. `log` lists every request as "METHOD /path"."""

    def __init__(self, xet: Path | None = None) -> None:
        self.xet = xet
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def content(self, oid: str) -> bytes | None:
        """A large file by its SHA-256, however it came; None where it did not."""
        if oid in self.objects or self.xet is None:
            return self.objects.get(oid)
        if (found := xet_files(self.xet).get(oid)) is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(self.xet, f"{folder}/store")  # the client's process holds the store's lock
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(*found), f"{folder}/file")
            self.objects[oid] = Path(folder, "file").read_bytes()
        return self.objects[oid]

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        return [commit.title for commit in self.repositories[repo].branches[branch]]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch][-1].files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        hub = self.server_hub
        path = urlsplit(self.path).path
        line = f"{self.command} {unquote(path)}"
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        with hub.lock:
            hub.log.append(line)
            fault = next((f for f in hub.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.action == "hang":
            hub.ended.wait()
        if fault is not None and fault.action in ("drop", "hang"):
            self.rfile.read(min(length, 1000))  # in the middle of the body
            self.close_connection = True
            self.connection.close()
            return
        body = self._chunks() if chunked else self.rfile.read(length)
        if fault is not None:
            return self.answer(int(fault.action), {"error": fault.says}, fault.headers)
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (method == self.command or (method == "GET" and self.command == "HEAD")):
                return function(self, body, *map(unquote, match.groups()))
        return self.answer(404, {"error": f"no route {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        if status == 404 and "X-Error-Code" not in (headers or {}):
            entry = "/resolve/" in self.path or "/tree/" in self.path
            self.send_header("X-Error-Code", "EntryNotFound" if entry else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self.answer(403 if self.token else 401, {"error": "You don't have the rights to write here"})
        return False

    def repository(self, name: str) -> Repository | None:
        repository = self.server_hub.repositories.get(name)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_ONLY_TOKEN)):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if not self.may_write():
            return
        if name in self.server_hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.server_hub.url}/{name}"})
        private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.server_hub.repositories[name] = Repository(private)
        self.answer(200, {"url": f"{self.server_hub.url}/{name}", "id": name, "name": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.repository(name)
        if repository is not None and self.may_write():
            if branch in repository.branches:
                return self.answer(409, {"error": "exists"})
            repository.branches[branch] = list(repository.branches["main"])
            self.answer(201, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        commit = repository.at(revision or "main")
        if commit is None:
            return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": file} for file in commit.files]
        self.answer(200, {"id": name, "sha": commit.sha, "private": repository.private, "siblings": siblings})

    def commits(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is not None:
            entries = [{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                       for c in reversed(repository.branches.get(revision, []))]  # fmt: skip
            self.answer(200, entries)

    def _entry(self, commit: Commit, file: str) -> dict[str, Any]:
        data = commit.files[file]
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": _git_oid(data)}
        if file in commit.lfs:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is not None:
            commit = repository.at(revision)
            self.answer(200, [self._entry(commit, file) for file in commit.files] if commit else [])

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is None or not self.may_write():
            return
        commit = repository.at(revision)
        files = []
        for wanted in json.loads(body)["files"]:
            mode = "lfs" if wanted["path"].endswith((".safetensors", ".png")) else "regular"
            answer = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            if commit is not None and wanted["path"] in commit.files:
                data = commit.files[wanted["path"]]
                answer["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else _git_oid(data)
            files.append(answer)
        self.answer(200, {"files": files})

    def xet_token(self, body: bytes, name: str, kind: str, revision: str) -> None:
        if self.repository(name) is None or (kind == "write" and not self.may_write()):
            return
        if self.server_hub.xet is None:
            return self.answer(404, {"error": "Not Found"})
        token = {"casUrl": f"local://{self.server_hub.xet}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        self.answer(200, token)

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self.repository(name) is None or not self.may_write():
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.server_hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(422, {"error": "the content is not what its hash says"})
        self.server_hub.objects[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name)
        if repository is None or not self.may_write():
            return
        before = repository.branches[revision][-1]
        title, files, lfs = "", dict(before.files), set(before.lfs)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", before.sha) != before.sha:
                    return self.answer(412, {"error": "a commit has happened since"})
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.server_hub.content(value["oid"])
                if content is None or hashlib.sha256(content).hexdigest() != value["oid"]:
                    return self.answer(400, {"error": "a large file is missing"})
                files[value["path"]] = content
                lfs.add(value["path"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
        new = Commit(title, files, lfs)
        repository.branches[revision].append(new)
        url = f"{self.server_hub.url}/{name}/commit/{new.sha}"
        self.answer(200, {"commitOid": new.sha, "commitUrl": url, "success": True})

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None or file not in commit.files:
            code = "EntryNotFound" if commit else "RevisionNotFound"
            headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit.sha} if commit else {})
            return self.answer(404, {"error": "not there"}, headers)
        data = commit.files[file]
        etag = hashlib.sha256(data).hexdigest() if file in commit.lfs else _git_oid(data)
        self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"})

    def whoami(self, body: bytes) -> None:
        if self.token in (TOKEN, READ_ONLY_TOKEN):
            return self.answer(200, {"type": "user", "name": "tester", "orgs": []})
        self.answer(401, {"error": "Invalid credentials"})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})


def xet_files(store: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 -> (Xet hash, size) of each file in hf_xet's local store.

    Read from its shards (huggingface/xet-core, mdb_shard): a header of 48 bytes, then for each file a row (hash, flags,
    number of segments), its segments, as many rows of their checks (flag 31) and a row with its SHA-256 (flag 30); rows
    have 48 bytes, and one whose hash is all ones ends the list.
    """
    found = {}
    for shard in store.glob("**/*.mdb"):
        rows = [data[i : i + 48] for data in [shard.read_bytes()] for i in range(48, len(data), 48)]
        while rows and (head := rows.pop(0))[:32] != b"\xff" * 32:
            flags, count = struct.unpack("<II", head[32:40])
            size = sum(struct.unpack("<I", row[36:40])[0] for row in rows[:count])
            del rows[: count * (2 if flags >> 31 & 1 else 1)]
            if flags >> 30 & 1:
                found[_hex(rows.pop(0)[:32])] = (_hex(head[:32]), size)
    return found


def _hex(value: bytes) -> str:
    """A hash as hf_xet writes it: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", value))


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"  # of a path as it is sent: a branch's own "/" is "%2F"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/commits/(.+)", _Handler.commits),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("GET", rf"/api/models/{_NAME}/xet-(read|write)-token/([^/]+)", _Handler.xet_token),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
