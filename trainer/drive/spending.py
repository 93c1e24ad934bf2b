"""The driver's ledger: stages that one process does, ``prepare``, ``verify`` and the card."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.console import warn
from trainer.cost.book import Book
from trainer.cost.power import Sockets
from trainer.paths import RunFolder


@contextmanager
def spending(folder: RunFolder, stage: str) -> Iterator[None]:
    """What the process that is started inside uses is spent on ``stage``, however it ends."""
    sockets = Sockets()
    book = Book(
        folder.driver_ledger,
        rank=-1,
        sockets=sockets if sockets.are_readable else None,
        cpu_seconds=children_seconds,
        warn=warn,
        every=None,
    )
    with book.stage(stage):
        yield


def children_seconds() -> float:
    """CPU time in seconds of the processes that this one started, and theirs, once they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
