"""Batches made ahead of their use by one background thread, in a ring of buffers that are used again and again.

Making a batch takes a fraction of a millisecond, but planning an epoch, or pages of the arena that are not in memory
yet, can take longer; neither should be waited for between two steps. One thread is enough for any model, because the
lock of the interpreter is released while tokens are copied and packs are planned: no worker processes, no copies of
the data in them, nothing to be sent to them.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

from trainer_kernels.checks import whole
from trainer_kernels.errors import PackingError

Order = TypeVar("Order")
Room = TypeVar("Room")
Made = TypeVar("Made")

AHEAD = 3
"""Batches that are ready while one is trained on."""


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class _End:
    """All have been made."""


class Ahead(Generic[Order, Room, Made]):
    """Iterates over ``make(order, buffers)`` for each of ``orders``, in order, made by a thread up to ``ahead`` early.

    ``orders`` is anything that says what to make, such as the document ids of each pack; it is read by the thread, so
    a generator that plans does so there too. ``make`` writes to the buffers that it gets and returns the batch.
    ``new_buffers`` makes them, ``Buffers`` or anything else that holds one batch; it is called ``ahead + held`` times,
    here and now.

    A batch is valid until the ``held``-th request after it, then its buffers are written again: ask only when nothing
    reads the oldest any more, a copy to a device included. An error of ``orders`` or ``make`` is raised where its batch
    would have come. ``close``, the end of a ``with`` block, or dropping the object ends the thread.
    """

    def __init__(
        self,
        orders: Iterable[Order],
        make: Callable[[Order, Room], Made],
        new_buffers: Callable[[], Room],
        *,
        ahead: int = AHEAD,
        held: int = 1,
    ) -> None:
        whole("ahead", ahead, 1, 1024)
        whole("held", held, 1, 1024)
        self._held = held
        self._free: SimpleQueue[Room | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Room, Made] | _Failed | _End] = SimpleQueue()
        self._out: deque[Room] = deque()
        self._state = "open"
        for _ in range(ahead + held):
            self._free.put(new_buffers())
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(orders, make, self._free, self._ready, stop), name="batches ahead", daemon=True
        )
        self._stop = weakref.finalize(self, _stop, stop, self._free)
        self._thread.start()

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        if self._state == "closed":
            raise PackingError(
                "the batches made ahead were closed",
                got="a request for another",
                allowed="requests before close()",
                do="make another Ahead from where this one ended",
            )
        if self._state == "ended":
            raise StopIteration
        while len(self._out) >= self._held:
            self._free.put(self._out.popleft())
        ready = self._ready.get()
        if isinstance(ready, _Failed | _End):
            self._state = "ended"
            self._thread.join()
            if isinstance(ready, _Failed):
                raise ready.error
            raise StopIteration
        buffers, made = ready
        self._out.append(buffers)
        return made

    def close(self) -> None:
        """End the thread; what is being made is finished and discarded. May be called again."""
        self._state = "closed"
        self._stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _stop(stop: threading.Event, free: "SimpleQueue[Room | None]") -> None:
    stop.set()
    free.put(None)


def _work(
    orders: Iterable[Order],
    make: Callable[[Order, Room], Made],
    free: "SimpleQueue[Room | None]",
    ready: "SimpleQueue[tuple[Room, Made] | _Failed | _End]",
    stop: threading.Event,
) -> None:
    """Make all of ``orders``, each when there are free buffers; None among those only wakes it up to stop."""
    try:
        for order in orders:
            buffers = free.get()
            if buffers is None or stop.is_set():
                return
            ready.put((buffers, make(order, buffers)))
    except BaseException as error:  # the thread that asks for the batch has to hear of it, whatever it is
        ready.put(_Failed(error))
    else:
        ready.put(_End())
