"""The state of training on disk: published whole or not at all, verified before it is believed.

A checkpoint is a folder ``step-00000012``:

    rank{r}.safetensors   the fragments rank r owns: ``param:NAME``, ``exp_avg:NAME``, ``exp_avg_sq:NAME``, flat, fp32
    rank{r}.json          per fragment: where it starts, the parameter's shape and count of optimizer steps
    manifest.json         step, identity of the run, base model, guards, sizes and sha256 of all files; its own digest

No pickle is written or read. It is written into a hidden folder beside the final place, every file and then the folder
is synced, and after all ranks have agreed that theirs is good, rank 0 renames it once. Fragments fill tensors of any
strategy and world size. No random state is stored, because none exists between two micro-batches (``seed_all``): the
noise of a micro-batch follows from seed, step and documents.

Resuming goes from the newest to the oldest and names what it skips. Old ones are only deleted after a newer one was
published, and only verified ones count.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.distributed.fragments import Fragment
from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import NeedsPerson, RunError, TrimtabError
from trainer.fingerprint import digest, file_digest
from trainer.paths import fsync_directory, write_atomic
from trainer.train.guard import Best, LossHistory
from trainer.train.metrics import StepRecord

FORMAT = 1
STAGED = ".stage-"
REMOVED = ".removed-"
_NAME = re.compile(r"step-(\d{8})")
_RANK_FILE = re.compile(r"rank\d+\.(safetensors|json)")


class DamagedCheckpoint(TrimtabError):
    """A checkpoint folder that is not what was published."""


class SaveFailed(RunError):
    """A checkpoint could not be written; what was published before is intact."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything the loop knows besides weights and optimizer; the same on every rank.

    ``step``: optimizer steps done. ``tokens``: seen so far, without padding. ``skipped``: float16 steps that overflowed
    and were not taken. ``pending``: the record of the last step when the run was stopped before its validation.
    ``stopped_early``: patience ran out, there is nothing more to train. ``scaler``: of the float16 loss scale.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    losses: LossHistory = field(default_factory=LossHistory)
    best: Best = field(default_factory=Best)
    pending: StepRecord | None = None
    stopped_early: bool = False
    scaler: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size in bytes and sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``manifest.json``. ``base``: sha256 of the base model. ``shapes``: of all trainable parameters, by name.

    ``sha256``: digest of this manifest with the field empty.
    """

    format: int
    step: int
    identity: str
    base: str
    world_size: int
    state: TrainState
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, FileInfo]
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class FragmentInfo:
    """One fragment in ``rank{r}.json``; ``step`` is the parameter's own count of optimizer steps."""

    start: int
    length: int
    shape: tuple[int, ...]
    step: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was verified."""

    path: Path
    manifest: Manifest


# -- names ---------------------------------------------------------------------------------------------------------


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return directory / f"step-{step:08d}"


def published(directory: Path) -> list[Path]:
    """Published checkpoints, newest first, verified or not."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


# -- writing -------------------------------------------------------------------------------------------------------


def save(strategy: Strategy, directory: Path, state: TrainState, *, identity: str, base: str) -> Path:
    """Publish the state of training; called by all ranks at a step boundary. Returns the folder.

    A checkpoint of the same step that is already there and whole is left alone; a damaged one is moved aside.

    Raises:
        SaveFailed: on all ranks, when one of them could not write. The partial folder is gone.
    """
    ranks = strategy.ranks
    final = checkpoint_path(directory, state.step)
    if _is_there(ranks, final):
        return final
    staged = directory / f"{STAGED}{final.name}"
    state = replace(state, scaler=strategy.scaler_state())
    try:
        _together(ranks, lambda: _make_stage(directory, staged), only_first=True)
        _together(ranks, lambda: _write_rank(strategy, staged))
        _together(ranks, lambda: _publish(ranks, staged, final, state, identity=identity, base=base), only_first=True)
    except SaveFailed:
        if ranks.is_first:
            shutil.rmtree(staged, ignore_errors=True)
        ranks.barrier()
        raise
    return final


def _is_there(ranks: Ranks, final: Path) -> bool:
    found = 0
    if ranks.is_first and final.is_dir():
        try:
            verify(final)
            found = 1
        except DamagedCheckpoint:
            final.rename(_unused(final.with_name(f"{final.name}.damaged")))
    return bool(ranks.from_first(found))


def _unused(path: Path) -> Path:
    number = 0
    while (candidate := path.with_name(f"{path.name}{number or ''}")).exists():
        number += 1
    return candidate


def _together(ranks: Ranks, work: Callable[[], None], *, only_first: bool = False) -> None:
    """Do ``work`` and agree on how it went, so that no rank goes on alone.

    Raises:
        SaveFailed: on all ranks, with the first rank's reason.
    """
    problem = ""
    if ranks.is_first or not only_first:
        try:
            work()
        except (OSError, SafetensorError) as fault:
            problem = str(fault) or type(fault).__name__
    problems = ranks.gather(problem)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
    if failed:
        raise SaveFailed(
            "a checkpoint could not be written",
            got=failed[0],
            do="make room on this disk, or check its permissions; the checkpoints published before are intact",
        )


