"""A Hugging Face Hub on the loopback: what clients of a real one ask for, with a log of it and faults on demand."""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

USER = "me"
FAULTS = ("500", "503", "slow", "cut", "checksum", "expired_token")
CHUNK = 2**16
# variables that would lead a child to the user's caches, tokens and servers, or keep it off ours
FOREIGN = re.compile(r"HF_|HUGGINGFACE|TRANSFORMERS_|SANE_|PYTHONPATH|(https?|all|no)_proxy$", re.IGNORECASE)
LFS_SUFFIXES = ("arrow", "bin", "gz", "h5", "npy", "npz", "parquet", "pkl", "pt", "pth", "safetensors", "tar", "zip")
GIT_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LFS_SIZE = 10 * 2**20  # larger files are stored as large files, whatever their name

ID = r"[^/]+/[^/]+"
API = rf"/api/(?P<kind>models|datasets)/(?P<repo>{ID})"
ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{API}/refs", "refs"),
        ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "list_commits"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{API}/branch/(?P<name>[^/]+)", "create_branch"),
        ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "create_tag"),
        ("POST", rf"/(?:(?P<kind>datasets)/)?(?P<repo>{ID})\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/(?:(?P<kind>datasets)/)?(?P<repo>{ID})\.git/info/lfs/objects/verify", "lfs_verify"),
        (
            "GET|HEAD",
            rf"/(?:(?P<kind>datasets)/)?(?P<repo>{ID})/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            "resolve",
        ),
        # a name without a user is a valid question, to which this Hub has no repository
        ("GET|HEAD", r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+)(/(revision|tree|refs)/.*)?", "info"),
        ("GET|HEAD", r"/(?P<repo>[^/]+)/resolve/.+", "info"),
    )
]


# ---------------------------------------------------------------------------------------------------- repositories
@dataclass(frozen=True)
class Blob:
    """The content of a file, in git or as a large file."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return lines.encode()

    @cached_property
    def oid(self) -> str:
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of all files; `files` is never changed."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """Commits by their id, and the names that point to them."""

    repo_type: str
    repo_id: str
    private: bool
    gated: bool
    created: str
    history: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, or an id, which may be shortened."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        if oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((oid for oid in self.history if oid.startswith(revision)), None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def back_from(self, commit: Commit) -> Iterator[Commit]:
        """The commit and those before it, newest first."""
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self.history[commit.parent]

    def add(self, branch: str, changes: Mapping[str, Blob | None], title: str, message: str, author: str) -> Commit:
        """Put a commit on a branch; None deletes a file."""
        parent = self.branches.get(branch)
        files = dict(self.history[parent].files) if parent else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        content = [len(self.history), parent, title, [(path, blob.oid) for path, blob in sorted(files.items())]]
        oid = hashlib.sha1(repr([self.repo_type, self.repo_id, content]).encode()).hexdigest()
        self.history[oid] = Commit(oid, parent, title, message, author, _now(), files)
        self.branches[branch] = oid
        return self.history[oid]

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file, or the files of a folder, their present content."""
        found = commit
        for older in self.back_from(commit):
            if _below(older.files, path) != _below(commit.files, path):
                break
            found = older
        return found


def _below(files: Mapping[str, Blob], path: str) -> dict[str, str]:
    return {name: blob.oid for name, blob in files.items() if name == path or name.startswith(f"{path}/")}


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---------------------------------------------------------------------------------------------------- HTTP
@dataclass
class Request:
    method: str
    target: str  # as it was sent: quoted, with the query
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ").strip() or None

    @property
    def client(self) -> str | None:
        """What the process calls itself through `HF_HUB_USER_AGENT_ORIGIN`."""
        # uploads of large files carry no user agent, but go to an address that was made for the process
        found = re.search(r"origin/([^;]+)", self.headers.get("user-agent", ""))
        return found[1] if found else self.query.get("client", [None])[0]


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> "Answer":
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


