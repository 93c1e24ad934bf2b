"""Batches made ahead and sent to the device: the same ones in the same order, in memory nobody still reads."""

import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_fixtures import make_arena, make_source, schedule_for, tiny_loss, tiny_strategy

from trainer.batch import Batch
from trainer.data.batches import Load, TrainingBatches, held_out_batches
from trainer.data.scheduling import ScheduleOptions, training_schedule
from trainer.data.transfer import (
    BatchShape,
    DeviceBatches,
    HostBatches,
    check_maker,
    collate_fixed,
    make_batch,
    rounded_length,
    unlike,
)
from trainer.distributed.ranks import start_ranks
from trainer.errors import RunError, StoppedInGoodOrder, TrainingFault
from trainer.train.guard import Judge, NonFinite, StopFlag
from trainer.train.loop import Hooks, Settings, train
from trainer.train.state import TrainState
from trainer_kernels import Buffers, TokenArena, collate, reference

CPU = torch.device("cpu")
TENSORS = ("input_ids", "labels", "position_ids", "cu_seqlens")
NUMBERS = ("boundaries", "max_seqlen", "num_tokens", "num_targets")
AHEAD = "batches ahead"


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> TokenArena:
    return make_arena(tmp_path_factory.mktemp("arena") / "train")


def batches(arena: TokenArena, device: torch.device = CPU, *, packs: int = 4, epochs: float = 3.0) -> TrainingBatches:
    plan = schedule_for(arena, world_size=1, packs=packs, epochs=epochs, max_steps=None)
    return TrainingBatches(arena, plan, capacity=96, rank=0, device=device, pad_token_id=5)


def threads() -> list[str]:
    """The threads that make batches."""
    return [thread.name for thread in threading.enumerate() if thread.name == AHEAD]


def values(batch: Batch) -> dict[str, Any]:
    """All that is in a batch, as lists and numbers."""
    return {name: getattr(batch, name).tolist() for name in TENSORS} | {name: getattr(batch, name) for name in NUMBERS}


def taken(source: TrainingBatches, load: Load, start: int, steps: int | None = None) -> Iterator[Batch]:
    """The batches of ``steps`` steps as the loop asks for them."""
    for planned in islice(source.steps(start), steps):
        for documents in planned.documents:
            yield load(documents)


# -- on the CPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 4, 11])
def test_batches_made_ahead_are_those_made_at_once(arena: TokenArena, start: int) -> None:
    source = batches(arena)
    assert start < source.num_steps
    wanted = [
        values(make_batch(arena, documents, pad_token_id=5)) for s in source.steps(start) for documents in s.documents
    ]
    with source.ahead(start) as load:
        assert [values(batch) for batch in taken(source, load, start)] == wanted
    assert any(not batch["num_tokens"] for batch in wanted), "an empty pack is among them"


def test_a_finished_run_has_nothing_ahead(arena: TokenArena) -> None:
    source = batches(arena)
    with source.ahead(source.num_steps) as load, pytest.raises(AssertionError, match="in the order of the schedule"):
        load(np.array([0], np.int32))
    assert threads() == []


def test_the_memory_of_a_batch_is_its_own_until_the_next_is_asked_for(arena: TokenArena) -> None:
    """And not longer: there are no more sets of buffers than are needed, and they are used again."""
    source = batches(arena)
    seen: set[int] = set()
    with source.ahead(0) as load:
        for planned in source.steps(0):
            for documents in planned.documents:
                batch = load(documents)
                seen.add(batch.input_ids.data_ptr())
                batch.input_ids.add_(0)  # a tensor that can be written: the arena's memory is not in it
                assert values(batch) == values(make_batch(arena, documents, pad_token_id=5))
    assert len(seen) == 4, "three ready, and the one that is trained on"


def test_other_documents_than_the_schedule_has_are_refused(arena: TokenArena) -> None:
    source = batches(arena)
    first, second = islice(source.steps(0), 2)
    with source.ahead(0) as load, pytest.raises(AssertionError, match="in the order of the schedule"):
        load(second.documents[0])
    assert not np.array_equal(first.documents[0], second.documents[0])


