"""What runs inside a Slurm job: ``python -m trainer.drive.job RUN [--verb VERB] [-- COMMAND...]``.

It starts an agent on every machine with srun (or COMMAND, for batch scripts of one's own), waits for its end, and
decides what becomes of the job. That is done here and not in the traps of a shell, because it needs the job's state:

- 0: done. 75 (and what amounts to it): requeue, 76: hold; both only while the job runs. What somebody cancelled is
  never requeued, and what Slurm requeues by itself (preemption, a lost node) not a second time.
- ``launch.max_stalls`` starts in a row without a new checkpoint or a finished stage: hold.
- A second job of the same run does nothing while an older one is queued or runs.

Slurm sends its signals to the processes of the step. One that reaches only this process is sent there.
"""

import argparse
import errno
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from trainer import console
from trainer.config.launch import LaunchConfig
from trainer.drive.lock import holder_of
from trainer.drive.progress import Start, progress_of, read_starts, stalls, write_starts
from trainer.drive.queue import COMMENT
from trainer.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_STOPPED, RunError
from trainer.paths import RunFolder
from trainer.plan import RunPlan, load_plan
from trainer_launch import slurm
from trainer_launch.batch_script import meeting_port, step_words
from trainer_launch.jobs import Decision, Job, Next, decide
from trainer_launch.slurm import Allocation, NoAnswer, SlurmError

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TRIES, PAUSE = 40, 15.0
"""So often, so many seconds apart, a controller that does not answer is asked: ten minutes."""
NEIGHBOURS = 100
"""So many ports are tried, from the one of this start on."""
LOCK_SECONDS = 180.0
"""How long a start waits for processes of an earlier one that still hold the run, on a machine that was cut off."""


class Step:
    """The command of a job's step, and the signals that came meanwhile."""

    def __init__(self, here: Allocation) -> None:
        self._here = here
        self._events: SimpleQueue[signal.Signals | None] = SimpleQueue()
        self.signalled = threading.Event()
        for number in HEEDED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signalled.set()
        self._events.put(signal.Signals(number))

    def run(self, words: Sequence[str]) -> int:
        """Start ``words``, wait for its end and give its exit code (128 + the signal that ended it)."""
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
            threading.Thread(target=self._wait_for, args=(process,), daemon=True).start()
            while (number := self._events.get()) is not None:
                self._pass_on(number)
            code = process.wait()
        return code if code >= 0 else 128 - code

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._events.put(None)

    def _pass_on(self, number: signal.Signals) -> None:
        threading.Thread(target=self._ask_processes, args=(number,), daemon=True).start()  # nobody waits for Slurm

    def _ask_processes(self, number: signal.Signals) -> None:
        """Not in a job that is ending: Slurm has told them, and scancel would try until the next start of it runs."""
        try:
            if not still_runs(self._here):
                return
            console.note(f"{number.name} came to the batch step alone: asking the processes of the job to stop")
            slurm.signal_steps(self._here.name, "USR1")
        except SlurmError as fault:
            console.warn(f"the processes of the job could not be told of {number.name}: {fault}")


def agent_words(plan: RunPlan, verb: str, here: Allocation) -> tuple[str, ...]:
    """What a machine of the job runs, without its number; what was planned where the job was submitted is fixed.

    Raises:
        SlurmError: Slurm does not name the machines.
    """
    launch = plan.config.launch
    host = slurm.hosts(here.node_list)[0]
    port = free_port(host, meeting_port(here.job, here.restarts))
    return (
        *launch.container,
        launch.python or sys.executable,
        "-m",
        "trainer",
        verb,
        plan.run_dir,
        f"launch.address={host}:{port}",
        f"launch.device={plan.device}",
        f"launch.processes={plan.processes}",
    )


def free_port(host: str, port: int) -> int:
    """``port``, or one soon after it where somebody listens there; as it is where ``host`` is not this machine.

    The batch step runs on the first machine of its job, where node 0 will listen.
    """
    for candidate in range(port, port + NEIGHBOURS):
        try:
            with socket.create_server((host, candidate)):
                return candidate
        except OSError as fault:
            if fault.errno != errno.EADDRINUSE:
                return port
    return port


def default_words(folder: RunFolder, verb: str, here: Allocation) -> tuple[str, ...]:
    """The srun command of a run that was submitted with launch=slurm.

    Raises:
        RunError: its plan cannot be read.
        SlurmError: Slurm does not name the machines.
    """
    plan = load_plan(folder.plan_json.read_bytes())
    plan = replace(plan, run_dir=str(folder.root))
    agent = agent_words(plan, verb, here)
    return step_words(agent, nodes=plan.nodes, cpus=here.cpus, options=plan.config.launch.srun)


def most_stalls(folder: RunFolder) -> int:
    """``launch.max_stalls`` of the run, or its default where there is no plan yet."""
    try:
        return load_plan(folder.plan_json.read_bytes()).config.launch.max_stalls
    except (OSError, RunError):
        return LaunchConfig().max_stalls


# -- one start -----------------------------------------------------------------------------------------------------


