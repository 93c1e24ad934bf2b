"""From a pack of documents to a ``Batch`` on the device, in memory that is used again.

Three steps, because they belong to different threads: ``room`` is memory for one batch; ``make`` collates into it and,
for a GPU, sends it off (the thread that works ahead); ``finish`` gives the batch to the thread that trains. On a CPU
the arrays are the tensors. To a GPU go 4 bytes a token, out of pinned memory, on a stream of their own beside the
computation; there one kernel makes the tensors. Nothing on this way makes the training thread wait for the device.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import Batch
from trainer.errors import RunError, TrainingFault
from trainer_kernels import IGNORE, Buffers, CompactBatch, PackedBatch, TokenArena, collate

Documents = NDArray[np.int32]
Room = TypeVar("Room")
Made = TypeVar("Made")

BOUNDARIES_MULTIPLE = 16
"""The length of ``cu_seqlens`` on a GPU is a multiple of this; so the tokens behind it are aligned for wide loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What holds for every batch of a run: at most ``positions`` tokens of at most ``documents`` documents."""

    positions: int
    documents: int

    @property
    def boundaries(self) -> int:
        """Length of ``cu_seqlens`` where it is fixed: for all documents, a padded tail and the end."""
        return -(-(self.documents + 2) // BOUNDARIES_MULTIPLE) * BOUNDARIES_MULTIPLE


def rounded_length(longest: int, positions: int) -> int:
    """``longest`` (at least 1) rounded up to a power of two, at most ``positions``: few different values in a run."""
    return min(1 << (longest - 1).bit_length(), positions)


class BatchMaker(Protocol[Room, Made]):
    """The three steps, and all of them at once. Only ``make`` may be called by another thread than the training one."""

    def room(self) -> Room:
        """Memory for one batch."""
        ...

    def make(self, documents: Documents, room: Room) -> Made:
        """Collate ``documents`` (int32 ids; none: a batch of padding) into ``room``, and send it off."""
        ...

    def finish(self, made: Made) -> Batch:
        """The batch; on a GPU, ready for what the current stream is given from now on."""
        ...

    def fresh(self, documents: Documents) -> Batch:
        """The batch of ``documents`` in memory of its own."""
        ...


def batch_maker(
    arena: TokenArena, *, device: torch.device, shape: BatchShape, pad_token_id: int
) -> BatchMaker[Any, Any]:
    """The way to ``device``, for batches within ``shape``.

    Raises:
        RunError: a CUDA device without Triton.
    """
    if device.type == "cuda":
        return DeviceBatches(arena, device=device, shape=shape, pad_token_id=pad_token_id)
    return HostBatches(arena, shape=shape, pad_token_id=pad_token_id)


class HostBatches:
    """Batches on the CPU, without padding. Their tensors are views of the room: valid until it is written again."""

    def __init__(self, arena: TokenArena, *, shape: BatchShape, pad_token_id: int) -> None:
        self._arena = arena
        self._shape = shape
        self._pad_token_id = pad_token_id

    def room(self) -> Buffers:
        """Ordinary memory, 24 bytes a token."""
        return Buffers.of("int64", self._shape.positions, self._shape.documents)

    def make(self, documents: Documents, room: Buffers) -> Batch:
        """The batch; no documents: one token of padding."""
        return _as_tensors(collate(self._arena, documents, layout="int64", pad_id=self._pad_token_id, out=room))

    def finish(self, made: Batch) -> Batch:
        """The same."""
        return made

    def fresh(self, documents: Documents) -> Batch:
        """See ``make_batch``."""
        return make_batch(self._arena, documents, pad_token_id=self._pad_token_id)


def make_batch(arena: TokenArena, documents: Documents, *, pad_token_id: int) -> Batch:
    """The batch of ``documents`` on the CPU, as many as there are, in memory of its own."""
    return _as_tensors(collate(arena, documents, layout="int64", pad_id=pad_token_id))


def check_maker(maker: BatchMaker[Any, Any], arena: TokenArena, *, shape: BatchShape, pad_token_id: int) -> None:
    """Compare the batch of the first documents, as ``maker`` makes it, with the one collated on the CPU, bit by bit.

    Costs one batch and one wait for the device, once in a run: a driver or compiler that gets the kernel wrong must not
    train anything.

    Raises:
        TrainingFault: they differ.
    """
    fitting = np.flatnonzero(np.cumsum(arena.lengths[: shape.documents], dtype=np.int64) <= shape.positions)
    documents = fitting.astype(np.int32)
    made, wanted = maker.fresh(documents), make_batch(arena, documents, pad_token_id=pad_token_id)
    wrong = unlike(made, wanted)
    if wrong:
        raise TrainingFault(
            "a batch made on the device is not the one that the CPU makes",
            where=f"{made.input_ids.device}, the first {len(documents)} documents",
            got=f"different {', '.join(wrong)}",
            allowed="equal to the bit",
            do="check driver, torch and triton of this machine; launch.device=cpu trains without the kernel",
        )


def unlike(made: Batch, wanted: Batch) -> list[str]:
    """What differs in ``made`` from ``wanted``, a batch without padding of the same documents."""
    size = wanted.num_tokens
    found = [
        name
        for name in ("input_ids", "labels", "position_ids")
        if not torch.equal(getattr(made, name)[0, :size].cpu(), getattr(wanted, name)[0, :size])
    ]
    if bool((made.labels[0, size:] != IGNORE).any()):
        found.append("labels of padding")
    segments = len(wanted.boundaries)
    if made.cu_seqlens[:segments].tolist() != list(wanted.boundaries) or made.max_seqlen < wanted.max_seqlen:
        found.append("cu_seqlens")
    if bool((made.cu_seqlens[segments:] != made.input_ids.shape[1]).any()):
        found.append("end of cu_seqlens")
    if (made.num_tokens, made.num_targets) != (wanted.num_tokens, wanted.num_targets):
        found.append("counts")
    return found


def _as_tensors(packed: PackedBatch) -> Batch:
    """An int64 batch as tensors that share its memory."""
    return Batch(
        input_ids=torch.from_numpy(packed.input_ids)[None],
        labels=torch.from_numpy(packed.labels)[None],
        position_ids=torch.from_numpy(packed.position_ids)[None],
        cu_seqlens=torch.from_numpy(packed.cu_seqlens),
        boundaries=tuple(packed.cu_seqlens.tolist()),
        max_seqlen=packed.max_seqlen,
        num_tokens=packed.num_tokens,
        num_targets=packed.num_targets,
    )


def collate_fixed(
    arena: TokenArena, documents: Documents, *, shape: BatchShape, pad_token_id: int, out: Buffers
) -> CompactBatch:
    """The compact batch of ``documents``, filled up to ``shape``; its ``cu_seqlens`` are the true ones.

    All of ``out.cu_seqlens`` is written: those, and repetitions of the number of positions.
    """
    compact = collate(arena, documents, layout="compact", pad_to=shape.positions, pad_id=pad_token_id, out=out)
    out.cu_seqlens[len(compact.cu_seqlens) :] = shape.positions
    return compact


@dataclass(frozen=True, slots=True, eq=False)
class PinnedRoom:
    """``memory`` int32 [boundaries + positions], pinned: one copy takes both. ``buffers``: views of it.

    ``copied``: the latest copy out of it is done. Before the first one it says so, too.
    """

    memory: torch.Tensor
    buffers: Buffers
    copied: torch.cuda.Event


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A compact batch on its way: ``memory`` int32 [boundaries + positions] on the device holds it after ``copied``."""

    memory: torch.Tensor
    copied: torch.cuda.Event
    boundaries: tuple[int, ...]
    max_seqlen: int
    num_tokens: int
    num_targets: int


