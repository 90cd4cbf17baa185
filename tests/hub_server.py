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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TOKENS = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("alice", "read")}
LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet", "*.zip", "*.onnx", "*.h5", "*.arrow")
LFS_SIZE = 10 << 20
LICENCES = ("apache-2.0", "mit", "other", "llama3.1", "cc-by-4.0", "gemma")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


class Blob(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's, of the file or of its LFS pointer."""
        content = self.content
        if self.lfs:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(self.content),
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
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
    """What goes wrong, and where: create, card, preupload, batch, lfs, commit, info, resolve, any."""

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
        self.status, self.headers = status, dict(headers or {})
        if error:
            content = {"error": error}
            self.headers["X-Error-Message"] = error
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


class HubServer:
    def __init__(self, port: int = 0, latency: float = 0.0, bandwidth: float | None = None, part: int = 4 << 20):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # kind, method, path
        self.bodies: list[bytes] = []  # as they came, headers of ours aside
        self.latency, self.bandwidth, self.part = latency, bandwidth, part
        self.lock = threading.RLock()
        self.port, self.server = port, None
        self.up()

    # ---- its life

    def up(self) -> None:
        hub = self

        class Bound(Handler):
            hub = None

        Bound.hub = hub
        Server.allow_reuse_address = True
        self.server = Server(("127.0.0.1", self.port), Bound)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Connections are refused, and those that there are break."""
        if self.server is not None:
            server, self.server = self.server, None
            server.shutdown()
            server.server_close()
            server.break_all()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, token: str | None = "hf_alice", home: Path | None = None) -> dict[str, str]:
        known = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        known |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return known | ({"HF_TOKEN": token} if token else {}) | ({"HF_HOME": str(home)} if home else {})

    # ---- what a test asks of it

    def fault(self, where: str, **what: Any) -> Fault:
        fault = Fault(where, **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo].commit(revision)
        assert commit is not None
        return {path: blob.content for path, blob in commit.files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Without the first, which the Hub makes itself."""
        return self.repos[repo].branches[revision][1:] if repo in self.repos else []

    def write(self, repo: str, path: str, content: bytes | str, message: str = "by hand") -> None:
        """As somebody does in the browser."""
        content = content.encode() if isinstance(content, str) else content
        with self.lock:
            files = {**self.repos[repo].commit("main").files, path: Blob(content, False)}
            self._append(repo, "main", files, message)

    def make(self, repo: str, private: bool = False) -> None:
        attributes = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES)
        first = Commit(_oid(repo, 0), "initial commit", {".gitattributes": Blob(attributes.encode(), False)})
        self.repos[repo] = Repo(private, {"main": [first]})

    def _append(self, repo: str, branch: str, files: dict[str, Blob], message: str) -> Commit:
        commits = self.repos[repo].branches[branch]
        commits.append(Commit(_oid(repo + branch + message, len(commits) + time.time_ns()), message, files))
        return commits[-1]

    # ---- its answers

    def answer(self, method: str, path: str, query: dict, headers: Any, body: bytes) -> Answer:
        rules = (
            ("create", "POST", r"/api/repos/create", self._create),
            ("card", "POST", r"/api/validate-yaml", self._validate),
            ("info", "GET", r"/api/whoami-v2", self._whoami),
            ("preupload", "POST", rf"/api/models/({NAME}/{NAME})/preupload/([^/]+)", self._preupload),
            ("batch", "POST", rf"/({NAME}/{NAME})\.git/info/lfs/objects/batch", self._batch),
            ("lfs", "PUT", r"/lfs/([0-9a-f]{64})", self._put),
            ("lfs", "POST", r"/lfs/([0-9a-f]{64})/complete", self._complete),
            ("lfs", "POST", r"/lfs/([0-9a-f]{64})/verify", self._verify),
            ("commit", "POST", rf"/api/models/({NAME}/{NAME})/commit/([^/]+)", self._commit),
            ("create", "POST", rf"/api/models/({NAME}/{NAME})/branch/([^/]+)", self._branch),
            ("info", "GET", rf"/api/models/({NAME}/{NAME})", self._info),
            ("info", "GET", rf"/api/models/({NAME}/{NAME})/revision/([^/]+)", self._info),
            ("info", "POST", rf"/api/models/({NAME}/{NAME})/paths-info/([^/]+)", self._paths),
            ("resolve", "GET|HEAD", rf"/({NAME}/{NAME})/resolve/([^/]+)/(.+)", self._resolve),
            ("resolve", "GET", r"/cdn/([0-9a-f]{64})", self._cdn),
        )
        for _, methods, pattern, function in rules:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(methods, method):
                with self.lock:
                    try:
                        return function(*map(unquote, match.groups()), query=query, headers=headers, body=body)
                    except Answer as answer:
                        return answer
        return Answer(404, error=f"no such endpoint: {method} {path}")

    @staticmethod
    def kind(path: str) -> str:
        for kind, part in (
            ("create", "/repos/create|/branch/"),
            ("card", "/validate-yaml"),
            ("preupload", "/preupload/"),
            ("batch", "objects/batch"),
            ("lfs", "^/lfs/"),
            ("commit", "/commit/"),
            ("resolve", "/resolve/|^/cdn/"),
        ):
            if re.search(part, path):
                return kind
        return "info"

    def _user(self, headers: Any, write: bool = False) -> tuple[str, str]:
        words = (headers.get("Authorization") or "").split()
        if not words:
            raise Answer(401, error="Invalid username or password.")
        if words[0] != "Bearer" or words[1] not in TOKENS:
            raise Answer(401, error="Invalid credentials in Authorization header")
        user, role = TOKENS[words[1]]
        if write and role != "write":
            raise Answer(403, error="You don't have the rights to do this: the token has the role 'read'.")
        return user, role

    def _repo(self, name: str, headers: Any, write: bool = False) -> Repo:
        user = self._user(headers, write)[0] if write or headers.get("Authorization") else None
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
        user, _ = self._user(headers, write=True)
        content = json.loads(body)
        _require(
            set(content) <= {"name", "organization", "private", "visibility", "type"}, f"unknown key in {content}"
        )
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

    def _whoami(self, *, headers: Any, **_: Any) -> Answer:
        user, role = self._user(headers)
        return Answer(200, {"name": user, "type": "user", "auth": {"accessToken": {"role": role}}, "orgs": []})

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
            _path(file["path"])
            sample = base64.b64decode(file["sample"], validate=True)
            _require(len(sample) == min(512, file["size"]), f"sample of {len(sample)} bytes")
            there = commit.files.get(file["path"])
            large = file["size"] > LFS_SIZE or b"\0" in sample
            lfs = large or any(fnmatch.fnmatch(file["path"].split("/")[-1], pattern) for pattern in LFS_NAMES)
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(file["path"], pattern) for pattern in ignored)
            if there is not None:
                answer["oid"] = there.sha256 if there.lfs else there.oid
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
            _require(re.fullmatch("[0-9a-f]{64}", oid) is not None and size > 0, f"bad object {wanted}")
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}?size={size}"}
                if size > self.part:
                    count = -(-size // self.part)
                    parts = {str(n + 1): f"{self.url}/lfs/{oid}?part={n + 1}" for n in range(count)}
                    upload = {"href": f"{self.url}/lfs/{oid}/complete?size={size}"}
                    upload["header"] = {"chunk_size": str(self.part), **parts}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, *, query: dict, headers: Any, body: bytes, **_: Any) -> Answer:
        _require(headers.get("Authorization") is None, "signed addresses take no token")
        if "part" in query:
            number = int(query["part"][0])
            self.uploads.setdefault(oid, {})[number] = body
            return Answer(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        _require(len(body) == int(query["size"][0]), f"{len(body)} bytes, and not {query['size'][0]}")
        _require(hashlib.sha256(body).hexdigest() == oid, "not the content that was announced")
        self.objects[oid] = body
        return Answer(200, {})

    def _complete(self, oid: str, *, query: dict, body: bytes, **_: Any) -> Answer:
        content = json.loads(body)
        parts = self.uploads.get(oid, {})
        _require(content["oid"] == oid and [part["partNumber"] for part in content["parts"]] == sorted(parts), "parts")
        for part in content["parts"]:
            etag = f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"'
            _require(part["etag"] == etag, f"etag of part {part['partNumber']}")
        whole = b"".join(parts[number] for number in sorted(parts))
        _require(len(whole) == int(query["size"][0]) and hashlib.sha256(whole).hexdigest() == oid, "content")
        self.objects[oid] = whole
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
            value = operation["value"]
            path = _path(value["path"])
            if operation["key"] == "file":
                _require(value["encoding"] == "base64", "encoding")
                content = base64.b64decode(value["content"], validate=True)
                _require(len(content) <= LFS_SIZE and b"\0" not in content[:512], f"{path} belongs into LFS")
                if path == "README.md":
                    _require(not problems_of(content.decode()), f"{problems_of(content.decode())}")
                files[path] = Blob(content, False)
            elif operation["key"] == "lfsFile":
                _require(value["algo"] == "sha256" and value["oid"] in self.objects, f"{path} was not uploaded")
                _require(value["size"] == len(self.objects[value["oid"]]), f"size of {path}")
                files[path] = Blob(self.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                _require(path in files, f"{path} is not there to be deleted")
                del files[path]
            else:
                raise Answer(400, error=f"unknown operation {operation['key']!r}")
        commit = self._append(name, revision, files, first["value"]["summary"])
        return Answer(
            200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid}
        )

    def _info(self, name: str, revision: str = "main", *, headers: Any, **_: Any) -> Answer:
        commit = self._at(name, revision, headers)
        content = {"_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": self.repos[name].private}
        content |= {"siblings": [{"rfilename": path} for path in sorted(commit.files)], "tags": [], "downloads": 0}
        return Answer(200, content)

    def _paths(self, name: str, revision: str, *, headers: Any, body: bytes, **_: Any) -> Answer:
        commit = self._at(name, revision, headers)
        found = []
        for path in parse_qs(body.decode())["paths"]:
            if path in commit.files:
                blob = commit.files[path]
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 128}
                found.append(entry)
        return Answer(200, found)

    def _resolve(self, name: str, revision: str, path: str, *, headers: Any, **_: Any) -> Answer:
        commit = self._at(name, revision, headers)
        known = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            return Answer(404, {}, {**known, "X-Error-Code": "EntryNotFound"})
        if not blob.lfs:
            return Answer(200, blob.content, {**known, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        self.objects.setdefault(blob.sha256, blob.content)
        elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host, as on the real Hub
        return Answer(302, b"", {**known, **linked, "Location": f"{elsewhere}/cdn/{blob.sha256}"})

    def _cdn(self, oid: str, *, headers: Any, **_: Any) -> Answer:
        _require(headers.get("Authorization") is None, "signed addresses take no token")
        return Answer(200, self.objects[oid], {"ETag": f'"{oid}"'})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what this is about."""

    def break_all(self) -> None:
        for connection in list(self.connections):
            _reset(connection)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement
    hub: Any = None

    def do(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        kind = hub.kind(parts.path)
        with hub.lock:
            hub.requests.append((kind, self.command, parts.path))
            fault = next((one for one in hub.faults if one.times > 0 and one.where in (kind, "any")), None)
            if fault is not None:
                fault.times -= 1
        self._serve(kind, parts, fault)

    def _serve(self, kind: str, parts: Any, fault: Fault | None) -> None:
        hub = self.hub
        if fault is not None and fault.reset_after is not None and not fault.after:
            self.rfile.read(min(fault.reset_after, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            _reset(self.connection)
            return
        body = self._body()
        with hub.lock:
            hub.bodies.append(body)
        time.sleep(hub.latency + (len(body) / hub.bandwidth if hub.bandwidth else 0.0))
        if fault is not None and fault.hang:
            time.sleep(fault.hang)
        if fault is not None and fault.status is not None:
            answer = Answer(fault.status, {}, fault.headers, error="made to fail")
        else:
            answer = hub.answer(self.command, parts.path, parse_qs(parts.query), self.headers, body)
        if fault is not None and fault.after:
            self.close_connection = True
            _reset(self.connection)
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, *_: Any) -> None:
        pass


def problems_of(card: str) -> list[str]:
    """Of a card's metadata, as the Hub's own validation would name them."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["not a map"]
    problems = []
    for name in ("tags", "datasets"):
        value = data.get(name, [])
        if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))):
            problems.append(f"{name!r} must be a list of strings")
    if data.get("license", "mit") not in LICENCES:
        problems.append(f"unknown license {data['license']!r}")
    base = data.get("base_model", "a/b")
    if not re.fullmatch(rf"({NAME}/)?{NAME}", str(base)):
        problems.append(f"base_model {base!r} is no repository")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            problems.append("model-index needs name and results")
            continue
        for result in model["results"]:
            if not (result.get("task", {}).get("type") and result.get("dataset", {}).get("type")):
                problems.append("a result needs task and dataset")
            if not result.get("metrics") or any("type" not in one or "value" not in one for one in result["metrics"]):
                problems.append("a metric needs type and value")
    return problems


def _reset(connection: socket.socket) -> None:
    """Not a farewell: the peer sees the connection break."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass


def _path(path: str) -> str:
    _require(bool(path) and not path.startswith("/") and ".." not in path.split("/"), f"bad path {path!r}")
    return path


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Answer(400, error=problem)


def _oid(text: str, number: int) -> str:
    return hashlib.sha1(f"{quote(text)} {number}".encode()).hexdigest()
