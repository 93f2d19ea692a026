"""A stand-in for the Hugging Face Hub on the loopback interface, with faults. Standard library only.

    with FakeHub(folder) as hub: ...            # HF_ENDPOINT=hub.url, set before huggingface_hub is imported
    hub.faults.append(Fault(r"POST .*/commit/", times=1, status=500))

It has the routes that creating, committing, listing and downloading use. Contents lie under `folder/objects` by
SHA-256, repositories live in memory. It knows nothing of Xet storage (`HF_HUB_DISABLE_XET=1`), and shows what a client
does, not what the Hub does.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.parquet", "*.npz", "*.model", "*.png", "tokenizer.json")
LARGE = 10 * 2**20  # bytes from which any file is stored as LFS
DATE = "2026-01-01T00:00:00.000Z"


class Stored(NamedTuple):
    sha256: str
    size: int
    lfs: bool


@dataclass
class Commit:
    sha: str
    files: dict[str, Stored]
    title: str


@dataclass
class Repository:
    """`refs`: name -> its commits, oldest first."""

    private: bool
    refs: dict[str, list[Commit]]

    def find(self, revision: str) -> Commit | None:
        for name in (revision, "main" if revision == "HEAD" else f"refs/heads/{revision}"):
            if name in self.refs:
                return self.refs[name][-1]
        every = [commit for commits in self.refs.values() for commit in commits]
        return next((commit for commit in every if commit.sha.startswith(revision) and len(revision) >= 7), None)


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches `pattern`.

    Attributes:
        status: answered instead; None cuts the connection.
        after: the request is carried out first, and only its answer lost.
        read: bytes of the body that are read before the connection is cut; None is all.
        fired: how often it has happened.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    after: bool = False
    read: int | None = None
    fired: int = 0


@dataclass
class FakeHub:
    """The server. `users`: token -> name; each may write under that name, and under `shared`."""

    root: Path
    users: dict[str, str] = field(default_factory=lambda: {"hf_test": "tester", "hf_other": "other"})
    shared: str = "org"
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    one_namespace: bool = False  # a name taken by a dataset is not free for a model
    alter: Callable[[dict[str, Any]], None] | None = None  # changes each entry of a listed tree

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        (self.root / "objects").mkdir(parents=True, exist_ok=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "objects" / digest).write_bytes(content)
        return digest

    def get(self, digest: str) -> bytes:
        return (self.root / "objects" / digest).read_bytes()

    def has(self, digest: str) -> bool:
        return (self.root / "objects" / digest).exists()

    def create(self, name: str, kind: str = "models", private: bool = False) -> Repository:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS).encode()
        files = {".gitattributes": Stored(self.put(attributes), len(attributes), False)}
        repository = Repository(private, {"refs/heads/main": [self.commit(files, "initial commit", None)]})
        self.repositories[kind, name] = repository
        return repository

    def commit(self, files: dict[str, Stored], title: str, parent: str | None) -> Commit:
        sha = hashlib.sha1(json.dumps([sorted(files.items()), title, parent, len(self.requests)]).encode()).hexdigest()
        return Commit(sha, files, title)

    def files(self, name: str, ref: str = "refs/heads/main", kind: str = "models") -> dict[str, bytes]:
        """Name -> content at the head of a branch or pull request."""
        found = self.repositories[kind, name].refs[ref][-1].files
        return {path: self.get(stored.sha256) for path, stored in found.items()}

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Cut(Exception):
    """Close the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    silent = False  # the answer is lost

    def log_message(self, *_: object) -> None:
        pass

    # -- plumbing

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f.fired < f.times and re.search(f.pattern, request)), None)
            if fault is not None:
                fault.fired += 1
        try:
            self.body = self.payload(None if fault is None else fault.read)
            self.silent = False
            if fault is not None and not fault.after:
                if fault.status is None:
                    raise _Cut
                self.error(fault.status, "Injected", f"injected fault {fault.status}")
                return
            self.silent = fault is not None
            with self.hub.lock:
                self.route(path)
            if fault is not None:
                if fault.status is None:
                    raise _Cut
                self.silent = False
                self.error(fault.status, "Injected", f"injected fault {fault.status}")
        except _Cut:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str) -> None:
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                handle(self, **match.groupdict())
                return
        self.error(404, "NoRoute", f"the stand-in has no route for {self.command} {path}")

    def payload(self, limit: int | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        size = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(size if limit is None else min(size, limit))

    def reply(self, status: int, content: Any = None, body: bytes | None = None, **headers: str) -> None:
        if self.silent:
            return
        body = json.dumps({} if content is None else content).encode() if body is None else body
        self.send_response(status)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **names}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def user(self) -> str | None:
        name = self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if name is None:
            self.error(401, "Unauthorized", "Invalid credentials in Authorization header")
        return name

    def may_write(self, repo: str) -> bool:
        name = self.user()
        if name is not None and repo.split("/")[0] not in (name, self.hub.shared):
            self.error(403, "Forbidden", f"Forbidden: you don't have write access to {repo}")
            return False
        return name is not None

    def find(self, kind: str | None, repo: str, revision: str = "main") -> tuple[Repository, Commit] | None:
        repository = self.hub.repositories.get((kind or "models", repo))
        reader = self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        hidden = repository is not None and repository.private and repo.split("/")[0] not in (reader, self.hub.shared)
        if repository is None or hidden:
            self.error(404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.find(revision)
        if commit is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    # -- routes

    def who_am_i(self) -> None:
        if name := self.user():
            self.reply(200, {"type": "user", "id": "0", "name": name, "fullname": name, "orgs": [], "auth": {}})

    def validate_yaml(self) -> None:
        """Only that the front matter is YAML and an object: the Hub's own rules are not public."""
        text = json.loads(self.body)["content"]
        try:
            valid = isinstance(yaml.safe_load(text.split("---")[1]), dict)
        except (IndexError, yaml.YAMLError):
            valid = False
        problem = [] if valid else [{"message": "not an object"}]
        self.reply(200 if valid else 400, {"errors": problem, "warnings": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = self.user()
        if name is None:
            return
        repo, kind = f"{wanted.get('organization') or name}/{wanted['name']}", f"{wanted.get('type', 'model')}s"
        if not self.may_write(repo):
            return
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        kinds = ("models", "datasets", "spaces") if self.hub.one_namespace else (kind,)
        if any((other, repo) in self.hub.repositories for other in kinds):
            return self.reply(409, {"url": url, "error": "You already created this repo"})
        self.hub.create(repo, kind, wanted.get("visibility") == "private")
        self.reply(200, {"url": url, "name": repo, "id": "0"})

    def branch(self, kind: str, repo: str, rev: str) -> None:
        if self.may_write(repo) and (found := self.find(kind, repo)):
            if f"refs/heads/{rev}" in found[0].refs:
                return self.error(409, "Conflict", "Reference already exists")
            found[0].refs[f"refs/heads/{rev}"] = [found[1]]
            self.reply(200)

    def preupload(self, kind: str, repo: str, rev: str) -> None:
        if self.user() is None or (found := self.find(kind, repo, rev)) is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = any(fnmatch.fnmatch(file["path"], pattern) for pattern in LFS) or file["size"] > LARGE
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if old := found[1].files.get(file["path"]):
                entry["oid"] = old.sha256 if old.lfs else git_blob(self.hub.get(old.sha256))
            files.append(entry)
        self.reply(200, {"files": files})

    def lfs_batch(self, repo: str, kind: str | None = None) -> None:
        if self.user() is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.has(wanted["oid"]):
                upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/_lfs/verify"}}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "BadOid", f"SHA-256 is not {oid}")
        self.hub.put(self.body)
        self.reply(200)

    def lfs_verify(self) -> None:
        self.reply(200 if self.hub.has(json.loads(self.body)["oid"]) else 404)

    def make_commit(self, kind: str, repo: str, rev: str) -> None:
        pull_request = self.query.get("create_pr") == ["1"]
        allowed = self.user() if pull_request else self.may_write(repo)
        found = self.find(kind, repo, rev) if allowed else None
        if found is None:
            return
        repository, head = found
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if header["value"].get("parentCommit") not in (None, head.sha):
            return self.error(412, "PreconditionFailed", "parentCommit is not the head")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Stored(self.hub.put(content), len(content), False)
            elif key == "lfsFile":
                if not self.hub.has(value["oid"]):
                    return self.error(400, "MissingLfs", f"LFS object missing: {value['path']}")
                files[value["path"]] = Stored(value["oid"], len(self.hub.get(value["oid"])), True)
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
        commit = self.hub.commit(files, header["value"]["summary"], head.sha)
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        if pull_request:
            repository.refs[f"refs/pr/{number}"] = [commit]
        else:
            ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
            repository.refs[ref].append(commit)
        base = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{base}/commit/{commit.sha}"}
        self.reply(200, answer | ({"pullRequestUrl": f"{base}/discussions/{number}"} if pull_request else {}))

    def info(self, kind: str, repo: str, rev: str = "main") -> None:
        if found := self.find(kind, repo, rev):
            siblings = [{"rfilename": path} for path in sorted(found[1].files)]
            flags = {"private": found[0].private, "gated": False, "disabled": False, "tags": []}
            dates = {"createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0}
            names = {"_id": "0", "id": repo, "modelId": repo, "sha": found[1].sha}
            self.reply(200, {**names, **flags, **dates, "siblings": siblings})

    def entry(self, path: str, stored: Stored) -> dict[str, Any]:
        oid = stored.sha256[:40] if stored.lfs else git_blob(self.hub.get(stored.sha256))
        entry: dict[str, Any] = {"type": "file", "path": path, "size": stored.size, "oid": oid}
        if stored.lfs:
            entry["lfs"] = {"oid": stored.sha256, "size": stored.size, "pointerSize": 134}
        if self.hub.alter is not None:
            self.hub.alter(entry)
        return entry

    def tree(self, kind: str, repo: str, rev: str, path: str | None = None) -> None:
        """The files of a folder, with `recursive` those below too."""
        if (found := self.find(kind, repo, rev)) is None:
            return
        start, recursive = f"{path}/" if path else "", self.query.get("recursive") == ["true"]
        names = [name for name in sorted(found[1].files) if name.startswith(start)]
        if path and not names:
            return self.error(404, "EntryNotFound", "Entry not found")
        listed = [name for name in names if recursive or "/" not in name.removeprefix(start)]
        self.reply(200, [self.entry(name, found[1].files[name]) for name in listed])

    def refs(self, kind: str, repo: str) -> None:
        if found := self.find(kind, repo):
            every: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
            for ref, commits in found[0].refs.items():
                group = "pullRequests" if ref.startswith("refs/pr/") else "branches"
                every[group].append({"name": ref.split("/")[-1], "ref": ref, "targetCommit": commits[-1].sha})
            self.reply(200, every)

    def resolve(self, repo: str, rev: str, path: str, kind: str | None = None) -> None:
        if (found := self.find(kind, repo, rev)) is None:
            return
        stored = found[1].files.get(path)
        if stored is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = self.hub.get(stored.sha256)
        tag = f'"{stored.sha256 if stored.lfs else git_blob(content)}"'
        headers = {"ETag": tag, "X_Repo_Commit": found[1].sha, "Content_Type": "application/octet-stream"}
        if stored.lfs:
            headers |= {"X_Linked_Etag": tag, "X_Linked_Size": str(stored.size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.reply(206, body=content[first : last + 1], **headers)
        self.reply(200, body=content, **headers)


_KIND, _REPO = r"(?P<kind>models|datasets|spaces)", r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<rev>refs/pr/\d+|[^/]+)"
_API = f"/api/{_KIND}/{_REPO}"
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("GET",), "/api/whoami-v2", _Handler.who_am_i),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), f"{_API}/branch/{_REV}", _Handler.branch),
    (("POST",), f"{_API}/preupload/{_REV}", _Handler.preupload),
    (("POST",), f"{_API}/commit/{_REV}", _Handler.make_commit),
    (("POST",), rf"/(?:{_KIND}/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), "/_lfs/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), _API, _Handler.info),
    (("GET", "HEAD"), f"{_API}/revision/{_REV}", _Handler.info),
    (("GET",), f"{_API}/tree/{_REV}(?:/(?P<path>.+))?", _Handler.tree),
    (("GET",), f"{_API}/refs", _Handler.refs),
    (("GET", "HEAD"), f"/(?:{_KIND}/)?{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
)
