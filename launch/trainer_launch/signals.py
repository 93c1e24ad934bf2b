"""Signals that a process heeds for a while: it passes them on, or notes them, where Python alone would end."""

import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heeding(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Have ``handler`` called for each of ``numbers`` while the block runs; afterwards all is as it was.

    One that this process was told to ignore (nohup, ``&``) stays ignored. Must be called from the main thread.
    """
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