def _make_stage(directory: Path, staged: Path) -> None:
    """An empty folder to write into; what an earlier process left half done goes away."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [*directory.glob(f"{STAGED}*"), *directory.glob(f"{REMOVED}*")]:
        shutil.rmtree(leftover)
    staged.mkdir()


def _write_rank(strategy: Strategy, staged: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, FragmentInfo] = {}
    for fragment in strategy.fragments(saving=True):
        tensors |= {f"{kind}:{fragment.name}": flat.contiguous() for kind, flat in fragment.tensors.items()}
        index[fragment.name] = FragmentInfo(fragment.start, fragment.length, fragment.shape, float(fragment.step))
    rank = strategy.ranks.rank
    listing = staged / f"rank{rank}.json"
    write_atomic(listing, msgspec.json.encode(index))
    weights = listing.with_suffix(".safetensors")
    save_file(tensors, weights)
    weights.chmod(listing.stat().st_mode & 0o777)  # safetensors makes 0600, and a run folder is often a group's
    _sync_file(weights)


def _publish(ranks: Ranks, staged: Path, final: Path, state: TrainState, *, identity: str, base: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, FileInfo] = {}
    for rank in range(ranks.world_size):
        index = staged / f"rank{rank}.json"
        shapes |= {name: info.shape for name, info in _read_index(index).items()}
        for path in (index, index.with_suffix(".safetensors")):
            files[path.name] = FileInfo(path.stat().st_size, file_digest(path))
    manifest = Manifest(
        format=FORMAT,
        step=state.step,
        identity=identity,
        base=base,
        world_size=ranks.world_size,
        state=state,
        shapes=shapes,
        files=files,
    )
    # As it will be read: JSON turns an int in a float's place into a float, and the digest has to be of that.
    manifest = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    manifest = replace(manifest, sha256=digest(manifest))
    write_atomic(staged / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
    fsync_directory(staged)
    staged.rename(final)
    fsync_directory(final.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


# -- reading -------------------------------------------------------------------------------------------------------


def verify(path: Path) -> Manifest:
    """Read every byte of a published checkpoint and compare it with its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, cut, changed or of another format; the message names it.
    """
    manifest = _read_manifest(path)
    for name, info in manifest.files.items():
        file = path / name
        if not _RANK_FILE.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise _damaged(path, f"{name} is missing")
        size = file.stat().st_size
        if size != info.bytes:
            raise _damaged(path, f"{name} has {size} of {info.bytes} bytes")
        if file_digest(file) != info.sha256:
            raise _damaged(path, f"{name} has other contents than were written")
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    except OSError as fault:
        raise _damaged(path, f"manifest.json cannot be read ({fault.strerror})") from fault
    except msgspec.DecodeError as fault:
        raise _damaged(path, f"manifest.json cannot be understood ({fault})") from fault
    if manifest.sha256 != digest(replace(manifest, sha256="")):
        raise _damaged(path, "manifest.json has other contents than were written")
    if manifest.format != FORMAT:
        raise _damaged(path, f"format {manifest.format}, and this version reads {FORMAT}")
    if checkpoint_path(path.parent, manifest.step) != path:
        raise _damaged(path, f"manifest.json is of step {manifest.step}")
    return manifest


def _damaged(path: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint("damaged checkpoint", where=str(path), got=what, do="it is not used and not deleted")


def find_resumable(directory: Path, *, identity: str, base: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None when there is none at all.

    Args:
        directory: the run's checkpoints.
        identity: of this run.
        base: sha256 of the base model.
        warn: told about every damaged checkpoint that is skipped.

    Raises:
        NeedsPerson: there are checkpoints, and all of them are damaged.
        RunError: the newest good one belongs to another run or base model.
    """
    damaged: list[Path] = []
    for path in published(directory):
        try:
            manifest = verify(path)
        except DamagedCheckpoint as fault:
            warn(f"skipping a {fault}")
            damaged.append(path)
            continue
        _refuse_foreign(path, manifest, identity=identity, base=base)
        return Checkpoint(path, manifest)
    if damaged:
        raise NeedsPerson(
            "no checkpoint of this run can be trusted",
            where=str(directory),
            got=f"all {len(damaged)} are damaged: " + ", ".join(path.name for path in damaged),
            do="restore one from a backup, or move the folder away to train from the start",
        )
    return None


