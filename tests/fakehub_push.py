"""A Hugging Face hub on this machine that takes commits: repositories as lists of whole trees, and a list of what it was sent.

As much of its HTTP as huggingface_hub asks for without Xet: making a repository, its tree, files, Git LFS and commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34
_LARGE = (".onnx", ".bin", ".png")


@dataclass
class Repo:
    """``commits`` are its trees by commit, oldest first; ``gated`` ones show nothing to anyone."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, tree: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[name] = dict(tree)
        return name

    def at(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


@dataclass
class Hub:
    """``blobs`` by sha256, ``requests`` as ``METHOD PATH``; paths that hold a key of ``breaks`` fail with its status."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)

    def sent(self, method: str) -> list[str]:
        return [line.partition(" ")[2] for line in self.requests if line.startswith(method + " ")]


@contextmanager
def pushable() -> Iterator[Hub]:
    """A hub without repositories that knows one token, as long as the block lives."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.dispatch("HEAD")

    def do_GET(self) -> None:
        self.dispatch("GET")

    def do_POST(self) -> None:
        self.dispatch("POST")

    def do_PUT(self) -> None:
        self.dispatch("PUT")

    def dispatch(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        for part, status in self.hub.breaks.items():
            if part in path:
                return self.reply(b"broken", status)
        if method == "PUT":  # its address was given out with the token's help
            digest = path.rpartition("/")[2]
            assert hashlib.sha256(self.body).hexdigest() == digest
            self.hub.blobs[digest] = self.body
            self.hub.uploaded.append(digest)
            return self.reply(b"")
        if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(b'{"error": "Invalid user token."}', 401)
        return self.post(path) if method == "POST" else self.get(path)

    def get(self, path: str) -> None:
        repo, rest = self.repo_of(path.removeprefix("/api/models"))
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})
        kind, _, rest = rest.partition("/")
        if repo.gated:
            return self.reply(b"", 403, {"X-Error-Code": "GatedRepo"})
        revision, _, name = (rest if kind else "main").partition("/")
        commit = repo.at(revision)
        if commit is None:
            return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        tree = repo.commits[commit]
        if kind in ("", "revision"):
            return self.json({"id": "x/y", "sha": commit, "siblings": []})
        if kind == "tree":
            return self.json([self.entry(one, data) for one, data in sorted(tree.items())])
        if name not in tree:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        return self.reply(tree[name], headers={"ETag": f'"{oid(name, tree[name])}"', "X-Repo-Commit": commit})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid(name, data)}
        if name.endswith(_LARGE):
            entry["lfs"] = {"oid": oid(name, data), "size": len(data), "pointerSize": 1}
        return entry

    def post(self, path: str) -> None:
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.upload(one) for one in json.loads(self.body)["objects"]]
            return self.json({"transfer": "basic", "objects": objects})
        repo, rest = self.repo_of(path.removeprefix("/api/models"))
        assert repo is not None, path
        if rest.startswith("preupload/"):
            return self.json({"files": [self.mode(repo, one["path"]) for one in json.loads(self.body)["files"]]})
        assert rest == "commit/main", path
        return self.commit(repo, [json.loads(line) for line in self.body.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[name].commit({".gitattributes": b"*.onnx filter=lfs"})
        return self.json({"url": f"{self.hub.address}/{name}"})

    def upload(self, one: dict[str, Any]) -> dict[str, Any]:
        there = one["oid"] in self.hub.blobs
        return one | ({} if there else {"actions": {"upload": {"href": f"{self.hub.address}/upload/{one['oid']}"}}})

    def mode(self, repo: Repo, name: str) -> dict[str, Any]:
        tree = repo.commits[repo.head]
        there = {"oid": oid(name, tree[name])} if name in tree else {}
        return {"path": name, "uploadMode": "lfs" if name.endswith(_LARGE) else "regular", "shouldIgnore": False, **there}

    def commit(self, repo: Repo, lines: list[dict[str, Any]]) -> None:
        header, *changes = lines
        if header["value"].get("parentCommit") not in (None, repo.head):
            return self.json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        tree = dict(repo.commits[repo.head])
        for change in changes:
            value, name = change["value"], change["value"]["path"]
            if change["key"] == "file":
                tree[name] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                tree[name] = self.hub.blobs[value["oid"]]
            else:
                assert change["key"] == "deletedFile", change
                del tree[name]
        made = repo.commit(tree)
        return self.json({"success": True, "commitOid": made, "commitUrl": f"{self.hub.address}/x/y/commit/{made}"})

    def repo_of(self, path: str) -> tuple[Repo | None, str]:
        """``/ORG/NAME/REST``; a file's address has ``resolve/REVISION/NAME`` for the rest."""
        org, _, rest = path.strip("/").partition("/")
        name, _, rest = rest.partition("/")
        return self.hub.repos.get(f"{org}/{name}"), rest

    def json(self, obj: object, status: int = 200) -> None:
        self.reply(json.dumps(obj).encode(), status)

    def reply(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def oid(name: str, data: bytes) -> str:
    """What the hub calls a file's bytes: their sha256 as a large file, else git's own."""
    if name.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
