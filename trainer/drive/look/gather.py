"""What the files of a run folder say, read once and without a lock: also of a run that is still going on."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from trainer.cost.ledger import read_account
from trainer.cost.sums import Cost, Factors, cost_of
from trainer.drive.lock import holder_of
from trainer.drive.look.scores import Evaluated, read_evaluated, test_digest
from trainer.drive.queue import job_lines
from trainer.markers import STAGES, Marker, read_marker
from trainer.paths import RunFolder
from trainer.plan import RunPlan, load_plan
from trainer.records import Curve, Record, as_number, curve_of, read_records
from trainer.train.checkpoint.format import DamagedCheckpoint, OtherFormat, published, read_manifest, verify

TUNED, BEFORE = "tuned", "zero_shot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A published checkpoint. ``kinds``: why it is kept; ``bytes``: of its files; ``written``: when it was published.

    ``state``: what it is, in words; ``is_good``: it can be resumed from, as far as was looked.
    """

    name: str
    kinds: list[str]
    bytes: int
    written: datetime
    state: str
    is_good: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the lines of ``metrics.jsonl`` say together. ``tokens``: seen, ``targets``: those of them that carried loss.

    ``speed``: tokens per second of the median step (None: no step says); ``shares``: part of a step -> seconds of all
    steps; ``memory_gb``: peak of rank 0, in 10^9 bytes.
    """

    steps: int
    epochs: float
    tokens: int
    targets: int
    speed: float | None
    memory_gb: float
    shares: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of all steps, validation included."""
        return sum(self.shares.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLook:
    """One run as it stands. ``label`` tells it from others; ``stages``: in the order of a run, None: not done.

    ``curves``: figure -> its values by step; ``evaluated``: ``zero_shot`` and ``tuned``, where measured; ``test``: hash
    of the frozen test rows ("" unknown); ``cost``: None where nothing was written down.
    """

    folder: RunFolder
    plan: RunPlan
    label: str
    state: str
    job: list[str]
    stages: dict[str, Marker | None]
    trained: Trained | None
    curves: dict[str, Curve]
    evaluated: dict[str, Evaluated]
    test: str
    saved: list[Saved]
    cost: Cost | None


def look_at(folder: RunFolder, *, contents: bool = False) -> RunLook:
    """Read a run. ``contents``: every byte of its checkpoints.

    Raises:
        RunError: the plan, the record of steps or an evaluation cannot be understood.
    """
    plan, records = load_plan(folder.plan_json.read_bytes()), read_records(folder.metrics_jsonl)
    evaluated = {who: read_evaluated(folder, who) for who in (BEFORE, TUNED)}
    return RunLook(
        folder=folder,
        plan=plan,
        label=f"{plan.name}/{plan.identity}",
        state=state_of(folder, records),
        job=job_lines(folder),
        stages={stage: read_marker(folder, stage) for stage in STAGES},
        trained=trained_of(records),
        curves=curves_of(records),
        evaluated={who: found for who, found in evaluated.items() if found is not None},
        test=test_digest(folder),
        saved=saved_checkpoints(folder, plan, contents=contents),
        cost=cost_at(folder, plan),
    )


def cost_at(folder: RunFolder, plan: RunPlan) -> Cost | None:
    """What the run has spent so far; None where it was not written down."""
    return cost_of(read_account(folder.cost), Factors(**asdict(plan.config.cost)))


def state_of(folder: RunFolder, records: Sequence[Record]) -> str:
    """``done``, ``running``, or how far it got."""
    holder = holder_of(folder.lock)
    if holder is not None:
        return f"running: {holder}"
    if folder.done.exists():
        return "done"
    finished = [stage for stage in STAGES if read_marker(folder, stage) is not None]
    trained = f", {records[-1]['step']} steps trained" if records and "train" not in finished else ""
    return f"not running; finished stages: {', '.join(finished) or 'none'}{trained}"


def trained_of(records: Sequence[Record]) -> Trained | None:
    """What the steps say together; None where there is none."""
    if not records:
        return None
    last, speeds = records[-1], curve_of(records, "tokens_per_second")
    return Trained(
        steps=_whole(last.get("step")),
        epochs=as_number(last.get("epoch")),
        tokens=_whole(last.get("tokens")),
        targets=sum(_whole(record.get("targets")) for record in records),
        speed=None if speeds is None else statistics.median(speeds.values),
        memory_gb=as_number(last.get("memory_gb")),
        shares=_shares(records),
    )


def _shares(records: Sequence[Record]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for record in records:
        seconds = record.get("seconds")
        for name, value in msgspec.convert(seconds, dict[str, float]).items() if seconds is not None else ():
            parts[name] = parts.get(name, 0.0) + value
    return parts


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def curves_of(records: Sequence[Record]) -> dict[str, Curve]:
    """Every figure of the steps that is a number and worth a curve: losses first."""
    validated = dict.fromkeys(name for record in records for name in record if name.startswith("val_"))
    names = ("loss", "val_loss", *(name for name in validated if name != "val_loss"), "grad_norm", "lr")
    found: Mapping[str, Curve | None] = {name: curve_of(records, name) for name in (*names, "tokens_per_second")}
    return {name: curve for name, curve in found.items() if curve is not None}


def saved_checkpoints(folder: RunFolder, plan: RunPlan, *, contents: bool) -> list[Saved]:
    """Every published checkpoint, newest first."""
    paths, best = published(folder.checkpoints), _best_step(folder)
    every = plan.config.checkpoint.every
    found: list[Saved] = []
    for path in paths:
        step = int(path.name.removeprefix("step-"))
        kinds = ["last"] if path == paths[0] else []
        kinds += ["best"] if step == best else []
        kinds += [f"every {every}"] if every and step % every == 0 else []
        found.append(_saved(path, kinds, contents=contents))
    return found


def _saved(path: Path, kinds: list[str], *, contents: bool) -> Saved:
    is_good = False
    try:
        manifest = verify(path, contents=contents)
    except OtherFormat as fault:
        state = f"of {fault.problems[0].got}"
    except DamagedCheckpoint as fault:
        state = f"DAMAGED: {fault.problems[0].got}"
    else:
        state = f"whole, {'hashes checked' if contents else 'by sizes'}, {manifest.world_size} rank(s)"
        is_good = True
    return Saved(
        name=path.name,
        kinds=kinds,
        bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        written=datetime.fromtimestamp(path.stat().st_mtime, UTC),
        state=state,
        is_good=is_good,
    )


def _best_step(folder: RunFolder) -> int | None:
    for path in published(folder.checkpoints):
        try:
            return read_manifest(path).state.best.step
        except DamagedCheckpoint:
            continue
    return None
