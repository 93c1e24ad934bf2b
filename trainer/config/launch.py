"""The section ``launch``: where ranks are started, on one machine, on several, or by Slurm."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from trainer.config.bounds import Count, Positive


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """Where the ranks are started."""

    name: Literal["local", "torchrun", "slurm"] = "local"
    """``local``: on this machine. ``torchrun``: on several machines that share the run folder and the cache; prints one
    command for each, or starts them all over ssh with ``hosts``. ``slurm``: submits a job."""
    nodes: Count | None = None
    """torchrun: machines; null: as many as ``hosts``, or what PET_NNODES or NNODES says. slurm: null: one."""
    address: str | None = None
    """torchrun: where the machines meet: HOST or HOST:PORT of node 0 (port 29500 if left out); null: the first of
    ``hosts``, what PET_MASTER_ADDR or MASTER_ADDR says, or this machine when commands are printed. slurm: the job
    knows it."""
    hosts: list[str] = field(default_factory=list[str])
    """torchrun: start every machine's part over ssh (HOST or USER@HOST, keys only); the first one is node 0."""
    ssh: list[str] = field(default_factory=lambda: ["ssh"])
    """The ssh command and its options, for ``hosts``: ``[ssh, -p, "2222"]``."""
    meet_seconds: Count | None = None
    """How long machines and ranks wait for those that are missing; null: 300 for machines that are started by hand, 30
    for those that ``hosts`` starts, and for ranks."""
    processes: Count | None = None
    """Ranks on a machine; null: one per visible GPU, or one on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute."""
    gpu_memory_gb: Positive | None = None
    """Count on so much memory of each GPU, in 10^9 bytes; null: what the GPUs
    here have. With the verb ``plan`` also GPUs that this machine does not have: ``launch.gpu_memory_gb=80
    launch.processes=8``."""
    threads: Count | None = None
    """CPU threads of each rank; null: the cores divided by the ranks."""
    time: str | None = None
    """slurm: time limit as sbatch takes it: ``90`` (minutes), ``4:00:00``, ``2-12`` (days, hours). The run stops in
    good order before it and is requeued. Where this and the next seven are null, the cluster decides."""
    partition: str | None = None
    """slurm: partition."""
    account: str | None = None
    """slurm: account."""
    qos: str | None = None
    """slurm: quality of service."""
    constraint: str | None = None
    """slurm: features of nodes, as sbatch takes them: ``a100|h100``."""
    gres: str | None = None
    """slurm: GPUs of each node: ``gpu:4``, ``gpu:a100:4``; one rank on each, unless ``processes`` says otherwise."""
    cpus: Count | None = None
    """slurm: cores of each node."""
    mem: str | None = None
    """slurm: main memory of each node: ``64G``."""
    options: list[str] = field(default_factory=list[str])
    """slurm: further options of sbatch: ``[--exclusive, "--mail-type=END"]``."""
    prolog: list[str] = field(default_factory=list[str])
    """slurm: shell lines of the job before anything of ours: ``[module load cuda/12.8]``."""
    srun: list[str] = field(default_factory=list[str])
    """slurm: further options of srun: ``["--container-image=/images/torch.sqsh"]``."""
    container: list[str] = field(default_factory=list[str])
    """slurm: words before Python on every node: ``[apptainer, exec, --nv, torch.sif]``."""
    python: str | None = None
    """slurm: the Python that computes, where it is another one than that which submits (in a container)."""
    grace: Annotated[int, Meta(ge=1, le=65535)] = 120
    """Seconds before the end of a Slurm job at which the run is asked to save and stop."""
    max_stalls: Count = 3
    """slurm: so many starts in a row without a new checkpoint or a finished stage, and the job is held for a person."""
    wait: bool = False
    """slurm: show the job's output until it is over, and end with its exit code."""