def find_agreed(ranks: Ranks, directory: Path, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Let rank 0 ``find`` a checkpoint (it reads every byte) and all ranks use that one.

    Raises:
        TrimtabError: whatever rank 0's search raised, on all ranks.
    """
    found: Checkpoint | None = None
    fault: TrimtabError | None = None
    if ranks.is_first:
        try:
            found = find()
        except TrimtabError as error:
            fault = error
    fault, step = ranks.gather((fault, found.manifest.step if found else -1))[0]
    if fault is not None:
        raise fault
    if step < 0 or found is not None:
        return found
    path = checkpoint_path(directory, step)
    return Checkpoint(path, _read_manifest(path))


def _refuse_foreign(path: Path, manifest: Manifest, *, identity: str, base: str) -> None:
    for what, theirs, ours in (("run", manifest.identity, identity), ("base model", manifest.base, base)):
        if theirs != ours:
            raise RunError(
                f"this checkpoint belongs to another {what}",
                where=str(path),
                got=theirs,
                allowed=ours,
                do="use another run.dir, or move the checkpoints away",
            )


def load(strategy: Strategy, checkpoint: Checkpoint, *, weights_only: bool = False) -> TrainState:
    """Fill weights and optimizer from a verified checkpoint of any strategy and world size; returns its state.

    Args:
        strategy: prepared; called by all ranks.
        checkpoint: the same on every rank.
        weights_only: leave the optimizer as it is (evaluation and export).

    Raises:
        RunError: the checkpoint does not have exactly this model's trainable parameters.
        TrainingFault: the ranks differ after loading.
    """
    manifest = checkpoint.manifest
    ours = {name: tuple(parameter.shape) for name, parameter in strategy.trainable.items()}
    if ours != manifest.shapes:
        different = sorted(set(ours.items()) ^ set(manifest.shapes.items()))
        raise RunError(
            "this checkpoint is of a model with other trainable parameters",
            where=str(checkpoint.path),
            got=f"{len(different)} differences, first {different[0][0]} {list(different[0][1])}",
            allowed="the same names and shapes",
            do="move the checkpoints away, or restore the settings they were made with",
        )
    with torch.no_grad(), _stored(checkpoint) as pieces:
        for fragment in strategy.fragments(saving=False):
            filled = _fill(fragment, pieces[fragment.name], ("param",) if weights_only else tuple(fragment.tensors))
            if filled < fragment.length:
                raise _damaged(checkpoint.path, f"{fragment.name} has {filled} of {fragment.length} elements")
    strategy.refresh()
    if not weights_only:
        strategy.load_scaler_state(manifest.state.scaler)
    if strategy.replicated:
        strategy.ranks.same_on_all_ranks(state_digest(strategy), what="weights and optimizer state after loading")
    return manifest.state


def _fill(fragment: Fragment, pieces: Sequence["_Piece"], kinds: Sequence[str]) -> int:
    """Copy what the stored ``pieces`` have of ``fragment`` into its views; returns how many elements that were."""
    filled = 0
    for piece in pieces:
        first = max(fragment.start, piece.info.start)
        last = min(fragment.start + fragment.length, piece.info.start + piece.info.length)
        if first >= last:
            continue
        for kind in kinds:
            stored = piece.file.get_slice(f"{kind}:{fragment.name}")[first - piece.info.start : last - piece.info.start]
            fragment.tensors[kind][first - fragment.start : last - fragment.start].copy_(stored)
        if len(kinds) > 1:
            fragment.step.fill_(piece.info.step)
        filled += last - first
    return filled


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stored fragment and the open file that has it."""

    info: FragmentInfo
    file: safe_open


@contextmanager
def _stored(checkpoint: Checkpoint) -> Iterator[Mapping[str, list[_Piece]]]:
    """All stored fragments by the name of their parameter."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in checkpoint.manifest.shapes}
    with ExitStack() as stack:
        for rank in range(checkpoint.manifest.world_size):
            index = _read_index(checkpoint.path / f"rank{rank}.json")
            file = stack.enter_context(safe_open(checkpoint.path / f"rank{rank}.safetensors", framework="pt"))
            for name, info in index.items():
                pieces[name].append(_Piece(info, file))
        yield pieces


def _read_index(path: Path) -> Mapping[str, FragmentInfo]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, FragmentInfo])


def state_digest(strategy: Strategy) -> str:
    """A digest of weights and optimizer state that tells ranks apart: sums in float64, not every byte."""
    return digest(
        [
            [fragment.name, float(fragment.step), *(float(flat.double().sum()) for flat in fragment.tensors.values())]
            for fragment in strategy.fragments(saving=False)
        ]
    )


# -- keeping -------------------------------------------------------------------------------------------------------


def retain(directory: Path, *, keep: int, best: int | None, verified: set[int]) -> list[int]:
    """Delete old checkpoints by rank 0, after a newer one was published. Returns the steps deleted.

    Args:
        directory: the run's checkpoints.
        keep: newest verified ones to keep, at least 1.
        best: step of the best one, kept besides.
        verified: steps known to be whole; those found whole here are added. A damaged one neither counts nor goes.
    """
    good: list[Path] = []
    for path in published(directory):
        step = int(path.name.removeprefix("step-"))
        if step not in verified:
            try:
                verify(path)
            except DamagedCheckpoint:
                continue
            verified.add(step)
        good.append(path)
    removed: list[int] = []
    for path in good[max(1, keep) :]:
        step = int(path.name.removeprefix("step-"))
        if step == best:
            continue
        # Renamed first: a folder that is half deleted never has the name of a checkpoint.
        going = path.with_name(f"{REMOVED}{path.name}")
        path.rename(going)
        shutil.rmtree(going)
        removed.append(step)
    return removed
