"""What the agents of several machines tell each other, from their meeting until the end.

Node 0 is the chair (``chair.py``): it listens at one address, says when the ranks start, and hears how they ended. The
others take a seat (``seat.py``). Nobody but the chair talks to everybody, so there is one order of events and one first
cause. A seat proves that it belongs here with the token that the chair's run folder holds, which shows as well that the
folder is shared.

Messages of the chair: ``greeting`` (the sha256 of the token), ``welcome`` or ``refused`` (why), ``start`` (an order),
``stop`` (a signal's name), ``failed`` (a cause, with ``grace`` in seconds), ``published``, ``finish`` (an exit code,
with ``cause``). Of a seat: ``hello`` (``Hello``), ``stop``, ``failed``, ``result`` (``NodeResult``).
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer_launch.node import PeerNews, StopThere
from trainer_launch.verdict import STOPPED, NodeResult

LOST_GRACE_SECONDS = 15.0
"""Ranks have so long after the agent of another machine was found to be gone; with the silence before, below 30 s."""


class MeetingError(Exception):
    """The agents do not come together: ``what`` is wrong, what was ``got``, what to ``do``."""

    def __init__(self, what: str, *, got: str, do: str) -> None:
        super().__init__(f"{what}: {got}")
        self.what, self.got, self.do = what, got, do


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a seat says first. ``facts``: what is compared with the chair's; ``problem``: why it cannot take part."""

    node: int
    host: str
    token: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""


@dataclass(slots=True)
class Line:
    """News on its way to whoever supervises processes at the moment; what came while nobody did is kept."""

    _notify: Callable[[PeerNews], None] | None = None
    _waiting: list[PeerNews] = field(default_factory=list[PeerNews])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def listen(self, notify: Callable[[PeerNews], None] | None) -> None:
        """See ``node.Peers.listen``."""
        with self._lock:
            self._notify = notify
            if notify is not None:
                for news in self._waiting:
                    notify(news)
                self._waiting.clear()

    def forget(self) -> None:
        """Drop what nobody has heard but a stop: it was about ranks that have ended."""
        with self._lock:
            self._waiting = [news for news in self._waiting if isinstance(news, StopThere)]

    def tell(self, news: PeerNews) -> None:
        """Pass ``news`` on."""
        with self._lock:
            if self._notify is not None:
                self._notify(news)
            else:
                self._waiting.append(news)


def token_digest(token: str) -> str:
    """What the chair says of its token: enough to know the right one, and no use without it."""
    return hashlib.sha256(token.encode()).hexdigest()


def name_of(node: int, host: str) -> str:
    """How messages call a machine."""
    return f"node {node} ({host})"


def first_cause(results: Mapping[int, NodeResult], order: Sequence[int]) -> tuple[int, NodeResult]:
    """The machine that ended the run, and how: ``order`` are machines that failed, the first one first.

    A machine that only lost another one is not the cause, unless all of them say so.
    """
    failed = [node for node in dict.fromkeys([*order, *sorted(results)]) if results[node].exit_code not in (0, STOPPED)]
    own = [node for node in failed if not results[node].lost_peer]
    stopped = [node for node in sorted(results) if results[node].exit_code == STOPPED]
    node = (own or failed or stopped or [0])[0]
    return node, results[node]
