"""One file that says where every part of a result came from: ``lineage.json``.

It is collected from what the stages left in the run folder, after all of them have ended, and nothing is asked twice:
the model card is rendered from this file alone, so that the two cannot disagree. Hashes are of contents.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from trainer.config import Config
from trainer.cost.ledger import read_account
from trainer.cost.sums import Cost, Factors, cost_of, totals
from trainer.errors import RunError
from trainer.export.comparison import VERIFICATION, Comparison
from trainer.fingerprint import file_digest
from trainer.markers import STAGES, read_marker
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan
from trainer.redaction import redact
from trainer.samples import BaseModel, Dropped, EvaluationRecord, Prepared, SourceInfo, SplitInfo

FORMAT = 1
CARD = "README.md"
LINEAGE = "lineage.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """Counts of one split after all filters, and the hash of its tokens."""

    rows: int
    documents: int
    tokens: int
    targets: int
    longest: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """What the model learnt from and was measured on; ``splits`` by name, ``splits_sha256`` of the frozen division."""

    sources: list[SourceInfo]
    splits: dict[str, SplitRecord]
    splits_sha256: str
    dropped: list[Dropped]
    truncated: int
    labels: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """From ``metrics.jsonl``. Losses in nats per target token; ``tokens`` without padding, ``targets`` those of them
    that carried loss (0: not recorded); speed is the median step's.

    ``best_validation_loss`` and its step are None when nothing was validated.
    """

    steps: int
    tokens: int
    epochs: float
    last_loss: float
    best_validation_loss: float | None
    best_step: int | None
    tokens_per_second: float
    targets: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One stage: wall time in seconds, end (ISO 8601, UTC), its few figures."""

    seconds: float
    finished: str
    summary: dict[str, float | int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One exported file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeRecord:
    """The code that trained. ``commit`` is empty outside a checkout; ``dirty``: tracked files differed from it."""

    version: str = ""
    commit: str = ""
    dirty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentRecord:
    """Of ``env.json``: the machine and what was installed."""

    python: str = ""
    platform: str = ""
    cores: int = 0
    cpu: str = ""
    cpu_flags: list[str] = field(default_factory=list[str])
    device: str = ""
    gpus: list[str] = field(default_factory=list[str])
    memory_bytes: int = 0
    code: CodeRecord = field(default_factory=CodeRecord)
    packages: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """``lineage.json``. ``created``: ISO 8601, UTC; ``exports``: folder name -> file name -> what it is.

    ``verification`` is empty for an export that was not verified. ``cost``: up to the card, None where nothing was
    written down; ``cost_totals``: what ``cost.totals`` makes of it.
    """

    format: int
    created: str
    name: str
    identity: str
    base: BaseModel
    data: DataRecord
    dtype: str
    dtype_reason: str
    stop_token_ids: list[int]
    world_size: int
    strategy: str
    training: TrainingRecord
    evaluations: dict[str, EvaluationRecord]
    stages: dict[str, StageRecord]
    exports: dict[str, dict[str, FileRecord]]
    verification: list[Comparison]
    environment: EnvironmentRecord
    config: Config
    cost: Cost | None = None
    cost_totals: dict[str, float | None] = field(default_factory=dict[str, float | None])


def collect_lineage(folder: RunFolder, plan: RunPlan, prepared: Prepared, *, now: datetime) -> Lineage:
    """Read what the stages of the run in ``folder`` left.

    Raises:
        RunError: a file that a finished run has is missing or damaged.
    """
    verification = folder.export / VERIFICATION
    exports = [path for path in (folder.adapter, folder.merged) if path.is_dir()]
    verified = read_marker(folder, "verify") is not None and not plan.config.export.nothing
    cost = cost_of(read_account(folder.cost), Factors(**asdict(plan.config.cost)))
    return Lineage(
        format=FORMAT,
        created=now.astimezone(UTC).isoformat(timespec="seconds"),
        name=plan.name,
        identity=plan.identity,
        base=prepared.base,
        data=_data(prepared),
        dtype=prepared.dtype,
        dtype_reason=prepared.dtype_reason,
        stop_token_ids=prepared.stop_token_ids,
        world_size=plan.world_size,
        strategy=plan.strategy,
        training=read_training(folder.metrics_jsonl),
        evaluations={path.stem: read(path, EvaluationRecord) for path in sorted(folder.evaluation.glob("*.json"))},
        stages=_stages(folder),
        exports={path.name: describe_files(path) for path in exports},
        verification=read(verification, list[Comparison]) if verified else [],
        environment=read(folder.env_json, EnvironmentRecord),
        config=plan.config,
        cost=cost,
        cost_totals={} if cost is None else totals(cost),
    )


def write_lineage(path: Path, lineage: Lineage) -> None:
    """Write ``lineage`` with every secret in it replaced."""
    encoded = msgspec.json.format(msgspec.json.encode(lineage), indent=2).decode()
    write_atomic(path, redact(encoded) + "\n")


def read_lineage(path: Path) -> Lineage:
    """Read ``lineage.json``.

    Raises:
        RunError: missing or damaged.
    """
    return read(path, Lineage)


def read_training(metrics: Path) -> TrainingRecord:
    """Summarise ``metrics.jsonl``.

    Raises:
        RunError: missing, empty, or a line that is not a step.
    """
    try:
        lines = metrics.read_bytes().splitlines()
        steps = [msgspec.json.decode(line, type=_Step, strict=False) for line in lines]
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(metrics, str(error)) from error
    if not steps:
        raise _unreadable(metrics, "no steps")
    validated = [(step.val_loss, step.step) for step in steps if step.val_loss is not None]
    best = min((pair for pair in validated if math.isfinite(pair[0])), default=None)
    return TrainingRecord(
        steps=steps[-1].step,
        tokens=steps[-1].tokens,
        epochs=steps[-1].epoch,
        last_loss=steps[-1].loss,
        best_validation_loss=None if best is None else best[0],
        best_step=None if best is None else best[1],
        tokens_per_second=statistics.median(step.tokens_per_second for step in steps),
        targets=sum(step.targets for step in steps),
    )


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of the files of an export, without the card and the lineage that are added to it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (CARD, LINEAGE))
    return {path.name: FileRecord(size=path.stat().st_size, sha256=file_digest(path)) for path in files}


