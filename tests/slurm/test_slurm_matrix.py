"""What a cluster does to jobs, row by row: requeue, preemption, lost nodes and daemons, arrays, dependencies.

The counter stands in for the training. The table in slurm/README.md says what came of it.
"""

import dataclasses
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_stand_ins import PER_SECOND, Counted

from trainer.drive.progress import read_starts
from trainer_launch import slurm
from trainer_launch.batch_script import step_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHORT = 15 * PER_SECOND
LONG = 3600 * PER_SECOND


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "run")


def on(counted: Counted, lab: Cluster, *nodes: int, total: int = SHORT) -> int:
    """Submit the counter to these nodes (of 0 to 3)."""
    names = ",".join(lab.nodes[node] for node in nodes)
    spec = counted.spec(total=total, nodes=len(nodes))
    return counted.submit(dataclasses.replace(spec, options=(f"--nodelist={names}",)))


def counts(counted: Counted, start: int = 0, nodes: int = 1) -> None:
    def here() -> bool:
        return sum(f"start {start}: from" in line for line in counted.journal()) == nodes

    until(here, f"{nodes} nodes count in start {start}", 180)


def finishes(counted: Counted, lab: Cluster, job: int, *, restarts: int) -> None:
    """The job ends well after exactly so many restarts, and the last start went on from what the one before saved."""
    assert lab.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", seconds=240) == "COMPLETED", counted.log()
    assert lab.field(job, "Restarts") == str(restarts)
    (last,) = [line for line in counted.journal() if line.startswith(f"node 0 start {restarts}: from")]
    assert int(last.split()[-1]) > 0 or restarts == 0
    assert read_starts(counted.folder)[-1].ended == 0


def test_requeued_by_somebody(lab: Cluster, counted: Counted) -> None:
    job = on(counted, lab, 0, 1)
    counts(counted, nodes=2)
    lab.ask("scontrol", "requeue", str(job))
    counts(counted, start=1, nodes=2)
    assert "Slurm has requeued the job already" in read_starts(counted.folder)[0].why
    finishes(counted, lab, job, restarts=1)


def test_preempted(lab: Cluster, counted: Counted) -> None:
    spec = counted.spec(total=SHORT, nodes=4)
    job = counted.submit(dataclasses.replace(spec, partition="low", options=("--exclusive",)))
    counts(counted, nodes=4)
    words = ("--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true")
    urgent = int(lab.ask("sbatch", *words))
    lab.wait_for(urgent, "COMPLETED")
    (stopped,) = [line for line in counted.journal() if line.startswith("node 0 start 0: ends")]
    assert stopped.endswith("because of SIGTERM")
    finishes(counted, lab, job, restarts=1)
    assert [start.ended for start in read_starts(counted.folder)] == [75, 0]


def test_a_node_set_down(lab: Cluster, counted: Counted) -> None:
    job = on(counted, lab, 0, 1)
    counts(counted, nodes=2)
    until(lambda: (counted.folder.root / "count").exists(), "it has saved")
    lab.ask("scontrol", "update", f"nodename={lab.nodes[1]}", "state=down", "reason=test")
    until(lambda: lab.field(job, "Restarts") == "1", "it is requeued")
    lab.ask("scontrol", "update", f"nodename={lab.nodes[1]}", "state=resume", check=False)
    finishes(counted, lab, job, restarts=1)


@pytest.mark.parametrize("lost", [0, 1], ids=["the first", "the second"])
def test_a_node_that_lost_power(lab: Cluster, counted: Counted, lost: int) -> None:
    job = on(counted, lab, 0, 1, total=LONG)
    counts(counted, nodes=2)
    until(lambda: (counted.folder.root / "count").exists(), "it has saved")
    lab.lose_power(lab.nodes[lost])
    until(lambda: lab.field(job, "Restarts") == "1", "it is requeued", 120)
    lab.start_node(lab.nodes[lost])
    counts(counted, start=1, nodes=2)
    lab.ask("scancel", str(job))
    lab.wait_for(job, "CANCELLED")
    assert any(line.startswith("node 0 start 1: from") and not line.endswith(" 0") for line in counted.journal())


def test_a_node_daemon_that_was_killed_and_came_back(lab: Cluster, counted: Counted) -> None:
    job = on(counted, lab, 2, 3)
    counts(counted, nodes=2)
    lab.kill(lab.nodes[3])
    lab.start_node(lab.nodes[3])
    assert lab.wait_for(job, "COMPLETED", "FAILED", seconds=120) == "COMPLETED"
    assert lab.field(job, "Restarts") == "0"


