"""What the keys of ``launch`` say together: several machines need a number and a meeting point, one needs neither."""

from collections.abc import Iterator

from trainer.config import Config
from trainer.errors import Problem
from trainer.rules.problems import no_effect
from trainer_launch.machines import is_host, parse_address

SEVERAL = ("nodes", "address", "hosts", "ssh", "meet_seconds")


def launch_rules(config: Config) -> Iterator[Problem]:
    """Yield keys for several machines with one machine, and hosts and addresses that cannot be meant."""
    launch = config.launch
    if launch.name == "local":
        yield from no_effect("launch", launch, SEVERAL, "launch=local", "launch=torchrun, or remove it")
        return
    if launch.name == "slurm":
        return  # launch_slurm.py
    if launch.address is not None and parse_address(launch.address) is None:
        yield Problem(
            what="is no address",
            where="launch.address",
            got=launch.address,
            allowed="HOST or HOST:PORT, with a port from 1 to 65535",
            do="give the machine of node 0 as the others call it",
        )
    for host in launch.hosts:
        if not is_host(host):
            yield Problem(
                what="is no host", where="launch.hosts", got=host, allowed="HOST or USER@HOST", do="check the name"
            )
    if len(set(launch.hosts)) < len(launch.hosts):
        yield Problem(
            what="names a machine twice",
            where="launch.hosts",
            got=", ".join(launch.hosts),
            allowed="one agent per machine",
            do="name each once, and give the ranks of each with launch.processes",
        )
    if not launch.hosts:
        yield from no_effect("launch", launch, ("ssh",), "no launch.hosts", "launch.hosts=[...], or remove it")
    elif not launch.ssh:
        yield Problem(what="is empty", where="launch.ssh", got="[]", allowed="a command", do="launch.ssh=[ssh]")
    if launch.nodes is not None and launch.hosts and launch.nodes != len(launch.hosts):
        yield Problem(
            what="is not the number of hosts",
            where="launch.nodes",
            got=f"{launch.nodes} with {len(launch.hosts)} hosts",
            allowed=f"{len(launch.hosts)}, or null",
            do="remove it",
        )
    elif launch.nodes == 1 or len(launch.hosts) == 1:
        yield Problem(
            what="needs at least two machines",
            where="launch.nodes" if launch.nodes == 1 else "launch.hosts",
            got="1",
            allowed="2 or more",
            do="launch=local on that machine",
        )
