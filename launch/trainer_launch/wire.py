"""One TCP connection between the agents of two machines: JSON objects, one a line, and a sign of life every 2 s.

A process that is killed closes its connection, and the other end knows at once. A machine that loses power or network,
and a process that hangs, close nothing: silence for ``SILENCE_SECONDS`` means the same.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

Message = dict[str, Any]

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 10.0
LONGEST_LINE = 1 << 22
_BEAT: Message = {"beat": 1}


class WireError(Exception):
    """The other end is gone, or does not speak this protocol; the text says which."""


class Wire:
    """A connected socket that talks in messages. Sending is safe from any thread; receiving is for one."""

    def __init__(self, connection: socket.socket, *, beat: float = BEAT_SECONDS, silence: float = SILENCE_SECONDS):
        self._socket = connection
        self._socket.settimeout(silence)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._beat, self._silence = beat, silence

    def send(self, message: Message) -> None:
        """Send ``message``; when the other end is gone, ``receive`` is what says so."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> Message:
        """Wait for the next message that is no sign of life.

        Raises:
            WireError: the connection is closed, silent for too long, or used by somebody else.
        """
        while True:
            message = self._receive()
            if message != _BEAT:
                return message

    def _receive(self) -> Message:
        try:
            line = self._lines.readline(LONGEST_LINE)
        except TimeoutError:
            raise WireError(f"not heard of for {self._silence:.0f} s") from None
        except (OSError, ValueError):  # ValueError: closed here meanwhile
            raise WireError("the connection broke") from None
        if not line.endswith(b"\n"):
            raise WireError("the connection was closed")
        try:
            message: object = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise WireError("what came is not a message of ours")
        return cast("Message", message)

    def keep_alive(self) -> None:
        """Give signs of life from now on."""
        threading.Thread(target=self._give_signs, daemon=True).start()

    def on_messages(self, deliver: Callable[[Message], None], lost: Callable[[str], None]) -> None:
        """Receive in a thread of its own: every message goes to ``deliver``, the end of the connection to ``lost``."""
        threading.Thread(target=self._pump, args=(deliver, lost), daemon=True).start()

    def close(self) -> None:
        """Hang up; what was sent before still arrives."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes up who reads, who would otherwise hold the lock below
        self._lines.close()
        self._socket.close()

    def _give_signs(self) -> None:
        while not self._closed.wait(self._beat):
            self.send(_BEAT)

    def _pump(self, deliver: Callable[[Message], None], lost: Callable[[str], None]) -> None:
        while True:
            try:
                message = self.receive()
            except WireError as fault:
                if not self._closed.is_set():
                    lost(str(fault))
                return
            deliver(message)
