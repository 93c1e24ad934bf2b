"""Saves and runs that are killed at a chosen system call or at any moment, and what is left of them.

A process that has imported everything and holds a prepared strategy forks a child for every point; the child waits, so
that ``strace`` can tie itself to it, and is then killed by the kernel at its n-th call of a kind. That costs a fraction
of a second a point, where starting Python and torch anew would cost ten.
"""

import os
import random
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from train_fixtures import BASE, IDENTITY, Run, tiny_strategy, train_run

from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import TrimtabError
from trainer.train.checkpoint import writing
from trainer.train.checkpoint.behind import Saver
from trainer.train.checkpoint.fence import claim
from trainer.train.checkpoint.format import DamagedCheckpoint, published, verify
from trainer.train.checkpoint.publish import retain, save
from trainer.train.checkpoint.resume import find_resumable, load, state_digest
from trainer.train.state import TrainState

SYSCALLS = ("write", "fsync", "rename", "mkdir", "openat", "unlinkat", "rmdir")
"""What a save does to a disk, and so where a kill can fall between two states of it."""


@dataclass(slots=True)
class Tally:
    """Points that were injected, those that were survived, and words about the others."""

    points: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list[str])

    def add(self, what: str, problem: str) -> None:
        """Count one point; ``problem`` empty: it was survived."""
        self.points += 1
        if problem:
            self.lost.append(f"{what}: {problem}")
        else:
            self.survived += 1


class SaveBench:
    """A folder with a good checkpoint of step 4 and a strategy whose state of step 8 is saved again and again."""

    def __init__(self, folder: Path, ranks: Ranks, *, asynchronous: bool) -> None:
        self.folder, self.ranks, self.asynchronous = folder, ranks, asynchronous
        self.strategy, _ = tiny_strategy(ranks, lora=True)
        self.first = folder / "first"
        self._save(self.first, 4)
        self.digests = {4: state_digest(self.strategy)}
        for parameter in self.strategy.trainable.values():
            parameter.data.add_(0.5)
        self.digests[8] = state_digest(self.strategy)

    def _save(self, directory: Path, step: int) -> None:
        fence = claim(directory)
        channel = self.ranks.aside() if self.asynchronous else None
        saver = Saver(
            self.strategy,
            fence,
            channel,
            identity=IDENTITY,
            base=BASE,
            before=lambda: None,
            after=lambda state: (retain(fence, keep=1, best=None, verified={state.step}), None)[1],
            warn=lambda _: None,
        )
        saver.save(TrainState(step=step), required=True)

    def kill_at(self, syscall: str, number: int, *, error: str = "") -> tuple[bool, str]:
        """Save with a kill (or an ``error``) at the ``number``-th ``syscall``: (it came to that, what is wrong)."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.first, place)
        self.restore()
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            code = 3
            try:
                self._save(place, 8)
                code = 0
            except TrimtabError:
                code = 74
            finally:
                os._exit(code)
        os.read(ready[0], 1)
        fault = f"error={error}" if error else "signal=KILL"
        words = ["strace", "-f", "-qq", "-p", str(child), "-o", str(self.folder / "trace")]
        words += ["-e", f"trace={syscall}", "-e", f"inject={syscall}:{fault}:when={number}"]
        tracer = subprocess.Popen(words, stderr=subprocess.PIPE)
        _wait_until_traced(child, tracer)
        os.write(go[1], b"x")
        _, status = os.waitpid(child, 0)
        tracer.communicate()
        for handle in (*ready, *go):
            os.close(handle)
        reached = "INJECTED" in (self.folder / "trace").read_text() or os.WIFSIGNALED(status)
        return reached, self.verdict(place, done=os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0)

    def verdict(self, place: Path, *, done: bool) -> str:
        """What is wrong with what is left; empty: a resume starts from a whole checkpoint and has its state."""
        skipped: list[str] = []
        found = find_resumable(place, identity=IDENTITY, base=BASE, warn=skipped.append)
        if found is None:
            return "no checkpoint is left"
        if skipped:
            return f"a checkpoint that is not whole was published: {skipped}"
        step = found.manifest.step
        if done and step != 8:
            return "the save said that it was done, and is not there"
        load(self.strategy, found)
        wrong = "" if state_digest(self.strategy) == self.digests[step] else f"step {step} has another state"
        # A second start saves on top of whatever the first one left.
        self._load_second(place)
        if published(place)[0].name != "step-00000008":
            return "the next save does not get through"
        try:
            verify(published(place)[0])
        except DamagedCheckpoint as fault:
            return str(fault)
        return wrong

    def _load_second(self, place: Path) -> None:
        shutil.rmtree(place / "step-00000008", ignore_errors=True)
        if not published(place):
            shutil.copytree(self.first / "step-00000004", place / "step-00000004")
        self.restore()
        self._save(place, 8)

    def restore(self) -> None:
        """Bring the strategy to the state of step 8."""
        found = find_resumable(self.first, identity=IDENTITY, base=BASE, warn=lambda _: None)
        assert found is not None
        load(self.strategy, found)
        for parameter in self.strategy.trainable.values():
            parameter.data.add_(0.5)


def _wait_until_traced(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    """Until ``tracer`` has tied itself to ``pid`` and waits for its calls: between the two, calls would be missed."""
    status, state = Path(f"/proc/{pid}/status"), Path(f"/proc/{tracer.pid}/stat")
    while "TracerPid:\t0" in status.read_text() or state.read_text("utf-8").rpartition(") ")[2][0] != "S":
        if tracer.poll() is not None:
            raise RuntimeError(f"strace cannot trace: {tracer.communicate()[1].decode()}")
        time.sleep(0.001)


def sweep_saves(bench: SaveBench, *, every: int, most: int, chunk: int, error: str = "") -> Tally:
    """Kill a save at every ``every``-th call of each kind, up to ``most`` of a kind; ``chunk`` bytes in a write."""
    tally, before = Tally(), writing.CHUNK
    writing.CHUNK = chunk
    try:
        for syscall in SYSCALLS:
            for number in range(1, most + 1, every):
                reached, problem = bench.kill_at(syscall, number, error=error)
                if not reached:
                    break
                tally.add(f"{syscall} {number}", problem)
    finally:
        writing.CHUNK = before
    return tally


def kill_at_random(run: Run, ranks: Ranks, *, cycles: int, longest: float, seed: int) -> Tally:
    """Start ``run`` and kill it after a random time, ``cycles`` times or until it is done; then let it end.

    A point is survived when the next start goes on; that the end is the same as without kills, the caller compares.
    """
    tally, chance = Tally(), random.Random(seed)
    for cycle in range(cycles):
        child = os.fork()
        if child == 0:
            _silent_end(lambda: train_run(run, ranks))
        handle = os.pidfd_open(child)
        deadline = time.monotonic() + chance.uniform(0.02, longest)
        ended = _ends_before(handle, deadline)
        if not ended:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(handle)
        code = os.waitstatus_to_exitcode(status)
        tally.add(f"cycle {cycle + 1}", "" if code in (0, -signal.SIGKILL) else f"it ended with {code}")
        if code == 0:
            break
    return tally


def _ends_before(handle: int, deadline: float) -> bool:
    ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
    return bool(ready)


def _silent_end(work: Callable[[], object]) -> None:
    code = 1
    try:
        work()
        code = 0
    except TrimtabError as fault:
        code = fault.exit_code
    finally:
        os._exit(code)


def damages() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every way of damaging every file of a checkpoint."""
    for name in ("manifest.json", "rank0.json", "rank0.safetensors"):
        yield f"{name} cut", lambda path, name=name: _cut(path / name)
        yield f"{name} changed", lambda path, name=name: _flip(path / name)
        yield f"{name} gone", lambda path, name=name: (path / name).unlink()
        yield f"{name} empty", lambda path, name=name: os.truncate(path / name, 0)
        yield f"{name} a link", lambda path, name=name: _link(path / name)


