"""Going on from a checkpoint: which one can be trusted, and how its fragments get into the tensors of this run.

The search goes from the newest to the oldest and names what it skips. Stored fragments fill tensors of any strategy and
world size; what was loaded is compared over the ranks before anything is trained.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from trainer.distributed.fragments import Fragment
from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import NeedsPerson, RunError, TrimtabError
from trainer.fingerprint import digest
from trainer.train.checkpoint.format import (
    Checkpoint,
    DamagedCheckpoint,
    FragmentInfo,
    Manifest,
    OtherFormat,
    checkpoint_path,
    damage,
    published,
    read_index,
    read_manifest,
    verify,
)
from trainer.train.state import TrainState


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
    kinds = "damaged"
    for path in published(directory):
        try:
            manifest = verify(path)
        except DamagedCheckpoint as fault:
            warn(f"skipping a {fault}")
            damaged.append(path)
            kinds = "damaged or of another version" if isinstance(fault, OtherFormat) else kinds
            continue
        _refuse_foreign(path, manifest, identity=identity, base=base)
        return Checkpoint(path, manifest)
    if damaged:
        raise NeedsPerson(
            "no checkpoint of this run can be trusted",
            where=str(directory),
            got=f"all {len(damaged)} are {kinds}: " + ", ".join(path.name for path in damaged),
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
    return Checkpoint(path, read_manifest(path))


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
    ours = strategy.shapes
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
                raise damage(checkpoint.path, f"{fragment.name} has {filled} of {fragment.length} elements")
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
            index = read_index(checkpoint.path / f"rank{rank}.json")
            file = stack.enter_context(safe_open(checkpoint.path / f"rank{rank}.safetensors", framework="pt"))
            for name, info in index.items():
                pieces[name].append(_Piece(info, file))
        yield pieces


def state_digest(strategy: Strategy) -> str:
    """A digest of weights and optimizer state that tells ranks apart: sums in float64, not every byte."""
    return digest(
        [
            [fragment.name, float(fragment.step), *(float(flat.double().sum()) for flat in fragment.tensors.values())]
            for fragment in strategy.fragments(saving=False)
        ]
    )
