"""A small Hugging Face Hub on the loopback address, for the unmodified huggingface_hub, transformers, peft and datasets.

    with HubServer() as hub:
        hub.add_user("ann", token="hf_ann")
        run(..., env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1"})
        hub.repo("ann/model").files()

    python tests/hub_server.py --port 8080 --user ann=hf_ann   # the same by hand

Repositories are in memory, structured as in git: commits with a parent, and references (branches, tags, pull
requests) that point to them. Large files go through the LFS protocol, are only joined to a commit if they were
uploaded before, and are served by a redirect, as from the Hub's CDN. Errors have the status codes and `X-Error-Code`
headers of the Hub. Every request is logged; `fail` and `drop` break chosen ones.

Spaces have files, variables and a requested hardware; nothing runs them.

Not supported: Xet, gated repositories, discussions other than the pull requests that commits open.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from huggingface_hub import constants

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".mp4", ".parquet", ".arrow")
LFS_MIN_SIZE = 10_000_000
PAGE_SIZE = 20  # entries of a tree listing; the Hub's is 1000


# -- Storage


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Hash of git, except that git stores a pointer in place of a large file."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repository:
    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> a commit
    # Of a Space.
    sdk: str | None = None
    hardware: str | None = None
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag, `refs/...` or a full hash."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def commit(self, ref: str, parent: Commit | None, files: dict[str, Blob], title: str, message: str, author: str):
        """Add a commit and move `ref` to it."""
        described = [ref, parent and parent.oid, title, message, len(self.commits)]
        described.append(sorted((path, blob.oid) for path, blob in files.items()))
        oid = hashlib.sha1(json.dumps(described).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[oid] = Commit(oid, parent and parent.oid, title, message, author, date, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> list[Commit]:
        """Commits from the newest to the first."""
        found = [commit]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    # Read by tests.

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def titles(self, revision: str = "main") -> list[str]:
        """Titles of the commits, the newest first."""
        return [commit.title for commit in self.history(self.resolve(revision))]


@dataclass(frozen=True)
class User:
    name: str
    can_write: bool


@dataclass
class Fault:
    """A failure of the next `times` requests that match."""

    pattern: re.Pattern
    times: int
    status: int | None  # None cuts the connection half-way through the request


@dataclass(frozen=True)
class LoggedRequest:
    method: str
    path: str
    status: int
    user: str | None


class HubError(Exception):
    """Error with the text of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class HubServer:
    """Local Hub: users, repositories and uploads, and the thread that serves them.

    Args:
        check_card: the text of a README.md and the kind of its repository -> errors; a commit is accepted
            without errors. Nothing is checked by default.
        port: a free port by default.
    """

    def __init__(self, check_card: Callable[[str, str], list[str]] = lambda text, kind: [], port: int = 0) -> None:
        self.check_card = check_card
        self.users: dict[str, User] = {}  # by token
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256, in a commit or not
        self.log: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Another host name: clients treat redirects between hosts differently, and send no token there.
        self.cdn_endpoint = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def add_user(self, name: str, token: str, can_write: bool = True) -> None:
        """Add a token to a user; `can_write=False` makes it read-only."""
        self.users[token] = User(name, can_write)

    def repo(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def fail(self, pattern: str, status: int = 503, times: int = 1) -> None:
        """Answer the next `times` requests whose `METHOD /path` matches with an error."""
        self.faults.append(Fault(re.compile(pattern), times, status))

    def drop(self, pattern: str, times: int = 1) -> None:
        """Cut the connection of the next `times` requests that match, after half of the body."""
        self.faults.append(Fault(re.compile(pattern), times, None))

    def heal(self) -> None:
        self.faults.clear()

    def requests(self, pattern: str) -> list[LoggedRequest]:
        """Return the logged requests whose `METHOD /path` matches."""
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(line):
                    fault.times -= 1
                    return fault
        return None


def use_hub(monkeypatch: Any, server: "HubServer", cache: Path, token: str) -> None:
    """Point the clients of this process at a server, with a cache and a token of a test."""
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # caches the address
    monkeypatch.setenv("HF_TOKEN", token)


# -- Protocol

Answer = tuple[int, dict[str, str], bytes]
_ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []
_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
_FILES = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)"
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}  # of the address of a page