def _cut(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _link(path: Path) -> None:
    moved = path.with_name(f"moved-{path.name}")
    path.rename(moved)
    path.symlink_to(moved)


def damage_each(folder: Path, bench: SaveBench, *, all_of_them: bool) -> Tally:
    """Damage the newest of two checkpoints in every way (or both): the older one is used (or a person asked)."""
    tally = Tally()
    pair = folder / "pair"
    if not pair.exists():
        shutil.copytree(bench.first, pair)
        bench.restore()
        fence = claim(pair)
        save(bench.strategy, fence, TrainState(step=8), identity=IDENTITY, base=BASE)
    for name, damage in damages():
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(pair, place)
        for path in published(place)[: None if all_of_them else 1]:
            damage(path)
        tally.add(name, _after_damage(place, all_of_them=all_of_them))
    return tally


def _after_damage(place: Path, *, all_of_them: bool) -> str:
    said: list[str] = []
    try:
        found = find_resumable(place, identity=IDENTITY, base=BASE, warn=said.append)
    except TrimtabError as fault:
        return "" if all_of_them and fault.exit_code == 76 else f"it refuses: {fault}"
    if all_of_them or found is None:
        return "it would train from the start"
    return "" if found.manifest.step == 4 and len(said) == 1 else f"step {found.manifest.step} was used"


def same_end(run: Run, ranks: Ranks, reference: Path, folder: Path) -> str:
    """Finish ``run`` in ``folder`` and compare its newest checkpoint with that in ``reference``: what differs."""
    strategy: Strategy
    strategy, _, _ = train_run(replace(run, folder=str(folder)), ranks)
    assert strategy is not None
    one, other = (verify(published(place / "checkpoints")[0]) for place in (reference, folder))
    same = one.files == other.files and one.step == other.step
    return "" if same else f"sha256 differ: {one.files} and {other.files}"
