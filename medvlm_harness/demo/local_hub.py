"""A Hub on this machine for trying `medvlm push`: what arrives is written into a folder, and nothing leaves.

    python -m medvlm_harness.demo.local_hub FOLDER [PORT]

It plays the few endpoints that publishing uses, for one user, and says whether a repo would be private. It checks no
metadata, and is no proof of how huggingface.co answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.files import write_whole

__all__ = ["TOKEN", "Answer", "LocalHub", "Repo", "serving"]

PORT = 8990
TOKEN = "local-token"  # noqa: S105  # of the one user that it has
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+))?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Answer(NamedTuple):
    """What a request gets."""

    status: int
    body: bytes
    headers: Mapping[str, str]


@dataclass
class Repo:
    """One repo: the files of its newest commit, and how they came there."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    shas: list[str] = field(default_factory=lambda: [_oid(b"first")])
    commits: list[dict[str, Any]] = field(default_factory=list)  # title, parent, files
    requests: list[dict[str, Any]] = field(default_factory=list)  # the same of pull requests


class LocalHub:
    """The state and the answers; keys of `repos` are "datasets/ORG/NAME" and "models/ORG/NAME".

    Args:
        token: that requests must bring.
        folder: where commits and pull requests are written to; None keeps them in memory alone.
    """

    def __init__(self, token: str = TOKEN, folder: Path | None = None) -> None:
        self.token, self.folder = token, folder
        self.repos: dict[str, Repo] = {}
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str, query: Mapping[str, list[str]], authorization: str, body: bytes) -> Answer:
        """What a request gets, whatever its method."""
        if authorization != f"Bearer {self.token}":
            return _json(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return _json(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := _API.match(path):
            return self._api(found[1], found[2], found[3], query, body)
        if found := _FILE.fullmatch(path):
            return self._file(self.repos.get(f"{found[1] or 'models'}/{found[2]}"), found[3], found[4])
        return _json(404, {"error": f"this local Hub has no {path}"})

    def _create(self, asked: Mapping[str, Any]) -> Answer:
        name = f"{asked.get('organization')}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        url = {"url": f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{name}"}
        with self._lock:
            if f"{kind}/{name}" in self.repos:
                return _json(409, {**url, "error": "You already created this repo"})
            self.repos[f"{kind}/{name}"] = Repo(private=asked.get("visibility") == "private")
        return _json(200, url)

    def _api(self, kind: str, name: str, what: str | None, query: Mapping[str, list[str]], body: bytes) -> Answer:
        repo = self.repos.get(f"{kind}/{name}")
        if repo is None:
            return _json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if what == "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            return _json(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        if what == "commit":
            return self._commit(f"{kind}/{name}", repo, body, as_request=bool(query.get("create_pr")))
        if what == "discussions":
            return _json(200, _discussions(name, repo))
        siblings = [{"rfilename": path} for path in repo.files]
        info = {"_id": "0", "id": name, "sha": repo.shas[-1], "private": repo.private, "siblings": siblings}
        return _json(200, info)

    def _file(self, repo: Repo | None, revision: str, path: str) -> Answer:
        if repo is None:
            return _json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", repo.shas[-1]) or path not in repo.files:
            return _json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return Answer(200, repo.files[path], {})

    def _commit(self, key: str, repo: Repo, body: bytes, *, as_request: bool) -> Answer:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        (header,) = [line["value"] for line in lines if line["key"] == "header"]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        made = {"title": header["summary"], "parent": header.get("parentCommit"), "files": files}
        with self._lock:
            oid = _oid(body + repo.shas[-1].encode())
            url = f"{self.url}/{key.removeprefix('models/')}"
            done = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
            if as_request:
                repo.requests.append(made)
                number = len(repo.requests)
                self._write(f"{key}/pull_request_{number}", files)
                return _json(200, {**done, "pullRequestUrl": f"{url}/discussions/{number}"})
            if made["parent"] not in (None, repo.shas[-1]):
                return _json(412, {"error": "A commit has happened since. Please refresh and try again."})
            repo.commits.append(made)
            repo.files |= files
            repo.shas.append(oid)
            self._write(key, files)
        return _json(200, done)

    def _write(self, key: str, files: Mapping[str, bytes]) -> None:
        if self.folder is None:
            return
        root = (self.folder / key).resolve()
        for name, data in files.items():
            path = (root / name).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                raise UserError(f"Expected a path inside the repo, but got {name!r}.")
            write_whole(path, data)


@contextmanager
def serving(hub: LocalHub, port: int = 0) -> Iterator[str]:
    """Answer on this machine alone while the block lasts; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            address = urlsplit(self.path)
            authorization = self.headers.get("Authorization", "")
            answer = hub.answer(unquote(address.path), parse_qs(address.query), authorization, body)
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
            except OSError:  # the client has given up
                self.close_connection = True

        do_GET = do_POST = do_HEAD = _respond  # noqa: N815  # names of the base class

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()


def _json(status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(content).encode(), headers or {})


def _discussions(name: str, repo: Repo) -> dict[str, Any]:
    opened = [
        {
            **{"num": number, "title": one["title"], "author": {"name": "local"}, "status": "open"},
            **{"createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True, "repo": {"name": name, "type": "model"}},
        }
        for number, one in enumerate(repo.requests, start=1)
    ]
    return {"discussions": opened, "count": len(opened), "start": 0}


def _oid(data: bytes) -> str:
    """40 hexadecimal digits, as a commit has."""
    return hashlib.sha256(data).hexdigest()[:40]


def _main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2) or not all(one.isdecimal() for one in arguments[1:]):
        sys.exit(f"usage: python -m medvlm_harness.demo.local_hub FOLDER [PORT, {PORT} if not said]")
    folder, port = arguments[0], int(arguments[1]) if arguments[1:] else PORT
    try:
        with serving(LocalHub(folder=Path(folder)), port) as url:
            sys.stdout.write(f"export HF_ENDPOINT={url} HF_TOKEN={TOKEN}\nwhat arrives is in {folder}; Ctrl-C ends\n")
            sys.stdout.flush()
            threading.Event().wait()
    except OSError as error:
        sys.exit(f"error: port {port}: {first_line(error)}. Name another one behind the folder.")
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    _main(sys.argv[1:])