@lru_cache(maxsize=8)
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies of a process: torch keeps memory per stream, and every validation would keep some more."""
    return torch.cuda.Stream(device)


class DeviceBatches:
    """Batches of one shape on a CUDA device."""

    def __init__(self, arena: TokenArena, *, device: torch.device, shape: BatchShape, pad_token_id: int) -> None:
        try:
            from trainer_kernels.expand import expand
        except ImportError as fault:
            raise RunError(
                "batches are made on the GPU by a Triton kernel, and Triton cannot be imported",
                where="launch.device",
                got=str(fault),
                allowed="torch for CUDA, which brings triton along",
                do="install torch from its CUDA index (with its dependencies), or set launch.device=cpu",
            ) from fault
        self._arena = arena
        self._device = device
        self._shape = shape
        self._pad_token_id = pad_token_id
        self._expand = expand
        self._stream = _copying_stream(device)

    def room(self) -> PinnedRoom:
        """Pinned memory, 4 bytes a token and a boundary."""
        shape = self._shape
        memory = torch.empty(shape.boundaries + shape.positions, dtype=torch.int32, pin_memory=True)
        cu_seqlens, rows = memory[: shape.boundaries].numpy(), memory[None, shape.boundaries :].numpy()
        return PinnedRoom(memory, Buffers(rows, cu_seqlens), torch.cuda.Event())

    def make(self, documents: Documents, room: PinnedRoom) -> Sent:
        """Collate into ``room`` as soon as the copy before has left it, and start the next one."""
        room.copied.synchronize()
        compact = collate_fixed(
            self._arena, documents, shape=self._shape, pad_token_id=self._pad_token_id, out=room.buffers
        )
        with torch.cuda.stream(self._stream):
            memory = torch.empty(room.memory.numel(), dtype=torch.int32, device=self._device)
            memory.copy_(room.memory, non_blocking=True)
            room.copied.record(self._stream)
        return Sent(
            memory=memory,
            copied=room.copied,
            boundaries=tuple(compact.cu_seqlens.tolist()),
            max_seqlen=rounded_length(compact.max_seqlen, self._shape.positions),
            num_tokens=compact.num_tokens,
            num_targets=compact.num_targets,
        )

    def finish(self, made: Sent) -> Batch:
        """Expand on the current stream, behind the copy."""
        with torch.cuda.device(self._device):
            compute = torch.cuda.current_stream()
            compute.wait_event(made.copied)
            # Its memory is of the copying stream's: it may be handed out again only after what is queued here.
            made.memory.record_stream(compute)
            cu_seqlens, tokens = made.memory[: self._shape.boundaries], made.memory[self._shape.boundaries :]
            rows = torch.empty(3, 1, self._shape.positions, dtype=torch.int64, device=self._device)
            self._expand(tokens, cu_seqlens, input_ids=rows[0], labels=rows[1], position_ids=rows[2])
        return Batch(
            input_ids=rows[0],
            labels=rows[1],
            position_ids=rows[2],
            cu_seqlens=cu_seqlens,
            boundaries=made.boundaries,
            max_seqlen=made.max_seqlen,
            num_tokens=made.num_tokens,
            num_targets=made.num_targets,
        )

    def fresh(self, documents: Documents) -> Batch:
        """All steps. torch keeps pinned memory for the next time, and waits itself until a copy has left it."""
        return self.finish(self.make(documents, self.room()))
