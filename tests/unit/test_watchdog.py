"""Who stands still is named, and nobody is accused who only takes long."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from trainer.train.busy import Busy, Used, used_so_far, waits_for_disk_now
from trainer.train.watchdog import ALARM, Sign, Watchdog, ask_for_stack, clear_signs, is_running, read_sign

TIMEOUT = 60.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Group:
    """A watchdog of rank 0 and the signs of rank 1."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.codes = Clock(), list[int]()
        self.busy = False
        self.dog = Watchdog(
            folder, 0, 2, timeout=TIMEOUT, end=self.codes.append, now=self.clock, is_busy=lambda: self.busy
        )
        self.path = folder / "rank1.json"
        self.other = Sign(pid=1, host="there", started=0.0, phase="train", step=7, count=0, moves=0)
        self.dog.enter("train", 7)

    def pass_time(self, seconds: float, *, alive: bool = True, moving: bool = True) -> str:
        """Let time pass; rank 1 gives a sign, and moves, or not."""
        trouble = ""
        for _ in range(20):
            self.clock.seconds += seconds / 20
            if alive:
                self.other = replace(self.other, count=self.other.count + 1, moves=self.other.moves + moving)
            self.path.write_bytes(msgspec.json.encode(self.other))
            trouble = self.dog.look()
        return trouble


@pytest.fixture
def group(tmp_path: Path) -> Group:
    made = Group(tmp_path)
    assert made.pass_time(0) == ""
    return made


def test_a_rank_without_signs_is_frozen_or_dead(group: Group) -> None:
    assert group.pass_time(TIMEOUT, alive=False) == ""
    trouble = group.pass_time(1, alive=False)
    assert trouble == (
        "rank 1 (process 1 on there) has given no sign of life for 61 s, last in 'train' of step 7: frozen or dead"
    )


def test_the_frozen_one_is_named_in_any_phase(group: Group) -> None:
    group.other = replace(group.other, phase="validation")
    assert group.pass_time(1) == ""
    assert "last in 'validation'" in group.pass_time(TIMEOUT + 1, alive=False)


def test_no_move_in_a_step_is_a_standstill_and_the_one_behind_is_named(group: Group) -> None:
    group.dog.enter("train", 8)
    assert group.pass_time(1, moving=False) == ""
    assert group.pass_time(TIMEOUT - 2, moving=False) == ""
    assert group.pass_time(3, moving=False) == "nothing has moved for 60 s: rank 1 is behind the others in step 7"


def test_all_may_be_stuck_alike(group: Group) -> None:
    group.other = replace(group.other, moves=0)
    assert group.pass_time(1, moving=False) == ""
    assert (
        group.pass_time(TIMEOUT + 1, moving=False) == "nothing has moved for 60 s: all ranks are in 'train' of step 7"
    )


def test_one_that_moves_is_enough(group: Group) -> None:
    assert group.pass_time(5 * TIMEOUT) == ""


@pytest.mark.parametrize("phase", ["loading", "validation", "saving", "export"])
def test_a_rank_that_works_outside_of_steps_may_take_as_long_as_it_needs(group: Group, phase: str) -> None:
    """Also when only one rank does: the others wait for it in their step."""
    group.other = replace(group.other, phase=phase)
    for _ in range(5):
        group.other = replace(group.other, work=group.other.work + 1)
        assert group.pass_time(TIMEOUT, moving=False) == ""
    assert group.pass_time(TIMEOUT, moving=False) == (
        f"nothing has moved for 60 s: rank 0 is in 'train' of step 7; rank 1 is in '{phase}' of step 7"
    )


def test_nobody_who_does_anything_is_a_hang_in_any_phase(group: Group) -> None:
    group.dog.enter("export", 0)
    group.other = replace(group.other, phase="export", step=0)
    assert group.pass_time(1, moving=False) == ""
    assert group.pass_time(TIMEOUT - 1, moving=False) == ""
    assert group.pass_time(2, moving=False) == "nothing has moved for 60 s: all ranks are in 'export'"


@pytest.mark.parametrize(("phase", "counts"), [("export", True), ("train", False)])
def test_what_a_process_does_is_a_move_outside_of_training_steps_alone(group: Group, phase: str, counts: bool) -> None:
    """Ranks that wait for each other in a step may spin."""
    group.dog.enter(phase, 7)
    assert group.pass_time(1, moving=False) == ""
    group.busy, trouble = True, ""
    for _ in range(10):
        group.dog.give_sign()
        trouble = group.pass_time(TIMEOUT / 5, moving=False)
    assert bool(trouble) is not counts


def test_a_process_is_busy_that_computes_or_reads_or_waits_for_a_disk() -> None:
    used, waits = [Used(0.0, 5.0, 0)], [False]
    busy = Busy(lambda: used[0], lambda: waits[0])
    used[0] = Used(10.0, 5.05, 100)
    assert not busy.since_last()
    used[0] = Used(20.0, 5.5, 100)
    assert busy.since_last()
    used[0] = Used(30.0, 5.5, 200_000)
    assert busy.since_last()
    assert not busy.since_last()
    waits[0] = True
    assert busy.since_last()
    assert Busy(lambda: None, lambda: False).since_last(), "where the system does not tell, nobody is accused"