def run_job(folder: RunFolder, verb: str, command: Sequence[str]) -> int:
    """One start of the job, from what was there before it to what becomes of the job; gives the exit code.

    Raises:
        RunError: this process is in no Slurm job.
    """
    here = slurm.allocation()
    if here is None:
        raise RunError(
            "this is the program of a Slurm job",
            got="a process outside of any (no SLURM_JOB_ID)",
            do="python -m trainer ... launch=slurm submits one; slurm/README.md shows a script of one's own",
        )
    step = Step(here)
    console.say(f"job {here.job}, start {here.restarts + 1}, on {here.node_list}: {folder.root}")
    other = older_job(here.job)
    if other is not None:
        console.say(f"this run has an older job, which does the work: {other}. This one ends")
        return EXIT_DONE
    work = partial(_do_step, folder, verb, command, here, step)
    return one_start(folder, here, work, progress=lambda: progress_of(folder), most=lambda: most_stalls(folder))


def one_start(
    record: RunFolder,
    here: Allocation,
    work: Callable[[], int],
    *,
    progress: Callable[[], str],
    most: Callable[[], int],
) -> int:
    """Put a start on record in the folder ``record``, do its ``work``, and decide what becomes of the job.

    ``progress``: what there is now, as one line; ``most``: so many starts in a row without any, and the job is held.
    Both are asked after the work as well. Gives the exit code.
    """
    began = read_starts(record)
    begun = begin(record, here, progress())
    try:
        # all of them may have been killed before they could say that they got nowhere
        code = EXIT_STOPPED if stalls(began, progress()) >= most() else work()
    except SlurmError as fault:
        console.error(f"Slurm does not name the machines of this job: {fault}")
        code = EXIT_STOPPED
    count = stalls(read_starts(record), progress())
    decision = _decide(here, code, count=count, most=most())
    end(record, replace(begun, ended=decision.code, why=decision.why))
    console.say(f"job {here.job}, start {here.restarts + 1}: {decision.why}")
    return carry_out(decision, here)


def _do_step(folder: RunFolder, verb: str, command: Sequence[str], here: Allocation, step: Step) -> int:
    if not lock_is_free(folder, step.signalled):
        return EXIT_STOPPED
    return step.run(command or default_words(folder, verb, here))


def older_job(own: int) -> Job | None:
    """An older job of the run that this job was submitted for, which is queued or runs: a reply had been lost.

    None as well when nobody answers: the run's lock is there too.
    """
    try:
        name, comment = slurm.name_and_comment(own)
        if not comment.startswith(COMMENT):
            return None  # a script of somebody's own
        jobs = [job for job in slurm.queued(name) if job.comment == comment]
    except SlurmError:
        return None
    return next((job for job in jobs if job.id < own and not job.is_over and not job.is_held), None)


def begin(folder: RunFolder, here: Allocation, progress: str) -> Start:
    """Put this start on record, before anything can end it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = Start(job=here.job, restarts=here.restarts, began=now, progress=progress)
    write_starts(folder, [*read_starts(folder), start])
    return start


def end(folder: RunFolder, start: Start) -> None:
    """Record how a start ended. After a hold the count begins anew: a person will have looked."""
    if start.ended == EXIT_NEEDS_PERSON:
        start = replace(start, progress="(held)")
    before = [one for one in read_starts(folder) if (one.job, one.restarts) != (start.job, start.restarts)]
    write_starts(folder, [*before, start])


def lock_is_free(folder: RunFolder, signalled: threading.Event, seconds: float = LOCK_SECONDS) -> bool:
    """Wait until no earlier process of this run is left; False: one still is, or a signal came."""
    deadline, said = time.monotonic() + seconds, False
    while (holder := holder_of(folder.lock)) is not None:
        if not said:
            console.note(f"waiting for {holder}, at most {seconds:.0f} s")
            said = True
        if signalled.wait(1.0):
            return False
        if time.monotonic() >= deadline:
            console.error(f"the run is still held by {holder}")
            return False
    return True


# -- what becomes of the job ---------------------------------------------------------------------------------------


def _decide(here: Allocation, code: int, *, count: int, most: int) -> Decision:
    try:
        job = (
            slurm.persistently(lambda: slurm.controlled(here.name), tries=TRIES, pause=PAUSE)
            if code != EXIT_DONE
            else None
        )
    except SlurmError as fault:
        console.warn(str(fault))
        job = None
    return decide(code, job, restarts=here.restarts, stalls=count, max_stalls=most)


def carry_out(decision: Decision, here: Allocation) -> int:
    """Requeue or hold the job; Slurm then ends this process. Gives the exit code for where it does not."""
    if decision.next is Next.NOTHING:
        return decision.code
    call = slurm.requeue if decision.next is Next.REQUEUE else slurm.hold
    for _ in range(TRIES):
        try:
            if still_runs(here):  # asked again after a lost reply
                call(here.name)
            break
        except NoAnswer as fault:
            console.warn(f"no answer to the request to {decision.next.value} the job: {fault}")
            time.sleep(PAUSE)
        except SlurmError as fault:
            console.error(f"Slurm refused to {decision.next.value} the job: {fault}. The same command goes on")
            break
    return decision.code


def still_runs(here: Allocation) -> bool:
    """Whether the controller has this start of the job as running, and nothing else in mind for it.

    Raises:
        SlurmError: it does not answer.
    """
    job = slurm.controlled(here.name)
    return job.state == "RUNNING" and job.restarts == here.restarts


def main() -> int:
    """The program of a batch step."""
    parser = argparse.ArgumentParser(prog="python -m trainer.drive.job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--verb", default="run")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    found = parser.parse_args(words[:split])
    return run_job(RunFolder(found.run.absolute()), found.verb, words[split + 1 :])


if __name__ == "__main__":
    sys.exit(console.run_and_report(main))
