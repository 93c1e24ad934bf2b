"""Everything that reaches the terminal, so that all processes of a run speak alike and none dies of its own output.

A rank's output is a pipe to the driver and a log file, never the terminal itself: a terminal that goes away (a closed
laptop) must not end a rank that is saving. Progress therefore travels as plain lines of one fixed shape
(``format_progress``, ``parse_progress``). The driver draws a bar out of them where it has a terminal and prints them as
they are where it has none. A process started by hand on a terminal draws its own bar.

Text is printed as it is: no markup, no highlighting, no wrapping. When nobody reads any more (``| head``, a closed
terminal) the process goes on and only its output ends.
"""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from trainer.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER,
    ConfigError,
    RunError,
    StoppedInGoodOrder,
    TrimtabError,
)

EXIT_INTERRUPTED = 130
"""What shells report for a process that Ctrl-C ended before it could save (128 + SIGINT)."""

LINE_SECONDS = 5.0
"""At most one progress line in this many seconds where there is no terminal."""

NOBODY_READS = (errno.EPIPE, errno.EIO)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without output; rich would end the process here."""
        _forgive(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


_OUT = _Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
_ERR = _Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)
_WIDE = _Console(markup=False, highlight=False, emoji=False, width=1000)


# -- saying things -------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """One line (or several) of the run's story, to stdout."""
    _print(_OUT, text)


def note(text: str) -> None:
    """A detail, dimmed on a terminal."""
    _print(_OUT, text, style="dim")


def warn(text: str) -> None:
    """Something the user should look at, to stderr, with ``warning:`` before it."""
    _print(_ERR, f"warning: {text}", style="yellow")


def error(fault: TrimtabError | str) -> None:
    """A fault with its parts (what, got, allowed, do), to stderr; every problem of a ``ConfigError`` of many."""
    if isinstance(fault, str):
        _print(_ERR, f"error: {fault}", style="red")
        return
    if len(fault.problems) > 1:
        kind = "of the config" if isinstance(fault, ConfigError) else "found"
        _print(_ERR, f"error: {len(fault.problems)} problems {kind}", style="red")
    for problem in fault.problems:
        head, *rest = str(problem).split("\n")
        _print(_ERR, f"error: {head}", style="red")
        for line in rest:
            _print(_ERR, line)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table of texts. Where there is no terminal it takes the width it needs, and nothing is cut."""
    drawn = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    try:
        (_OUT if _OUT.is_terminal else _WIDE).print(drawn)
    except OSError as fault:
        _forgive(fault)


def _print(target: Console, text: str, style: str | None = None) -> None:
    try:
        target.print(text, style=style)
        target.file.flush()
    except OSError as fault:
        _forgive(fault)


def _forgive(fault: OSError) -> None:
    """Nobody reads any more: send both streams nowhere, so that neither this line nor the exit of Python fails."""
    if fault.errno not in NOBODY_READS:
        raise fault
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


# -- progress ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """One report of progress: ``done`` of ``total``, time left as text, and what else is worth a look."""

    label: str
    done: int
    total: int
    left: str
    facts: str


_PROGRESS = re.compile(
    r"(?P<label>\S[^\d]*?) +(?P<done>\d+)/(?P<total>\d+) \(\d+ %\), (?P<left>[\d:?]+) left(?:: (?P<facts>.*))?"
)


def format_progress(line: ProgressLine) -> str:
    """``train 12/340 (3 %), 02:31 left: loss 1.234``: what ``parse_progress`` reads back."""
    share = 100 * line.done // line.total if line.total else 100
    head = f"{line.label} {line.done}/{line.total} ({share} %), {line.left} left"
    return f"{head}: {line.facts}" if line.facts else head


def parse_progress(text: str) -> ProgressLine | None:
    """The report in ``text``, or None when it is any other line."""
    found = _PROGRESS.fullmatch(text)
    if found is None:
        return None
    return ProgressLine(
        label=found["label"],
        done=int(found["done"]),
        total=int(found["total"]),
        left=found["left"],
        facts=found["facts"] or "",
    )


def gigabytes(count: int) -> str:
    """``count`` bytes for people, in decimal units: GB, below one MB, below one kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def format_seconds(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressReport:
    """Progress of one piece of work. ``update(done, facts)`` as often as you like; it prints only when it is time.

    The time left is what this process measured: (total - done) x time per unit since ``start``, the first unit left
    out because it holds the warm-up. Use as a context manager; ``label`` has no digits.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._first: tuple[float, int] | None = None
        self._start = start
        self._printed = -LINE_SECONDS
        self._bar = _Bar() if _OUT.is_terminal else None

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, facts: str = "") -> None:
        """``done`` units of the total are finished. ``facts``: one short line such as ``loss 1.234``."""
        now = self._clock()
        if self._first is None and done > self._start:
            self._first = (now, done)
        line = ProgressLine(self._label, done, self._total, self._left(now, done), facts)
        if self._bar is not None:
            self._bar.show(line)
        elif done >= self._total or now - self._printed >= LINE_SECONDS:
            self._printed = now
            say(format_progress(line))

    def close(self) -> None:
        """Take the bar away; nothing to do for plain lines."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, now: float, done: int) -> str:
        if done >= self._total:
            return format_seconds(0)
        if self._first is None or done == self._first[1]:
            return "?"
        since, counted = self._first
        return format_seconds((self._total - done) * (now - since) / (done - counted))


def progress(label: str, total: int, *, start: int = 0) -> ProgressReport:
    """Progress of ``total`` units of which ``start`` were done before this process began (a resumed run)."""
    return ProgressReport(label, total, start=start)


class _Bar:
    """The bar on a terminal; one at a time, made when the first report comes and again for another label."""

    def __init__(self) -> None:
        self._drawn: Progress | None = None
        self._task = TaskID(0)
        self._label = ""

    def show(self, line: ProgressLine) -> None:
        """Draw ``line``."""
        try:
            if self._drawn is None or line.label != self._label:
                self.close()
                self._open(line)
            if self._drawn is not None:
                self._drawn.update(self._task, completed=line.done, left=line.left, facts=line.facts)
            if line.done >= line.total:
                self.close()
        except OSError as fault:
            _forgive(fault)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._drawn is not None:
            drawn, self._drawn = self._drawn, None
            try:
                drawn.stop()
            except OSError as fault:
                _forgive(fault)

    def _open(self, line: ProgressLine) -> None:
        self._label = line.label
        self._drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[left]} left", markup=False),
            TextColumn("{task.fields[facts]}", markup=False),
            console=_OUT,
        )
        self._task = self._drawn.add_task(
            line.label, total=line.total, completed=line.done, left=line.left, facts=line.facts
        )
        self._drawn.start()


