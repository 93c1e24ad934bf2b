"""The record of a run: its names, its honesty about numbers, and what a resume cuts."""

import json
import time
from io import FileIO
from pathlib import Path

import pytest
import torch

from trainer.errors import RunError
from trainer.model.device import peak_memory_gb
from trainer.train.metrics import MetricsFile, StepRecord, StepTimer


def record(step: int, loss: float = 1.5, grad_norm: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        lr=1e-4,
        grad_norm=grad_norm,
        tokens_per_second=100.0,
        tokens=10 * step,
        targets=7,
        epoch=0.1 * step,
        seconds={"data": 0.1},
        memory_gb=0.5,
    )


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_line_has_the_names_that_scripts_rely_on(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(record(1), {"loss": 2.0, "exact_match": 0.25})
    metrics.append(record(2), {})
    first, second = read(metrics.path)
    common = {
        "step", "loss", "lr", "grad_norm", "tokens_per_second", "tokens", "targets", "epoch", "seconds", "memory_gb",
    }  # fmt: skip
    assert set(second) == common
    assert set(first) == common | {"val_loss", "val_exact_match"}
    assert first["val_loss"] == 2.0
    assert first["seconds"] == {"data": 0.1}


def test_a_value_that_is_not_finite_is_written_as_text(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(record(1, loss=float("nan"), grad_norm=float("inf")), {"loss": float("-inf")})
    assert read(metrics.path)[0]["loss"] == "nan"
    assert read(metrics.path)[0]["grad_norm"] == "inf"
    assert read(metrics.path)[0]["val_loss"] == "-inf"


def test_floats_come_back_bit_by_bit(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    loss = 0.1 + 0.2
    metrics.append(record(1, loss=loss), {})
    assert read(metrics.path)[0]["loss"] == loss


def test_a_resume_cuts_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.append(record(step), {})
    with metrics.path.open("ab") as handle:
        handle.write(b'{"step": 6, "lo')
    assert metrics.continue_after(3) == 3
    assert [line["step"] for line in read(metrics.path)] == [1, 2, 3]
    metrics.append(record(4), {})
    assert [line["step"] for line in read(metrics.path)] == [1, 2, 3, 4]


def test_nothing_to_cut(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.continue_after(3) == 0
    metrics.append(record(1), {})
    before = metrics.path.read_bytes()
    assert metrics.continue_after(3) == 0
    assert metrics.path.read_bytes() == before


@pytest.mark.parametrize("line", ["hello\n", '{"loss": 1}\n', "[1]\n", '{"step": "two"}\n'])
def test_a_line_that_is_not_a_step_is_refused(tmp_path: Path, line: str) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(record(1), {})
    with metrics.path.open("a") as handle:
        handle.write(line)
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: the record of this run has a line that is not a step") as e:
        metrics.continue_after(1)
    assert e.value.problems[0].got == line.strip()
    assert "one JSON object" in e.value.problems[0].allowed


def test_sync_needs_no_file_yet(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.sync()
    metrics.append(record(1), {})
    metrics.sync()
    assert len(read(metrics.path)) == 1


def test_parts_of_a_step_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.0, 4.0, 6.0, 6.5, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timer = StepTimer()
    with timer.part("data"):
        pass
    with timer.part("optimizer"):
        pass
    with timer.part("data"):
        pass
    assert timer.parts == {"data": 2.5, "optimizer": 1.0}
    assert timer.total == 10.0


def test_memory_is_in_units_of_a_thousand_million_bytes() -> None:
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(100_000_000)
    grown = peak_memory_gb(torch.device("cpu")) - before
    assert held.numel() == 100_000_000
    assert 0.0 <= grown <= 0.6
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 24


# -- a disk that fails, and a process that was overtaken -------------------------------------------------------------


class FullDisk(FileIO):
    """A file on a disk that takes ``room`` more bytes and then has no space."""

    room = 0

    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # bytes are all that is written here
        if not self.room:
            raise OSError(28, "No space left on device")
        return super().write(bytes(data)[: self.room])


@pytest.mark.parametrize("room", [0, 7])
def test_lines_wait_in_memory_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    warnings: list[str] = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", warn=warnings.append)
    metrics.continue_after(0)
    metrics.append(record(1), {})
    before = metrics.path.read_bytes()
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr("trainer.train.metrics.open", lambda path, *_, **__: FullDisk(path, "ab"), raising=False)
    metrics.append(record(2), {})
    metrics.append(record(3), {})
    with pytest.raises(OSError, match="No space left"):
        metrics.sync()
    monkeypatch.undo()
    assert metrics.path.read_bytes() == before, "no half line"
    assert len(warnings) == 1
    assert "its lines wait in memory" in warnings[0]
    metrics.append(record(4), {})
    assert [line["step"] for line in read(metrics.path)] == [1, 2, 3, 4]


def test_a_process_that_was_overtaken_writes_nothing_into_the_new_file(tmp_path: Path) -> None:
    old, new = MetricsFile(tmp_path / "metrics.jsonl"), MetricsFile(tmp_path / "metrics.jsonl")
    old.continue_after(0)
    old.append(record(1), {})
    new.continue_after(1)
    with pytest.raises(RunError, match="another process writes the record of this run"):
        old.append(record(2), {})
    new.append(record(2, loss=9.0), {})
    assert [line["loss"] for line in read(new.path)] == [1.5, 9.0]


def test_every_line_asks_whether_the_run_is_still_ours(tmp_path: Path) -> None:
    def lost() -> None:
        raise RunError("taken over")

    metrics = MetricsFile(tmp_path / "metrics.jsonl", still_ours=lost)
    with pytest.raises(RunError, match="taken over"):
        metrics.append(record(1), {})
    assert not metrics.path.exists()
