"""Several machines on this one: agents as processes of their own, and a program that stands in for ssh."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch_fixtures import StandIn

from trainer_launch.chair import Chair, open_chair
from trainer_launch.run import free_port
from trainer_launch.seat import Seat, find_chair

LAUNCH = Path(__file__).parents[2] / "launch"
TOKEN = "0123"
HERE = "127.0.0.1"

AGENT = """
import dataclasses, sys
sys.path.insert(0, {launch!r})
from trainer_launch.meeting import Hello
from trainer_launch.run import run_as_ordered
from trainer_launch.seat import find_chair
from trainer_launch.spec import LaunchSpec

seat = find_chair({host!r}, {port}, seconds=60)
seat.take(Hello(node=1, host="two", token={token!r}))
print("seated", flush=True)
spec = {spec!r}
while "start" in (order := seat.next_order()):
    run_as_ordered(spec, seat, order["start"], lambda text: print(text, flush=True))
print("end:", order["finish"], order["cause"], flush=True)
seat.leave()
sys.exit(order["finish"])
"""
"""The agent of node 1, as the driver would be it."""

SSH = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    del words[:2]
host, line = words
if not host.startswith("127."):
    sys.exit("ssh: Could not resolve hostname " + host) if host != "silent" else __import__("signal").pause()
os.execv("/bin/sh", ["sh", "-c", line])
"""
"""What ssh does, on this machine: options are skipped, hosts that are no loopback address are unknown."""


def stand_in_ssh(folder: Path) -> Path:
    """Write the program; ``launch.ssh=[PATH]``."""
    path = folder / "ssh"
    path.write_text(SSH.format(python=sys.executable))
    path.chmod(0o755)
    return path


@contextmanager
def chair(nodes: int = 2, port: int = 0) -> Iterator[tuple[Chair, int]]:
    """Node 0 at ``port``, or a free one."""
    port = port or free_port(HERE)
    with open_chair(HERE, port, nodes, TOKEN) as made:
        yield made, port


@contextmanager
def agent(ranks: StandIn, port: int) -> Iterator[subprocess.Popen[str]]:
    """The agent of node 1 in a process of its own, seated or about to be; its second line is its rank's first."""
    spec = ranks.spec(processes=1, nodes=2, node_rank=1)
    script = AGENT.format(launch=str(LAUNCH), host=HERE, port=port, token=TOKEN, spec=spec)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ranks.folder)
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def seated(port: int, take: Callable[[Seat], None]) -> Iterator[Seat]:
    """A seat of this process; ``take`` says hello in a thread of its own, while the chair assembles."""
    seat = find_chair(HERE, port, seconds=60)
    thread = threading.Thread(target=take, args=(seat,))
    thread.start()
    try:
        yield seat
    finally:
        thread.join()
        seat.leave()
