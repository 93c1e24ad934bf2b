"""The agent of node 0 among several machines: waits for the others, speaks for all, and finds the first cause."""

import hmac
import ipaddress
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from trainer_launch.meeting import LOST_GRACE_SECONDS, Hello, Line, MeetingError, first_cause, name_of, token_digest
from trainer_launch.node import GRACE_SECONDS, FailureThere, PeerNews, StopThere
from trainer_launch.verdict import AGAIN, STOPPED, NodeResult
from trainer_launch.wire import SILENCE_SECONDS, Message, Wire, WireError

HANG_UP_SECONDS = 5.0


@dataclass(slots=True)
class _Seated:
    host: str
    wire: Wire


class Chair:
    """Node 0 among ``nodes`` machines. Use as a context manager: at its end all seats are told how the run ended."""

    def __init__(self, listener: socket.socket, *, host: str, nodes: int, token: str) -> None:
        self._token = token
        self._listener = listener
        self._host, self._nodes = host, nodes
        self._seats: dict[int, _Seated] = {}
        self._arrivals: SimpleQueue[tuple[Hello, Wire]] = SimpleQueue()
        self._line = Line()
        self._lock = threading.Lock()
        self._order: list[int] = []  # machines that failed, the first one first
        self._results: dict[int, NodeResult] = {}
        self._changed = threading.Condition(self._lock)
        self._gone: set[int] = set()
        self._wires: list[Wire] = []  # of all who said hello, let in or not
        self._hung_up = 0
        self._over = False
        self._farewell: Message = {"finish": 1, "cause": f"{name_of(0, host)} ended without a word"}
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Chair":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over, farewell = True, self._farewell
        self._send(farewell)
        with self._changed:  # a seat hangs up when it has heard it; closing first could take it from the wire
            self._changed.wait_for(lambda: self._hung_up == len(self._wires), timeout=HANG_UP_SECONDS)
        self._listener.close()
        while not self._arrivals.empty():
            self._wires.append(self._arrivals.get()[1])
        for wire in self._wires:
            wire.close()

    def ends_with(self, code: int, cause: str = "") -> None:
        """What the seats are told at the end: their exit code, and one line."""
        self._farewell = {"finish": code, "cause": cause}

    def assemble(self, check: Callable[[Hello], str], *, seconds: float) -> None:
        """Wait until every machine is here; ``check`` says why one cannot take part, or "".

        Raises:
            MeetingError: naming who is missing after ``seconds``, or who was refused and why.
        """
        deadline = time.monotonic() + seconds
        while len(self._seats) < self._nodes - 1:
            try:
                hello, wire = self._arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise self._missing(seconds) from None
            self._seat(hello, wire, check)
        with self._lock:
            gone = sorted(self._gone)
        if gone:
            raise MeetingError(
                "a machine left before the run began",
                got=name_of(gone[0], self._seats[gone[0]].host),
                do="see what it printed, and start the same commands again",
            )

    def _missing(self, seconds: float) -> MeetingError:
        missing = ", ".join(str(node) for node in range(1, self._nodes) if node not in self._seats)
        there = ", ".join(name_of(node, seat.host) for node, seat in sorted(self._seats.items()))
        return MeetingError(
            f"not all machines are here after {seconds:.0f} s",
            got=f"missing: node {missing}; here: {', '.join(filter(None, [name_of(0, self._host), there]))}",
            do="start the same command with that --node-rank, look whether a firewall is between the machines, or "
            "wait longer with launch.meet_seconds",
        )

    def _seat(self, hello: Hello, wire: Wire, check: Callable[[Hello], str]) -> None:
        node = hello.node
        problem = hello.problem
        if not 0 < node < self._nodes:
            problem = f"there are nodes 0 to {self._nodes - 1}, and 0 is here"
        elif node in self._seats:
            problem = f"node {node} is here already, from {self._seats[node].host}"
        elif not problem and not hmac.compare_digest(hello.token, self._token):
            problem = "it does not see the run folder that node 0 sees"
        problem = problem or check(hello)
        self._wires.append(wire)
        if problem:
            wire.send({"refused": problem})
            wire.on_messages(lambda _: None, lambda _: self._hang_up())
            raise MeetingError(
                f"{name_of(node, hello.host)} cannot take part",
                got=problem,
                do="give all machines the same code, packages, config and folders, and start the same commands again",
            )
        with self._lock:
            self._seats[node] = _Seated(hello.host, wire)
        wire.send({"welcome": 1})
        wire.on_messages(lambda message: self._hear(node, message), lambda why: self._lose(node, why))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed: the run is over
            threading.Thread(target=self._greet, args=(Wire(connection),), daemon=True).start()

    def _greet(self, wire: Wire) -> None:
        wire.keep_alive()
        wire.send({"greeting": token_digest(self._token)})
        try:
            self._arrivals.put((Hello(**wire.receive()["hello"]), wire))
        except (WireError, KeyError, TypeError):
            wire.close()  # somebody else's: a port scanner, a health check

    # -- news ------------------------------------------------------------------------------------------------------

    def _hear(self, node: int, message: Message) -> None:
        name = name_of(node, self._seats[node].host)
        if "stop" in message:
            self._send(message, but=node)
            self._line.tell(StopThere(signal.Signals[message["stop"]]))
        elif "failed" in message:
            self._fail(node, f"{name}: a rank failed", GRACE_SECONDS)
        elif "result" in message:
            result = NodeResult(**message["result"])
            if result.exit_code not in (0, STOPPED):
                self._fail(node, f"{name}: {result.cause}", GRACE_SECONDS)
            self._conclude(node, result)

    def _hang_up(self) -> None:
        with self._changed:
            self._hung_up += 1
            self._changed.notify_all()

    def _lose(self, node: int, why: str) -> None:
        with self._lock:
            self._gone.add(node)
            concluded = self._over or node in self._results
        self._hang_up()
        if not concluded:
            cause = f"its agent was killed, or the machine is lost ({why})"
            self._fail(node, f"{name_of(node, self._seats[node].host)}: {cause}", LOST_GRACE_SECONDS)
            self._conclude(node, NodeResult(exit_code=AGAIN, cause=cause))

    def _fail(self, node: int, cause: str, grace: float) -> None:
        with self._lock:
            known = node in self._order
            self._order.append(node)
        if not known:
            self._send({"failed": cause, "grace": grace}, but=node)
            if node != 0:
                self._line.tell(FailureThere(cause, grace))

    def _conclude(self, node: int, result: NodeResult) -> None:
        with self._changed:
            self._results.setdefault(node, result)
            self._changed.notify_all()

    def _send(self, message: Message, *, but: int = 0) -> None:
        with self._lock:
            wires = [seat.wire for node, seat in self._seats.items() if node != but and node not in self._gone]
        for wire in wires:
            wire.send(message)

    # -- what the agent of node 0 does -----------------------------------------------------------------------------

    def listen(self, notify: Callable[[PeerNews], None] | None) -> None:
        """See ``node.Peers.listen``."""
        self._line.listen(notify)

    def stop(self, number: signal.Signals) -> None:
        """Ask the ranks of all machines to stop."""
        self._send({"stop": number.name})

    def failure(self) -> None:
        """Say that a rank of node 0 failed."""
        self._fail(0, f"{name_of(0, self._host)}: a rank failed", GRACE_SECONDS)

    def start_ranks(self, order: Message) -> None:
        """Have every seat start its ranks; ``order`` is what they need to know."""
        with self._lock:
            self._results = {node: one for node, one in self._results.items() if node in self._gone}
            self._order = [node for node in self._order if node in self._gone]
            gone = sorted(self._gone)
        self._line.forget()
        for node in gone:
            self._line.tell(FailureThere(f"{name_of(node, self._seats[node].host)} has left", LOST_GRACE_SECONDS))
        self._send({"start": order})

    def conclude(self, own: NodeResult) -> NodeResult:
        """Wait for the other machines after node 0 ended as ``own`` says; gives the end of the whole, with its name."""
        if own.exit_code in (0, STOPPED):
            self._send({"published": own.exit_code})
        else:
            self.failure()
        self._conclude(0, own)
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._results) == self._nodes, timeout=GRACE_SECONDS + SILENCE_SECONDS + HANG_UP_SECONDS
            )
            results, order = dict(self._results), list(self._order)
        for node in range(self._nodes):
            results.setdefault(node, NodeResult(exit_code=1, cause="its agent does not say how its ranks ended"))
        node, result = first_cause(results, order)
        if node == 0 and result.exit_code in (0, STOPPED):
            return result
        host = self._host if node == 0 else self._seats[node].host
        cause = f"{name_of(node, host)}: {result.cause}"
        return NodeResult(exit_code=result.exit_code, cause=cause, log=result.log, shown=result.shown and node == 0)


def new_token() -> str:
    """What the chair writes into the run folder before it listens, and every seat has to read there."""
    return secrets.token_hex(16)


def open_chair(host: str, port: int, nodes: int, token: str) -> Chair:
    """Listen at ``port``: of the address that ``host`` is, or where it is a name, of all addresses of this machine.

    A name is often that of 127.0.1.1 on its own machine, where no other one would get through.

    Raises:
        MeetingError: somebody listens there, or it is no address of this machine.
    """
    try:
        listener = _listen(host, port)
    except OSError as fault:
        raise MeetingError(
            "cannot listen where the machines are to meet",
            got=f"{host}:{port}: {os.strerror(fault.errno or 0)}",
            do="another port, launch.address=HOST:PORT on all machines; node 0 has to be the machine of that address",
        ) from None
    return Chair(listener, host=host, nodes=nodes, token=token)


def _listen(host: str, port: int) -> socket.socket:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    return socket.create_server((host, port), family=socket.AF_INET if version == 4 else socket.AF_INET6)