T = TypeVar("T")


def read(path: Path, kind: type[T]) -> T:
    """Read a JSON file into a dataclass; fields that the dataclass does not know are left aside.

    Raises:
        RunError: missing, damaged or of another shape.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, str(error)) from error


class _Step(msgspec.Struct):
    """What is read of a line of ``metrics.jsonl``; a value that is not finite is a text there."""

    step: int
    loss: float
    tokens: int
    epoch: float
    tokens_per_second: float
    targets: int = 0
    val_loss: float | None = None


def _data(prepared: Prepared) -> DataRecord:
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    return DataRecord(
        sources=prepared.sources,
        splits={name: _split(split) for name, split in splits.items() if split is not None},
        splits_sha256=prepared.splits_sha256,
        dropped=prepared.dropped,
        truncated=prepared.truncated,
        labels=prepared.labels,
    )


def _split(split: SplitInfo) -> SplitRecord:
    return SplitRecord(
        rows=split.rows,
        documents=split.documents,
        tokens=split.tokens,
        targets=split.targets,
        longest=split.longest,
        sha256=split.arena_sha256,
    )


def _stages(folder: RunFolder) -> dict[str, StageRecord]:
    found: dict[str, StageRecord] = {}
    for stage in STAGES:
        marker = read_marker(folder, stage)
        if marker is not None and stage != "card":  # the card's own marker would be that of the time before
            found[stage] = StageRecord(seconds=marker.seconds, finished=marker.finished, summary=marker.summary)
    return found


def _unreadable(path: Path, got: str) -> RunError:
    return RunError(
        "the lineage of this run cannot be collected",
        where=str(path),
        got=got,
        allowed="the file as its stage wrote it",
        do="run the same command again: stages whose files are missing are repeated when their marker in stages/ is "
        "removed",
    )
