"""The part of the hub that `gpt_serve.adapters` uses, in a thread of the test's process; the client is the real one."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories of models.

    Attributes:
        repositories: path -> content, by name.
        commits: of each commit, the paths in it.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[list[str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in path:
            files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            for file in files:
                self.files()[file["path"]] = base64.b64decode(file["content"])
            self.server.commits.append([file["path"] for file in files])
            self.answer({"commitUrl": f"{self.server.url}/x/y/commit/{'0' * 40}", "commitOid": "0" * 40})
        elif "/paths-info/" in path:
            self.answer([])
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        files = self.files()
        if files is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in sorted(files.items())
                ]
            )
        elif "/resolve/" in path:
            self.file(files[path.partition("/resolve/")[2].partition("/")[2]])
        else:
            self.answer({"id": "x/y", "sha": "0" * 40, "siblings": [], "private": False})

    do_HEAD = do_GET

    def files(self) -> Any:
        parts = urlsplit(self.path).path.strip("/").removeprefix("api/models/").split("/")
        return self.server.repositories.get("/".join(parts[:2]))

    def file(self, data: bytes) -> None:
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        span = self.headers.get("Range")
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last or len(data)) + 1]
        self.send(data, 206 if span else 200, tag)

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
