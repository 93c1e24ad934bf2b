"""What the driver reads of the files that other processes write.

Only the fields that it shows or decides by: the whole types (``samples.py``) would bring numpy along, and a second
start of a finished run has to answer at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from trainer.errors import RunError
from trainer.memory import folder_shape
from trainer.paths import RunFolder
from trainer.plan import RunPlan, fitted

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Counts of one split (``samples.SplitInfo``); ``arena``: the folder of its tokens."""

    rows: int
    documents: int
    tokens: int
    targets: int
    longest: int
    arena: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base model (``samples.BaseModel``)."""

    name: str
    directory: str
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Rows left out for one reason (``samples.Dropped``)."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedView:
    """Of ``prepared.json`` (``samples.Prepared``)."""

    base: Base
    dtype: str
    dtype_reason: str
    train: Split
    validation: Split | None = None
    test: Split | None = None
    dropped: list[Dropped] = field(default_factory=list[Dropped])
    truncated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleView:
    """``launch/schedule.json``, written by prepare: packs of the first epoch and what becomes of them.

    ``fill`` is the share of a pack that holds tokens; ``tokens_per_step`` counts real tokens, without padding.
    """

    packs: int
    fill: float
    steps: int
    steps_per_epoch: float
    tokens_per_step: float
    waiting: float | None = None
    by_time: bool = False
    sync: str = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresView:
    """Of ``evaluation/<who>.json``."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    by_slice: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict[str, dict[str, dict[str, float]]])
    loss: float | None = None
    rows: int = 0
    seconds: float = 0.0


def on_disk(plan: RunPlan, prepared: PreparedView) -> RunPlan:
    """Return ``plan`` with the folder that the base model turned out to be: for what is read off its files."""
    model = replace(plan.config.model, path=prepared.base.directory, revision=None)
    return replace(plan, config=replace(plan.config, model=model))


def settled(plan: RunPlan, prepared: PreparedView) -> RunPlan:
    """Return ``plan`` with the layout for the model that is on disk now, in the dtype that was decided.

    Raises:
        ConfigError: nothing fits into the memory.
    """
    return fitted(plan, folder_shape(Path(prepared.base.directory)), prepared.dtype)


def read_prepared(folder: RunFolder) -> PreparedView:
    """Read ``prepared.json``.

    Raises:
        RunError: it is missing or not what prepare writes.
    """
    return _read(folder.prepared_json, PreparedView)


def is_still_there(folder: RunFolder) -> bool:
    """Whether the tokens and the base model that ``prepare`` found or made are still where it left them."""
    try:
        prepared = read_prepared(folder)
    except RunError:
        return False
    splits = (prepared.train, prepared.validation, prepared.test)
    places = [prepared.base.directory, *(split.arena for split in splits if split is not None)]
    return all(Path(place).is_dir() for place in places)


def read_schedule(folder: RunFolder) -> ScheduleView:
    """Read ``launch/schedule.json``.

    Raises:
        RunError: it is missing or not what prepare writes.
    """
    return _read(folder.launch / "schedule.json", ScheduleView)


def read_scores(folder: RunFolder, who: str) -> ScoresView | None:
    """Read the scores of ``who`` (``zero_shot``, ``tuned``), or None when there are none.

    Raises:
        RunError: the file is not what the evaluation writes.
    """
    path = folder.evaluation / f"{who}.json"
    return _read(path, ScoresView) if path.is_file() else None


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise _unusable(path, "no such file") from None
    except msgspec.DecodeError as fault:
        raise _unusable(path, str(fault)) from None


def _unusable(path: Path, got: str) -> RunError:
    return RunError(
        "a file of the run is not what it should be",
        where=str(path),
        got=got,
        allowed="the file as the run wrote it",
        do=f"remove {path.parent.parent if path.parent.name == 'launch' else path.parent}/stages/prepare.json and "
        "start the same command again: it writes the file anew",
    )
