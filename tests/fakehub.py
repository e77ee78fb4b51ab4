"""A Hugging Face hub on this machine: as much of its HTTP as huggingface_hub asks for, and a list of what it sent."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

COMMIT = "c" * 40
_MOST = 10**8  # bytes that it sends at once: a test that asks for gigabytes fails and does not fill this machine


@contextmanager
def hub(repo: str, folder: Path, revision: str = "main") -> Iterator[tuple[str, dict[str, int]]]:
    """Serve a folder as `repo` at a revision, and no other one.

    Yields:
        The endpoint's address, and the bytes that were sent of each file; both live as long as the block.
    """
    sent: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            file = folder / path.rpartition("/")[2]
            if path == f"/api/models/{repo}/revision/{quote(revision, safe='')}":
                self.reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), body)
            elif path == f"/api/models/{repo}/tree/{COMMIT}":
                names = sorted(p.name for p in folder.iterdir())
                tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
                self.reply(json.dumps(tree).encode(), body)
            elif path == f"/{repo}/resolve/{COMMIT}/{file.name}" and file.is_file():
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
                first, last = map(int, asked.groups()) if asked else (0, file.stat().st_size - 1)
                if body and last - first > _MOST:
                    return self.reply(b"", body, 500)
                with file.open("rb") as opened:
                    opened.seek(first)
                    data = opened.read(last + 1 - first)
                sent[file.name] = sent.get(file.name, 0) + (len(data) if body else 0)
                etag = hashlib.sha256(file.name.encode()).hexdigest()
                self.reply(data, body, 206 if asked else 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                missing = "EntryNotFound" if path.startswith(f"/{repo}/") else "RepoNotFound"
                missing = "RevisionNotFound" if path.startswith(f"/api/models/{repo}/revision/") else missing
                self.reply(b"", body, 404, {"X-Error-Code": missing})

        def reply(self, data: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