class Relay:
    """Prints another process's lines as this process's own: progress as a bar on a terminal, warnings in colour."""

    def __init__(self) -> None:
        self._bar = _Bar() if _OUT.is_terminal else None

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, text: str) -> None:
        """Show one line."""
        line = parse_progress(text) if self._bar is not None else None
        if line is not None and self._bar is not None:
            self._bar.show(line)
        elif text.startswith("warning: "):
            _print(_OUT, text, style="yellow")
        elif text.startswith("error: "):
            _print(_OUT, text, style="red")
        else:
            say(text)


# -- the end of a process ------------------------------------------------------------------------------------------


def run_and_report(main: Callable[[], int | None], *, logs: str = "") -> int:
    """Call ``main`` and turn whatever comes of it into printed words and an exit code (``errors.py``).

    Every entry point but a rank's ends with ``sys.exit(run_and_report(main))``. Errors raised on purpose are printed
    without a traceback; a full disk too, as a ``RunError``. Anything else is a defect: its traceback is printed, with
    ``logs`` (where the logs are) after it.
    """
    return _run(main, logs)[0]


def run_and_leave(main: Callable[[], int | None], *, logs: str = "") -> NoReturn:
    """As ``run_and_report``, and then end this process at once: what a rank ends with.

    An exception keeps alive what its frames hold, the model in its DDP wrapper too. Released after the process group
    was left, that wrapper is the last to hold gloo's group; the group's destructor waits for a thread of its own, which
    waits for the interpreter's lock, which the destructor's thread holds: the rank never ends. So nothing is released.
    """
    code, _kept_alive = _run(main, logs)
    _flush(sys.stdout)
    _flush(sys.stderr)
    os._exit(code)


def _run(main: Callable[[], int | None], logs: str) -> tuple[int, BaseException | None]:
    """The exit code, and the exception that led to it."""
    try:
        code = main()
    except StoppedInGoodOrder as stop:
        say(str(stop))
        return stop.exit_code, stop
    except TrimtabError as fault:
        error(fault)
        return fault.exit_code, fault
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        return EXIT_INTERRUPTED, interrupt
    except OSError as fault:
        return _report_os_error(fault, logs), fault
    except Exception as fault:
        return _report_defect(logs), fault
    _flush(sys.stdout)
    return EXIT_DONE if code is None else code, None


def _report_os_error(fault: OSError, logs: str) -> int:
    if fault.errno in NO_SPACE:
        error(
            RunError(
                "no space left on the disk",
                where=str(fault.filename or ""),
                got=fault.strerror or "",
                do="free some space and start the same command again; what was published before is intact",
            )
        )
        return EXIT_USER
    return _report_defect(logs)


def _report_defect(logs: str) -> int:
    text = traceback.format_exc().rstrip()
    _print(_ERR, text)
    if logs:
        _print(_ERR, f"logs: {logs}")
    return EXIT_FAILURE


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError as fault:
        _forgive(fault)