def route(method: str, pattern: str) -> Callable:
    """Register a method of the handler for a request; named groups become its arguments, unquoted."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern + r"/?"), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass  # `HubServer.log` is the log

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.user: User | None = None
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.take_fault(f"{self.command} {url.path}")
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self._note(url.path, 0)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        try:
            if fault is not None:
                raise HubError(fault.status, "internal error of the server")
            self._authenticate()
            with self.hub.lock:
                status, headers, content = self._dispatch(url.path)
        except HubError as error:
            status, headers = error.status, {"X-Error-Message": error.message, **error.headers}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            content = json.dumps({"error": error.message}).encode()
        self._note(url.path, status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has closed the connection
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _note(self, path: str, status: int) -> None:
        self.hub.log.append(LoggedRequest(self.command, unquote(path), status, self.user and self.user.name))

    def _authenticate(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            self.user = self.hub.users.get(token)
            if self.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")

    def _dispatch(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in _ROUTES:
            match = pattern.fullmatch(path) if wanted == method else None
            if match:
                return function(self, **{name: unquote(part) for name, part in match.groupdict().items() if part})
        raise HubError(404, f"no such address: {method} {path}")

    # Parts of all answers.

    @staticmethod
    def _json(value: Any, status: int = 200, **headers: str) -> Answer:
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

    def _repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        """Return the repository, if this user may read it (and write to it)."""
        repository = self.hub.repositories.get((kind, repo_id))
        is_owner = repository is not None and self.user is not None and self.user.name == repository.owner
        if repository is None or (repository.private and not is_owner):
            # The Hub hides private repositories from anonymous users.
            raise HubError(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise HubError(401, "Invalid username or password.")
        if write and not (is_owner and self.user.can_write):
            raise HubError(403, "Forbidden: you must have write access to this repository")
        return repository

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Accounts and repositories.

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Answer:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        role = "write" if self.user.can_write else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "token", "role": role}}
        return self._json({"type": "user", "name": self.user.name, "fullname": "", "orgs": [], "auth": access})

    @route("POST", "/api/repos/create")
    def create(self) -> Answer:
        wanted = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        owner, kind = wanted.get("organization") or self.user.name, wanted.get("type", "model")
        if owner != self.user.name or not self.user.can_write:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{_PREFIXES[kind]}{repo_id}", "name": repo_id}
        if kind == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise HubError(400, f"Invalid sdk: {wanted.get('sdk')}")
        if (kind, repo_id) in self.hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, status=409)
        repository = Repository(
            kind,
            repo_id,
            private=wanted.get("visibility") == "private",
            sdk=wanted.get("sdk"),
            hardware=wanted.get("hardware"),
            variables={variable["key"]: variable["value"] for variable in wanted.get("variables", ())},
        )
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": Blob(attributes.encode(), is_lfs=False)}
        repository.commit("refs/heads/main", None, files, "initial commit", "", self.user.name)
        self.hub.repositories[kind, repo_id] = repository
        return self._json(answer)

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> Answer:
        wanted = json.loads(self.body)
        errors = self.hub.check_card(wanted["content"], wanted["repoType"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return self._json(answer, status=400 if errors else 200)

    @route("GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, repo_id: str, revision: str = "main") -> Answer:
        repository = self._repository(kind, repo_id)
        commit = self._commit_of(repository, revision)
        described = {
            **{"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repository.owner, "sha": commit.oid},
            **{"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0},
            **{"tags": [], "lastModified": commit.date, "createdAt": commit.date},
        }
        with_sizes = "blobs" in self.query
        described["siblings"] = [
            {"rfilename": path, **(_file_entry(path, blob) if with_sizes else {})}
            for path, blob in sorted(commit.files.items())
        ]
        return self._json(described)

    @route("GET", _REPO + r"/auth-check(?P<write>/write)?")
    def auth_check(self, kind: str, repo_id: str, write: str = "") -> Answer:
        self._repository(kind, repo_id, write=bool(write))
        return self._json({})

    @route("GET", _REPO + r"/refs")
    def refs(self, kind: str, repo_id: str) -> Answer:
        repository = self._repository(kind, repo_id)

        def listed(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repository.refs.items()
                if ref.startswith(prefix)
            ]

        names = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        return self._json({"converts": [], **{name: listed(prefix) for name, prefix in names.items()}})

    @route("GET", _REPO + r"/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, repo_id: str, revision: str) -> Answer:
        repository = self._repository(kind, repo_id)
        listed = [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repository.history(self._commit_of(repository, revision))
        ]
        return self._json(listed)

    @route("POST", _REPO + r"/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def create_ref(self, kind: str, repo_id: str, what: str, name: str) -> Answer:
        repository = self._repository(kind, repo_id, write=True)
        wanted = json.loads(self.body or b"{}")
        # The address of a branch is its name, that of a tag the revision that it is put on.
        start, ref = (wanted.get("startingPoint", "main"), f"refs/heads/{name}")
        if what == "tag":
            start, ref = name, f"refs/tags/{wanted['tag']}"
        if ref in repository.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repository.refs[ref] = self._commit_of(repository, start).oid
        return self._json({})

    @route("GET", "/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables")
    def variables(self, repo_id: str) -> Answer:
        return self._variables(self._repository("space", repo_id, write=True))

    @route("POST", "/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables")
    def set_variable(self, repo_id: str) -> Answer:
        repository, wanted = self._repository("space", repo_id, write=True), json.loads(self.body)
        repository.variables[wanted["key"]] = wanted["value"]
        return self._variables(repository)

    def _variables(self, repository: Repository) -> Answer:
        return self._json({name: {"key": name, "value": value} for name, value in repository.variables.items()})

    # Listings.

    @route("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, kind: str, repo_id: str, revision: str, folder: str = "") -> Answer:
        commit = self._commit_of(self._repository(kind, repo_id), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = _entries(commit, folder, recursive)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {"X-Repo-Commit": commit.oid}
        if start + PAGE_SIZE < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE_SIZE}"
            headers["Link"] = f'<{address}>; rel="next"'
        return self._json(entries[start : start + PAGE_SIZE], **headers)

    @route("POST", _REPO + r"/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> Answer:
        commit = self._commit_of(self._repository(kind, repo_id), revision)
        form = parse_qs(self.body.decode())
        if self.headers.get("Content-Type", "").startswith("application/json"):
            form = json.loads(self.body)
        wanted = {path.strip("/") for path in form.get("paths", [])}
        return self._json([entry for entry in _entries(commit, "", True) if entry["path"] in wanted])

    # Uploads.

    @route("POST", _REPO + r"/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo_id: str, revision: str) -> Answer:
        opens_pull_request = "create_pr" in self.query
        repository = self._repository(kind, repo_id, write=not opens_pull_request)
        commit = self._commit_of(repository, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, existing = file["path"], commit.files.get(file["path"])
            is_lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_MIN_SIZE
            files.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if existing is not None:
                files[-1]["oid"] = existing.etag
        return self._json({"files": files, "commitOid": commit.oid})

    @route("POST", _FILES + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str, kind: str = "model") -> Answer:
        self._repository(kind, repo_id)
        if self.user is None or not self.user.can_write:
            raise HubError(403, "Forbidden: this token cannot upload")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            objects.append({"oid": oid, "size": wanted["size"]})
            if oid not in self.hub.uploads:
                upload, verify = (f"{self.hub.endpoint}/lfs/{where}{oid}" for where in ("", "verify/"))
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return self._json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is not what its hash says")
        self.hub.uploads[oid] = self.body
        return self._json({})

    @route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
    def lfs_verify(self, oid: str) -> Answer:
        if len(self.hub.uploads.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(400, "the upload is not complete")
        return self._json({})

    @route("POST", _REPO + r"/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo_id: str, revision: str) -> Answer:
        """One commit of all that is asked, or none."""
        opens_pull_request = "create_pr" in self.query
        repository = self._repository(kind, repo_id, write=not opens_pull_request)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        parent = self._commit_of(repository, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        card = files.get("README.md")
        errors = self.hub.check_card(card.content.decode(), kind) if card is not None else []
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        if opens_pull_request:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            ref = f"refs/pr/{number}"
        elif revision in repository.refs:  # refs/pr/1
            ref = revision
        else:
            ref = f"refs/heads/{revision}"
        commit = repository.commit(
            ref, parent, files, header["summary"], header.get("description", ""), self.user.name
        )
        address = f"{self.hub.endpoint}/{_PREFIXES[kind]}{repo_id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{address}/commit/{commit.oid}"}
        if opens_pull_request:
            answer["pullRequestUrl"] = f"{address}/discussions/{number}"
        return self._json(answer)

    def _apply(self, files: dict[str, Blob], operation: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if operation == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif operation == "lfsFile":
            if value["oid"] not in self.hub.uploads:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(self.hub.uploads[value["oid"]], is_lfs=True)
        elif operation in ("deletedFile", "deletedFolder"):
            doomed = [p for p in files if p == path or p.startswith(path.rstrip("/") + "/")]
            if not doomed:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in doomed:
                del files[name]
        elif operation != "header":
            raise HubError(400, f"unknown operation {operation}")

    # Downloads.

    @route("GET", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str, kind: str = "model") -> Answer:
        commit = self._commit_of(self._repository(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not blob.is_lfs:
            return self._content(blob.content, {**headers, "ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return 302, {**headers, "Location": f"{self.hub.cdn_endpoint}/cdn/{blob.sha256}"}, b""

    @route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
    def cdn(self, oid: str) -> Answer:
        return self._content(self.hub.uploads[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> Answer:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None or self.command == "HEAD":
            # A HEAD is answered with the length that the content would have, and without it.
            return 200, {**headers, "Content-Length": str(len(content))}, content
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if start >= len(content):
            raise HubError(416, "Requested range not satisfiable", None, {"Content-Range": f"bytes */{len(content)}"})
        return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]


def _file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": blob.oid, "blobId": blob.oid, "size": len(blob.content)}
    if blob.is_lfs:
        size = len(blob.content)
        entry["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": size, "pointerSize": 134}
    return entry


def _entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below `folder`."""
    prefix = f"{folder.strip('/')}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        names = path[len(prefix) :].split("/")
        for depth in range(1, len(names) if recursive else min(len(names), 2)):
            name = prefix + "/".join(names[:depth])
            found[name] = {
                "type": "directory",
                "path": name,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": 0,
            }
        if recursive or len(names) == 1:
            found[path] = _file_entry(path, blob)
    return [found[path] for path in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=0, help="any free one by default")
    parser.add_argument("--user", nargs="+", default=["user=hf_user"], help="name=token, as many as wanted")
    options = parser.parse_args()
    hub = HubServer(port=options.port)
    for user in options.user:
        hub.add_user(*user.split("=", 1))
    print(f"HF_ENDPOINT={quote(hub.endpoint, safe=':/')} HF_HUB_DISABLE_XET=1", flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
