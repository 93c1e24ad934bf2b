"""The agent of every machine but node 0: finds the chair, follows its orders, and says how they went."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from queue import SimpleQueue

from trainer_launch.meeting import LOST_GRACE_SECONDS, Hello, Line, MeetingError, name_of
from trainer_launch.node import FailureThere, PeerNews, PublisherEnded, StopThere
from trainer_launch.verdict import AGAIN, NodeResult
from trainer_launch.wire import Message, Wire, WireError

RETRY_SECONDS = 0.5


class Seat:
    """Any other machine. ``orders`` gives what the chair wants, one message after the other."""

    def __init__(self, wire: Wire, chair: str, token_digest: str) -> None:
        self._wire, self._chair = wire, chair
        self.token_digest = token_digest
        self._line = Line()
        self._orders: SimpleQueue[Message] = SimpleQueue()

    def take(self, hello: Hello) -> None:
        """Say hello and be let in.

        Raises:
            MeetingError: the chair refused, and why, or hung up.
        """
        self._wire.send({"hello": asdict(hello)})
        try:
            answer = self._wire.receive()
        except WireError as fault:
            answer = {"refused": f"it hung up: {fault}"}
        if "welcome" not in answer:
            reason = answer.get("refused") or answer.get("cause") or "an answer of another program"
            do = "see what node 0 printed; start the same command on all machines"
            raise MeetingError(f"node 0 ({self._chair}) does not let this machine in", got=str(reason), do=do)
        self._wire.on_messages(self._hear, self._lose)

    def _hear(self, message: Message) -> None:
        if "stop" in message:
            self._line.tell(StopThere(signal.Signals[message["stop"]]))
        elif "failed" in message:
            self._line.tell(FailureThere(str(message["failed"]), float(message["grace"])))
        elif "published" in message:
            self._line.tell(PublisherEnded())
        else:
            self._line.forget()
            self._orders.put(message)

    def _lose(self, why: str) -> None:
        cause = f"{name_of(0, self._chair)}: its agent was killed, or the machine is lost ({why})"
        self._line.tell(FailureThere(cause, LOST_GRACE_SECONDS))
        self._orders.put({"finish": AGAIN, "cause": cause})

    def next_order(self) -> Message:
        """Wait for what the chair wants: ``start`` or ``finish``."""
        return self._orders.get()

    def listen(self, notify: Callable[[PeerNews], None] | None) -> None:
        """See ``node.Peers.listen``."""
        self._line.listen(notify)

    def stop_all(self) -> None:
        """Have all machines stop, while no rank runs here that would pass on a signal."""
        self.stop(signal.SIGTERM)

    def stop(self, number: signal.Signals) -> None:
        """Have all machines stop."""
        self._wire.send({"stop": number.name})

    def failure(self) -> None:
        """Say that a rank of this machine failed."""
        self._wire.send({"failed": 1})

    def report(self, result: NodeResult) -> None:
        """Say how the ranks of this machine ended."""
        self._wire.send({"result": asdict(result)})

    def leave(self) -> None:
        """Hang up."""
        self._wire.close()


def find_chair(host: str, port: int, *, seconds: float) -> Seat:
    """Connect to node 0, which may still have to be started.

    Raises:
        MeetingError: nobody answered within ``seconds``, or somebody who is not node 0.
    """
    wire = Wire(_connect(host, port, time.monotonic() + seconds, f"node 0 does not answer after {seconds:.0f} s"))
    wire.keep_alive()
    try:
        return Seat(wire, host, str(wire.receive()["greeting"]))
    except (WireError, KeyError) as fault:
        wire.close()
        raise MeetingError(
            "what answers is not node 0 of a run",
            got=f"{host}:{port}: {fault}",
            do="another port, launch.address=HOST:PORT on all machines",
        ) from None


def _connect(host: str, port: int, deadline: float, late: str) -> socket.socket:
    pause = threading.Event()
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
        except OSError as fault:
            if time.monotonic() + RETRY_SECONDS >= deadline:
                raise MeetingError(
                    late,
                    got=f"{host}:{port}: {fault.strerror or fault}",
                    do="start the same command with --node-rank 0 on that machine, look whether the name is right and "
                    "no firewall is between, or wait longer with launch.meet_seconds",
                ) from None
            pause.wait(RETRY_SECONDS)
