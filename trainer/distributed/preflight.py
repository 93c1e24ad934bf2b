"""What the ranks of a group check before anything is loaded: all are here, they add up right, they run the same code.

torch alone says "timed out" after half an hour when a rank is missing; here the missing one is named within seconds.
One process alone has nothing to check.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer import console
from trainer.errors import EXIT_FAILURE, RunError, TrainingFault

MEET_SECONDS = 30.0
_PROBE = 1 << 10
"""Numbers in the first sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPoint:
    """Where the ranks meet. ``kept``: the launcher keeps the store there (torchrun does); otherwise rank 0 does.

    ``prefix``: what belongs to this start of the ranks, where the launcher starts them again.
    """

    host: str
    port: int
    kept: bool = False
    prefix: str = ""


def meeting_point(environment: Mapping[str, str]) -> MeetingPoint:
    """Read the launcher's variables.

    Raises:
        RunError: they do not say where the ranks meet.
    """
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise RunError(
            "the launcher's variables are incomplete",
            got=f"MASTER_ADDR={host or '(not set)'}, MASTER_PORT={port or '(not set)'}",
            allowed="the address of rank 0, and a port there",
            do="start with `python -m trainer`, torchrun or `accelerate launch`",
        )
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return MeetingPoint(host=host, port=int(port), kept=kept, prefix=f"trimtab/{attempt}" if kept else "trimtab")


def meet(point: MeetingPoint, rank: int, world_size: int, *, seconds: float) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Wait until all ranks are here; gives the store that they share.

    Raises:
        RunError: naming the ranks that are missing after ``seconds``, or rank 0 cannot be reached.
    """
    try:
        shared = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            point.host,
            point.port,
            world_size,
            is_master=rank == 0 and not point.kept,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as fault:
        raise _unreachable(point, rank, seconds, fault) from None
    store = dist.PrefixStore(point.prefix, shared)  # pyright: ignore[reportPrivateImportUsage]
    keys = [f"here/{number}" for number in range(world_size)]
    store.set(keys[rank], "1")
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        missing = [number for number, key in enumerate(keys) if not store.check([key])]
        raise RunError(
            f"not all ranks are here after {seconds:.0f} s",
            where=f"{point.host}:{point.port}",
            got=f"missing: rank {', '.join(str(number) for number in missing)} of {world_size}",
            allowed="every rank",
            do="see the logs of these ranks; where loading libraries takes longer (a cold network file system), raise "
            "launch.meet_seconds",
        ) from None
    return store


def _unreachable(point: MeetingPoint, rank: int, seconds: float, fault: Exception) -> RunError:
    said = str(fault).splitlines()[0]
    return RunError(
        f"rank {rank} cannot listen" if rank == 0 and not point.kept else f"rank {rank} does not reach rank 0",
        where=f"{point.host}:{point.port}",
        got=f"after {seconds:.0f} s: {said}" if "EADDRINUSE" not in said else said,
        do="look whether rank 0 runs, the address is right there, the port is free, and no firewall is between",
    )


@contextmanager
def no_longer_than(seconds: float, rank: int) -> Iterator[None]:
    """End this process when the block takes longer: a collective that hangs can be left in no other way."""

    def leave() -> None:
        console.error(
            f"rank {rank}: the ranks have met, but could not compute together within {seconds:.0f} s: they may use "
            "the wrong network (set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to its interface), or a firewall is "
            "between them"
        )
        os._exit(EXIT_FAILURE)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_sum(rank: int, world_size: int, device: torch.device | None) -> None:
    """Add up over all ranks, on the device on which training will, and compare with the sum that it has to be.

    Raises:
        TrainingFault: it is another one.
    """
    numbers = torch.arange(_PROBE, dtype=torch.float32, device=device)
    found = numbers + rank
    dist.all_reduce(found)
    right = numbers * world_size + world_size * (world_size - 1) // 2
    if not torch.equal(found, right):
        wrong = (found != right).sum().item()
        raise TrainingFault(
            "the ranks do not add up right",
            got=f"{wrong} of {_PROBE} sums over {world_size} ranks are wrong on rank {rank}",
            allowed="whole numbers, to the last digit",
            do="test the network and the GPUs: training would go wrong silently",
        )


def require_same_code(told: Sequence[tuple[str, str, Any]]) -> None:
    """Compare (host, digest of the source, version of torch) of all ranks.

    Raises:
        RunError: naming ranks and hosts that differ from rank 0.
    """
    host, code, version = told[0]
    other = [
        f"rank {rank} on {there} has " + ("other code" if digest != code else f"torch {torch_there}")
        for rank, (there, digest, torch_there) in enumerate(told)
        if (digest, torch_there) != (code, version)
    ]
    if other:
        raise RunError(
            "the ranks do not run the same code",
            got=f"rank 0 on {host} has code {code[:10]} and torch {version}; {'; '.join(other)}",
            allowed="one version of the program and of torch",
            do="give all machines the same installation, on a shared file system or by the same commands",
        )
