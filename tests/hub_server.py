"""A Hub on loopback that the real huggingface_hub client talks to: strict about what it takes, and faulty on demand.

    with HubServer() as hub:
        environment = hub.environment(token="hf_alice")       # HF_ENDPOINT and what else a client needs
        hub.fault("commit", status=500, times=2)
        ...
        hub.files("alice/model")["README.md"]                  # bytes

It has models only, keeps every commit, and speaks LFS in one part or several. Not spoken: Xet.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("alice", "read")}
LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet", "*.zip", "*.onnx", "*.h5", "*.arrow")
LFS_SIZE = 10 << 20
LICENCES = ("apache-2.0", "mit", "other", "llama3.1", "cc-by-4.0", "gemma")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REPO, SHA = rf"({NAME}/{NAME})", "([0-9a-f]{64})"
# Kind of a request, as faults name it; method, path, and the method of `HubServer` that answers
RULES = (
    ("create", "POST", "/api/repos/create", "_create"),
    ("create", "POST", rf"/api/models/{REPO}/branch/([^/]+)", "_branch"),
    ("card", "POST", "/api/validate-yaml", "_validate"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/([^/]+)", "_preupload"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("lfs", "PUT", f"/lfs/{SHA}", "_put"),
    ("lfs", "POST", f"/lfs/{SHA}/complete", "_complete"),
    ("lfs", "POST", f"/lfs/{SHA}/verify", "_verify"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/([^/]+)", "_commit"),
    ("info", "GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", "_info"),
    ("info", "POST", rf"/api/models/{REPO}/paths-info/([^/]+)", "_paths"),
    ("resolve", "GET|HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", "_resolve"),
    ("resolve", "GET", f"/cdn/{SHA}", "_cdn"),
    ("unknown", ".*", "(.*)", "_unknown"),
)


class Blob(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash of the file or of its LFS pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for branch in self.branches.values() for one in branch if one.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong, in requests of a kind (see `RULES`, or "any"), and how often."""

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    reset_after: int | None = None  # bytes of the body that are read first
    after: bool = False  # only the answer is lost
    hang: float = 0.0
    times: float = 1


class Answer(Exception):  # noqa: N818
    def __init__(self, status: int, content: Any = None, headers: dict[str, str] | None = None, error: str = ""):
        super().__init__(status, error)
        self.status, self.headers = status, {**(headers or {}), **({"X-Error-Message": error} if error else {})}
        content = {"error": error} if error else content
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


