"""A real Slurm on this machine: a controller and a few nodes, each with a loopback address of its own.

Nothing of the system is touched: all files are in one folder, all daemons are children of this process, munge has a key
of its own, and node names are addresses, so that no name has to be known to the system.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from slurm_networks import CONTROLLER, Networks

CHECKOUT = Path(__file__).parents[2]
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])  # noqa: TID251
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
KILL_WAIT = 5
GRACE = 10
"""Seconds that a preempted job has."""
CONF = """
ClusterName=tests
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait={kill_wait}
TCPTimeout=2
MessageTimeout=10
BatchStartTimeout=10
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 State=UP PreemptMode=off
PartitionName=low  Nodes=ALL PriorityTier=1 State=UP PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 State=UP PreemptMode=off
"""


def why_not() -> str:
    """Why no Slurm can be brought up here; empty: it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    missing = [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]
    return f"Slurm is not installed: no {', '.join(missing)} (.ci/setup installs it)" if missing else ""


def until(what: Callable[[], bool], said: str, seconds: float = 60) -> None:
    """Ask Slurm again and again: it tells nobody when something happens."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {said}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Cluster:
    """The running cluster. ``environment`` is what its commands need."""

    folder: Path
    nodes: list[str]
    environment: dict[str, str]
    networks: Networks | None = None
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # -- daemons

    def start(self, name: str, *words: str) -> None:
        """Start a daemon, in the foreground of a session of its own."""
        path = shutil.which(words[0], path=SEARCH)
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [path, *words[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        place = () if self.networks is None else self.networks.inside(node)
        self.start(node, *place, "slurmd", "-D", "-N", node)

    def start_controller(self) -> None:
        self.start("slurmctld", "slurmctld", "-D")

    def kill(self, name: str) -> None:
        """End a daemon as a crash does."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def lose_power(self, node: str) -> None:
        """End a node's daemon and all processes of its jobs.

        Those that hold the steps go first: on a busy machine they would still report how the others ended, as a node
        without power cannot.
        """
        steps = self._steps(node)
        of_jobs = [*steps, *(one for step in steps for one in step.children(recursive=True))]
        self.kill(node)
        for one in of_jobs:
            _kill(one)

    def _steps(self, node: str = "") -> list[psutil.Process]:
        """The processes that hold the jobs' steps. They write over their own environment; their children's tells."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "slurmstepd":
                    told = [child.environ() for child in process.children()]
                    ours = [one for one in told if one.get("SLURM_CONF") == self.environment["SLURM_CONF"]]
                    found += [process] if any(node in ("", one.get("SLURMD_NODENAME")) for one in ours) else []
            except psutil.Error:
                continue
        return found

    def processes(self, word: str) -> list[psutil.Process]:
        """The processes of jobs that have ``word`` in their command."""
        found: list[psutil.Process] = []
        for step in self._steps():
            try:
                below = step.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for one in below:
                try:
                    found += [one] if any(word in part for part in one.cmdline()) else []
                except psutil.Error:
                    continue  # it has ended meanwhile
        return found

    def stop(self) -> None:
        """Cancel what runs and end all daemons and all that is left of jobs."""
        self.ask("scancel", f"--user={getpass.getuser()}", check=False)
        left = [one for step in self._steps() for one in (*step.children(recursive=True), step)]
        for name, daemon in self.daemons.items():
            if name != "munged":
                daemon.send_signal(signal.SIGKILL)
        for one in left:
            _kill(one)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()

    @contextmanager
    def commands(self) -> Iterator[None]:
        """Point the commands of Slurm that this process starts at this cluster."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("PATH", "PYTHONPATH", "SLURM_CONF"):
                patch.setenv(name, self.environment[name])
            yield

    # -- questions

    def ask(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands and give its output."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def field(self, job: int, name: str) -> str:
        """One field of ``scontrol show job``."""
        words = self.ask("scontrol", "show", "job", "-o", str(job)).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_for(self, job: int, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of the states."""
        until(lambda: self.field(job, "JobState") in states, f"job {job} in {states}", seconds)
        return self.field(job, "JobState")

    def jobs(self) -> list[int]:
        """All jobs that the controller remembers."""
        return [int(line) for line in self.ask("squeue", "-h", "--states=all", "-o", "%A").split()]

    def is_quiet(self) -> bool:
        """Whether no job is queued or runs."""
        return not self.ask("squeue", "-h", "-o", "%A")


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@contextmanager
def cluster(
    nodes: int = 4,
    networks: Networks | None = None,
    *,
    accounting: str = "AccountingStorageType=accounting_storage/none",
    before: Callable[[Cluster], None] = lambda _: None,
) -> Iterator[Cluster]:
    """Bring a cluster up for the block, with four cores on each node.

    Its nodes are 127.0.77.1 and so on, or have ``networks`` of their own. ``accounting``: the lines of its
    configuration about that, with ``{folder}`` for the cluster's own; ``before``: done when munge answers, before the
    controller starts.
    """
    folder = Path(tempfile.mkdtemp(prefix="tt-slurm."))  # a short path: sockets lie in it
    names = [f"127.0.77.{number}" for number in range(1, nodes + 1)] if networks is None else networks.addresses
    port, *node_ports = free_ports(len(names) + 1)
    lines = [
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={name} Port={node_port} CPUs=4 RealMemory=2000"
        for name, node_port in zip(names, node_ports, strict=True)
    ]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(
            host=socket.gethostname().partition(".")[0],
            controller="127.0.0.1" if networks is None else CONTROLLER,
            port=port,
            user=getpass.getuser(),
            folder=folder,
            kill_wait=KILL_WAIT,
            grace=GRACE,
            accounting=accounting.format(folder=folder),
            nodes="\n".join(lines),
        )
    )
    ours = [str(CHECKOUT / name) for name in ("", "kernels", "launch", "tests/unit")]
    paths = [*ours, os.environ.get("PYTHONPATH", "")]  # noqa: TID251
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},  # noqa: TID251
        "PATH": SEARCH,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SLURM_CONF": str(conf),
    }
    made = Cluster(folder, names, environment, networks)
    try:
        _start(made, before)
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _start(made: Cluster, before: Callable[[Cluster], None]) -> None:
    munge = made.folder / "munge"
    munge.mkdir(mode=0o711)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    words = [f"--{option}={munge / name}" for option, name in files.items()]
    made.folder.chmod(0o755)  # munged refuses a socket that others could not reach
    made.start("munged", "munged", "--foreground", "--force", *words)
    until(lambda: (munge / "socket").exists(), "munged listens", 20)
    (made.folder / "state").mkdir()
    before(made)
    made.start_controller()
    for node in made.nodes:
        made.start_node(node)

    def idle() -> bool:
        return len(set(made.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())) == len(made.nodes)

    until(idle, f"all nodes are idle; see {made.folder}", 60)
