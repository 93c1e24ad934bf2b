"""Whether several machines can do one run: what each says of itself, and files that all of them have to see.

Done by the agents, before any rank is started and torch is loaded anywhere. That ranks meet and compute together is
checked by themselves (``trainer/distributed/preflight.py``).
"""

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from trainer.drive.environment import installed
from trainer.errors import RunError
from trainer.fingerprint import code_digest
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan
from trainer_launch.meeting import Hello, token_digest

COMPUTE = ("torch", "transformers", "accelerate", "deepspeed", "peft", "numpy", "numba", "safetensors")
"""Packages whose version changes what ranks compute or how they talk."""
OWN = ("threads", "machine", "considered")
"""What of a plan each machine may have its own way."""
SEEN_SECONDS = 20.0
"""Network file systems show a new file to other machines after a while."""
SHOWN = 3


def facts(plan: RunPlan) -> dict[str, Any]:
    """What has to be the same on all machines, as plain values."""
    described = cast("dict[str, Any]", msgspec.to_builtins(plan))
    return {
        "plan": {name: value for name, value in described.items() if name not in OWN},
        "code": code_digest(),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "packages": installed(COMPUTE),
    }


def difference(here: dict[str, Any], there: dict[str, Any]) -> str:
    """In what two machines' facts differ, ``here`` being node 0's; "" when they are the same."""
    one, two = _flat(here), _flat(there)
    names = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    if not names:
        return ""
    shown = [f"{_title(name)} is {_short(two.get(name))} there and {_short(one.get(name))} on node 0" for name in names]
    return "; ".join(shown[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for name, entry in cast("dict[str, object]", value).items():
        flat |= _flat(entry, f"{prefix}.{name}" if prefix else name)
    return flat


def _title(name: str) -> str:
    if name == "code":
        return "the program's source"
    return name.removeprefix("plan.config.").removeprefix("plan.").removeprefix("packages.")


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:10]}..." if len(text) == 64 and " " not in text else text


# -- files that everybody sees -------------------------------------------------------------------------------------


@contextmanager
def token_left(folder: RunFolder, cache: Path, token: str) -> Iterator[None]:
    """While the block runs, ``token`` is in the run folder and in the cache, for the other machines to find.

    Raises:
        RunError: the cache cannot be written to.
    """
    places = (_token_file(folder.launch), _token_file(cache))
    try:
        for place in places:
            write_atomic(place, token)
        yield
    except PermissionError as fault:
        raise RunError(
            "cannot write into the cache",
            where=str(cache),
            got=fault.strerror or str(fault),
            allowed="a folder that you may write to",
            do="set run.cache to another place",
        ) from None
    finally:
        for place in places:
            place.unlink(missing_ok=True)


def hello_of(node: int, plan: RunPlan, digest: str) -> Hello:
    """What this machine says to node 0, after a look for the files that node 0 left (``digest``: of their token)."""
    folder = RunFolder(Path(plan.run_dir))
    host = socket.gethostname()
    token, problem = "", ""
    for place, key in ((folder.launch, "run.root"), (Path(plan.cache_dir), "run.cache")):
        found = _find(_token_file(place), digest)
        if found is None:
            problem = f"it does not see what node 0 wrote into {place}; all need one shared folder there ({key})"
            break
        token = found
    if not problem:
        problem = _leave_trace(folder, node, token)
    return Hello(node=node, host=host, token=token, facts=facts(plan), problem=problem)


def why_not(hello: Hello, mine: dict[str, Any], folder: RunFolder) -> str:
    """Why node 0, whose facts are ``mine``, cannot work with the machine that said ``hello``; "": it can."""
    trace = _trace(folder, hello.node)
    if _find(trace, token_digest(hello.token)) is None:
        return f"node 0 does not see what it wrote into {trace.parent}; all need one shared folder there (run.root)"
    trace.unlink(missing_ok=True)
    return difference(mine, hello.facts)


def _token_file(place: Path) -> Path:
    return place / ".meeting"


def _trace(folder: RunFolder, node: int) -> Path:
    return folder.launch / f".node{node}"


def _leave_trace(folder: RunFolder, node: int, token: str) -> str:
    try:
        write_atomic(_trace(folder, node), token)
    except OSError as fault:
        return f"it cannot write into {folder.root}: {fault.strerror}"
    return ""


def _find(path: Path, digest: str) -> str | None:
    """The token in ``path`` once it is the one of ``digest``; None when it has not become so."""
    deadline, pause = time.monotonic() + SEEN_SECONDS, threading.Event()
    while True:
        try:
            token = path.read_text(encoding="utf-8")
        except OSError:
            token = ""
        if token_digest(token) == digest:
            return token
        if time.monotonic() >= deadline:
            return None
        pause.wait(0.5)
