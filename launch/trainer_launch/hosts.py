"""One command for several machines: asks each whether it answers, starts its agent over ssh, sees all to their end."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer_launch.children import Child
from trainer_launch.machines import (
    FromOutside,
    from_environment,
    node_command,
    probe_line,
    relay_words,
    remote_line,
    sent_variables,
    ssh_words,
)
from trainer_launch.node import supervise
from trainer_launch.verdict import NodeResult

ANSWER_SECONDS = 15
"""A machine that has not answered after so long is taken as unreachable."""


def told_by_environment() -> FromOutside:
    """Which machine this is, as far as another launcher's variables say."""
    return from_environment(os.environ)  # noqa: TID251


def unreachable(ssh: Sequence[str], hosts: Sequence[str], *, folder: str, python: str) -> dict[str, str]:
    """Those of ``hosts`` that cannot be used, with the reason: no answer, no such folder or Python there."""
    line = probe_line(folder=folder, python=python)

    def ask(host: str) -> str:
        try:
            answer = subprocess.run(
                ssh_words(ssh, host, line),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {ANSWER_SECONDS} s"
        except OSError as fault:
            return f"{ssh[0]}: {fault.strerror}"
        said = answer.stderr.strip().splitlines() or ["nothing"]
        return "" if answer.returncode == 0 else f"ssh ended with {answer.returncode} and said: {said[-1]}"

    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    return {host: answer for host, answer in answers.items() if answer}


def run_hosts(
    words: Sequence[str],
    hosts: Sequence[str],
    on_line: Callable[[str], None],
    *,
    ssh: Sequence[str],
    folder: str,
    log: Callable[[int], Path],
) -> NodeResult:
    """Start ``words`` with its ``--node-rank`` in ``folder`` of every host; the first one is node 0.

    Lines come with the host before them; ``log`` gives the file that has those of a node. Signals reach every machine.
    """

    variables = sent_variables(os.environ)  # noqa: TID251

    def agent(node: int, host: str) -> Child:
        line = remote_line(node_command(words, node), folder=folder, python=sys.executable, variables=variables)
        return Child(
            name=f"the agent of node {node} ({host})",
            arguments=relay_words(sys.executable, ssh_words(ssh, host, line)),
            variables={},
            log=log(node),
            shown=True,
            prefix=f"[{host}] ",
        )

    return supervise([agent(node, host) for node, host in enumerate(hosts)], on_line)
