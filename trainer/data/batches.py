"""From the arena to batches on the device: which documents a rank sees at which step, and the tensors of one pack.

Which documents come when is a pure function of a few numbers (``training_schedule``), the same in the planner and on
every rank, so a resumed run or one at another world size needs no state of a sampler. Nothing is held back or
shuffled here: a micro-batch is collated when it is asked for, which takes a fraction of a millisecond.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import Batch
from trainer.errors import DataError
from trainer_kernels import CostModel, PackingError, PackPlan, Schedule, TokenArena, collate, pack, schedule
from trainer_kernels.schedule import Sync

Algorithm = Literal["rfc", "ffd", "bfd"]
Documents = NDArray[np.int32]

NAMED_DOCUMENTS = 8
"""At most so many documents are named in a message."""


def training_schedule(
    lengths: NDArray[np.int32],
    targets: NDArray[np.int32],
    *,
    capacity: int,
    algorithm: Algorithm,
    max_documents: int | None,
    seed: int,
    epochs: float,
    max_steps: int | None,
    world_size: int,
    accumulation: int,
    cost_ratio: float = 0.0,
    sync: Sync = "step",
) -> Schedule:
    """The packs of every optimizer step of a run, for all ranks.

    Args:
        lengths: int32 [n], tokens of each document, as ``TokenArena.lengths``.
        targets: int32 [n], target tokens of each document, as ``TokenArena.targets``.
        capacity: tokens per pack.
        algorithm: how documents are packed; every epoch packs them anew.
        max_documents: most documents in a pack.
        seed: of the order of documents.
        epochs: passes over the documents.
        max_steps: train exactly so many optimizer steps instead, however many passes that takes.
        world_size: ranks.
        accumulation: packs per rank and step; the global batch is ``world_size * accumulation`` packs.
        cost_ratio: above 0, packs are filled by time (``timing.py``). Where a document takes more time than a pack has,
            they are filled by tokens, and the packs of a step are dealt to the ranks by time.
        sync: whether ranks wait for each other in every micro-batch ("micro") or once per step ("step").

    Raises:
        DataError: fewer packs than one step takes, a document longer than ``capacity``, a step without targets.
    """
    cost = CostModel(1.0, cost_ratio) if cost_ratio else None
    fits = cost is not None and fits_by_time(lengths, capacity, cost_ratio)

    def packs(epoch: int) -> PackPlan:
        return pack(
            lengths,
            capacity,
            algorithm=algorithm,
            seed=seed,
            epoch=epoch,
            max_docs=max_documents,
            cost=cost if fits else None,
        )

    try:
        if max_steps is not None:
            # One pass more than the first one's packs say: other passes may need a pack less for the same documents.
            epochs = ceil(max_steps * world_size * accumulation / len(packs(0))) + 1
        return schedule(
            packs,
            targets,
            epochs=epochs,
            world_size=world_size,
            accumulation=accumulation,
            max_steps=max_steps,
            sync=sync,
            costs=cost.weight(lengths) if cost is not None and not fits else None,
        )
    except PackingError as fault:
        raise DataError(
            fault.what, where="optim.batch_packs, packing", got=fault.got, allowed=fault.allowed, do=fault.do
        ) from fault


def fits_by_time(lengths: NDArray[np.int32], capacity: int, cost_ratio: float) -> bool:
    """Whether the document that takes longest takes no more time than a pack of ``capacity`` has."""
    return int(CostModel(1.0, cost_ratio).weight(lengths[[lengths.argmax()]])[0]) <= capacity


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
    """The training data of one rank. ``origin_of`` names a document in messages; it is only called for those."""

    def __init__(
        self,
        arena: TokenArena,
        plan: Schedule,
        *,
        rank: int,
        device: torch.device,
        pad_token_id: int,
        origin_of: Callable[[int], str] = "document {}".format,
    ) -> None:
        self.num_steps: int = plan.num_steps
        self._arena = arena
        self._schedule = plan
        self._rank = rank
        self._device = device
        self._pad_token_id = pad_token_id
        self._origin_of = origin_of

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
        """The micro-batch of these documents, on the device."""
        return make_batch(self._arena, documents, device=self._device, pad_token_id=self._pad_token_id)

    def describe(self, index: int, rank: int, micro_batch: int) -> str:
        """The documents of any rank's micro-batch in words, for messages."""
        documents = next(self._schedule.batches(rank, index))[micro_batch]
        named = [self._origin_of(int(document)) for document in documents[:NAMED_DOCUMENTS]]
        more = len(documents) - len(named)
        return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def make_batch(arena: TokenArena, documents: Documents, *, device: torch.device, pad_token_id: int) -> Batch:
    """Collate ``documents`` (int32 ids; none: one token of padding) into a batch without further padding."""
    packed = collate(arena, documents, layout="int64", pad_id=pad_token_id)

    def row(values: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        # Only pinned memory is copied without making the host wait.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    return Batch(
        input_ids=row(packed.input_ids)[None],
        labels=row(packed.labels)[None],
        position_ids=row(packed.position_ids)[None],
        cu_seqlens=row(packed.cu_seqlens),
        boundaries=tuple(packed.cu_seqlens.tolist()),
        max_seqlen=packed.max_seqlen,
        num_tokens=packed.num_tokens,
        num_targets=packed.num_targets,
    )


def held_out_batches(
    arena: TokenArena, *, capacity: int, rank: int, world_size: int, device: torch.device, pad_token_id: int
) -> Iterator[Batch]:
    """Every document of ``arena`` once over all ranks, packed tightly; the packs do not depend on the world size.

    Every rank gets the same number of batches, the last of some without documents: sharded models talk in each forward
    pass.
    """
    plan = pack(arena.lengths, capacity, algorithm="ffd")
    nothing = np.zeros(0, dtype=np.int32)
    for first in range(0, len(plan), world_size):
        documents = plan.pack(first + rank) if first + rank < len(plan) else nothing
        yield make_batch(arena, documents, device=device, pad_token_id=pad_token_id)
