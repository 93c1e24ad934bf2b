"""From a command and a list of machines to the exact words that start each of them. Pure functions, like ``command``.

What they return is recorded in ``tests/golden/launch`` and compared word by word.
"""

import ipaddress
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PORT = 29500
"""torchrun's own."""
SSH_OPTIONS = (
    "-o",
    "BatchMode=yes",  # never ask for a password: nobody would answer
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
_HOST = re.compile(r"(?:[A-Za-z0-9_][\w.\-]*@)?[A-Za-z0-9_:\[][\w.\-:\]%]*")
_SENT = re.compile(r"PYTHONPATH|LD_LIBRARY_PATH|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|(?:NCCL|TORCH_NCCL|GLOO)_\w+")
BEHIND_SSH = str(Path(__file__).with_name("behind_ssh.py"))
OVER_SSH = str(Path(__file__).with_name("over_ssh.py"))


@dataclass(frozen=True, slots=True)
class Address:
    """Where the agents of a run meet."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address | None:
    """``n0``, ``n0:29501``, ``10.0.0.1``, ``[fd00::1]:29501``; None for anything else."""
    try:
        return Address(str(ipaddress.ip_address(text.strip("[]"))), DEFAULT_PORT)
    except ValueError:
        host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(DEFAULT_PORT)
    bare = host.removeprefix("[").removesuffix("]")
    if not is_host(host) or "@" in host or (":" in host and bare == host):
        return None
    if not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return Address(bare, int(port))


def is_host(text: str) -> bool:
    """Whether ``text`` is a host for ssh (``n1``, ``me@n1``) and could not be taken for one of its options."""
    return _HOST.fullmatch(text) is not None


def host_name(text: str) -> str:
    """The machine of ``me@n1``."""
    return text.rpartition("@")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class FromOutside:
    """Which machine this is, as far as the variables of another launcher say; "" and None: they do not."""

    node_rank: int | None = None
    nodes: int | None = None
    address: str = ""


def from_environment(environment: Mapping[str, str]) -> FromOutside:
    """What torchrun would read out of ``environment``: ``PET_NODE_RANK`` and its kin, and the names without ``PET_``.

    Something that is no number counts as not given (torchrun's ``PET_NNODES`` may be a range).
    """

    def text(name: str) -> str:
        return environment.get(f"PET_{name}", environment.get(name, ""))

    def number(name: str) -> int | None:
        return int(text(name)) if text(name).isdecimal() else None

    host, port = text("MASTER_ADDR"), text("MASTER_PORT")
    return FromOutside(
        node_rank=number("NODE_RANK"), nodes=number("NNODES"), address=f"{host}:{port}" if host and port else host
    )


def node_command(words: Sequence[str], node: int) -> tuple[str, ...]:
    """What starts ``node``: ``words`` (a command without its number), equal on all machines but for the number."""
    return (*words, "--node-rank", str(node))


def shell_line(words: Sequence[str]) -> str:
    """``words`` as they are typed into a shell."""
    return shlex.join(words)


def sent_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that go to machines behind ssh: paths and networking. No secret does: others could read it."""
    return {name: environment[name] for name in sorted(environment) if _SENT.fullmatch(name)}


def remote_line(words: Sequence[str], *, folder: str, python: str, variables: Mapping[str, str]) -> str:
    """The line for the shell at the other end: ``words`` in ``folder``, with signals taken from standard input."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *settings, python, '-I', '-S', BEHIND_SSH, *words])}"


def probe_line(*, folder: str, python: str) -> str:
    """The line that ends well where ``folder`` and ``python`` are."""
    return f"cd {shlex.quote(folder)} && exec {shlex.join([python, '-I', '-S', '-c', ''])}"


def ssh_words(ssh: Sequence[str], host: str, line: str) -> tuple[str, ...]:
    """The ssh command that runs ``line`` on ``host``."""
    return (*ssh, *SSH_OPTIONS, host, line)


def relay_words(python: str, words: Sequence[str]) -> tuple[str, ...]:
    """What holds the ssh command ``words``: signals to it become words on the other end's standard input."""
    return (python, "-I", "-S", OVER_SSH, *words)