class HubServer:
    def __init__(self, latency: float = 0.0, bandwidth: float | None = None, part: int = 4 << 20):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # kind, method, path
        self.bodies: list[bytes] = []  # as they came
        self.latency, self.bandwidth, self.part = latency, bandwidth, part
        self.lock = threading.RLock()
        self.port, self.server = 0, None
        self.up()

    # ---- its life

    def up(self) -> None:
        self.server = Server(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Connections are refused, and open ones break."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for connection in server.connections:
                _reset(connection)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, token: str | None = "hf_alice", home: Path | None = None) -> dict[str, str]:
        settings = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")}
        return settings | ({"HF_TOKEN": token} if token else {}) | ({"HF_HOME": str(home)} if home else {})

    # ---- what a test asks of it

    def fault(self, where: str, **what: Any) -> None:
        with self.lock:
            self.faults.append(Fault(where, **what))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[repo].commit(revision).files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Without the first, which the Hub makes itself."""
        return self.repos[repo].branches[revision][1:] if repo in self.repos else []

    def write(self, repo: str, path: str, content: bytes | str, message: str = "by hand") -> None:
        """As somebody does in the browser."""
        content = content.encode() if isinstance(content, str) else content
        with self.lock:
            self._append(repo, "main", {**self.repos[repo].commit("main").files, path: Blob(content, False)}, message)

    def make(self, repo: str, private: bool = False) -> None:
        attributes = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES)
        self.repos[repo] = Repo(private, {"main": []})
        self._append(repo, "main", {".gitattributes": Blob(attributes.encode(), False)}, "initial commit")

    def _append(self, repo: str, branch: str, files: dict[str, Blob], message: str) -> Commit:
        commits = self.repos[repo].branches[branch]
        oid = hashlib.sha1(f"{repo} {branch} {message} {len(commits)} {time.time_ns()}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return commits[-1]

    # ---- its answers

    def answer(self, method: str, path: str, query: dict, headers: Any, body: bytes) -> Answer:
        match, function = next(
            (match, function)
            for _, methods, pattern, function in RULES
            if (match := re.fullmatch(pattern, path)) and re.fullmatch(methods, method)
        )
        words = [unquote(word) for word in match.groups() if word is not None]
        with self.lock:
            try:
                return getattr(self, function)(*words, query=query, headers=headers, body=body)
            except Answer as answer:
                return answer

    @staticmethod
    def kind(path: str) -> str:
        return next(kind for kind, _, pattern, _ in RULES if re.fullmatch(pattern, path))

    def _unknown(self, path: str, **_: Any) -> Answer:
        return Answer(404, error=f"no such endpoint: {path}")

    def _user(self, headers: Any, write: bool = False) -> str:
        scheme, _, token = (headers.get("Authorization") or "").partition(" ")
        if scheme != "Bearer" or token not in TOKENS:
            raise Answer(401, error="Invalid credentials in Authorization header")
        user, role = TOKENS[token]
        if write and role != "write":
            raise Answer(403, error="You don't have the rights to do this: the token has the role 'read'.")
        return user

    def _repo(self, name: str, headers: Any, write: bool = False) -> Repo:
        user = self._user(headers, write) if write or headers.get("Authorization") else None
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Answer(401 if user is None else 404, {}, {"X-Error-Code": "RepoNotFound"})
        if write and user != name.split("/")[0]:
            raise Answer(403, error=f"You don't have write access to {name}.")
        return repo

    def _at(self, name: str, revision: str, headers: Any, write: bool = False) -> Commit:
        commit = self._repo(name, headers, write).commit(revision)
        if commit is None:
            raise Answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _create(self, *, headers: Any, body: bytes, **_: Any) -> Answer:
        user = self._user(headers, write=True)
        content = json.loads(body)
        _require(set(content) <= {"name", "organization", "private", "visibility", "type"}, f"unknown key: {content}")
        _require(re.fullmatch(NAME, content["name"]) is not None, f"bad name {content['name']!r}")
        owner = content.get("organization") or user
        if owner != user:
            raise Answer(403, error=f"You don't have the rights to create a model under the namespace {owner!r}.")
        name = f"{owner}/{content['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return Answer(409, {**answer, "error": "You already created this model repo"})
        self.make(name, bool(content.get("private")) or content.get("visibility") == "private")
        return Answer(200, answer)

    def _branch(self, name: str, branch: str, *, headers: Any, **_: Any) -> Answer:
        repo = self._repo(name, headers, write=True)
        if branch in repo.branches:
            return Answer(409, error=f"Reference already exists: {branch}")
        repo.branches[branch] = [repo.branches["main"][-1]]
        return Answer(200, {})

    def _validate(self, *, body: bytes, **_: Any) -> Answer:
        content = json.loads(body)
        _require(content.get("repoType") == "model", "only models here")
        errors = problems_of(content["content"])
        return Answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    def _preupload(self, name: str, revision: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        commit = self._at(name, revision, headers, write=True)
        ignored = commit.files[".gitignore"].content.decode().split() if ".gitignore" in commit.files else []
        answers = []
        for file in json.loads(body)["files"]:
            _require(set(file) == {"path", "sample", "size"}, f"bad file {file}")
            path, sample = _path(file["path"]), base64.b64decode(file["sample"], validate=True)
            _require(len(sample) == min(512, file["size"]), f"sample of {len(sample)} bytes")
            lfs = file["size"] > LFS_SIZE or b"\0" in sample
            lfs = lfs or any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in LFS_NAMES)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            if path in commit.files:
                answer["oid"] = commit.files[path].sha256 if commit.files[path].lfs else commit.files[path].oid
            answers.append(answer)
        return Answer(200, {"files": answers})

    def _batch(self, name: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        self._repo(name, headers, write=True)
        content = json.loads(body)
        _require(content["operation"] == "upload" and content["hash_algo"] == "sha256", "bad operation")
        _require({"basic", "multipart"} <= set(content["transfers"]), "no transfer that we speak")
        objects = []
        for wanted in content["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            _require(re.fullmatch(SHA, oid) is not None and size > 0, f"bad object {wanted}")
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}?size={size}"}
                if size > self.part:
                    parts = range(1, -(-size // self.part) + 1)
                    upload = {"href": f"{self.url}/lfs/{oid}/complete?size={size}"}
                    upload["header"] = {str(part): f"{self.url}/lfs/{oid}?part={part}" for part in parts}
                    upload["header"]["chunk_size"] = str(self.part)
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, *, query: dict, headers: Any, body: bytes, **_: Any) -> Answer:
        _require(headers.get("Authorization") is None, "signed addresses take no token")
        if "part" in query:
            self.uploads.setdefault(oid, {})[int(query["part"][0])] = body
            return Answer(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        return self._store(oid, query, body)

    def _complete(self, oid: str, *, query: dict, body: bytes, **_: Any) -> Answer:
        content, parts = json.loads(body), self.uploads.get(oid, {})
        _require(content["oid"] == oid and [part["partNumber"] for part in content["parts"]] == sorted(parts), "parts")
        for part in content["parts"]:
            etag = f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"'
            _require(part["etag"] == etag, f"etag of part {part['partNumber']}")
        return self._store(oid, query, b"".join(parts[number] for number in sorted(parts)))

    def _store(self, oid: str, query: dict, content: bytes) -> Answer:
        _require(len(content) == int(query["size"][0]), f"{len(content)} bytes, and not {query['size'][0]}")
        _require(hashlib.sha256(content).hexdigest() == oid, "not the content that was announced")
        self.objects[oid] = content
        return Answer(200, {})

    def _verify(self, oid: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        self._user(headers)
        content = json.loads(body)
        _require(content["oid"] == oid and len(self.objects.get(oid, b"")) == content["size"], "not there")
        return Answer(200, {})

    def _commit(self, name: str, revision: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        head = self._at(name, revision, headers, write=True)
        _require(revision in self.repos[name].branches, f"{revision!r} is no branch")
        _require(headers.get("Content-Type") == "application/x-ndjson", "not ndjson")
        first, *operations = [json.loads(line) for line in body.decode().splitlines()]
        _require(first["key"] == "header" and bool(first["value"]["summary"]), "no header")
        if first["value"].get("parentCommit") not in (None, head.oid):
            return Answer(412, error="A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        commit = self._append(name, revision, files, first["value"]["summary"])
        url = f"{self.url}/{name}/commit/{commit.oid}"
        return Answer(200, {"success": True, "commitUrl": url, "commitOid": commit.oid})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = _path(value["path"])
        if key == "file":
            _require(value["encoding"] == "base64", "encoding")
            content = base64.b64decode(value["content"], validate=True)
            _require(len(content) <= LFS_SIZE and b"\0" not in content[:512], f"{path} belongs into LFS")
            if path == "README.md":
                _require(not problems_of(content.decode()), f"{problems_of(content.decode())}")
            files[path] = Blob(content, False)
        elif key == "lfsFile":
            _require(value["algo"] == "sha256" and value["oid"] in self.objects, f"{path} was not uploaded")
            _require(value["size"] == len(self.objects[value["oid"]]), f"size of {path}")
            files[path] = Blob(self.objects[value["oid"]], True)
        else:
            _require(key == "deletedFile" and path in files, f"{key} of {path}")
            del files[path]

    def _info(self, name: str, revision: str = "main", *, headers: Any, **_: Any) -> Answer:
        commit = self._at(name, revision, headers)
        content = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": self.repos[name].private}
        content |= {"siblings": [{"rfilename": path} for path in sorted(commit.files)], "tags": [], "downloads": 0}
        return Answer(200, content)

    def _paths(self, name: str, revision: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        files, entries = self._at(name, revision, headers).files, []
        for path in filter(files.__contains__, parse_qs(body.decode())["paths"]):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(files[path].content)}
            if files[path].lfs:
                entry["lfs"] = {"oid": files[path].sha256, "size": len(files[path].content), "pointerSize": 128}
            entries.append({**entry, "oid": files[path].oid})
        return Answer(200, entries)

    def _resolve(self, name: str, revision: str, path: str, *, headers: Any, **_: Any) -> Answer:
        commit = self._at(name, revision, headers)
        at, blob = {"X-Repo-Commit": commit.oid}, commit.files.get(path)
        if blob is None:
            return Answer(404, {}, {**at, "X-Error-Code": "EntryNotFound"})
        if not blob.lfs:
            return Answer(200, blob.content, {**at, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        self.objects.setdefault(blob.sha256, blob.content)
        elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host, as on the real Hub
        return Answer(302, b"", {**at, **linked, "Location": f"{elsewhere}/cdn/{blob.sha256}"})

    def _cdn(self, oid: str, *, headers: Any, **_: Any) -> Answer:
        _require(headers.get("Authorization") is None, "signed addresses take no token")
        return Answer(200, self.objects[oid], {"ETag": f'"{oid}"'})


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
        kind = hub.kind(url.path)
        with hub.lock:
            hub.requests.append((kind, self.command, url.path))
            fault = next((one for one in hub.faults if one.times > 0 and one.where in (kind, "any")), Fault("none"))
            fault.times -= 1
        if fault.reset_after is not None and not fault.after:
            self.rfile.read(min(fault.reset_after, int(self.headers.get("Content-Length") or 0)))
            return self._break()
        body = self._body()
        hub.bodies.append(body)
        time.sleep(hub.latency + fault.hang + (len(body) / hub.bandwidth if hub.bandwidth else 0.0))
        if fault.status is not None:
            answer = Answer(fault.status, {}, fault.headers, error="made to fail")
        else:
            answer = hub.answer(self.command, url.path, parse_qs(url.query), self.headers, body)
        if fault.after:
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

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: Any) -> None: ...


def problems_of(card: str) -> list[str]:
    """Return what the Hub's own validation would find wrong with a card's metadata."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["not a map"]
    lists = {name: data.get(name, []) for name in ("tags", "datasets")}
    words = {name: [value] if isinstance(value, str) else value for name, value in lists.items()}
    models = data.get("model-index", [])
    results = [result for model in models for result in model.get("results", [{}])]
    metrics = [metric for result in results for metric in result.get("metrics") or [{}]]
    rules = {
        **{
            name: isinstance(value, list) and all(isinstance(one, str) for one in value)
            for name, value in words.items()
        },
        "license": data.get("license", "mit") in LICENCES,
        "base_model": re.fullmatch(rf"({NAME}/)?{NAME}", str(data.get("base_model", "a/b"))) is not None,
        "model-index": all(isinstance(model.get("name"), str) for model in models),
        "task and dataset": all(result.get(key, {}).get("type") for result in results for key in ("task", "dataset")),
        "metrics": all({"type", "value"} <= metric.keys() for metric in metrics),
    }
    return [f"{name} is not valid: {data.get(name)!r}" for name, valid in rules.items() if not valid]


def _reset(connection: socket.socket) -> None:
    """Break a connection, so that the peer sees no regular end."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


def _path(path: str) -> str:
    _require(bool(path) and not path.startswith("/") and ".." not in path.split("/"), f"bad path {path!r}")
    return path


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Answer(400, error=problem)
