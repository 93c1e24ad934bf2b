"""Words on the terminal, progress, and how a process ends."""

import errno
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import console
from trainer.console import ProgressLine, ProgressReport, Relay, format_progress, format_seconds, parse_progress
from trainer.errors import (
    ConfigError,
    DataError,
    NeedsPerson,
    Problem,
    StoppedInGoodOrder,
    TrainingFault,
    TrimtabError,
)

CHECKOUT = Path(__file__).parents[2]

# -- words ---------------------------------------------------------------------------------------------------------


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]not markup[/bold] :smile: " + "x" * 300

    console.say(text)

    assert capsys.readouterr().out == text + "\n"


def test_an_error_has_all_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(
        DataError("not JSON", where="a.jsonl:3", got="{oops", allowed="one object per line", do="mend line 3")
    )

    printed = capsys.readouterr()
    assert printed.err == (
        "error: a.jsonl:3: not JSON\n  got: {oops\n  allowed: one object per line\n  do this: mend line 3\n"
    )
    assert printed.out == ""


def test_all_problems_of_a_config_are_printed_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(ConfigError.of([Problem(what="unknown key", where="optim.l"), Problem(what="does not fit")]))

    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems of the config",
        "error: optim.l: unknown key",
        "error: does not fit",
    ]


def test_warnings_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn("3 rows left out")

    assert capsys.readouterr().err == "warning: 3 rows left out\n"


def test_a_table_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/very/long/path" * 20

    console.table(["what", "where"], [["card", path]], title="Places")

    title, _, heads, *_, row, _ = capsys.readouterr().out.splitlines()
    assert (title.split(), heads.split(), row.split()) == (["Places"], ["what", "where"], ["card", path])


def test_a_table_without_headings_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["", ""], [["dtype", "bfloat16"]])

    assert capsys.readouterr().out.split() == ["dtype", "bfloat16"]


# -- progress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ProgressLine("train", 12, 340, "2:31", "loss 1.234, 2345 tokens/s"),
        ProgressLine("test rows", 0, 3, "?", ""),
        ProgressLine("train", 3, 3, "0:00", ""),
        ProgressLine("nothing to do", 0, 0, "0:00", ""),
    ],
)
def test_a_progress_line_is_read_back(line: ProgressLine) -> None:
    assert parse_progress(format_progress(line)) == line


@pytest.mark.parametrize("text", ["", "step 3/4", "error: 1/2 (50 %)", "loss 1/2 is better", "train 1/2 (50 %), left"])
def test_other_lines_are_no_progress(text: str) -> None:
    assert parse_progress(text) is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def report(times: list[float], *, total: int, start: int = 0) -> ProgressReport:
    return ProgressReport("train", total, start=start, clock=iter(times).__next__)


def test_time_left_leaves_out_the_first_unit_and_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    with report([0, 100, 110, 120], total=20, start=10) as shown:
        shown.update(10)
        shown.update(11, "loss 2")
        shown.update(12, "loss 1")
        shown.update(13)

    assert capsys.readouterr().out.splitlines() == [
        "train 10/20 (50 %), ? left",
        "train 11/20 (55 %), ? left: loss 2",
        "train 12/20 (60 %), 1:20 left: loss 1",
        "train 13/20 (65 %), 1:10 left",
    ]


def test_lines_keep_their_distance_but_the_last_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    with report([0, 1, 2, 6, 7], total=5) as shown:
        for done in range(1, 6):
            shown.update(done)

    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["1/5", "4/5", "5/5"]


def test_lines_of_another_process_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["train 1/2 (50 %), 0:01 left", "warning: slow", "error: broken", "[x] plain"]

    with Relay() as relay:
        for line in lines:
            relay(line)

    assert capsys.readouterr().out.splitlines() == lines


ON_A_TERMINAL = """
from trainer import console
with console.Relay() as relay:
    relay("train 1/4 (25 %), 0:03 left: loss 3.25")
    relay("a line between")
    relay("train 4/4 (100 %), 0:00 left: loss 1.50")
with console.progress("score", 2) as shown:
    shown.update(1, "half")
    shown.update(2, "all")
"""


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {"PATH": os.defpath, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stdout=theirs, stderr=theirs, env=environment, cwd=CHECKOUT
    )
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as screen:
        while True:
            try:
                part = screen.read(4096)
            except OSError:  # EIO: the other end is closed
                break
            if not part:
                break
            shown += part

    assert process.wait() == 0
    text = shown.decode()
    assert "━" in text
    for expected in ("1/4", "4/4", "loss 1.50", "a line between", "2/2", "all"):
        assert expected in text
    assert "(25 %)" not in text


# -- the end of a process ------------------------------------------------------------------------------------------


def raising(fault: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise fault

    return main


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (DataError("no rows"), 2, "error: no rows"),
        (TrainingFault("loss is not finite"), 1, "error: loss is not finite"),
        (NeedsPerson("no trustworthy checkpoint"), 76, "error: no trustworthy checkpoint"),
        (TrimtabError("failed"), 1, "error: failed"),
    ],
)
def test_errors_raised_on_purpose_have_no_traceback(
    capsys: pytest.CaptureFixture[str], fault: TrimtabError, code: int, said: str
) -> None:
    assert console.run_and_report(raising(fault)) == code
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_stop_in_good_order_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run_and_report(raising(StoppedInGoodOrder("saved step 4"))) == 75
    assert capsys.readouterr() == ("saved step 4\n", "")


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run_and_report(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().out == "interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_clear_error(capsys: pytest.CaptureFixture[str], number: int) -> None:
    assert console.run_and_report(raising(OSError(number, "No space left on device", "/runs/x"))) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: /runs/x: no space left on the disk",
        "  got: No space left on device",
        "  do this: free some space and start the same command again; what was published before is intact",
    ]


@pytest.mark.parametrize("fault", [ZeroDivisionError("division by zero"), OSError(errno.EPIPE, "Broken pipe")])
def test_a_defect_is_printed_with_its_traceback_and_the_logs(
    capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    assert console.run_and_report(raising(fault), logs="/runs/x/logs") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2].endswith(str(fault))
    assert lines[-1] == "logs: /runs/x/logs"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_main_without_fault_decides_the_code(result: int | None, code: int) -> None:
    assert console.run_and_report(lambda: result) == code


LEAVING = """
from trainer import console
from trainer.errors import StoppedInGoodOrder

class Held:
    def __del__(self):
        print("released")

def main():
    held = Held()
    raise StoppedInGoodOrder("saved")

console.run_and_leave(main)
print("came back")
"""


def test_a_rank_leaves_without_releasing_anything() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], capture_output=True, text=True, cwd=CHECKOUT, check=False, timeout=60
    )

    assert (done.returncode, done.stdout, done.stderr) == (75, "saved\n", "")


NOBODY_READS = """
import sys
from trainer import console

def main():
    sys.stdin.read()  # until nobody reads our output any more
    for _ in range(3):
        console.say("x" * 100000)
        console.table(["a"], [["b" * 100000]])
    return 7

sys.exit(console.run_and_report(main))
"""


def test_a_process_goes_on_when_nobody_reads() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NOBODY_READS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()

        assert process.stderr.read() == ""
        assert process.wait() == 7


def test_other_faults_of_the_output_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        encoding = "utf-8"

        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdout", Full())

    with pytest.raises(OSError, match="No space left on device"):
        console.say("text")