class Refusal(Exception):
    """An answer that is an error, with the code that the client's exceptions are made from."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer = Answer.of({"error": message}, status, **named, **headers)


@dataclass
class Entry:
    """A line of the log."""

    host: str  # "hub", "storage", or "elsewhere" for what a client asked of other machines
    method: str
    path: str
    range: str | None  # as it was asked for: "bytes=0-99"
    client: str | None
    authorized: bool  # came with a token
    status: int = 0
    start: int = 0  # where in the file the answer's body begins
    sent: int = 0  # bytes of the body that went into the connection; a client that hangs up may not have read the last
    fault: str | None = None


@dataclass
class Fault:
    kind: str
    match: re.Pattern
    times: int
    seconds: float
    hits: int = 0


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait for 40 ms

    def setup(self) -> None:
        # little may wait in the connection, so that what the log counts as sent is about what a client took
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
        super().setup()

    def log_message(self, *_args: Any) -> None:
        """Nothing on the terminal: there is a log."""

    def _handle(self) -> None:
        hub, name = self.server.hub, self.server.name
        request = Request(self.command, self.path, self.headers, self._read_body())
        authorized = "authorization" in self.headers
        entry = Entry(name, self.command, request.path, self.headers.get("range"), request.client, authorized)
        elsewhere = not self.path.startswith("/")  # asked as a proxy, for a host that is none of ours
        if elsewhere:
            entry.host, entry.path = "elsewhere", self.path
        with hub.lock:
            hub.log.append(entry)
        answer = Answer(403) if elsewhere else hub.respond(request, entry, self.server.answer)
        cut = entry.fault == "cut"
        entry.status = answer.status
        found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        entry.start = int(found[1]) if found else 0
        self.close_connection = cut or elsewhere
        if cut and self.command == "PUT":
            return
        self.send_response(answer.status)
        for header in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            end = len(answer.body) // 2 if cut else len(answer.body)
            for start in range(0, end, CHUNK):
                chunk = answer.body[start : min(start + CHUNK, end)]
                entry.sent += len(chunk)  # before it is on its way, so that whoever got it finds it in the log
                self.wfile.write(chunk)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _content(request: Request, content: bytes, headers: Mapping[str, str]) -> Answer:
    """A file, or the part of it that is asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not found or found.groups() == ("", ""):
        return Answer(200, content, headers)
    size, (first, last) = len(content), found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if stop <= start:
        raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


