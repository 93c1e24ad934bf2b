"""From the arena to batches on the device: which documents a rank sees at which step, and the batches made ahead.

Which documents come when is a pure function of a few numbers (``scheduling.py``), the same in the planner and on every
rank, so a resumed run or one at another world size needs no state of a sampler. Nothing is shuffled here, and what is
made ahead is only that function worked out early: dropping it loses nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from trainer.batch import Batch
from trainer.data.transfer import BatchShape, Documents, batch_maker, check_maker
from trainer_kernels import Ahead, Schedule, TokenArena, pack

NAMED_DOCUMENTS = 8
"""At most so many documents are named in a message."""

Load = Callable[[Documents], Batch]
"""Gives the batch of a micro-batch's documents (int32 ids)."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """One optimizer step as one rank sees it.

    ``index`` counts from 0. ``num_targets``: target tokens over all ranks and micro-batches. ``epoch``: passes over the
    data once the step is done. ``documents``: int32 document ids per micro-batch of this rank; empty ones are filler.
    """

    index: int
    num_targets: int
    epoch: float
    documents: tuple[Documents, ...]


class TrainingBatches:
    """The training data of one rank: packs of up to ``capacity`` tokens, as ``plan`` has them.

    ``origin_of`` names a document in messages; it is only called for those.
    """

    def __init__(
        self,
        arena: TokenArena,
        plan: Schedule,
        *,
        capacity: int,
        rank: int,
        device: torch.device,
        pad_token_id: int,
        origin_of: Callable[[int], str] = "document {}".format,
    ) -> None:
        self.num_steps: int = plan.num_steps
        self._arena = arena
        self._schedule = plan
        self._rank = rank
        self._shape = BatchShape(positions=capacity, documents=plan.row.most_documents)
        self._pad_token_id = pad_token_id
        self._maker = batch_maker(arena, device=device, shape=self._shape, pad_token_id=pad_token_id)
        self._origin_of = origin_of

    def check(self) -> None:
        """Compare one batch on the device with the CPU's, see ``check_maker``; once, before the first step."""
        check_maker(self._maker, self._arena, shape=self._shape, pad_token_id=self._pad_token_id)

    def steps(self, start: int) -> Iterator[PlannedStep]:
        """The steps from index ``start`` on; reaching one takes no time."""
        for index, documents in enumerate(self._schedule.batches(self._rank, start), start):
            yield PlannedStep(
                index=index,
                num_targets=self._schedule.num_targets(index),
                epoch=self._schedule.epoch_of(index),
                documents=tuple(documents),
            )

    def work(self, index: int) -> tuple[int, int]:
        """Tokens of the documents of a step over all ranks, and the sum of the squares of their lengths."""
        lengths = [self._arena.lengths[documents].astype(np.int64) for documents in self._schedule.documents(index)]
        return sum(int(part.sum()) for part in lengths), sum(int((part * part).sum()) for part in lengths)

    def load(self, documents: Documents) -> Batch:
        """The micro-batch of these documents, any ones, on the device, in memory of its own."""
        return self._maker.fresh(documents)

    @contextmanager
    def ahead(self, start: int) -> Iterator[Load]:
        """Batches made ahead by a thread, which ends with the block: gives a ``load`` for the steps from ``start`` on.

        It has to be called for every micro-batch of these steps, in their order. A batch is valid until the next one
        is asked for: on a CPU its memory is then written again, so its backward pass has to be over. An error in the
        thread is raised where its batch was asked for.
        """
        maker = self._maker
        orders = (documents for step in self._schedule.batches(self._rank, start) for documents in step)
        with Ahead(orders, lambda documents, room: (documents, maker.make(documents, room)), maker.room) as ring:

            def load(documents: Documents) -> Batch:
                expected, made = next(ring, (None, None))
                if expected is None or not np.array_equal(documents, expected):
                    raise AssertionError("batches made ahead are asked for in the order of the schedule")
                return maker.finish(made)

            yield load

    def describe(self, index: int, rank: int, micro_batch: int) -> str:
        """The documents of any rank's micro-batch in words, for messages."""
        documents = next(self._schedule.batches(rank, index))[micro_batch]
        named = [self._origin_of(int(document)) for document in documents[:NAMED_DOCUMENTS]]
        more = len(documents) - len(named)
        return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def held_out_batches(
    arena: TokenArena, *, capacity: int, rank: int, world_size: int, device: torch.device, pad_token_id: int
) -> Iterator[Batch]:
    """Every document of ``arena`` once over all ranks, packed tightly; the packs do not depend on the world size.

    Each batch has memory of its own. Every rank gets the same number of batches, the last of some without documents:
    sharded models talk in each forward pass.
    """
    plan = pack(arena.lengths, capacity, algorithm="ffd")
    shape = BatchShape(positions=capacity, documents=plan.most_documents)
    maker = batch_maker(arena, device=device, shape=shape, pad_token_id=pad_token_id)
    nothing = np.zeros(0, dtype=np.int32)
    for first in range(0, len(plan), world_size):
        documents = plan.pack(first + rank) if first + rank < len(plan) else nothing
        yield maker.fresh(documents)
