"""A stand-in for a W&B server, on 127.0.0.1: what the client and ``wandb agent`` say, both real, is kept and answered.

It is a contract test of the client's side and no W&B server: there is no page, no account and nothing on disk. An
operation that it does not know is answered with an error and kept in ``unknown``, so that a test can fail on it.
History is kept by line number, as the service keeps it: a line that a client sends again replaces itself.

``python tests/unit/wandb_server.py PORT`` serves until it is ended, for a look by hand: ``GET /state`` says what came.
"""

import gzip
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wandb_operations import Store

KEY = "local" + "0" * 40
"""An API key that the client takes for one."""


@dataclass(frozen=True)
class Request:
    """One request: ``operation`` is that of GraphQL, or empty; ``headers`` without Authorization; ``body`` unpacked."""

    method: str
    path: str
    operation: str
    headers: dict[str, str]
    body: bytes


class WandbServer(Store):
    """The stand-in. It can be stopped and started again on its port; what arrived stays.

    ``refuses``: answer everything with 401. ``delay``: seconds before every answer.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        # Bound for as long as this object lives, without listening: nobody else gets the port of a stopped server.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._held.bind(("127.0.0.1", port))
        self.port: int = self._held.getsockname()[1]
        self.refuses = False
        self.delay = 0.0
        self.requests: list[Request] = []
        self.authorizations: set[str] = set()
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._stopping = threading.Event()
        self._http: _Http | None = None

    def __enter__(self) -> "WandbServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._held.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a client comes here and nowhere else."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def start(self) -> None:
        """Serve, on the port of the time before."""
        self._stopping.clear()
        self._http = _Http(self)
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Go away as a killed process does: nothing listens, open connections are cut."""
        self._stopping.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.cut()
            self._http = None

    def wait_for(self, what: Callable[["WandbServer"], bool], *, seconds: float = 60.0) -> bool:
        """Wait until ``what`` holds, which is asked after every request."""
        with self.changed:
            return self.changed.wait_for(lambda: what(self), timeout=seconds)

    def pause(self) -> None:
        """The delay of a slow server, cut short when it is stopped."""
        if self.delay:
            self._stopping.wait(self.delay)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = True
    block_on_close = False

    def __init__(self, server: WandbServer) -> None:
        self.wandb = server
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", server.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was cut off, is no news."""

    def cut(self) -> None:
        """Close what is still open."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        wandb = self.server.wandb
        if self.path == "/state":
            self._reply({"runs": {name: vars(run) | {"files": list(run.files)} for name, run in wandb.runs.items()}})
        elif self._taken("", b""):
            self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if self._taken("", body):
            with self.server.wandb.changed:
                self.server.wandb.put(self.path, body)
                self.server.wandb.changed.notify_all()
            self._reply({})

    def do_POST(self) -> None:
        wandb, body = self.server.wandb, self._body()
        if self.path.startswith("/graphql"):
            query = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            operation = query.get("operationName") or (named[1] if named else "anonymous")
            if not self._taken(operation, body):
                return
            with wandb.changed:
                data = wandb.answer(operation, query.get("variables") or {})
                wandb.changed.notify_all()
            errors = [{"message": f"unknown operation {operation}"}]
            self._reply({"data": data} if data is not None else {"data": None, "errors": errors})
        elif self.path.endswith("/file_stream") and self._taken("", body):
            name = self.path.split("/")[-2]
            with wandb.changed:
                wandb.stream(name, json.loads(body))
                wandb.changed.notify_all()
            self._reply({"limits": {"rate_limit_seconds": 1}, "stopped": name in wandb.stopped})
        elif self._taken("", body):
            wandb.unknown.append(f"POST {self.path}")
            self._reply({}, 404)

    def _taken(self, operation: str, body: bytes) -> bool:
        """Keep the request; False: it was refused."""
        wandb = self.server.wandb
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        wandb.authorizations.add(self.headers.get("Authorization") or "")
        wandb.requests.append(Request(self.command, self.path, operation, headers, body))
        wandb.pause()
        if wandb.refuses:
            self._reply({"errors": [{"message": "user is not logged in"}]}, 401)
        return not wandb.refuses

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: Any, code: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    with WandbServer(int(sys.argv[1])) as running:
        print(f"listening at {running.url}", flush=True)
        threading.Event().wait()
