"""Whether a run gets anywhere: what of it is safe on disk, as one line, and how many starts added nothing to it.

A job that is requeued for ever without getting further costs a cluster its time and nobody notices. So every start of a
Slurm job notes what there is when it begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from trainer.markers import STAGES, read_marker
from trainer.paths import RunFolder, write_atomic
from trainer.train.checkpoint.format import DamagedCheckpoint, published, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a Slurm job: its number, how often it had been requeued, and what there was when it began.

    ``began``: ISO 8601, in UTC. ``ended``: the exit code of its step, None while it runs or when it was killed.
    """

    job: int
    restarts: int
    began: str
    progress: str
    ended: int | None = None
    why: str = ""


def progress_of(folder: RunFolder) -> str:
    """What is safe on disk: the newest whole checkpoint and the finished stages; another text is another state.

    Manifests and the sizes of files are looked at; a resume reads every byte.
    """
    finished = [marker.finished for stage in STAGES if (marker := read_marker(folder, stage)) is not None]
    return f"checkpoint {_newest_whole(folder)}; {len(finished)} stages, the last at {max(finished, default='-')}"


def _newest_whole(folder: RunFolder) -> str:
    for path in published(folder.checkpoints):  # the newest first
        try:
            return f"{path.name} {verify(path, contents=False).sha256[:12]}"
        except DamagedCheckpoint:
            continue
    return "none"


def stalls(starts: Sequence[Start], progress: str) -> int:
    """How many of the last starts in a row began with what there is now."""
    count = 0
    for start in reversed(starts):
        if start.progress != progress:
            break
        count += 1
    return count


def read_starts(folder: RunFolder) -> list[Start]:
    """The starts on record; none where the record is missing or damaged: it only limits what is tried again."""
    try:
        return msgspec.json.decode(folder.starts_json.read_bytes(), type=list[Start])
    except (OSError, msgspec.DecodeError):
        return []


def last_end(folder: RunFolder, job: int) -> Start | None:
    """The last start of a job on record, once it has ended; None: there is none, or it could not say that it ended."""
    last = next((start for start in reversed(read_starts(folder)) if start.job == job), None)
    return None if last is None or last.ended is None else last


def write_starts(folder: RunFolder, starts: Sequence[Start]) -> None:
    """Replace the record."""
    write_atomic(folder.starts_json, msgspec.json.format(msgspec.json.encode(starts), indent=1) + b"\n")
