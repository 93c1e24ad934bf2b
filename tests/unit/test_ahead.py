"""Batches made ahead: the same ones in the same order, valid for as long as promised, and no thread is left."""

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_fixtures import random_arena
from numpy.typing import NDArray

from trainer_kernels import Ahead, Buffers, PackedBatch, PackingError, TokenArena, collate, pack, schedule

collating = sys.modules["trainer_kernels.collate"]  # the function of this name hides the module


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> TokenArena:
    return random_arena(tmp_path_factory.mktemp("ahead") / "arena", documents=200, longest=40)


def small() -> Buffers:
    return Buffers.of("int32", 1, 0)


def note(order: int, buffers: Buffers) -> tuple[int, Buffers]:
    buffers.rows[0, 0] = order
    return order, buffers


def test_batches_are_those_made_without_a_thread(arena: TokenArena) -> None:
    steps = schedule(
        lambda epoch: pack(arena.lengths, 128, epoch=epoch), arena.targets, epochs=2, world_size=2, accumulation=3
    )

    def orders() -> Iterator[NDArray[np.int32]]:
        return (documents for step in steps.batches(1, 2) for documents in step)

    def make(documents: NDArray[np.int32], buffers: Buffers) -> PackedBatch:
        return collate(arena, documents, layout="int64", pad_to=128, out=buffers)

    expected = [collate(arena, documents, pad_to=128) for documents in orders()]
    with Ahead(orders(), make, lambda: Buffers.of("int64", 128, 200)) as ring:
        for wanted in expected:
            found = next(ring)
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
                assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
            assert found.num_targets == wanted.num_targets
        assert next(ring, None) is None
        assert next(ring, None) is None


@pytest.mark.parametrize("held", [1, 2, 5])
def test_a_batch_stays_until_as_many_more_were_asked_for_as_are_held(held: int) -> None:
    with Ahead(range(60), note, small, ahead=3, held=held) as ring:
        kept: list[tuple[int, Buffers]] = []
        for made in ring:
            kept = [*kept, made][-held:]
            assert [int(buffers.rows[0, 0]) for _, buffers in kept] == [order for order, _ in kept]
        assert kept[-1][0] == 59


def test_no_more_are_made_than_the_ring_has_room_for_and_no_fewer() -> None:
    asked: list[int] = []
    enough = threading.Event()

    def orders() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            if number == 5:
                enough.set()
            yield number

    with Ahead(orders(), note, small, ahead=3, held=2) as ring:
        assert enough.wait(60)  # five sets of buffers are full, and the sixth order waits for one
        assert asked == [0, 1, 2, 3, 4, 5]
        assert next(ring)[0] == 0
        assert next(ring)[0] == 1
        assert asked == [0, 1, 2, 3, 4, 5]


def test_buffers_are_used_again_and_only_as_many_are_made_as_said() -> None:
    made: list[Buffers] = []

    def new() -> Buffers:
        made.append(small())
        return made[-1]

    with Ahead(range(50), note, new, ahead=2, held=1) as ring:
        seen = {id(buffers) for _, buffers in ring}
    assert len(made) == 3
    assert seen == {id(buffers) for buffers in made}


def test_an_error_comes_where_its_batch_would_have_come_and_the_thread_has_ended() -> None:
    def make(order: int, buffers: Buffers) -> int:
        if order == 2:
            raise PackingError("wrong", got="2", allowed="others", do="nothing")
        return order

    def orders() -> Iterator[int]:
        yield 0
        raise RuntimeError("no plan")

    ring = Ahead(range(5), make, small)
    assert [next(ring), next(ring)] == [0, 1]
    with pytest.raises(PackingError, match="wrong"):
        next(ring)
    assert next(ring, None) is None
    assert not ring._thread.is_alive()
    failing = Ahead(orders(), make, small)
    assert next(failing) == 0
    with pytest.raises(RuntimeError, match="no plan"):
        next(failing)


def test_close_ends_the_thread_at_any_time_and_says_so_to_those_who_go_on() -> None:
    for taken in (0, 1, 7):
        ring = Ahead(range(1000), note, small)
        assert [next(ring)[0] for _ in range(taken)] == list(range(taken))
        ring.close()
        ring.close()
        assert not ring._thread.is_alive()
        with pytest.raises(PackingError, match="the batches made ahead were closed") as caught:
            next(ring)
        assert caught.value.do == "make another Ahead from where this one ended"


def test_dropping_it_ends_the_thread() -> None:
    ring = Ahead(range(1000), note, small)
    thread, gone = ring._thread, weakref.ref(ring)
    next(ring)
    del ring
    gc.collect()
    assert gone() is None
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["ahead", "held"])
def test_a_ring_needs_room(name: str) -> None:
    with pytest.raises(PackingError, match=f"{name} is out of range"):
        Ahead(range(3), note, small, **{name: 0})


@pytest.mark.parametrize("function", [collating._fill, collating._fill_compact, collating._set_boundaries])
def test_tokens_are_copied_without_the_lock_of_the_interpreter(function: Any) -> None:
    assert function.targetoptions["nogil"]
