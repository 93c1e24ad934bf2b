"""One run on two machines that are two loopback addresses: agents, ranks over gloo, and ssh that is a stand-in for it.

Longer ones are in tests/proofs/test_machines.py.
"""

import socket
from pathlib import Path

import pytest
from cli_fixtures import NOTHING_HEAVY, trainer
from layout_fixtures import SMOKE, steps
from machines_fixtures import stand_in_ssh

from trainer.cost.ledger import read_account
from trainer.paths import RunFolder
from trainer_launch.run import free_port

HERE = "127.0.0.1"


def over_ssh(folder: Path) -> list[str]:
    return [
        "launch=torchrun",
        "launch.hosts=[127.0.0.1,127.0.0.2]",
        f"launch.ssh=[{stand_in_ssh(folder)}]",
        f"launch.address={HERE}:{free_port(HERE)}",
        "launch.processes=1",
    ]


@pytest.mark.campaign
def test_one_command_trains_on_two_machines(tmp_path: Path) -> None:
    ended = trainer(
        tmp_path,
        "train",
        *SMOKE,
        *over_ssh(tmp_path),
        "optim.max_steps=3",
        "eval.generate_rows=0",
        "launch.meet_seconds=120",
    )
    assert ended.code == 0, ended.out + ended.err
    folder = RunFolder(tmp_path / "run")
    assert steps(folder) == [1, 2, 3]
    assert any(line.startswith("[127.0.0.1] train 3/3") for line in ended.words())
    assert "[127.0.0.2] the run is finished" in ended.words()
    assert "--node-rank 1" in (folder.logs / "node1.log").read_text()
    assert folder.rank_log(1).is_file()
    trained = [spell for spell in read_account(folder.cost).spells if spell.stage == "train"]
    assert {spell.rank for spell in trained} == {0, 1}, "the other machine's ranks are in the account"
    assert not list(folder.launch.glob(".*")), "what the machines left for each other is gone"
    assert ended.err.splitlines()[-1] == NOTHING_HEAVY


def test_without_a_number_the_commands_are_printed_and_nothing_starts(tmp_path: Path) -> None:
    words = ["+experiment=smoke", "launch=torchrun", "launch.nodes=2", "launch.device=cpu"]
    ended = trainer(tmp_path, *words)
    assert (ended.code, ended.err.splitlines()) == (0, [NOTHING_HEAVY])
    lines = [line for line in ended.words() if line.startswith("python -m trainer")]
    start = f"python -m trainer run {' '.join(words)} launch.address={socket.gethostname()}:29500 --node-rank"
    assert lines == [f"{start} 0", f"{start} 1"]
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_does_not_answer_is_named_before_anything_starts(tmp_path: Path) -> None:
    words = [*SMOKE, *over_ssh(tmp_path), "launch.hosts=[127.0.0.1,nowhere]"]
    ended = trainer(tmp_path, *words)
    assert ended.code == 2
    assert "not all hosts can be used" in ended.err
    assert "nowhere: ssh ended with 1 and said: ssh: Could not resolve hostname nowhere" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server((HERE, 0)) as taken:
        address = f"{HERE}:{taken.getsockname()[1]}"
        words = [*SMOKE, "launch=torchrun", "launch.nodes=2", f"launch.address={address}", "--node-rank", "0"]
        ended = trainer(tmp_path, *words)
    assert ended.code == 2
    assert "cannot listen where the machines are to meet" in ended.err
    assert f"{address}: Address already in use" in ended.err
    assert not (tmp_path / "run" / "prepared.json").exists()


@pytest.mark.parametrize(("node", "said"), [(0, "missing: node 1"), (1, "node 0 does not answer after 1 s")])
def test_a_machine_that_does_not_come_is_named(tmp_path: Path, node: int, said: str) -> None:
    address = f"launch.address={HERE}:{free_port(HERE)}"
    words = [*SMOKE, "launch=torchrun", "launch.nodes=2", address, "launch.meet_seconds=1"]
    ended = trainer(tmp_path, *words, "--node-rank", str(node))
    assert ended.code == 2
    assert said in ended.err