@pytest.mark.parametrize("after", [0, 1, 7])
def test_leaving_early_ends_the_thread(arena: TokenArena, after: int) -> None:
    source = batches(arena)
    with source.ahead(0) as load:
        assert threads() == [AHEAD]
        list(islice(taken(source, load, 0), after))
    assert threads() == []

    def break_off() -> None:
        with source.ahead(0) as load:
            list(islice(taken(source, load, 0), after))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert threads() == []


def test_an_error_in_the_thread_comes_with_its_batch(arena: TokenArena, monkeypatch: pytest.MonkeyPatch) -> None:
    source = batches(arena)
    steps = list(source.steps(0))
    wrong = steps[2].documents[1].tolist()
    make = HostBatches.make

    def failing(self: HostBatches, documents: Any, room: Any) -> Batch:
        if documents.tolist() == wrong:
            raise OSError("the disk is gone")
        return make(self, documents, room)

    monkeypatch.setattr(HostBatches, "make", failing)
    with source.ahead(0) as load:
        for planned in steps[:2]:
            for documents in planned.documents:
                load(documents)
        load(steps[2].documents[0])
        with pytest.raises(OSError, match="the disk is gone"):
            load(steps[2].documents[1])
    assert threads() == []


@pytest.mark.parametrize(
    ("ends", "error", "calls"),
    [("at the end", None, 12), ("stopped", StoppedInGoodOrder, 6), ("with a fault", NonFinite, 6)],
)
def test_the_loop_leaves_no_thread_however_it_ends(
    tmp_path: Path, ends: str, error: type[Exception] | None, calls: int
) -> None:
    ranks = start_ranks(device="cpu", world_size=1)
    make_arena(tmp_path / "train")
    source = make_source(tmp_path, ranks, packs=2, max_steps=6)
    strategy, loss = tiny_strategy(ranks, lora=True)
    stop = StopFlag()
    seen: list[list[str]] = []

    def interfere(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(threads())
        if ends == "stopped" and len(seen) == 5:
            stop.cause = "SIGTERM"
        return output * float("nan") if ends == "with a fault" and len(seen) == 5 else output

    loss.register_forward_hook(interfere)
    settings = Settings(seed=1, lr=lambda step: 1e-3, validate_every=100, save_every=100, judge=Judge(metric="loss"))
    hooks = Hooks(
        validate=None, save=lambda state, required: None, record=lambda record, figures: None, warn=lambda _: None
    )
    with pytest.raises(error) if error is not None else nullcontext():
        train(strategy, source, settings, hooks, TrainState(), stop)
    assert seen[:6] == [[AHEAD]] * 6
    assert len(seen) == calls
    assert threads() == []


# -- one shape for all batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "length"), [(0, 16), (1, 16), (14, 16), (15, 32), (1000, 1008)])
def test_boundaries_have_room_for_all_documents_a_tail_and_the_end(documents: int, length: int) -> None:
    shape = BatchShape(positions=4096, documents=documents)
    assert shape.boundaries == length
    assert shape.boundaries >= documents + 2


@pytest.mark.parametrize(
    ("longest", "rounded"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (2049, 3000), (3000, 3000)]
)
def test_lengths_are_rounded_up_to_few_values(longest: int, rounded: int) -> None:
    assert rounded_length(longest, 3000) == rounded


def test_the_schedule_knows_the_most_documents_of_a_pack(arena: TokenArena) -> None:
    plan = schedule_for(arena, world_size=1, packs=2, epochs=3.0, max_steps=None)
    counts = [len(documents) for step in range(plan.num_steps) for documents in plan.documents(step)]
    assert plan.row.most_documents == max(counts) > min(counts)
    few = training_schedule(arena.lengths, arena.targets, ScheduleOptions(capacity=96, max_documents=2))
    assert few.row.most_documents == 2


def test_a_batch_of_fixed_shape_is_the_padded_one_with_its_end_repeated(arena: TokenArena) -> None:
    plan = schedule_for(arena, world_size=1, packs=4, epochs=1.0, max_steps=None)
    shape = BatchShape(positions=96, documents=plan.row.most_documents)
    room = Buffers.of("compact", 96, shape.boundaries - 2)
    for documents in (*plan.documents(0), *plan.documents(plan.num_steps - 1), np.zeros(0, np.int32)):
        room.cu_seqlens[:] = 7
        found = collate_fixed(arena, documents, shape=shape, pad_token_id=5, out=room)
        wanted = collate(arena, documents, pad_to=96, pad_id=5)
        assert found.cu_seqlens.tolist() == wanted.cu_seqlens.tolist()
        assert room.cu_seqlens.tolist() == [*wanted.cu_seqlens, *[96] * (shape.boundaries - len(wanted.cu_seqlens))]
        assert reference.expand(found).labels.tolist() == wanted.labels.tolist()


def test_the_loss_does_not_depend_on_the_shape(arena: TokenArena) -> None:
    """Padding, segments of no tokens and a longest segment that is too long leave the sum and the gradient alone."""
    documents = np.array([3, 8, 1], np.int32)
    tight = make_batch(arena, documents, pad_token_id=5)
    padded = fixed_batch(arena, documents, BatchShape(positions=128, documents=40))
    found: list[tuple[float, list[torch.Tensor]]] = []
    for batch in (tight, padded):
        loss = tiny_loss(lora=False)
        value = loss(batch)
        value.backward()
        found.append((float(value.detach()), [p.grad for p in loss.parameters() if p.grad is not None]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def fixed_batch(arena: TokenArena, documents: Any, shape: BatchShape) -> Batch:
    """What a GPU has to get, made on the CPU in the slow way."""
    room = Buffers.of("compact", shape.positions, shape.boundaries - 2)
    compact = collate_fixed(arena, documents, shape=shape, pad_token_id=5, out=room)
    whole = reference.expand(compact)
    return Batch(
        input_ids=torch.from_numpy(whole.input_ids)[None],
        labels=torch.from_numpy(whole.labels)[None],
        position_ids=torch.from_numpy(whole.position_ids)[None],
        cu_seqlens=torch.from_numpy(room.cu_seqlens.copy()),
        boundaries=tuple(compact.cu_seqlens.tolist()),
        max_seqlen=rounded_length(compact.max_seqlen, shape.positions),
        num_tokens=compact.num_tokens,
        num_targets=compact.num_targets,
    )


def test_a_batch_is_compared_with_the_one_of_the_cpu_before_training(arena: TokenArena) -> None:
    batches(arena).check()
    shape = BatchShape(positions=96, documents=6)
    documents = np.arange(3, dtype=np.int32)
    wanted = make_batch(arena, documents, pad_token_id=5)
    assert unlike(fixed_batch(arena, documents, shape), wanted) == []
    damages = {
        "input_ids": {"input_ids": 2},
        "labels": {"labels": wanted.num_tokens - 2},
        "labels of padding": {"labels": 95},
        "position_ids": {"position_ids": 0},
        "cu_seqlens": {"cu_seqlens": 1},
        "end of cu_seqlens": {"cu_seqlens": 6},
    }
    for name, damage in damages.items():
        made = fixed_batch(arena, documents, shape)
        for tensor, place in damage.items():
            getattr(made, tensor).view(-1)[place] += 1
        assert unlike(made, wanted) == [name]


def test_a_wrong_batch_ends_the_run(arena: TokenArena) -> None:
    class Wrong(HostBatches):
        def fresh(self, documents: Any) -> Batch:
            made = super().fresh(documents)
            made.position_ids[0, 1] += 1
            return made

    shape = BatchShape(positions=96, documents=6)
    with pytest.raises(TrainingFault, match="a batch made on the device is not the one that the CPU makes") as caught:
        check_maker(Wrong(arena, shape=shape, pad_token_id=5), arena, shape=shape, pad_token_id=5)
    assert "different position_ids" in str(caught.value)


def test_a_gpu_without_triton_is_refused(arena: TokenArena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trainer_kernels.expand", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RunError, match="Triton cannot be imported") as caught:
        DeviceBatches(arena, device=torch.device("cuda"), shape=BatchShape(positions=96, documents=9), pad_token_id=0)
    assert "launch.device=cpu" in caught.value.problems[0].do


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


def shape_of(arena: TokenArena, *, epochs: float = 3.0) -> BatchShape:
    """That of ``batches``."""
    plan = schedule_for(arena, world_size=1, packs=4, epochs=epochs, max_steps=None)
    return BatchShape(positions=96, documents=plan.row.most_documents)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 4])
def test_batches_on_the_gpu_are_those_of_the_cpu_to_the_bit(arena: TokenArena, cuda: torch.device, start: int) -> None:
    source, shape = batches(arena, cuda), shape_of(arena)
    with source.ahead(start) as load:
        for planned in source.steps(start):
            for documents in planned.documents:
                batch, wanted = load(documents), fixed_batch(arena, documents, shape)
                assert {getattr(batch, name).device for name in TENSORS} == {cuda}
                assert values(batch) == values(wanted)
                assert values(source.load(documents)) == values(wanted)
                for name in TENSORS:
                    ours, theirs = getattr(batch, name), getattr(wanted, name)
                    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_nothing_waits_for_the_gpu(arena: TokenArena, cuda: torch.device) -> None:
    source = batches(arena, cuda)
    source.load(np.array([1], np.int32))  # compiles the kernel
    with source.ahead(0) as load:
        waiting = taken(source, load, 0)
        next(waiting)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(500_000_000)  # the queue is not empty while batches are asked for
            kept = [batch.input_ids for batch in islice(waiting, 12)]
            busy = not torch.cuda.current_stream().query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert busy, "the batches were ready before the work in front of them"
    assert len(kept) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["copies", "computation", "neither"])
def test_memory_is_not_written_before_it_was_read(arena: TokenArena, cuda: torch.device, slow: str) -> None:
    """Copies that begin late must still find their batch, and a late computation its boundaries and tokens."""
    source, shape = batches(arena, cuda, epochs=40.0), shape_of(arena, epochs=40.0)
    source.load(np.array([1], np.int32))
    copying = source._maker._stream  # type: ignore[attr-defined]
    asked: list[Any] = []
    found: list[list[torch.Tensor]] = []
    with source.ahead(0) as load:
        for planned in source.steps(0):
            for number, documents in enumerate(planned.documents):
                if slow == "copies" and number == 0:
                    with torch.cuda.stream(copying):
                        torch.cuda._sleep(3_000_000)
                if slow == "computation" and number == 0:
                    torch.cuda._sleep(3_000_000)
                batch = load(documents)
                found.append([getattr(batch, name).clone() for name in TENSORS])  # queued, not waited for
                asked.append(documents)
    torch.cuda.synchronize()
    assert len(found) > 300
    for tensors, documents in zip(found, asked, strict=True):
        batch = fixed_batch(arena, documents, shape)
        assert [tensor.tolist() for tensor in tensors] == [getattr(batch, name).tolist() for name in TENSORS]


@pytest.mark.gpu
def test_held_out_batches_on_the_gpu_have_one_shape_and_all_documents(arena: TokenArena, cuda: torch.device) -> None:
    on_cpu = list(held_out_batches(arena, capacity=96, rank=0, world_size=1, device=CPU, pad_token_id=5))
    on_gpu = list(held_out_batches(arena, capacity=96, rank=0, world_size=1, device=cuda, pad_token_id=5))
    assert len({tuple(getattr(batch, name).shape for name in TENSORS) for batch in on_gpu}) == 1
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        size = theirs.input_ids.shape[1]
        assert ours.input_ids[0, :size].tolist() == theirs.input_ids[0].tolist()
        assert ours.labels[0, :size].tolist() == theirs.labels[0].tolist()
        assert (ours.num_tokens, ours.num_targets) == (theirs.num_tokens, theirs.num_targets)


@pytest.mark.gpu
def test_the_loss_on_the_gpu_is_that_of_the_cpu(arena: TokenArena, cuda: torch.device) -> None:
    source = batches(arena, cuda)
    for documents in next(source.steps(0)).documents:
        on_cpu = tiny_loss(lora=False)(make_batch(arena, documents, pad_token_id=5))
        on_gpu = tiny_loss(lora=False).to(cuda)(source.load(documents))
        assert float(on_gpu.detach()) == pytest.approx(float(on_cpu.detach()), rel=1e-4)
