"""What a rank works on: the plan, what ``prepare`` made of the data, the other ranks, and the files between them.

This is the door at which config ends. The modules beside this one take it apart; everything below them takes plain
arguments.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from trainer import console
from trainer.cost.book import Book
from trainer.distributed.ranks import Ranks
from trainer.errors import DataError, RunError
from trainer.markers import BY_RANKS, Marker, write_marker
from trainer.model.precision import torch_dtype
from trainer.paths import RunFolder
from trainer.plan import RunPlan, load_plan, stage_inputs
from trainer.samples import EvaluationExample, Prepared, SplitInfo
from trainer.train.guard import StopFlag
from trainer.train.watchdog import Watchdog, clear_signs
from trainer_kernels import ArenaError, TokenArena

Summary = dict[str, float | int | str]
"""The few figures of a stage that its marker keeps and the closing table shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What this rank works on, and with whom; ``watchdog`` is told what it is doing."""

    folder: RunFolder
    plan: RunPlan
    prepared: Prepared
    ranks: Ranks
    stop: StopFlag
    watchdog: Watchdog
    book: Book

    @property
    def compute_dtype(self) -> torch.dtype:
        """What forward passes compute in."""
        return torch_dtype(self.prepared.dtype)

    def say(self, text: str) -> None:
        """Tell once what all ranks would tell."""
        if self.ranks.is_first:
            console.say(text)

    def warn(self, text: str) -> None:
        """Warn once of what all ranks see."""
        if self.ranks.is_first:
            console.warn(text)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around what is made ready before a stage: a request to stop ends it at once."""
        self.watchdog.enter("loading", 0)
        with self.stop.at_once("loading"):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Summary]:
        """Around one stage: rank 0 writes its marker at the end, with the summary that was filled in.

        A request to stop ends it at once; training alone sees to that itself, because it has something to save.
        """
        start = time.monotonic()
        summary: Summary = {}
        self.watchdog.enter(f"stage {name}", 0)
        with self.book.stage(name):
            if name == "train":
                yield summary
            else:
                with self.stop.at_once(name):
                    yield summary
            self.ranks.barrier()
        if self.ranks.is_first:
            finished = datetime.now(UTC).isoformat(timespec="seconds")
            seconds = time.monotonic() - start
            inputs = stage_inputs(self.plan, name)
            marker = Marker(stage=name, inputs=inputs, seconds=seconds, finished=finished, summary=summary)
            write_marker(self.folder, marker)


@contextmanager
def watched(folder: RunFolder, plan: RunPlan, ranks: Ranks) -> Iterator[Watchdog]:
    """A watchdog over all that the block does; it only listens with a ``guard.hang_timeout`` of 0."""
    timeout = plan.config.guard.hang_timeout
    watchdog = Watchdog(folder.signs, ranks.rank, ranks.world_size, timeout=timeout)
    if timeout == 0:
        yield watchdog
        return
    if ranks.is_first:
        clear_signs(folder.signs)
    ranks.barrier()
    with watchdog.watching():
        yield watchdog


def read_inputs(folder: RunFolder, stages: Sequence[str]) -> tuple[RunPlan, Prepared]:
    """``plan.json`` and ``prepared.json``.

    Raises:
        RunError: one is missing or cannot be understood, or a stage is not one of ours.
    """
    unknown = [stage for stage in stages if stage not in BY_RANKS]
    if unknown:
        raise RunError("no such stage", where="--stages", got=", ".join(unknown), allowed=", ".join(BY_RANKS))
    try:
        return load_plan(folder.plan_json.read_bytes()), msgspec.json.decode(
            folder.prepared_json.read_bytes(), type=Prepared
        )
    except FileNotFoundError as fault:
        raise RunError(
            "this is not a prepared run",
            where=str(folder.root),
            got=f"no {Path(fault.filename).name}",
            do="start with `python -m trainer`, which plans and prepares before it starts the ranks",
        ) from fault
    except msgspec.DecodeError as fault:
        raise RunError(
            "prepared.json cannot be understood",
            where=str(folder.prepared_json),
            got=str(fault),
            do="delete it, and stages/prepare.json, and start the same command again",
        ) from fault


def read_examples(path: str) -> list[EvaluationExample]:
    """A JSON-lines file of evaluation examples; none for an empty path."""
    if not path:
        return []
    return msgspec.json.Decoder(EvaluationExample).decode_lines(Path(path).read_bytes())


def open_arena(split: SplitInfo) -> TokenArena:
    """The tokens of a split.

    Raises:
        DataError: they are not the ones that were prepared, or damaged.
    """
    try:
        return TokenArena.open(split.arena, expect_sha256=split.arena_sha256)
    except ArenaError as fault:
        raise DataError(
            fault.what,
            where=split.arena,
            got=fault.got,
            allowed=fault.allowed,
            do="delete stages/prepare.json of this run, so that the same command prepares the data again",
        ) from fault
