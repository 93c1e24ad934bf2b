"""What a tracker is known to have of a run, in the run folder: nothing is sent twice, and nothing is forgotten."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trainer.errors import EXIT_DONE
from trainer.paths import RunFolder, write_atomic

OFFLINE = "offline"
"""``why`` of what was written for a later sync, as was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerState:
    """``tracking/<tracker>.json``.

    ``run``: the name of the run at the tracker, chosen once. ``step``: the last one that is known to have arrived.
    ``sent``: table or weights to the digest of what arrived. ``complete``: all that there was when the last attempt
    ended has arrived; else ``why`` not.
    """

    run: str = ""
    url: str = ""
    step: int = 0
    sent: dict[str, str] = field(default_factory=dict[str, str])
    complete: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """``tracking/end.json``: the exit code of the run, as far as it went."""

    code: int = EXIT_DONE


def state_path(folder: RunFolder, tracker: str) -> Path:
    """Where the state of ``tracker`` lies."""
    return folder.tracking / f"{tracker}.json"


def read_state(folder: RunFolder, tracker: str) -> TrackerState:
    """The state; a new one where there is none that can be read (trackers are asked what they have as well)."""
    try:
        return msgspec.json.decode(state_path(folder, tracker).read_bytes(), type=TrackerState)
    except (OSError, msgspec.DecodeError):
        return TrackerState()


def write_state(folder: RunFolder, tracker: str, state: TrackerState) -> None:
    """Replace the state."""
    write_atomic(state_path(folder, tracker), msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")


def read_end(folder: RunFolder) -> End:
    """How the run ended; done, where nobody wrote it."""
    try:
        return msgspec.json.decode((folder.tracking / "end.json").read_bytes(), type=End)
    except (OSError, msgspec.DecodeError):
        return End()


def write_end(folder: RunFolder, code: int) -> None:
    """Keep how the run ended, for a later ``sync``."""
    write_atomic(folder.tracking / "end.json", msgspec.json.encode(End(code=code)) + b"\n")