def test_the_system_tells_what_this_process_uses(tmp_path: Path) -> None:
    before = used_so_far()
    assert before is not None
    (tmp_path / "file").write_bytes(bytes(10_000_000))
    after = used_so_far()
    assert after is not None
    assert after.passed - before.passed >= 10_000_000
    assert after.cpu >= before.cpu - 0.1  # a difference of two clocks, which are read one after the other
    assert not waits_for_disk_now()


def test_an_alarm_of_another_machine_has_the_stacks_written_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    (tmp_path / ALARM).write_text("rank 5 is frozen")
    dog = Watchdog(tmp_path, 0, 1, timeout=0.5, end=codes.append, is_busy=lambda: True)
    with dog.watching():
        until_written = "rank 0, because rank 5 is frozen"
        while until_written not in capfd.readouterr().err:
            pass
    assert codes == [], "the launcher ends it"


def test_a_rank_that_never_gave_a_sign_is_missed(tmp_path: Path) -> None:
    group = Group(tmp_path)
    for _ in range(10):
        group.clock.seconds += TIMEOUT / 10
        assert group.dog.look() == ""
    group.clock.seconds += 1
    assert group.dog.look() == "rank 1 has given no sign of life for 61 s: frozen or dead"


def test_whoever_cannot_leave_signs_expects_none(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    group.dog.give_sign()
    assert group.pass_time(2 * TIMEOUT, alive=False) == ""
    monkeypatch.undo()
    group.dog.give_sign()
    assert group.pass_time(TIMEOUT, alive=False) == ""
    assert "frozen or dead" in group.pass_time(TIMEOUT / 10, alive=False)


def test_a_new_process_of_a_rank_starts_anew(group: Group) -> None:
    assert group.pass_time(TIMEOUT, alive=False) == ""
    group.other = replace(group.other, pid=2, count=0, moves=0)
    assert group.pass_time(TIMEOUT, alive=False) == ""


def test_a_sign_tells_of_its_process(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.dog.give_sign()
    group.dog.move()
    group.dog.give_sign()
    sign = read_sign(tmp_path / "rank0.json")
    assert sign is not None
    assert (sign.pid, sign.phase, sign.step, sign.count, sign.moves) == (os.getpid(), "train", 7, 2, 1)
    assert is_running(sign)
    assert not is_running(replace(sign, started=sign.started - 100))
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.json"]
    clear_signs(tmp_path)
    assert read_sign(tmp_path / "rank0.json") is None


def test_a_process_that_was_stopped_itself_blames_nobody(group: Group) -> None:
    group.clock.seconds += 10 * TIMEOUT
    assert group.dog.look() == ""
    assert group.pass_time(TIMEOUT, alive=False) == ""
    assert "frozen or dead" in group.pass_time(1, alive=False)


def test_half_a_sign_is_none(tmp_path: Path) -> None:
    (tmp_path / "rank1.json").write_bytes(b'{"pid": 1')
    assert read_sign(tmp_path / "rank1.json") is None


def test_the_alarm_writes_stacks_and_ends_with_a_code_to_be_continued(
    group: Group, capfd: pytest.CaptureFixture[str]
) -> None:
    group.pass_time(TIMEOUT + 1, alive=False)
    group.dog._raise_alarm("rank 1 is frozen")
    out = capfd.readouterr().err
    assert "=== stacks of rank 0, because rank 1 is frozen" in out
    assert "test_the_alarm_writes_stacks" in out, "this function's own frame"
    assert "asked to write" not in out, "rank 1 is on another machine"
    assert out.splitlines()[-1].startswith("error: rank 1 is frozen. The run ends")
    assert group.codes == [74]


STOPPED = """
import faulthandler, os, signal, threading

def elsewhere():
    threading.Event().wait()

def where_it_stood():
    os.kill(os.getpid(), signal.SIGSTOP)

faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
for _ in range(50):
    threading.Thread(target=elsewhere, daemon=True).start()
where_it_stood()
"""


def test_a_stopped_process_answers_from_where_its_main_thread_stood() -> None:
    """Not from another of its threads, of which any may take what is sent to the process as a whole."""
    with subprocess.Popen([sys.executable, "-c", STOPPED], stderr=subprocess.PIPE, text=True) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        ask_for_stack(process.pid)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, "it has run on"
    assert said.splitlines()[1].endswith(" in where_it_stood"), said
    assert "elsewhere" not in said


def test_nobody_is_asked_who_has_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    ask_for_stack(process.pid)


def test_a_rank_writes_its_stacks_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dog = Watchdog(tmp_path / "signs", 0, 1, timeout=1000.0)
    with dog.watching():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_a_rank_writes_its_stacks_when_asked" in capfd.readouterr().err
