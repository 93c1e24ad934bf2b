"""The words that start several machines, the configs that cannot mean any, and what each machine says of itself."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launch_fixtures import Gone
from machines_fixtures import stand_in_ssh
from plan_fixtures import GPUS, planned, refused

from trainer.compose import compose
from trainer.drive import preflight
from trainer.drive.machines import Typed, find_place, located, meet_seconds
from trainer.drive.preflight import difference, facts, hello_of, token_left, why_not
from trainer.errors import ConfigError, RunError, UserError
from trainer.paths import RunFolder
from trainer.rules.launch import launch_rules
from trainer_launch import hosts as hosts_module
from trainer_launch.hosts import unreachable
from trainer_launch.machines import (
    BEHIND_SSH,
    OVER_SSH,
    Address,
    FromOutside,
    from_environment,
    node_command,
    parse_address,
    probe_line,
    relay_words,
    remote_line,
    sent_variables,
    shell_line,
    ssh_words,
)
from trainer_launch.meeting import token_digest

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
TORCHRUN = ["launch=torchrun", "launch.nodes=2", "launch.address=n0"]


# -- the record ----------------------------------------------------------------------------------------------------


def test_words_for_several_machines_are_those_on_record() -> None:
    words = ["/env/bin/python", "-m", "trainer", "+experiment=smoke", "run.root=/shared/my runs"]
    environment = {"NCCL_SOCKET_IFNAME": "eth0", "PYTHONPATH": "/a:/b c", "HF_TOKEN": "secret", "HOME": "/root"}
    parts = ["# by hand", *(shell_line(node_command(words, node)) for node in (0, 1))]
    line = remote_line(
        node_command(words, 1),
        folder="/shared/my work",
        python="/env/bin/python",
        variables=sent_variables(environment),
    )
    connection = ssh_words(["ssh", "-p", "2222"], "me@n1", line)
    parts += ["# at the other end of ssh", line.replace(BEHIND_SSH, "BEHIND_SSH")]
    parts += ["# ssh", *connection[:-1]]
    parts += ["# at this end", shell_line(relay_words("/env/bin/python", ["SSH"])).replace(OVER_SSH, "OVER_SSH")]

    parts += ["# does it answer", probe_line(folder="/shared/my work", python="/env/bin/python")]

    path = GOLDEN / "over_ssh.txt"
    assert "\n".join(parts) + "\n" == path.read_text(), f"if this is meant, put the new text into {path}"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("n0", Address("n0", 29500)),
        ("n0.cluster:29501", Address("n0.cluster", 29501)),
        ("10.0.0.1:1", Address("10.0.0.1", 1)),
        ("fd00::1", Address("fd00::1", 29500)),
        ("[fd00::1]:29501", Address("fd00::1", 29501)),
        ("n0:0", None),
        ("n0:65536", None),
        ("n0:port", None),
        ("me@n0", None),
        ("-oProxyCommand=x", None),
        ("", None),
    ],
)
def test_addresses(text: str, address: Address | None) -> None:
    assert parse_address(text) == address
    assert address is None or parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, FromOutside()),
        ({"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "n0"}, FromOutside(node_rank=1, nodes=2, address="n0")),
        ({"PET_NODE_RANK": "0", "NODE_RANK": "1"}, FromOutside(node_rank=0)),
        ({"PET_NNODES": "1:4"}, FromOutside()),
        ({"PET_MASTER_ADDR": "n0", "PET_MASTER_PORT": "23456"}, FromOutside(address="n0:23456")),
    ],
)
def test_what_torchrun_would_read_is_read(variables: dict[str, str], told: FromOutside) -> None:
    assert from_environment(variables) == told


# -- config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "where", "what"),
    [
        (["launch.nodes=2"], "launch.nodes", "has no effect with launch=local"),
        (["launch.hosts=[a,b]"], "launch.hosts", "has no effect with launch=local"),
        (["launch=torchrun", "launch.nodes=1", "launch.address=n0"], "launch.nodes", "needs at least two machines"),
        (["launch=torchrun", "launch.hosts=[a]"], "launch.hosts", "needs at least two machines"),
        (["launch=torchrun", "launch.hosts=[a,a]"], "launch.hosts", "names a machine twice"),
        (["launch=torchrun", "launch.hosts=[a,'-oProxyCommand=x']"], "launch.hosts", "is no host"),
        (["launch=torchrun", "launch.hosts=[a,b]", "launch.nodes=3"], "launch.nodes", "is not the number of hosts"),
        (["launch=torchrun", "launch.hosts=[a,b]", "launch.ssh=[]"], "launch.ssh", "is empty"),
        ([*TORCHRUN, "launch.ssh=[rsh]"], "launch.ssh", "has no effect with no launch.hosts"),
        ([*TORCHRUN[:2], "launch.address=n0:x"], "launch.address", "is no address"),
    ],
)
def test_launch_keys_that_cannot_be_meant(overrides: list[str], where: str, what: str, tmp_path: Path) -> None:
    config = compose(["model=tiny", "data.train=my.jsonl", *overrides], config_dir=None, cwd=tmp_path)
    assert [(problem.where, problem.what) for problem in launch_rules(config)] == [(where, what)]


def test_the_batch_is_divided_among_the_ranks_of_all_machines(tmp_path: Path) -> None:
    plan = planned(tmp_path, *TORCHRUN, "launch.processes=2", "optim.batch_packs=12")
    assert (plan.nodes, plan.processes, plan.world_size, plan.accumulation) == (2, 2, 4, 3)
    assert plan.strategy == "ddp"
    assert plan.identity == planned(tmp_path, "launch.processes=4", "optim.batch_packs=12").identity


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    problem = refused(tmp_path, *TORCHRUN, "launch.processes=3", "optim.batch_packs=8")
    assert problem.got == "8 packs for 6 ranks (2 machines)"
    assert problem.do == "optim.batch_packs=6 or optim.batch_packs=12, or launch.processes=2"


def typed(node_rank: int | None) -> Typed:
    return Typed("python -m trainer", (), node_rank, Path())


def test_a_number_for_one_machine_is_refused(tmp_path: Path) -> None:
    config = planned(tmp_path).config
    assert not find_place(config, typed(None), together=True).only_starts
    with pytest.raises(UserError, match="there is one machine only"):
        find_place(config, typed(0), together=True)


def test_a_machine_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PET_NODE_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = planned(tmp_path, *TORCHRUN).config
    assert find_place(config, typed(None), together=True).only_starts
    assert not find_place(config, typed(None), together=False).only_starts
    assert find_place(config, typed(1), together=True).node == 1
    monkeypatch.setenv("NODE_RANK", "1")
    assert find_place(config, typed(None), together=True).node == 1
    assert find_place(config, typed(0), together=True).node == 0
    with pytest.raises(UserError, match="there is no such machine"):
        find_place(config, typed(2), together=True)


def test_machines_and_address_come_from_hosts_then_from_outside(tmp_path: Path) -> None:
    outside = FromOutside(nodes=4, address="n0:23456")
    launch = planned(tmp_path, "launch=torchrun", "launch.hosts=[me@a,b]").config.launch
    found = located(launch, outside, None)
    assert (found.nodes, found.address, meet_seconds(found)) == (2, "a:29500", 30)
    launch = planned(tmp_path, "launch=torchrun").config.launch
    found = located(launch, outside, 1)
    assert (found.nodes, found.address, meet_seconds(found)) == (4, "n0:23456", 300)
    with pytest.raises(ConfigError) as caught:
        located(launch, FromOutside(), 1)
    assert [problem.where for problem in caught.value.problems] == ["launch.nodes", "launch.address"]


# -- ssh -----------------------------------------------------------------------------------------------------------


def test_hosts_that_do_not_answer_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "ANSWER_SECONDS", 0.5)
    ssh = [str(stand_in_ssh(tmp_path))]
    found = unreachable(ssh, ["nowhere", "silent"], folder=str(tmp_path), python=sys.executable)
    assert found == {
        "nowhere": "ssh ended with 1 and said: ssh: Could not resolve hostname nowhere",
        "silent": "no answer within 0.5 s",
    }
    (message,) = unreachable(["/no/ssh"], ["a"], folder="/", python=sys.executable).values()
    assert message == "/no/ssh: No such file or directory"


def test_a_host_that_answers_is_fine_and_one_without_the_folder_is_not(tmp_path: Path) -> None:
    ssh = [str(stand_in_ssh(tmp_path))]
    assert unreachable(ssh, ["127.0.0.2"], folder=str(tmp_path), python=sys.executable) == {}
    (message,) = unreachable(ssh, ["127.0.0.2"], folder="/no/folder", python=sys.executable).values()
    assert "/no/folder" in message


LISTENS = """
import os, signal, sys
def stop(number, _):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""


