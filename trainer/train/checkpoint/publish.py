"""All that changes the folders of checkpoints: a new one appears whole or not at all, an old one goes only after that.

A checkpoint is written into a folder of this generation of the run (``fence.py``), every file and then the folder is
synced, and after all ranks have agreed that theirs is good, rank 0 renames it once. Old ones are only deleted after a
newer one was published, and only verified ones count.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from trainer.distributed.strategy import Strategy
from trainer.errors import Interrupted, TrainingFault
from trainer.fingerprint import digest
from trainer.paths import fsync_directory
from trainer.train.checkpoint.fence import Fence, fenced
from trainer.train.checkpoint.format import (
    FORMAT,
    DamagedCheckpoint,
    FileInfo,
    Manifest,
    checkpoint_path,
    published,
    verify,
)
from trainer.train.checkpoint.snapshot import Snapshot, live_snapshot
from trainer.train.checkpoint.writing import PoisonedValue, write_durably, write_tensors
from trainer.train.state import TrainState

T = TypeVar("T")


class SaveFailed(Interrupted):
    """A checkpoint could not be written; what was published before is intact."""


class Channel(Protocol):
    """How the ranks agree: the group of the training, or one beside it (``Aside``)."""

    @property
    def rank(self) -> int:
        """Number of this one."""
        ...

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in the order of ranks."""
        ...


Written = tuple[Mapping[str, FileInfo], Mapping[str, tuple[int, ...]]]
"""The files that a rank wrote, and the shapes of the parameters that it has parts of."""


def nothing() -> None:
    """Do nothing."""


def save(
    strategy: Strategy,
    fence: Fence,
    state: TrainState,
    *,
    identity: str,
    base: str,
    before: Callable[[], None] = nothing,
) -> Path:
    """Publish the state of training while it waits; called by all ranks at a step boundary. Returns the folder.

    Raises:
        SaveFailed, Fenced, TrainingFault: as in ``publish``.
    """
    state = replace(state, scaler=strategy.scaler_state())
    snapshot = live_snapshot(strategy)
    return publish(strategy.ranks, fence, snapshot, state, identity=identity, base=base, before=before)


def publish(
    channel: Channel,
    fence: Fence,
    snapshot: Snapshot,
    state: TrainState,
    *,
    identity: str,
    base: str,
    before: Callable[[], None] = nothing,
) -> Path:
    """Write ``snapshot`` and ``state`` as a checkpoint; called by all ranks alike. Returns its folder.

    A checkpoint of the same step that is already there and whole is left alone; a damaged one is moved aside.
    ``before`` is done by rank 0 first; where it cannot be done, nothing is published.

    Raises:
        SaveFailed: on all ranks, when one of them could not write. The partial folder is gone.
        Fenced: on all ranks, when a newer process has taken over the run.
        TrainingFault: on all ranks, when a value is not finite: that is never published.
    """
    final = checkpoint_path(fence.directory, state.step)
    staged = fence.space / final.name
    (there, *_) = _together(channel, fence, lambda: channel.rank == 0 and _is_there(fence, final))
    if there:
        return final
    try:
        _together(channel, fence, lambda: _make_stage(staged, before) if channel.rank == 0 else None)
        written = _together(channel, fence, lambda: _write_rank(channel.rank, snapshot, staged))
        manifest = Manifest(
            format=FORMAT,
            step=state.step,
            identity=identity,
            base=base,
            world_size=channel.world_size,
            state=state,
            shapes={name: shape for _, shapes in written for name, shape in shapes.items()},
            files={name: info for files, _ in written for name, info in files.items()},
        )
        _together(channel, fence, lambda: _publish(fence, staged, final, manifest) if channel.rank == 0 else None)
    except (SaveFailed, TrainingFault):
        if channel.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
        channel.gather(None)
        raise
    return final


def _is_there(fence: Fence, final: Path) -> bool:
    if not final.is_dir():
        return False
    try:
        verify(final)
    except DamagedCheckpoint:
        fence.check()
        final.rename(_unused(final.with_name(f"{final.name}.damaged")))
        return False
    return True


def _unused(path: Path) -> Path:
    number = 0
    while (candidate := path.with_name(f"{path.name}{number or ''}")).exists():
        number += 1
    return candidate


def _together(channel: Channel, fence: Fence, work: Callable[[], T]) -> list[T]:
    """Do ``work`` and agree on how it went, so that no rank goes on alone; gives what all ranks' work gave.

    Raises:
        SaveFailed, Fenced, TrainingFault: on all ranks, with the first rank's reason.
    """
    result: T | None = None
    problem, poisoned = "", False
    try:
        result = work()
    except OSError as fault:
        problem = str(fault) or type(fault).__name__
    except PoisonedValue as fault:
        problem, poisoned = str(fault), True
    outcomes = channel.gather((result, problem, poisoned))
    failed = [(f"rank {rank}: {text}", bad) for rank, (_, text, bad) in enumerate(outcomes) if text]
    if not failed:
        return [result for result, _, _ in outcomes]  # type: ignore[misc]  # without a problem there is a result
    if not channel.gather(fence.holds())[0]:
        raise fenced(fence.directory, fence.generation)
    text, poisoned = failed[0]
    if poisoned:
        raise TrainingFault(
            "the weights or the optimizer's state hold a value that is not finite; no checkpoint was made of them",
            got=text,
            do="the same command goes on from the checkpoint before; lower optim.lr or optim.clip_norm",
        )
    raise SaveFailed(
        "a checkpoint could not be written",
        got=text,
        do="make room on this disk, or check its permissions; the checkpoints published before are intact",
    )


def _make_stage(staged: Path, before: Callable[[], None]) -> None:
    """An empty folder to write into; what an earlier try left half done goes away. The generation's own is not made."""
    before()
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir()


def _write_rank(rank: int, snapshot: Snapshot, staged: Path) -> Written:
    index = snapshot.index()
    listing = staged / f"rank{rank}.json"
    weights = listing.with_suffix(".safetensors")
    files = {
        listing.name: write_durably(listing, [msgspec.json.encode(index)]),
        weights.name: write_tensors(weights, snapshot.tensors),
    }
    return files, {name: info.shape for name, info in index.items()}


def _publish(fence: Fence, staged: Path, final: Path, manifest: Manifest) -> None:
    # As it will be read: JSON turns an int in a float's place into a float, and the digest has to be of that.
    manifest = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    manifest = replace(manifest, sha256=digest(manifest))
    write_durably(staged / "manifest.json", [msgspec.json.format(msgspec.json.encode(manifest))])
    fsync_directory(staged)
    staged.rename(final)  # of a folder that is gone when a newer process has taken over
    fsync_directory(fence.directory)


def retain(fence: Fence, *, keep: int, best: int | None, verified: set[int]) -> list[int]:
    """Delete old checkpoints by rank 0, after a newer one was published. Returns the steps deleted.

    Args:
        fence: of this process.
        keep: newest verified ones to keep, at least 1.
        best: step of the best one, kept besides.
        verified: steps known to be whole; those found whole here are added. A damaged one neither counts nor goes.
    """
    good: list[Path] = []
    for path in published(fence.directory):
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
        going = fence.space / f"gone-{path.name}"
        path.rename(going)
        shutil.rmtree(going)
        removed.append(step)
    return removed
