"""What a run spends, written down while it spends it: ``cost/*.jsonl`` of the run folder.

Each process that computes for a run appends to a file of its own, every half minute and at the end of a stage, what it
used since its last line. Lines are differences, so a run's account is their sum: over ranks, machines, restarts, and
stages that were done twice. A process that is killed takes no more than its last half minute with it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from trainer.paths import without_links

Meter = Literal["", "counter", "power"]
"""How a device told its energy: not at all, by a counter of joules, or by its power, which was read now and then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spell:
    """What one process used between two lines.

    ``stage``: of the run; ``start``: before, between and after stages (starting, loading). ``began``: when the process
    began, ISO 8601 in UTC: the same in all its lines. ``rank``: -1 for a stage that the driver runs in one process.
    ``seconds``: wall time. ``gpus``: GPUs that the process held, ``gpu``: their name. ``core_seconds``: CPU time of all
    its threads. ``gpu_joules``: of its GPU; ``cpu_joules``: of all sockets of its machine, others' work included, told
    by one process a machine (0 from the rest). None: not measured.
    """

    stage: str
    began: str
    rank: int
    seconds: float
    gpus: int = 0
    gpu: str = ""
    core_seconds: float = 0.0
    gpu_joules: float | None = None
    gpu_meter: Meter = ""
    cpu_joules: float | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """All lines of a run; ``unreadable``: lines that a killed process or a full disk left half written."""

    spells: list[Spell]
    unreadable: int = 0


def append(path: Path, spell: Spell) -> None:
    """Add one line to a ledger that only this process writes.

    Raises:
        OSError: it cannot be written; what was written of the line is taken back if possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = msgspec.json.encode(spell) + b"\n"
    with open(path, "a+b", buffering=0, opener=without_links) as handle:
        size = handle.seek(0, os.SEEK_END)
        if size:
            handle.seek(size - 1)
            if handle.read(1) != b"\n":
                line = b"\n" + line  # a process before this one was killed within its line
        written = handle.write(line)
        if written != len(line):
            handle.truncate(size)
            raise OSError(f"{path}: {written} of {len(line)} bytes written")


def read_account(folder: Path) -> Account:
    """Every line of the ledgers in ``folder``; empty where there is none, as of runs before there were ledgers."""
    spells: list[Spell] = []
    unreadable = 0
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                spells.append(msgspec.json.decode(line, type=Spell))
            except msgspec.DecodeError:
                unreadable += bool(line)
    return Account(spells, unreadable)
