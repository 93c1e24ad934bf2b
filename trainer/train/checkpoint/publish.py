"""All that changes the folders of checkpoints: a new one appears whole or not at all, an old one goes only after that.

A checkpoint is written into a hidden folder beside the final place, every file and then the folder is synced, and after
all ranks have agreed that theirs is good, rank 0 renames it once. Old ones are only deleted after a newer one was
published, and only verified ones count.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import RunError
from trainer.fingerprint import digest, file_digest
from trainer.paths import fsync_directory, fsync_file, write_atomic
from trainer.train.checkpoint.format import (
    FORMAT,
    DamagedCheckpoint,
    FileInfo,
    FragmentInfo,
    Manifest,
    checkpoint_path,
    published,
    read_index,
    verify,
)
from trainer.train.state import TrainState

STAGED = ".stage-"
REMOVED = ".removed-"


class SaveFailed(RunError):
    """A checkpoint could not be written; what was published before is intact."""


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
    fsync_file(weights)


def _publish(ranks: Ranks, staged: Path, final: Path, state: TrainState, *, identity: str, base: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, FileInfo] = {}
    for rank in range(ranks.world_size):
        index = staged / f"rank{rank}.json"
        shapes |= {name: info.shape for name, info in read_index(index).items()}
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
