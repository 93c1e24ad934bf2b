"""``python -m trainer show RUN ...``: how a run stands, or how several differ, from the files that they left.

Nothing is computed, locked or changed, so a run can be looked at while it trains, on a login node too. Checkpoints are
compared with their manifests, by names and sizes; ``--verify`` reads every byte of them, as a resume does. ``--html``
writes what there is to see into a page for a browser.
"""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from trainer import console
from trainer.drive.look.gather import look_at
from trainer.drive.look.page import page_of_one, page_of_several
from trainer.drive.look.terminal import show_one, show_several
from trainer.errors import UserError
from trainer.paths import RunFolder, write_atomic

PAGES = (".html", ".htm")
PAGE = "show.html"


def show_runs(runs: Sequence[Path], *, contents: bool = False, page: Path | None = None) -> None:
    """Show one run in full, or several side by side. ``contents``: read every byte of the checkpoints.

    ``page``: write it there, as HTML, instead of on the terminal.

    Raises:
        RunError: a plan, a record of steps or an evaluation cannot be understood.
        UserError: ``page`` is not named as a page, or cannot be written.
    """
    looks = [look_at(RunFolder(run.resolve()), contents=contents) for run in runs]
    if page is not None:
        now = datetime.now(UTC)
        write_page(page, page_of_one(looks[0], now=now) if len(looks) == 1 else page_of_several(looks, now=now))
        return
    if len(looks) == 1:
        show_one(looks[0])
        if looks[0].saved and not contents:
            console.note(f"hashes: python -m trainer show --verify {looks[0].folder.root}")
    else:
        show_several(looks)
    console.note(f"for a browser: {shlex.join(_page_command(runs))}")


def _page_command(runs: Sequence[Path]) -> list[str]:
    place = runs[0] / PAGE if len(runs) == 1 else Path("runs.html")
    return ["python", "-m", "trainer", "show", "--html", str(place), *map(str, runs)]


def write_page(path: Path, page: str) -> None:
    """Write ``page`` and say where.

    Raises:
        UserError: the name is none of a page (a slip must not overwrite a plan), or it cannot be written.
    """
    if path.suffix.lower() not in PAGES or path.is_dir():
        raise UserError(
            "this is no name for a page",
            where="--html",
            got=str(path),
            allowed="a file that ends in .html",
            do="python -m trainer show --html runs.html RUN ...",
        )
    try:
        write_atomic(path, page)
    except OSError as fault:
        raise UserError(
            "the page cannot be written", where=str(path), got=fault.strerror or str(fault), do="name another place"
        ) from fault
    console.say(f"page for a browser: {path.resolve()}")