def test_a_node_cut_off_and_back(lab: Cluster, counted: Counted) -> None:
    """Its daemon is silent and its processes run on: two generations of one job are alive."""
    spec = counted.spec(total=LONG)
    job = counted.submit(spec)
    counts(counted)
    node = lab.field(job, "NodeList")
    lab.daemons[node].send_signal(signal.SIGSTOP)
    until(lambda: "waiting for 'count' of process" in counted.log(), "the next start waits for the first", 180)
    assert lab.field(job, "NodeList") != node
    lab.daemons[node].send_signal(signal.SIGCONT)
    counts(counted, start=1)
    (begun,) = [line for line in counted.journal() if line.startswith("node 0 start 1: from")]
    assert int(begun.split()[-1]) > 0
    lab.ask("scancel", str(job))
    lab.wait_for(job, "CANCELLED")
    until(lambda: lab.ask("sinfo", "-h", "-N", "-t", "idle", "-p", "main", "-o", "%N").count("127") == 4, "all idle")


def test_a_controller_that_restarts(lab: Cluster, counted: Counted) -> None:
    """The stop comes while nobody can be asked: the job waits for the controller, and is requeued once."""
    job = on(counted, lab, 0, total=40 * PER_SECOND)
    counts(counted)
    state, began = lab.folder / "state" / "job_state", (counted.folder.root / "journal").stat().st_mtime
    until(lambda: state.exists() and state.stat().st_mtime > began + 1, "the controller has saved that the job runs")
    (program,) = [step for step in lab.processes(str(counted.folder.root)) if "counter.py" in step.cmdline()[1]]
    lab.kill("slurmctld")
    program.send_signal(signal.SIGUSR1)
    until(lambda: "because of SIGUSR1" in counted.journal()[-1], "it has stopped")
    lab.start_controller()
    finishes(counted, lab, job, restarts=1)


def test_a_sweep_as_an_array(lab: Cluster, tmp_path: Path) -> None:
    """Three tasks, two at a time: one fails, one is stopped once; the others do not mind."""
    runs = [Counted(tmp_path / str(number)) for number in range(3)]
    lines = ["#!/bin/bash", "#SBATCH --mem=100 --output=/dev/null --requeue --array=0-2%2"]
    for number, run in enumerate(runs):
        program = run.spec(total=SHORT).words[-4:-3][0]
        agent = ["false"] if number == 1 else [sys.executable, program, str(run.folder.root), str(SHORT), "saves"]
        job = [sys.executable, "-m", "trainer.drive.job", str(run.folder.root), "--", *step_words(agent, nodes=1)]
        quoted = " ".join(f"'{word}'" for word in job)
        lines.append(f'if [ "$SLURM_ARRAY_TASK_ID" = {number} ]; then exec {quoted}; fi')
    script = tmp_path / "sweep.sbatch"
    script.write_text("\n".join(lines))
    number = int(lab.ask("sbatch", "--parsable", str(script)))
    counts(runs[0])
    first = read_starts(runs[0].folder)[0].job
    slurm.signal_steps(first, "USR1")
    until(lambda: not lab.ask("squeue", "-h", "-j", str(number), "-o", "%A"), "all tasks are over", 180)
    assert [start.ended for start in read_starts(runs[0].folder)] == [75, 0]
    assert [start.ended for start in read_starts(runs[1].folder)] == [1]
    assert [start.ended for start in read_starts(runs[2].folder)] == [0]


def test_a_chain_in_which_one_fails(lab: Cluster, tmp_path: Path) -> None:
    """afterok with --kill-on-invalid-dep: what waits for the failed one goes away."""
    done, failing, waiting = (Counted(tmp_path / name) for name in ("done", "failing", "waiting"))
    first = done.submit(dataclasses.replace(done.spec(total=1), name="done"))
    spec = dataclasses.replace(failing.spec(total=1), name="failing", options=(f"--dependency=afterok:{first}",))
    second = failing.submit(dataclasses.replace(spec, words=(*spec.words[: spec.words.index("--") + 1], "false")))
    options = (f"--dependency=afterok:{second}", "--kill-on-invalid-dep=yes")
    third = waiting.submit(dataclasses.replace(waiting.spec(total=1), name="waiting", options=options))
    assert lab.wait_for(first, "COMPLETED", "FAILED") == "COMPLETED"
    assert lab.wait_for(second, "COMPLETED", "FAILED") == "FAILED"
    assert lab.wait_for(third, "CANCELLED", "COMPLETED") == "CANCELLED"
    assert waiting.journal() == []
