"""Start what a spec says on this machine: with a port that is free, and with the files to do the same by hand."""

import dataclasses
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from trainer_launch.chair import Chair
from trainer_launch.command import accelerate_config, accelerate_line, torchrun_line
from trainer_launch.node import run_node
from trainer_launch.seat import Seat
from trainer_launch.spec import ANY_PORT, LaunchSpec
from trainer_launch.verdict import NodeResult
from trainer_launch.wire import Message

PORT_TRIES = 3
PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def free_port(address: str) -> int:
    """A TCP port that nobody listens on at ``address`` now. Somebody else may take it before it is used."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def run(spec: LaunchSpec, on_line: Callable[[str], None], *, keep_open: Sequence[int] = ()) -> NodeResult:
    """``run_node``, with a free port where the spec leaves it open; tried again when somebody took it meanwhile."""
    if spec.master_port != ANY_PORT:
        return run_node(spec, on_line, keep_open=keep_open)

    def start(port: int) -> NodeResult:
        return run_node(dataclasses.replace(spec, master_port=port), on_line, keep_open=keep_open)

    return _at_free_port(spec.master_addr, start, on_line)


def run_together(
    spec: LaunchSpec, chair: Chair, on_line: Callable[[str], None], *, keep_open: Sequence[int] = ()
) -> NodeResult:
    """``run`` for node 0 of several machines: every machine starts its ranks, and the whole has one end.

    The port at which the ranks meet is a free one of this machine; the port of the spec is where the agents met.
    """

    def start(port: int) -> NodeResult:
        chair.start_ranks({"port": port, "arguments": list(spec.arguments)})
        own = dataclasses.replace(spec, master_port=port)
        return chair.conclude(run_node(own, on_line, keep_open=keep_open, peers=chair))

    return _at_free_port("", start, on_line)


def _at_free_port(address: str, start: Callable[[int], NodeResult], on_line: Callable[[str], None]) -> NodeResult:
    """``start`` with a port that is free at ``address``, again with another one when somebody took it meanwhile."""
    for attempt in range(1, PORT_TRIES + 1):
        port = free_port(address)
        result = start(port)
        if attempt == PORT_TRIES or not PORT_TAKEN.search(result.cause):
            return result
        on_line(f"warning: port {port} was taken meanwhile; starting the ranks again with another one")
    raise AssertionError("the last try returns")


def run_as_ordered(spec: LaunchSpec, seat: Seat, order: Message, on_line: Callable[[str], None]) -> None:
    """Start this machine's ranks as node 0 wants, and report how they ended."""
    arguments = tuple(str(word) for word in order["arguments"])
    own = dataclasses.replace(spec, master_port=int(order["port"]), arguments=arguments)
    seat.report(run_node(own, on_line, peers=seat))


def write_hand_files(spec: LaunchSpec, folder: Path, *, device: Literal["cpu", "cuda"]) -> list[str]:
    """Write ``folder``/accelerate.yaml and return the two lines that start the same ranks by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "accelerate.yaml"
    config.write_text(accelerate_config(spec, device=device), encoding="utf-8")
    return [torchrun_line(spec), accelerate_line(spec, str(config))]
