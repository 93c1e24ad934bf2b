"""One small file per finished stage, so that the same command never repeats work and never trusts half of it.

A marker is written last, atomically, and names a digest of what the stage depended on. A stage whose digest has not
changed is skipped; a marker that cannot be read counts as absent, because doing the stage again is always right.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trainer.paths import RunFolder, write_atomic

STAGES = ("prepare", "baseline", "train", "evaluate", "export", "verify", "card")
"""In the order in which a run goes through them."""
BY_RANKS = ("baseline", "train", "evaluate", "export")
"""The stages that the ranks do, in one go; the others are one process each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """``stages/<stage>.json``.

    ``inputs`` is the digest of what the stage depended on, ``seconds`` its wall time, ``finished`` an ISO 8601 time in
    UTC, ``summary`` the few figures that the closing table shows.
    """

    stage: str
    inputs: str
    seconds: float
    finished: str
    summary: dict[str, float | int | str] = field(default_factory=dict[str, float | int | str])


def marker_path(folder: RunFolder, stage: str) -> Path:
    """Return where the marker of ``stage`` lies.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}; stages are {', '.join(STAGES)}")
    return folder.stages / f"{stage}.json"


def read_marker(folder: RunFolder, stage: str) -> Marker | None:
    """Return the marker of ``stage``, or None when there is none that can be read.

    Raises:
        ValueError: there is no such stage.
    """
    try:
        marker = msgspec.json.decode(marker_path(folder, stage).read_bytes(), type=Marker)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return marker if marker.stage == stage else None


def write_marker(folder: RunFolder, marker: Marker) -> None:
    """Publish ``marker``; call it after everything that it speaks of is on disk.

    Raises:
        ValueError: there is no such stage.
        OSError: it cannot be written.
    """
    encoded = msgspec.json.format(msgspec.json.encode(marker), indent=2)
    write_atomic(marker_path(folder, marker.stage), encoded + b"\n")


def is_current(folder: RunFolder, stage: str, inputs: str) -> bool:
    """Say whether ``stage`` is finished for exactly these ``inputs``."""
    marker = read_marker(folder, stage)
    return marker is not None and marker.inputs == inputs
