"""Who stands still is named, and nobody is accused who only takes long."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from trainer.train.watchdog import Sign, Watchdog, clear_signs, is_running, read_sign

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
        self.dog = Watchdog(folder, 0, 2, timeout=TIMEOUT, end=self.codes.append, now=self.clock)
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
    group.dog.enter("train", 7)
    group.other = replace(group.other, moves=2)
    assert group.pass_time(1, moving=False) == ""
    assert group.pass_time(TIMEOUT + 1, moving=False).endswith("all ranks are in step 7")


def test_one_that_moves_is_enough(group: Group) -> None:
    assert group.pass_time(5 * TIMEOUT) == ""


@pytest.mark.parametrize("phase", ["validation", "saving", "leaving"])
def test_phases_that_take_long_are_left_alone(group: Group, phase: str) -> None:
    """Also when only one rank is in it: the others wait for it in their step."""
    group.other = replace(group.other, phase=phase)
    for _ in range(5):
        assert group.pass_time(TIMEOUT, moving=False) == ""


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
    assert (sign.pid, sign.phase, sign.step, sign.count, sign.moves) == (os.getpid(), "train", 7, 2, 2)
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


def test_a_rank_writes_its_stacks_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dog = Watchdog(tmp_path / "signs", 0, 1, timeout=1000.0)
    with dog.watching():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_a_rank_writes_its_stacks_when_asked" in capfd.readouterr().err
