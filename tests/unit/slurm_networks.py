"""A network for every node of a cluster on this machine, which can be cut: its processes live on, on the same files.

Each node has a network namespace of its own, with one cable (a pair of virtual interfaces) to a bridge at which the
controller listens. That takes root and the command ``ip``; nothing of the machine's own network is touched.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_PREFIX = "10.207.77"
CONTROLLER = f"{_PREFIX}.254"


def why_no_networks() -> str:
    """Why none can be made here; empty: they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (apt-get install iproute2)"
    tried = subprocess.run(["ip", "netns", "add", _name(0)], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        _ip("netns", "del", _name(0))
    return tried.stderr.strip()


def _name(node: int) -> str:
    return f"tt{os.getpid()}n{node}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of nodes 1 to ``count``; the name of a node is its address."""

    count: int

    @property
    def addresses(self) -> list[str]:
        return [f"{_PREFIX}.{node}" for node in range(1, self.count + 1)]

    def inside(self, address: str) -> tuple[str, ...]:
        """Words before a command that runs on a node; ``ip netns exec`` would hide the control groups from it."""
        return ("nsenter", f"--net=/run/netns/{_name(self._node(address))}")

    def cut(self, address: str) -> None:
        """Nothing reaches the node or leaves it; nobody is told."""
        _ip("link", "set", _name(self._node(address)), "down")

    def heal(self, address: str) -> None:
        _ip("link", "set", _name(self._node(address)), "up")

    def _node(self, address: str) -> int:
        return self.addresses.index(address) + 1


@contextmanager
def networks(count: int) -> Iterator[Networks]:
    """Networks for so many nodes, for the block."""
    made, bridge = Networks(count), f"tt{os.getpid()}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{CONTROLLER}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for node, address in enumerate(made.addresses, 1):
            name = _name(node)
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "up0", "netns", name)
            _ip("link", "set", name, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "up0")
            for inner in ("lo", "up0"):
                _ip("-n", name, "link", "set", inner, "up")
        yield made
    finally:
        for node in range(1, count + 1):  # with a namespace its end of the cable goes, and so the other
            subprocess.run(["ip", "netns", "del", _name(node)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)
