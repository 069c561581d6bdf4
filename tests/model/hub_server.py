"""A stand-in for the Hugging Face Hub on 127.0.0.1: the endpoints that downloads and `push_to_hub` use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub.utils.sha import git_hash

LARGE = (".safetensors", ".bin")


def etag(name: str, content: bytes) -> str:
    """sha256 of files that the Hub keeps in LFS, Git's hash of the others."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


@dataclass
class Repository:
    """Files by path. `access`: "open", "private" or "gated". `sent`: what GET sends in the place of a file."""

    files: dict[str, bytes] = field(default_factory=dict)
    access: str = "open"
    sent: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class StandInHub:
    """Serves `repositories` while the context is open. `requests`: method and path of every one."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self) -> list[str]:
        return [
            request.rpartition("/")[2] for request in self.requests if re.match("GET .*/resolve/", request)
        ]


class _Handler(BaseHTTPRequestHandler):
    owner: StandInHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.owner.requests.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repository = self.owner.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if repository.access != "open" and "Authorization" not in self.headers:
            code = "GatedRepo" if repository.access == "gated" else "RepoNotFound"
            return self.answer(401, {"X-Error-Code": code})
        if match[2] not in ("main", repository.commit):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": repository.commit}
        content = repository.files.get(match[3])
        if content is None:
            return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        tag = etag(match[3], content)
        headers |= {"ETag": f'"{tag}"', "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        return self.answer(200, headers, repository.sent.get(match[3], content))

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self.owner.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = "/".join(filter(None, (values.get("organization"), values["name"])))
            self.owner.repositories.setdefault(name, Repository())
            return self.json({"url": f"{self.owner.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        repository = self.owner.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if match[2] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.json({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = f"{self.owner.url}/{match[1]}/commit/{repository.commit}"
        return self.json({"commitOid": repository.commit, "commitUrl": commit, "success": True})

    def json(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
