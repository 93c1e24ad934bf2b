"""The process that the driver starts beside a run: ``python -m trainer.tracking RUN [--stop-to FD | --sync]``.

It starts one process per tracker (``send.py``), begins one that failed anew after a while, and looks at the machine.
The driver writes the run's exit code to its standard input and closes it. Then there are ``tracking.finish_seconds``
for the rest; a closed input without a code means that the driver is gone. With ``--sync`` it is in the foreground,
sends what is missing and takes the time that it takes.
"""

import argparse
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.cost.gpu import read_gpus
from trainer.errors import EXIT_DONE, EXIT_STOPPED
from trainer.paths import RunFolder, without_links
from trainer.plan import RunPlan, load_plan
from trainer.records import GrowingRecords
from trainer.surroundings import in_use, variables
from trainer.tracker_state import read_state, write_end
from trainer.tracking.system import append_sample, take_sample

AGAIN_SECONDS = 10.0
"""So long after a failure a tracker is tried again."""
LONGEST_WAIT = 1.0


class Sender:
    """The process of one tracker. Its standard input is held open until the run ends."""

    def __init__(self, folder: RunFolder, tracker: str, *, online: bool = False, stop_to: int | None = None) -> None:
        self.tracker = tracker
        options = [*(["--online"] if online else []), *([] if stop_to is None else ["--stop-to", str(stop_to)])]
        self._words = [sys.executable, "-m", "trainer.tracking.send", str(folder.root), tracker, *options]
        self._keep_open = () if stop_to is None else (stop_to,)
        self._process: subprocess.Popen[bytes] | None = None
        self._again_at = 0.0
        self.failed = False

    def keep_going(self, now: float) -> None:
        """Start it, the first time or again."""
        if self._process is not None and self._process.poll() is not None:
            self.failed = self._process.returncode != EXIT_DONE
            self._process, self._again_at = None, now + AGAIN_SECONDS
        if self._process is None and now >= self._again_at:
            self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, pass_fds=self._keep_open)

    def tell_the_end(self) -> None:
        """Let it finish; one that had failed tries once more."""
        self._again_at = 0.0
        self.keep_going(0.0)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, seconds: float | None) -> bool:
        """Wait for its end, at most so long; whether all has arrived."""
        assert self._process is not None
        try:
            return self._process.wait(seconds) == EXIT_DONE
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        """End it, whatever it is doing."""
        if self._process is not None:
            self._process.kill()


def follow(folder: RunFolder, plan: RunPlan, senders: Sequence[Sender]) -> int | None:
    """Look at the machine and keep the senders going until standard input ends; gives the code that stood there."""
    records, step, said = GrowingRecords(folder.metrics_jsonl), 0, b""
    next_look = time.monotonic()
    while True:
        now = time.monotonic()
        for sender in senders:
            sender.keep_going(now)
        if now >= next_look:
            step = max([step, *(int(str(record["step"])) for record in records.new())])
            gpus = read_gpus(visible=variables().get("CUDA_VISIBLE_DEVICES")) if plan.device == "cuda" else []
            append_sample(folder.system_jsonl, take_sample(step + 1, gpus))
            next_look = now + plan.config.tracking.sample_seconds
        ready, _, _ = select.select([0], [], [], min(LONGEST_WAIT, max(0.0, next_look - time.monotonic())))
        if ready:
            read = os.read(0, 64)
            if not read:
                return int(said) if said.strip().isdigit() else None
            said += read


@contextmanager
def alone(folder: RunFolder) -> Iterator[None]:
    """Wait until no older process sends this run: the driver of the time before may be gone, its tracking not yet."""
    folder.tracking.mkdir(parents=True, exist_ok=True)
    with open(folder.tracking / "lock", "w", opener=without_links) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def forget_pieces(folder: RunFolder) -> None:
    """Remove what W&B's client kept of attempts: metrics.jsonl has it all, and ``wandb sync`` would send it twice."""
    kept = folder.tracking / "wandb"
    for path in kept.glob("run-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not any(kept.glob("offline-run-*")):
        shutil.rmtree(kept, ignore_errors=True)  # its logs, and links to what is gone


def main() -> int:
    """The program of this module."""
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--stop-to", type=int, metavar="FD")
    parser.add_argument("--sync", action="store_true")
    found = parser.parse_args()
    folder = RunFolder(found.run)
    plan = load_plan(folder.plan_json.read_bytes())
    with alone(folder):
        try:
            return _sync(folder, plan) if found.sync else _beside(folder, plan, found.stop_to)
        finally:
            forget_pieces(folder)


def _beside(folder: RunFolder, plan: RunPlan, stop_to: int | None) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the driver says when it is over
    senders = [Sender(folder, tracker, stop_to=stop_to) for tracker in in_use(plan.config.tracking)]
    code = follow(folder, plan, senders)
    deadline = time.monotonic() + plan.config.tracking.finish_seconds
    write_end(folder, EXIT_STOPPED if code is None else code)
    for sender in senders:
        sender.tell_the_end()
    arrived = [sender.wait(max(0.0, deadline - time.monotonic())) for sender in senders]
    for sender in senders:
        sender.kill()
    return EXIT_DONE if all(arrived) else EXIT_STOPPED


def _sync(folder: RunFolder, plan: RunPlan) -> int:
    done = [tracker for tracker in plan.config.tracking.to if read_state(folder, tracker).complete]
    for tracker in done:
        print(f"{tracker}: everything had arrived before: {read_state(folder, tracker).url}", flush=True)  # noqa: T201
    senders = [Sender(folder, tracker, online=True) for tracker in plan.config.tracking.to if tracker not in done]
    try:
        for sender in senders:
            sender.tell_the_end()
        return EXIT_DONE if all([sender.wait(None) for sender in senders]) else EXIT_STOPPED
    except KeyboardInterrupt:
        return EXIT_STOPPED
    finally:
        for sender in senders:
            sender.kill()


if __name__ == "__main__":
    sys.exit(main())