# ---------------------------------------------------------------------------------------------------- the Hub
class HubServer:
    """The Hub's protocol as huggingface_hub, transformers and datasets speak it, and nothing of its web pages.

    PyPI has mirrors of the real Hub (olah) and a starter for a program that it lacks (hf-local-hub), but no Hub.

    `url` is the Hub, `storage_url` the other host, which large files are sent to and come from. Repositories belong to
    the user "me". `token` writes, `read_token` only reads, `other_token` is of somebody else. `log` tells of every
    request to both hosts.

    Example:
    ```python
    with HubServer() as hub:
        hub.put("me/zoo", {"README.md": b"# Zoo"}, "dataset")
        subprocess.run(command, env=hub.environment(tmp_path, client="reader"))
        assert hub.reads("README.md", client="reader") == [(0, 5)]
    ```
    """

    token = "hf_write"
    read_token = "hf_read"
    other_token = "hf_somebody_else"

    def __init__(self):
        self.lock = threading.RLock()
        self.log: list[Entry] = []
        self.problems: list[str] = []  # requests it has no answer to: a gap in it, or a mistake in the test
        self.faults: list[Fault] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._objects: dict[str, bytes] = {}  # large files by their sha256
        self._uploads: dict[str, bytes] = {}  # those that are not verified yet
        self._secret = os.urandom(16)
        self._closing = threading.Event()
        self._servers = [self._serve("hub", self._answer), self._serve("storage", self._answer_storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def _serve(self, name: str, answer: Callable[[Request], Answer]) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), _Handler)
        server.hub, server.name, server.answer = self, name, answer
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def close(self) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_error: Any) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ for tests
    def environment(
        self, folder: str | Path, token: str | None = token, client: str | None = None, **more: str
    ) -> dict[str, str]:
        """Variables for a child process that finds this Hub, has its caches below `folder`, and reaches nothing else.

        `client` is the name under which the log has the process; `token=None` is for one that is not logged in.
        """
        folder = Path(folder)
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "SANE_CACHE": str(folder / "sane"),
            "HF_HUB_OFFLINE": "0",  # CI has it on
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # datasets also asks a host that it makes of ours, http://datasets-server.127.0.0.1, which no name server
            # knows; as the proxy for everything but ourselves we refuse it at once, and the log has whatever else a
            # process looks for
            "http_proxy": self.url,
            "https_proxy": self.url,
            "all_proxy": self.url,
            "no_proxy": "127.0.0.1,localhost",
        }
        if token is not None:
            ours["HF_TOKEN"] = token
        if client is not None:
            ours["HF_HUB_USER_AGENT_ORIGIN"] = client
        return {name: text for name, text in os.environ.items() if not FOREIGN.match(name)} | ours | more

    def fault(self, kind: str, match: str = "", times: int = 1, seconds: float = 60.0) -> Fault:
        """Let the next `times` requests fail whose "METHOD /path" matches the expression, on either host.

        A large file is `/me/model/resolve/main/model.safetensors` on the Hub, on the storage host
        `/models/me/model/<sha256>/model.safetensors`, and `/uploads/<sha256>` on its way there. Kinds:

        * "500", "503": that status;
        * "slow": the answer comes after `seconds`;
        * "cut": the connection is closed in the middle of a body;
        * "checksum": the last byte of a body is another one, of an upload or a download;
        * "expired_token": 401, as for a token that is no longer valid.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(FAULTS)}.")
        with self.lock:
            self.faults.append(Fault(kind, re.compile(match), times, seconds))
            return self.faults[-1]

    def check(self) -> None:
        """Fail if a question had no answer, or a fault never came to pass."""
        assert not self.problems, "\n".join(self.problems)
        idle = [f"{fault.kind} at {fault.match.pattern!r}" for fault in self.faults if fault.hits < fault.times]
        assert not idle, f"faults that did not happen as often as asked: {', '.join(idle)}"

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        repo_type: str = "model",
        private: bool = False,
        message: str = "seed",
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Commit files without HTTP, None deletes one; a missing repository is made. Returns the commit's id."""
        with self.lock:
            repo = self._repos.get((repo_type, repo_id)) or self._create(repo_type, repo_id, private, gated)
            repo.branches.setdefault(branch, repo.branches["main"])
            large = _LargeFiles(repo.at(branch).files)
            changes = {
                path: None if data is None else Blob(data, large(path, data[:512], len(data)))
                for path, data in files.items()
            }
            self._objects |= {blob.sha256: blob.content for blob in changes.values() if blob and blob.lfs}
            return repo.add(branch, changes, message, "", repo_id.split("/")[0]).oid

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, `.gitattributes` too, which every repository begins with."""
        with self.lock:
            return {path: blob.content for path, blob in self._repos[repo_type, repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the Hub's own."""
        with self.lock:
            repo = self._repos[repo_type, repo_id]
            return list(repo.back_from(repo.at(revision)))

    def repos(self) -> dict[str, bool]:
        """Whether each repository is private: {"models/me/model": False}."""
        with self.lock:
            return {f"{repo_type}s/{repo_id}": repo.private for (repo_type, repo_id), repo in self._repos.items()}

    def entries(
        self, path_suffix: str = "", client: str | None = None, method: str | None = None, host: str | None = None
    ) -> list[Entry]:
        """The lines of the log about some paths, of one process if `client` is given."""
        with self.lock:
            return [
                entry
                for entry in self.log
                if entry.path.endswith(path_suffix)
                and client in (None, entry.client)
                and method in (None, entry.method)
                and host in (None, entry.host)
            ]

    def reads(self, path_suffix: str, client: str | None = None) -> list[tuple[int, int]]:
        """Which bytes of a file were sent, in the order of the requests: (start, stop)."""
        sent = [entry for entry in self.entries(path_suffix, client, "GET") if entry.status in (200, 206)]
        return [(entry.start, entry.start + entry.sent) for entry in sent]

    def bytes_sent(self, path_suffix: str = "", client: str | None = None) -> int:
        """Bytes of content sent by both hosts."""
        return sum(stop - start for start, stop in self.reads(path_suffix, client))

    @property
    def strays(self) -> list[str]:
        """What processes asked of other machines; none of it was let through."""
        return [entry.path for entry in self.entries(host="elsewhere")]

    @property
    def leaks(self) -> list[Entry]:
        """Requests that brought a token to the storage host, which must never see one."""
        return [entry for entry in self.entries(host="storage") if entry.authorized]

    # ------------------------------------------------------------------------------------------------ requests
    def respond(self, request: Request, entry: Entry, answer: Callable[[Request], Answer]) -> Answer:
        fault = self._strike(request, entry, ("500", "503", "slow", "expired_token"))
        if fault is not None:
            if fault.kind == "slow":
                self._closing.wait(fault.seconds)
            elif fault.kind == "expired_token":
                return Refusal(401, "Invalid credentials in Authorization header").answer
            else:
                return Refusal(
                    int(fault.kind), "Internal Error - We're working hard to fix this as soon as possible!"
                ).answer
        if request.method == "PUT" and self._strike(request, entry, ("cut", "checksum")):
            if entry.fault == "cut":
                return Answer(500)
            request.body = _damaged(request.body)
        try:
            with self.lock:
                found = answer(request)
        except Refusal as refusal:
            found = refusal.answer
        except Exception:
            self.problems.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            found = Answer.of({"error": "the test's server failed"}, 500)
        if request.method in ("GET", "POST") and found.body and found.status < 300:
            fault = self._strike(request, entry, ("cut", "checksum"))
            if fault is not None and fault.kind == "checksum":
                found.body = _damaged(found.body)
        return found

    def _strike(self, request: Request, entry: Entry, kinds: tuple[str, ...]) -> Fault | None:
        """The fault that is due for this request, if any."""
        with self.lock:
            for fault in self.faults:
                due = fault.kind in kinds and fault.hits < fault.times
                if due and fault.match.search(f"{request.method} {request.path}"):
                    fault.hits += 1
                    entry.fault = fault.kind
                    return fault
        return None

    def _answer(self, request: Request) -> Answer:
        raw = urlsplit(request.target).path
        for methods, pattern, name in ROUTES:
            found = pattern.fullmatch(raw) if request.method in methods.split("|") else None
            if found:
                parts = {key: unquote(text) for key, text in found.groupdict().items() if text is not None}
                if "repo" in parts:
                    parts["repo_type"] = parts.pop("kind", "models").removesuffix("s")
                    parts["repo_id"] = parts.pop("repo")
                return getattr(self, f"_{name}")(request, **parts)
        self.problems.append(f"{request.method} {request.target}: the test's server does not know this request")
        raise Refusal(404, f"{raw} is nothing that this server knows")

    def _answer_storage(self, request: Request) -> Answer:
        raw = urlsplit(request.target).path
        found = re.fullmatch(rf"/((?:models|datasets)/{ID}|uploads)/([0-9a-f]{{64}})(/.+)?", raw)
        if not found or request.query.get("signature") != [self._signature(raw)]:
            raise Refusal(403, "The address is not signed")
        oid = found[2]
        if request.method == "PUT":
            self._uploads[oid] = request.body
            return Answer(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
        return _content(request, self._objects[oid], {"ETag": f'"{oid}"'})

    def _signature(self, path: str) -> str:
        return hashlib.sha256(self._secret + path.encode()).hexdigest()[:32]

    def _signed(self, path: str, client: str | None) -> str:
        name = f"&client={quote(client, safe='')}" if client else ""
        return f"{self.storage_url}{path}?signature={self._signature(path)}{name}"

    # ------------------------------------------------------------------------------------------------ permissions
    def _user(self, request: Request) -> tuple[str | None, str]:
        users = {self.token: (USER, "write"), self.read_token: (USER, "read"), self.other_token: ("somebody", "write")}
        return users.get(request.token, (None, ""))

    def _repo(self, request: Request, repo_type: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if whoever asks may see it, and change it."""
        repo = self._repos.get((repo_type, repo_id))
        user, role = self._user(request)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            if request.token is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and (user != owner or role != "write"):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return repo

    # ------------------------------------------------------------------------------------------------ API
    def _whoami(self, request: Request) -> Answer:
        user, role = self._user(request)
        if user is None:
            message = (
                "Invalid credentials in Authorization header" if request.token else "Invalid username or password."
            )
            raise Refusal(401, message)
        token = {"displayName": "tests", "role": role, "createdAt": _now()}
        auth = {"type": "access_token", "accessToken": token}
        return Answer.of({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    def _validate_yaml(self, request: Request) -> Answer:
        metadata, errors = _card(request.json["content"])
        if errors:
            return Answer.of({"errors": [{"message": text} for text in errors], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer.of({"errors": [], "warnings": warnings})

    def _create_repo(self, request: Request) -> Answer:
        user, role = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        asked = request.json
        owner, repo_type = asked.get("organization") or user, asked.get("type") or "model"
        repo_id = f"{owner}/{asked['name']}"
        if owner != user or role != "write":
            raise Refusal(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
        url = f"{self.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        if (repo_type, repo_id) in self._repos:
            return Answer.of({"error": f"You already created this {repo_type} repo: {repo_id}", "url": url}, 409)
        self._create(repo_type, repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        return Answer.of({"url": url, "name": repo_id, "id": repo_id})

    def _create(self, repo_type: str, repo_id: str, private: bool, gated: bool = False) -> Repo:
        repo = self._repos[repo_type, repo_id] = Repo(repo_type, repo_id, private, gated, _now())
        repo.add("main", {".gitattributes": Blob(GIT_ATTRIBUTES, False)}, "initial commit", "", "system")
        return repo

    def _info(self, request: Request, repo_type: str, repo_id: str, revision: str = "main") -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        commit = repo.at(revision)
        details = "blobs" in request.query
        siblings = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if details:
                siblings[-1] |= {"size": len(blob.content), "blobId": blob.oid}
                if blob.lfs:
                    lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
                    siblings[-1]["lfs"] = lfs
        readme = commit.files.get("README.md")
        card = _card(readme.content.decode())[0] if readme else {}
        value = {
            "_id": hashlib.md5(f"{repo_type}s/{repo_id}".encode()).hexdigest()[:24],
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "lastModified": repo.at("main").date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": siblings,
            "usedStorage": sum(len(blob.content) for blob in commit.files.values()),
        }
        if repo_type == "model":
            value |= {"modelId": repo_id, "library_name": card.get("library_name")}
        wanted = request.query.get("expand")
        return Answer.of({key: value[key] for key in value if key in ("_id", "id", *wanted)} if wanted else value)

    def _refs(self, request: Request, repo_type: str, repo_id: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, refs in (("heads", repo.branches), ("tags", repo.tags))
        )
        return Answer.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def _list_commits(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        return Answer.of(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "authors": [{"user": commit.author}],
                    "date": commit.date,
                }
                for commit in repo.back_from(repo.at(revision))
            ]
        )

    def _tree(self, request: Request, repo_type: str, repo_id: str, revision: str, path: str = "") -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        commit = repo.at(revision)
        inside = [name for name in _names(commit) if not path or name.startswith(f"{path}/")]
        if path and not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=commit.oid)
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            inside = [name for name in inside if "/" not in name[len(path) + 1 if path else 0 :]]
        expand = request.query.get("expand", ["false"])[0].lower() == "true"
        return Answer.of([_described(repo, commit, name, expand) for name in inside])

    def _paths_info(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        commit = repo.at(revision)
        if "json" in request.headers.get("content-type", ""):
            paths, expand = request.json["paths"], bool(request.json.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
        known = set(_names(commit))
        return Answer.of([_described(repo, commit, path, expand) for path in paths if path in known])

    def _create_branch(self, request: Request, repo_type: str, repo_id: str, name: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.at(request.json.get("startingPoint", "main")).oid
        return Answer()

    def _create_tag(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id, write=True)
        if request.json["tag"] in repo.tags:
            raise Refusal(409, f"Tag already exists: {request.json['tag']}")
        repo.tags[request.json["tag"]] = repo.at(revision).oid
        return Answer()

    # ------------------------------------------------------------------------------------------------ uploads
    def _preupload(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        files = self._repo(request, repo_type, repo_id, write=True).at(revision).files
        large = _LargeFiles(files)
        modes = []
        for asked in request.json["files"]:
            lfs = large(asked["path"], base64.b64decode(asked["sample"]), asked["size"])
            modes.append({"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if asked["path"] in files:
                modes[-1]["oid"] = files[asked["path"]].etag
        return Answer.of({"files": modes})

    def _lfs_batch(self, request: Request, repo_type: str, repo_id: str) -> Answer:
        self._repo(request, repo_type, repo_id, write=True)
        verify = f"{self.url}{urlsplit(request.target).path.removesuffix('batch')}verify"
        objects = []
        for asked in request.json["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self._objects:
                upload = self._signed(f"/uploads/{asked['oid']}", request.client)
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return Answer.of({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, request: Request, repo_type: str, repo_id: str) -> Answer:
        self._repo(request, repo_type, repo_id, write=True)
        oid, size = request.json["oid"], request.json["size"]
        content = self._uploads.pop(oid, self._objects.get(oid))  # two paths of one content are verified twice
        if content is None or len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"Upload of {oid} is not what was announced")
        self._objects[oid] = content
        return Answer()

    def _commit(self, request: Request, repo_type: str, repo_id: str, revision: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id, write=True)
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        present = repo.at(revision)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if not present.oid.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Blob | None] = {}
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                changes[path] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self._objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                changes[path] = Blob(self._objects[value["oid"]], True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = _below(present.files, path.rstrip("/"))
                if not gone or (key == "deletedFile" and path not in gone):
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes |= dict.fromkeys(gone)
            else:
                raise ValueError(f"{key} in a commit")
        user, _ = self._user(request)
        commit = repo.add(revision, changes, header["summary"], header.get("description", ""), user)
        url = f"{self.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}/commit/{commit.oid}"
        return Answer.of({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # ------------------------------------------------------------------------------------------------ downloads
    def _resolve(self, request: Request, repo_type: str, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._repo(request, repo_type, repo_id)
        user, _ = self._user(request)
        if repo.gated and user != repo_id.split("/")[0]:
            raise Refusal(403 if user else 401, f"Access to {repo_type} {repo_id} is restricted.", "GatedRepo")
        commit = repo.at(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{blob.etag}"',
            "Content-Disposition": f'inline; filename="{PurePosixPath(path).name}";',
        }
        if not blob.lfs:
            return _content(request, blob.content, headers)
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
        headers["Location"] = self._signed(f"/{repo_type}s/{repo_id}/{blob.sha256}/{quote(path)}", request.client)
        return Answer(302, headers=headers)


# ---------------------------------------------------------------------------------------------------- files
class _LargeFiles:
    """Which files are stored as large ones: by what `.gitattributes` says, their size, and zeros in them."""

    def __init__(self, files: Mapping[str, Blob]):
        lines = files[".gitattributes"].content.decode().splitlines() if ".gitattributes" in files else []
        self.patterns = [line.split()[0] for line in lines if "filter=lfs" in line]

    def __call__(self, path: str, sample: bytes, size: int) -> bool:
        names = (path, PurePosixPath(path).name)
        named = any(fnmatch(name, pattern) for name in names for pattern in self.patterns)
        return size > 0 and (named or size > LFS_SIZE or b"\0" in sample)


def _names(commit: Commit) -> list[str]:
    """Files and the folders they are in."""
    folders = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
    return sorted({*commit.files, *folders})


def _described(repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
    """What `tree` and `paths-info` say of a file or a folder."""
    blob = commit.files.get(path)
    if blob is None:
        oid = hashlib.sha1(repr(sorted(_below(commit.files, path).items())).encode()).hexdigest()
        value = {"type": "directory", "oid": oid, "size": 0, "path": path}
    else:
        value = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
        if blob.lfs:
            value["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    if expand:
        last = repo.last_change(commit, path)
        value["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return value


def _card(text: str) -> tuple[dict, list[str]]:
    """The metadata of a README.md, and what is wrong with it."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    if not found:
        return {}, []
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata is not valid: {error}"]
    if not isinstance(metadata, dict):
        return {}, ["YAML metadata must be an object"]
    errors = []
    for key in ("tags", "datasets", "base_model", "language", "library_name", "license", "pipeline_tag"):
        value = metadata.get(key, [])
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            errors.append(f'"{key}" must be a string or an array of strings')
    if "model-index" in metadata and not isinstance(metadata["model-index"], list):
        errors.append('"model-index" must be an array')
    return metadata, errors


def _damaged(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 0xFF]) if body else body
