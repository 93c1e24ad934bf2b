"""Which process may write to a run: the one that took it over last, whatever the others still believe.

A lock is not enough. After a network partition or a double requeue two processes of one run are alive, on machines that
do not see each other, and either believes that the run is its own. So each start of the training takes the next
generation: a folder ``checkpoints/.generation-00000003``, made by a ``mkdir`` that only one process can win. All that
is staged for a checkpoint or on its way out lies in that folder, and taking over moves the folders of all older
generations away. What an older process renames then no longer exists: no check can come too early, because there is
none between looking and writing.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.ranks import Ranks
from trainer.errors import RunError
from trainer.paths import fsync_directory

_GENERATION = re.compile(r"\.generation-(\d{8})")
_LEFTOVERS = (".stage-*", ".removed-*")


class Fenced(RunError):
    """Another process has taken over this run; this one must not write to it any more."""


@dataclass(frozen=True, slots=True)
class Fence:
    """The right of one ``generation`` to change the checkpoints in ``directory``."""

    directory: Path
    generation: int

    @property
    def space(self) -> Path:
        """The folder in which everything lies that is not a checkpoint yet, or no longer."""
        return self.directory / f".generation-{self.generation:08d}"

    def holds(self) -> bool:
        """Whether no newer process has taken over."""
        return self.space.is_dir()

    def check(self) -> None:
        """Go on only if no newer process has taken over.

        Raises:
            Fenced: one has.
        """
        if not self.holds():
            raise fenced(self.directory, self.generation)


def fenced(directory: Path, generation: int) -> Fenced:
    """The error of a process that is no longer the newest of its run."""
    newest = max(_generations(directory), default=0)
    return Fenced(
        "another process has taken over this run; nothing more of this one is written",
        where=str(directory.parent),
        got=f"generation {generation}, and the run is at {newest}",
        allowed="the newest one",
        do="leave the run to the other process; the same command goes on from its checkpoints once it has ended",
    )


def claim(directory: Path) -> Fence:
    """Take the run over: from now on no older process can publish a checkpoint or delete one.

    Raises:
        Fenced: a still newer process did the same at this moment.
        OSError: the folder cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        number = max(_generations(directory), default=0) + 1
        own = Fence(directory, number)
        try:
            own.space.mkdir()
        except FileExistsError:
            continue
        break
    older = [Fence(directory, other).space for other in _generations(directory) if other < number]
    for path in [*older, *(path for pattern in _LEFTOVERS for path in directory.glob(pattern))]:
        going = own.space / f"gone{path.name}"
        try:
            path.rename(going)
        except FileNotFoundError:
            own.check()  # or else a newer one has moved it
            continue
        shutil.rmtree(going)
    fsync_directory(directory)
    return own


def claim_together(ranks: Ranks, directory: Path) -> Fence:
    """Rank 0 takes the run over for all ranks; called by all of them, before anybody looks for a checkpoint.

    Raises:
        RunError: on all ranks, when it could not.
    """
    generation, problem = 0, ""
    if ranks.is_first:
        try:
            generation = claim(directory).generation
        except (OSError, Fenced) as fault:
            problem = str(fault)
    generation, problem = ranks.gather((generation, problem))[0]
    if problem:
        raise RunError(
            "this run cannot be taken over", where=str(directory), got=problem, do="check the disk of the run folder"
        )
    return Fence(directory, generation)


def _generations(directory: Path) -> list[int]:
    found = [_GENERATION.fullmatch(path.name) for path in directory.iterdir()] if directory.is_dir() else []
    return [int(match.group(1)) for match in found if match]
