"""A process writes down what it uses while it uses it, in lines that a kill, a full disk or a restart cannot spoil."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.cost.book import BETWEEN, Book
from trainer.cost.ledger import Spell, append, read_account
from trainer.cost.power import GpuMeter, Sockets
from trainer.cost.sums import Factors, cost_of
from trainer.paths import CHECKOUT

SPELL = Spell(stage="train", began="2026-01-01T00:00:00+00:00", rank=0, seconds=2.0, core_seconds=1.0)

KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from trainer.cost.book import Book
from trainer.cost.ledger import read_account
path = Path(sys.argv[1])
with Book(path, rank=0, every=0.002).stage("train"):
    while not any(spell.stage == "train" for spell in read_account(path.parent).spells):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass
class Machine:
    """Clocks and a GPU that only move when they are told to."""

    time: float = 0.0
    cpu: float = 0.0

    def work(self, seconds: float) -> None:
        self.time += seconds
        self.cpu += 2 * seconds


@dataclass
class Gpu:
    uuid: str = "GPU-12ab"
    energy: float | None = 1000.0
    power: float | None = 300.0

    def read(self) -> Sequence["Gpu"]:
        return [Gpu(uuid="GPU-other", energy=5.0), Gpu(self.uuid, self.energy, self.power)]


def book(path: Path, machine: Machine, **options: object) -> Book:
    clocks = {"now": lambda: machine.time, "cpu_seconds": lambda: machine.cpu, "every": None}
    return Book(path, rank=0, **(clocks | options))  # type: ignore[arg-type]


def test_time_goes_to_the_stage_it_was_spent_in(tmp_path: Path) -> None:
    machine = Machine()
    open_book = book(tmp_path / "rank00000.jsonl", machine, gpu="H100")
    machine.work(5.0)
    with open_book.stage("train"):
        machine.work(60.0)
    machine.work(1.0)
    with suppress(KeyError), open_book.stage("evaluate"):
        machine.work(7.0)
        raise KeyError
    open_book.close()
    spells = read_account(tmp_path).spells
    seconds: dict[str, float] = {}
    for spell in spells:
        seconds[spell.stage] = seconds.get(spell.stage, 0.0) + spell.seconds
        assert spell.core_seconds == 2 * spell.seconds
        assert (spell.gpus, spell.gpu, spell.gpu_joules, spell.cpu_joules) == (1, "H100", None, None)
    assert seconds == {BETWEEN: 6.0, "train": 60.0, "evaluate": 7.0}
    assert len({spell.began for spell in spells}) == 1


def test_a_line_appears_while_the_stage_goes_on(tmp_path: Path) -> None:
    """What a SIGKILL leaves: the thread writes by itself."""
    path = tmp_path / "rank00000.jsonl"
    open_book = Book(path, rank=0, every=0.001)
    with open_book.stage("train"):
        while not any(spell.stage == "train" for spell in read_account(tmp_path).spells):
            pass
    open_book.close()


def test_what_a_process_did_before_its_ledger_is_spent_too(tmp_path: Path) -> None:
    machine = Machine(time=100.0, cpu=8.0)
    book(tmp_path / "r.jsonl", machine, gpu="H100", lived=12.0).close()
    (spell,) = read_account(tmp_path).spells
    assert (spell.stage, spell.seconds, spell.core_seconds, spell.gpus) == (BETWEEN, 12.0, 8.0, 1)


def test_a_process_that_is_killed_has_told_almost_all(tmp_path: Path) -> None:
    """The next start adds to what the killed one wrote."""
    path = tmp_path / "rank00000.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLS_ITSELF, str(path)], cwd=CHECKOUT, check=False)
    assert killed.returncode == -signal.SIGKILL
    before = [spell for spell in read_account(tmp_path).spells if spell.stage == "train"]
    machine = Machine()
    open_book = book(path, machine)
    with open_book.stage("train"):
        machine.work(3600.0)
    cost = cost_of(read_account(tmp_path), Factors())
    assert cost is not None
    assert cost.stages["train"].starts == 2
    assert cost.stages["train"].seconds == pytest.approx(3600.0 + sum(spell.seconds for spell in before))


def test_energy_of_the_own_gpu_between_lines(tmp_path: Path) -> None:
    machine, gpu = Machine(), Gpu()
    open_book = book(tmp_path / "r.jsonl", machine, gpu="H100", meter=GpuMeter("12ab", gpu.read))
    machine.work(10.0)
    gpu.energy = 4000.0
    open_book.close()
    (spell,) = read_account(tmp_path).spells
    assert (spell.gpu_joules, spell.gpu_meter) == (3000.0, "counter")


def test_a_gpu_without_a_counter_is_measured_by_its_power() -> None:
    gpu = Gpu(energy=None, power=100.0)
    meter = GpuMeter("GPU-12ab", gpu.read)
    gpu.power = 300.0
    assert meter.used(10.0) == (2000.0, "power")
    gpu.power = None
    assert meter.used(10.0) == (None, "")


def test_a_counter_that_began_anew_is_no_negative_energy() -> None:
    gpu = Gpu(energy=1000.0, power=None)
    meter = GpuMeter("GPU-12ab", gpu.read)
    gpu.energy = 10.0
    assert meter.used(1.0) == (None, "")
    gpu.energy = 30.0
    assert meter.used(1.0) == (20.0, "counter")


def test_another_gpu_says_nothing_of_this_one() -> None:
    assert GpuMeter("GPU-99", Gpu().read).used(1.0) == (None, "")


def zone(folder: Path, name: str, kind: str, energy: int, most: int = 1_000_000) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "name").write_text(kind + "\n")
    (place / "energy_uj").write_text(f"{energy}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    return place


def test_sockets_are_added_up_without_their_parts(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 500_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)  # the whole machine, sockets included
    sockets = Sockets(tmp_path)
    assert sockets.are_readable
    (whole / "energy_uj").write_text("900000\n")
    (first / "energy_uj").write_text("700000\n")
    (second / "energy_uj").write_text("100000\n")  # it counts to a million and begins anew
    assert sockets.used() == pytest.approx(0.2 + 0.2)
    assert sockets.used() == 0.0
    (second / "energy_uj").unlink()
    assert sockets.used() is None


def test_sockets_that_nobody_may_read_say_nothing(tmp_path: Path) -> None:
    assert not Sockets(tmp_path).are_readable
    assert Sockets(tmp_path).used() is None
    place = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (place / "energy_uj").unlink()
    assert not Sockets(tmp_path).are_readable
    assert Sockets(tmp_path).used() is None


def test_one_process_of_a_machine_tells_its_sockets(tmp_path: Path) -> None:
    place = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    machine = Machine()
    teller = book(tmp_path / "cost/rank00000.jsonl", machine, sockets=Sockets(tmp_path / "powercap"))
    other = book(tmp_path / "cost/rank00001.jsonl", machine, told_by_another=True)
    (place / "energy_uj").write_text("250000\n")
    machine.work(1.0)
    teller.close()
    other.close()
    assert [spell.cpu_joules for spell in read_account(tmp_path / "cost").spells] == [0.25, 0.0]


def test_a_line_that_cannot_be_written_waits(tmp_path: Path) -> None:
    machine, told = Machine(), list[str]()
    in_the_way = tmp_path / "cost"
    in_the_way.write_text("")
    open_book = book(in_the_way / "r.jsonl", machine, warn=told.append)
    for _ in range(2):
        with open_book.stage("train"):
            machine.work(3.0)
    assert len(told) == 1
    in_the_way.unlink()
    open_book.close()
    assert sum(spell.seconds for spell in read_account(in_the_way).spells if spell.stage == "train") == 6.0


def test_half_a_line_of_a_killed_process_is_counted_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.jsonl"
    append(path, SPELL)
    with path.open("ab") as handle:
        handle.write(b'{"stage": "tra')
    append(path, SPELL)
    account = read_account(tmp_path)
    assert account.spells == [SPELL, SPELL]
    assert account.unreadable == 1


def test_a_run_without_ledgers_has_no_account(tmp_path: Path) -> None:
    account = read_account(tmp_path / "cost")
    assert (account.spells, account.unreadable) == ([], 0)
