"""Rows, licence packages and a loopback dataset hub for the tests of sources, splits, checks and the legal data."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from trainer.samples import Conversation, Message, Origin


def row(
    question: str, answer: str, *, label: str = "", group: str = "", file: str = "a.jsonl", line: int = 1
) -> Conversation:
    """One question with its answer; an answer of "" is an empty assistant turn."""
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    origin = Origin(file, line)
    return Conversation(id=str(origin), origin=origin, messages=turns, answer=answer, label=label, group=group)


def rows(count: int, *, labels: int = 1, per_group: int = 0, file: str = "a.jsonl") -> list[Conversation]:
    """``count`` different rows with labels in turn, and, if wanted, groups of ``per_group`` neighbours."""
    return [
        row(
            f"question {n} of {file}",
            f"label{n % labels}",
            label=f"label{n % labels}",
            group=f"group{n // per_group}" if per_group else "",
            file=file,
            line=n + 1,
        )
        for n in range(count)
    ]


def write_license(
    data: Path, key: str, text: str, *, owner: str = "", category: str = "Permissive", extra: str = ""
) -> None:
    """A licence as the package stores it."""
    folder = data / "licenses"
    folder.mkdir(parents=True, exist_ok=True)
    header = f"key: {key}\nname: {key}\ncategory: {category}\nowner: {owner or key}\n{extra}"
    (folder / f"{key}.LICENSE").write_text(f"---\n{header}---\n\n{text}\n", encoding="utf-8")


def write_rule(data: Path, name: str, text: str, header: str) -> None:
    """A rule as the package stores it."""
    folder = data / "rules"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.RULE").write_text(f"---\n{header}---\n\n{text}\n", encoding="utf-8")


class LoopbackHub:
    """Serves one public dataset ``org/clauses`` with two commits, a gated one and nothing else, over HTTP."""

    def __init__(self, commits: dict[str, dict[str, bytes]], branches: dict[str, str]) -> None:
        self.commits = commits
        self.branches = branches
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlparse(request.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[1:3])
        if name == "org/gated":
            return self.send(request, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if name != "org/clauses" or parts[1 if api else 0] != "datasets":
            return self.send(request, 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        rest = parts[4:] if api else parts[3:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            return self.send(request, 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self.send(request, 200, self.api(commit, rest, body), {})
        content = self.commits[commit].get("/".join(rest[2:]))
        if content is None:
            return self.send(
                request, 404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'}
        return self.send(request, 200, content, headers)

    def api(self, commit: str, rest: list[str], body: bytes) -> object:
        files = self.commits[commit]
        entries = [{"type": "file", "path": path, "size": len(raw), "oid": _oid(raw)} for path, raw in files.items()]
        kind = rest[0] if rest else "revision"
        if kind == "tree":
            folder = "/".join(rest[2:])
            return [entry for entry in entries if str(entry["path"]).startswith(folder)]
        if kind == "paths-info":
            asked = json.loads(body)["paths"]
            return [entry for entry in entries if entry["path"] in asked]
        siblings = [{"rfilename": path} for path in files]
        card = {"license": "cc0-1.0"}
        return {
            "_id": "1",
            "id": "org/clauses",
            "sha": commit,
            "private": False,
            "siblings": siblings,
            "cardData": card,
            "tags": [],
        }

    def send(self, request: BaseHTTPRequestHandler, code: int, content: object, headers: dict[str, str]) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(code)
        for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(raw)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def troubled_hub(fault: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub that "refuses" connections, "says 401" or "never answers", and the requests it got."""
    requests: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            requests.append(self.path)
            if fault == "never answers":
                over.wait()
                return
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if fault == "refuses":
        server.server_close()
        yield url, requests
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield url, requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()