@contextmanager
def over_ssh(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A connection to a program that listens to signals; its first line is its process id."""
    command = [sys.executable, "-c", LISTENS]
    line = remote_line(command, folder=str(tmp_path), python=sys.executable, variables={})
    words = relay_words(sys.executable, ssh_words([str(stand_in_ssh(tmp_path))], "127.0.0.2", line))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_signal_here_is_a_signal_at_the_other_end_of_ssh(tmp_path: Path) -> None:
    with over_ssh(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.read() == "got SIGUSR1\n"
        assert process.wait() == 75


def test_a_starter_that_is_gone_stops_the_other_end(tmp_path: Path) -> None:
    with over_ssh(tmp_path) as process:
        assert process.stdout is not None
        gone = Gone(int(process.stdout.readline()))
        process.kill()
        assert process.stdout.read() == "got SIGTERM\n"
    assert gone.wait()


# -- what each machine says of itself --------------------------------------------------------------------------------


def test_facts_that_differ_are_named(tmp_path: Path) -> None:
    here = facts(planned(tmp_path, *TORCHRUN, "launch.threads=1"))
    there: dict[str, Any] = {**here, "packages": {**here["packages"], "torch": "1.0"}, "code": "0" * 64}
    there["plan"] = {**here["plan"], "run_dir": "/other"}
    assert difference(here, here) == ""
    told = difference(here, there)
    assert f"run_dir is /other there and {here['plan']['run_dir']} on node 0" in told
    assert f"the program's source is 0000000000... there and {here['code'][:10]}... on node 0" in told
    assert "torch is 1.0 there and" in told


def test_cores_of_a_machine_are_its_own_business(tmp_path: Path) -> None:
    one = planned(tmp_path, *TORCHRUN, devices=GPUS)
    two = planned(tmp_path, *TORCHRUN, devices=type(GPUS)(gpus=4, cores=64))
    assert one.threads != two.threads
    assert difference(facts(one), facts(two)) == ""


def test_folders_have_to_be_shared_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SEEN_SECONDS", 0.0)
    plan = planned(tmp_path, *TORCHRUN, f"run.cache={tmp_path / 'cache'}")
    folder, cache, digest = RunFolder(Path(plan.run_dir)), Path(plan.cache_dir), token_digest("right")
    assert "see what node 0 wrote into" in hello_of(1, plan, digest).problem
    with token_left(folder, cache, "right"):
        hello = hello_of(1, plan, digest)
        assert (hello.problem, hello.token) == ("", "right")
        assert why_not(hello, facts(plan), folder) == ""
        assert "node 0 does not see what it wrote" in why_not(hello, facts(plan), folder), "the trace is used up"
        (cache / ".meeting").write_text("an old one")
        assert f"wrote into {cache}" in hello_of(1, plan, digest).problem
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight, "write_atomic", deny)
    with pytest.raises(RunError, match="cannot write into the cache"), token_left(RunFolder(tmp_path), tmp_path, "x"):
        pass
