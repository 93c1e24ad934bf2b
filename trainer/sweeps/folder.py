"""The folder of a sweep: its settings, its trials, and who may do what at this moment.

Any number of processes on any number of machines may work in one such folder. Whose turn it is is decided behind one
lock (``sweep.lock``), and a trial belongs to whoever holds the lock of its claim. Locks end with the processes that
hold them, so a claim of a dead worker is free at once, and nobody has to guess from times whether somebody is alive.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from trainer.errors import RunError
from trainer.identity import flatten
from trainer.paths import RunFolder, without_links, write_atomic

FORMAT = 1


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """Names inside the folder of a sweep."""

    root: Path

    @property
    def settings_json(self) -> Path:
        """What the sweep was begun with."""
        return self.root / "sweep.json"

    @property
    def journal(self) -> Path:
        """Optuna's journal: every trial with its parameters and figures."""
        return self.root / "journal.log"

    @property
    def lock(self) -> Path:
        """Held while somebody decides whose turn it is."""
        return self.root / "sweep.lock"

    @property
    def trials_csv(self) -> Path:
        """One line per trial."""
        return self.root / "trials.csv"

    @property
    def report_html(self) -> Path:
        """Plots of the search, in one file."""
        return self.root / "report.html"

    @property
    def importance_png(self) -> Path:
        """Importance of the parameters."""
        return self.root / "importance.png"

    @property
    def parallel_png(self) -> Path:
        """Every trial as a line through its parameters."""
        return self.root / "parallel.png"

    @property
    def conf(self) -> Path:
        """A config folder (``--config-dir``) with the experiment ``best``."""
        return self.root / "conf"

    @property
    def best_yaml(self) -> Path:
        """The best trial as an experiment."""
        return self.conf / "experiment" / "best.yaml"

    def run(self, number: int) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.root / "trials" / f"{number:04d}")

    def claim(self, number: int) -> Path:
        """Held by whoever works on the trial."""
        return self.root / "claims" / f"{number:04d}"

    def log(self, number: int) -> Path:
        """Everything that the trial printed, over all its starts."""
        return self.root / "logs" / f"{number:04d}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``sweep.json``: what makes trials comparable. ``trials`` is the budget, the only one that may change.

    ``space``: the file's content that matters; ``words``: what all trials have; ``identity``: of the run that they
    vary, which knows data and base model.
    """

    format: int = FORMAT
    name: str
    metric: str
    goal: str
    method: str
    pruner: str
    seed: int
    words: list[str]
    space: dict[str, Any]
    identity: str
    trials: int


def open_folder(folder: SweepFolder, settings: Settings) -> Settings:
    """Make the folder of a new sweep, or check that it holds this one; returns the settings that count.

    A higher number of trials is taken over, for everybody who works in the folder.

    Raises:
        RunError: it cannot be written, has no file locks, or holds a sweep with other settings (with what differs).
    """
    try:
        for part in (folder.root, folder.claim(0).parent, folder.log(0).parent):
            part.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.root, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder.root))
    except OSError as fault:
        raise RunError(
            "the folder of the sweep cannot be written",
            where=str(folder.root),
            got=fault.strerror or str(fault),
            allowed="a folder of yours, shared by all machines that take part",
            do="set sweep.dir",
        ) from None
    with deciding(folder):
        stored = read_settings(folder)
        if stored is None:
            if folder.journal.exists():
                raise RunError(
                    "this folder has the journal of something else",
                    where=str(folder.journal),
                    got="a journal without sweep.json",
                    allowed="a new folder, or one that a sweep of this program made",
                    do="set sweep.dir to another folder",
                )
            write_settings(folder, settings)
            return settings
        _require_same(folder, stored, settings)
        if settings.trials > stored.trials:
            stored = replace(stored, trials=settings.trials)
            write_settings(folder, stored)
        return stored


def read_settings(folder: SweepFolder) -> Settings | None:
    """Read ``sweep.json``; None: there is none yet.

    Raises:
        RunError: it is damaged, or of another format.
    """
    try:
        return msgspec.json.decode(folder.settings_json.read_bytes(), type=Settings)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as fault:
        raise RunError(
            "the settings of the sweep cannot be read",
            where=str(folder.settings_json),
            got=str(fault),
            allowed="the file as it was written",
            do="set sweep.dir to another folder",
        ) from None


def write_settings(folder: SweepFolder, settings: Settings) -> None:
    """Write ``sweep.json``."""
    write_atomic(folder.settings_json, msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")


def _require_same(folder: SweepFolder, stored: Settings, settings: Settings) -> None:
    before, now = flatten(asdict(stored)), flatten(asdict(settings))
    names = [name for name in dict.fromkeys([*before, *now]) if name != "trials"]
    differing = [
        f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]
    if differing:
        raise RunError(
            "this folder holds a sweep with other settings",
            where=str(folder.root),
            got="; ".join(differing),
            allowed="the same command again, with more sweep.trials, or other sweep.workers and sweep.retries",
            do="type the command as it was, or set sweep.dir to another folder",
        )


@contextmanager
def deciding(folder: SweepFolder) -> Iterator[None]:
    """Wait for the sweep's lock and hold it; nobody else decides anything meanwhile.

    Raises:
        RunError: the file system has no locks.
    """
    handle = without_links(str(folder.lock), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        _lock(handle, fcntl.LOCK_EX, folder)
        yield
    finally:
        os.close(handle)


def take_claim(folder: SweepFolder, number: int) -> int | None:
    """Take the claim of a trial: its descriptor, to be closed by the caller; None while somebody else holds it.

    A child that inherits the descriptor holds the claim as well, until it ends.

    Raises:
        RunError: the file system has no locks.
    """
    handle = without_links(str(folder.claim(number)), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _lock(handle: int, how: int, folder: SweepFolder) -> None:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError as fault:
        raise RunError(
            "the file system of the sweep has no file locks",
            where=str(folder.root),
            got=fault.strerror or str(fault),
            allowed="a file system with flock (local disks, NFS from version 4 on, Lustre mounted with -o flock)",
            do="set sweep.dir to a folder on another file system",
        ) from None
