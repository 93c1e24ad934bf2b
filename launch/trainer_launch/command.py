"""From a spec to the exact words: arguments, environment, and the two ways to start the same ranks by hand.

Pure functions: what they return is recorded in ``tests/golden/launch`` and compared word by word.
"""

import shlex
from collections.abc import Mapping
from typing import Literal

from trainer_launch.spec import LaunchSpec

FOREIGN_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_")
"""Variables of other launchers. accelerate reads them as configuration, which would bypass the run's own."""
SPINS = 3000
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}
"""How the threads of a process wait for each other, for every process that computes; see ``rank_environment``."""


def rank_arguments(spec: LaunchSpec) -> tuple[str, ...]:
    """What every rank runs: interpreter, module, arguments."""
    return (spec.python, "-m", spec.module, *spec.arguments)


def rank_environment(spec: LaunchSpec, local_rank: int) -> dict[str, str]:
    """The variables that make a process rank ``local_rank`` of this machine: torchrun's, and its CPU threads.

    A thread that waits looks ``SPINS`` times before it sleeps. libgomp's own default spins for milliseconds: two
    processes on the same two cores then take 3.1 times as long as with sleepers, where this takes 1.25 times as long.
    Threads that sleep at once (``OMP_WAIT_POLICY=PASSIVE`` alone) lose 15 to 30 % of a step on a quiet machine, because
    a model's small operations end before the others have woken up (LoRA step of SmolLM2-135M, 768 tokens, two cores).
    """
    return {
        "RANK": str(spec.rank(local_rank)),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.processes),
        "MASTER_ADDR": spec.master_addr,
        "MASTER_PORT": str(spec.master_port),
        "OMP_NUM_THREADS": str(spec.threads),
        **THREADS,
        "PYTHONUNBUFFERED": "1",
    }


def without_foreign(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """``environment`` without the variables of other launchers, and the names that were left out."""
    foreign = sorted(name for name in environment if name.startswith(FOREIGN_PREFIXES))
    return {name: value for name, value in environment.items() if name not in foreign}, foreign


def torchrun_line(spec: LaunchSpec) -> str:
    """A line for the shell that starts the same ranks with torchrun."""
    words = [spec.python, "-m", "torch.distributed.run", f"--nproc-per-node={spec.processes}"]
    if spec.nodes == 1:
        words.append("--standalone")
    else:
        words += [
            f"--nnodes={spec.nodes}",
            f"--node-rank={spec.node_rank}",
            f"--master-addr={spec.master_addr}",
            f"--master-port={spec.master_port}",
        ]
    return _shell(spec, [*words, "-m", spec.module, *spec.arguments])


def accelerate_line(spec: LaunchSpec, config_file: str) -> str:
    """A line for the shell that starts the same ranks with accelerate and ``accelerate_config``'s text in a file."""
    words = [spec.python, "-m", "accelerate.commands.launch", "--config_file", config_file]
    return _shell(spec, [*words, "--module", spec.module, *spec.arguments])


def _shell(spec: LaunchSpec, words: list[str]) -> str:
    waiting = " ".join(f"{name}={value}" for name, value in THREADS.items())
    return f"OMP_NUM_THREADS={spec.threads} {waiting} {shlex.join(words)}"


def accelerate_config(spec: LaunchSpec, *, device: Literal["cpu", "cuda"]) -> str:
    """The text of ``accelerate.yaml`` for these ranks.

    Several CPU ranks are ``MULTI_GPU`` with ``use_cpu``: the only form with which ``accelerate launch`` starts more
    than one CPU process without MPI (``--cpu --num_processes 2`` starts one and does not say so).
    """
    port = "" if spec.nodes == 1 else f"main_process_port: {spec.master_port}\n"
    return (
        "compute_environment: LOCAL_MACHINE\n"
        "debug: false\n"
        f"distributed_type: '{'MULTI_GPU' if spec.world_size > 1 else 'NO'}'\n"
        "downcast_bf16: 'no'\n"
        f"machine_rank: {spec.node_rank}\n"
        f"main_process_ip: {spec.master_addr}\n"
        f"{port}"
        "main_training_function: main\n"
        "mixed_precision: 'no'\n"
        f"num_machines: {spec.nodes}\n"
        f"num_processes: {spec.world_size}\n"
        "rdzv_backend: static\n"
        "same_network: true\n"
        f"use_cpu: {'true' if device == 'cpu' else 'false'}\n"
    )
