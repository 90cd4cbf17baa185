"""A Hub on loopback that the real huggingface_hub client talks to: strict about what it takes, and faulty on demand.

It has models only, keeps every commit, and speaks LFS in one part or several. Not spoken: Xet.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

TOKENS = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("alice", "read")}
LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet")
LICENCES = ("apache-2.0", "mit", "other", "llama3.1")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REPO, SHA = rf"({NAME}/{NAME})", "([0-9a-f]{64})"
# The kind of a request, as faults name it; its method and path; and the method of `HubServer` that answers
ROUTES = (
    ("create", "POST", "/api/repos/create", "_create"),
    ("create", "POST", rf"/api/models/{REPO}/branch/([^/]+)", "_branch"),
    ("card", "POST", "/api/validate-yaml", "_validate"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/([^/]+)", "_preupload"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("lfs", "PUT", f"/lfs/{SHA}", "_put"),
    ("lfs", "POST", f"/lfs/{SHA}/complete", "_complete"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/([^/]+)", "_commit"),
    ("info", "GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", "_info"),
    ("info", "POST", rf"/api/models/{REPO}/paths-info/([^/]+)", "_paths"),
    ("info", "GET", rf"/api/models/{REPO}/tree/([^/]+)", "_tree"),
    ("resolve", "GET|HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", "_resolve"),
    ("unknown", ".*", ".*", "_unknown"),
)


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, bytes]


class Repo(NamedTuple):
    private: bool
    branches: dict[str, list[Commit]]

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for branch in self.branches.values() for one in branch if one.oid == revision), None)


class Request(NamedTuple):
    kind: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fault:
    """What goes wrong in requests of a kind, and how often."""

    kind: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    reset_after: int | None = None  # the connection breaks after that many bytes of the body
    lost: bool = False  # the request is served, and the answer is lost
    hang: float = 0.0
    times: float = 1
    begun: threading.Event = field(default_factory=threading.Event)


class Answer(Exception):  # noqa: N818
    def __init__(self, status: int, content: Any = None, headers: dict[str, str] | None = None, error: str = ""):
        super().__init__(status, error)
        self.status, self.headers = status, {**(headers or {}), **({"X-Error-Message": error} if error else {})}
        content = {"error": error} if content is None else content
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


class HubServer:
    def __init__(self, latency: float = 0.0, bandwidth: float | None = None, part: int = 4 << 20):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.latency, self.bandwidth, self.part = latency, bandwidth, part
        self.lock = threading.RLock()
        self.port, self.server = 0, None
        self.up()

    def up(self) -> None:
        self.down()
        self.server = Server(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and break the open ones."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for connection in server.connections:
                _reset(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.down()

    def environment(self, token: str | None = "hf_alice", home: Path | None = None) -> dict[str, str]:
        settings = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")}
        return settings | ({"HF_TOKEN": token} if token else {}) | ({"HF_HOME": str(home)} if home else {})

    # ---- what a test asks of it

    def fault(self, kind: str, **options: Any) -> Fault:
        self.faults.append(Fault(kind, **options))
        return self.faults[-1]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo].commit(revision).files

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Return the commits without the first, which the Hub makes itself."""
        return self.repos[repo].branches[revision][1:] if repo in self.repos else []

    def count(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.requests)

    def write(self, repo: str, path: str, content: bytes | str) -> None:
        """Commit a file, as somebody does in the browser; a new repository is made for it."""
        content = content.encode() if isinstance(content, str) else content
        with self.lock:
            if repo not in self.repos:
                self.make(repo)
            self._append(repo, "main", {**self.files(repo), path: content}, "by hand")

    def make(self, repo: str, private: bool = False) -> None:
        self.repos[repo] = Repo(private, {"main": []})
        self._append(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def _append(self, repo: str, branch: str, files: dict[str, bytes], message: str) -> Commit:
        commits = self.repos[repo].branches[branch]
        oid = hashlib.sha1(f"{repo} {branch} {message} {len(commits)} {time.time_ns()}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return commits[-1]

    # ---- its answers

    def _unknown(self, request: Request) -> Answer:
        return Answer(404, error=f"no such endpoint: {request.path}")

    def _user(self, request: Request, write: bool = False) -> str:
        user, role = TOKENS.get((request.headers.get("Authorization") or "").removeprefix("Bearer "), (None, None))
        _require(user is not None, "Invalid credentials in Authorization header", 401)
        _require(not write or role == "write", "You don't have the rights: the token has the role 'read'.", 403)
        return user

    def _commit_of(self, request: Request, name: str, revision: str, write: bool = False) -> Commit:
        """Return a commit, if the user may read it or write there."""
        user = self._user(request, write) if write or request.headers.get("Authorization") else None
        repo, owner = self.repos.get(name), name.split("/")[0]
        found = repo is not None and (not repo.private or user == owner)
        _require(found, name, 401 if user is None else 404, {"X-Error-Code": "RepoNotFound"})
        _require(not write or user == owner, f"You don't have write access to {name}.", 403)
        _require(repo.commit(revision) is not None, revision, 404, {"X-Error-Code": "RevisionNotFound"})
        return repo.commit(revision)

    def _create(self, request: Request) -> Answer:
        user, content = self._user(request, write=True), request.json
        name = f"{content.get('organization') or user}/{content['name']}"
        _require(content.get("organization") in (None, user), f"You don't have the rights to create {name}.", 403)
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return Answer(409, answer)
        self.make(name, bool(content.get("private")) or content.get("visibility") == "private")
        return Answer(200, answer)

    def _branch(self, request: Request, name: str, branch: str) -> Answer:
        head, branches = self._commit_of(request, name, "main", write=True), self.repos[name].branches
        _require(branch not in branches, f"Reference already exists: {branch}", 409)
        branches[branch] = [head]
        return Answer(200)

    def _validate(self, request: Request) -> Answer:
        errors = problems_of(request.json["content"])
        return Answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def _preupload(self, request: Request, name: str, revision: str) -> Answer:
        files, answers = self._commit_of(request, name, revision, write=True).files, []
        ignored = files.get(".gitignore", b"").decode().split()
        for file in request.json["files"]:
            path = file["path"]
            mode = "lfs" if _is_lfs(path, base64.b64decode(file["sample"])) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": _matches(path, ignored)}
            answers.append(answer | ({"oid": _oid(path, files[path])} if path in files else {}))
        return Answer(200, {"files": answers})

    def _batch(self, request: Request, name: str) -> Answer:
        self._commit_of(request, name, "main", write=True)
        objects = []
        for oid, size in ((wanted["oid"], wanted["size"]) for wanted in request.json["objects"]):
            parts = range(1, -(-size // self.part) + 1)
            header = {str(part): f"{self.url}/lfs/{oid}?part={part}" for part in parts}
            upload = {"href": f"{self.url}/lfs/{oid}/complete", "header": {**header, "chunk_size": str(self.part)}}
            actions = {} if oid in self.objects else {"actions": {"upload": upload}}
            objects.append({"oid": oid, "size": size, **actions})
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, request: Request, oid: str) -> Answer:
        _require(request.headers.get("Authorization") is None, "signed addresses take no token")
        self.parts.setdefault(oid, {})[int(request.query["part"][0])] = request.body
        return Answer(200, headers={"ETag": hashlib.md5(request.body).hexdigest()})

    def _complete(self, request: Request, oid: str) -> Answer:
        parts = self.parts.get(oid, {})
        etags = {part["partNumber"]: part["etag"] for part in request.json["parts"]}
        _require(etags == {number: hashlib.md5(part).hexdigest() for number, part in parts.items()}, "etags")
        self.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        _require(hashlib.sha256(self.objects[oid]).hexdigest() == oid, "the content is not the announced one")
        return Answer(200)

    def _commit(self, request: Request, name: str, revision: str) -> Answer:
        head = self._commit_of(request, name, revision, write=True)
        first, *operations = [json.loads(line) for line in request.body.splitlines()]
        _require(first["value"].get("parentCommit") in (None, head.oid), "A commit has happened since.", 412)
        files = dict(head.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        commit = self._append(name, revision, files, first["value"]["summary"])
        return Answer(200, {"commitUrl": f"{self.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid})

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
            _require(not _is_lfs(path, files[path]), f"{path} belongs into LFS")
            problems = problems_of(files[path].decode()) if path == "README.md" else []
            _require(not problems, str(problems))
        elif key == "lfsFile":
            _require(value["oid"] in self.objects, f"{path} was not uploaded")
            files[path] = self.objects[value["oid"]]
        else:
            _require(key == "deletedFile" and path in files, f"{key} of {path}")
            del files[path]

    def _info(self, request: Request, name: str, revision: str = "main") -> Answer:
        commit = self._commit_of(request, name, revision)
        content = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": self.repos[name].private}
        siblings = []
        for path, text in commit.files.items():
            known = {"blobId": _oid(path, text), "size": len(text)}
            lfs = {"lfs": {"sha256": _oid(path, text), "size": len(text), "pointerSize": 128}}
            siblings.append({"rfilename": path, **known, **(lfs if _is_lfs(path, text) else {})})
        return Answer(200, {**content, "siblings": siblings})

    def _tree(self, request: Request, name: str, revision: str) -> Answer:
        files = self._commit_of(request, name, revision).files
        return Answer(200, [_entry(path, content) for path, content in files.items()])

    def _paths(self, request: Request, name: str, revision: str) -> Answer:
        files = self._commit_of(request, name, revision).files
        wanted = filter(files.__contains__, parse_qs(request.body.decode())["paths"])
        return Answer(200, [_entry(path, files[path]) for path in wanted])

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._commit_of(request, name, revision)
        headers, content = {"X-Repo-Commit": commit.oid}, commit.files.get(path)
        _require(content is not None, path, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        return Answer(200, content, {**headers, "ETag": f'"{_oid(path, content)}"'})


class Server(ThreadingHTTPServer):
    daemon_threads = allow_reuse_address = True

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what this is about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement
    hub: Any = None

    def do(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        kind, function, words = next(
            (kind, function, [unquote(word) for word in match.groups() if word is not None])
            for kind, methods, pattern, function in ROUTES
            if (match := re.fullmatch(pattern, url.path)) and re.fullmatch(methods, self.command)
        )
        with hub.lock:
            fault = next((one for one in hub.faults if one.times > 0 and one.kind == kind), Fault("none"))
            fault.times -= 1
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size if fault.reset_after is None else min(size, fault.reset_after))
        request = Request(kind, url.path, parse_qs(url.query), self.headers, body)
        hub.requests.append(request)
        fault.begun.set()
        if fault.reset_after is not None:
            return self._break()
        time.sleep(hub.latency + fault.hang + (len(body) / hub.bandwidth if hub.bandwidth else 0.0))
        try:
            _require(fault.status is None, "made to fail", fault.status, fault.headers)
            with hub.lock:
                answer = getattr(hub, function)(request, *words)
        except Answer as refusal:
            answer = refusal
        if fault.lost:
            return self._break()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815

    def _break(self) -> None:
        self.close_connection = True
        _reset(self.connection)

    def log_message(self, *_: Any) -> None: ...


def problems_of(card: str) -> list[str]:
    """Return what the Hub's own validation would find wrong with a card's metadata."""
    try:
        data = ModelCard(card).data  # its results are checked there, too
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    rules = {
        "license": data.license in (None, *LICENCES),
        "base_model": re.fullmatch(rf"({NAME}/)?{NAME}", str(data.base_model or "a/b")) is not None,
        **{name: all(isinstance(word, str) for word in data.get(name) or []) for name in ("tags", "datasets")},
    }
    return [f"{name} is not valid: {data.get(name)!r}" for name, valid in rules.items() if not valid]


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in patterns)


def _is_lfs(path: str, content: bytes) -> bool:
    return _matches(path, LFS_NAMES) or b"\0" in content[:512]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """Describe a file as a listing does."""
    known = {"oid": _oid(path, content), "size": len(content)}
    lfs = {"lfs": {**known, "pointerSize": 128}} if _is_lfs(path, content) else {}
    return {"type": "file", "path": path, **known, **lfs}


def _oid(path: str, content: bytes) -> str:
    """Return what LFS or git knows the content by."""
    if _is_lfs(path, content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _reset(connection: socket.socket) -> None:
    """Break a connection, so that the peer sees no regular end."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


def _require(condition: bool, problem: str, status: int = 400, headers: dict[str, str] | None = None) -> None:
    if not condition:
        raise Answer(status, headers=headers, error=problem)
