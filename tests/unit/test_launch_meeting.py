"""Agents of two machines, with real sockets and processes: who is let in, who ends whom, and what is the cause."""

import dataclasses
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from launch_fixtures import Gone, stand_in
from machines_fixtures import HERE, TOKEN, agent, chair, seated

from trainer_launch.chair import open_chair
from trainer_launch.meeting import Hello, MeetingError, first_cause
from trainer_launch.run import free_port, run_together
from trainer_launch.seat import Seat, find_chair
from trainer_launch.verdict import NodeResult
from trainer_launch.wire import Wire, WireError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # ``-m stand_in`` is found in the current folder


def fit(_: Hello) -> str:
    return ""


def hello(**changed: object) -> Hello:
    return dataclasses.replace(Hello(node=1, host="two", token=TOKEN), **changed)  # type: ignore[arg-type]


def refused(said: Hello) -> MeetingError:
    """What node 0 says; the seat has to be told the same."""
    heard: list[MeetingError] = []

    def take(seat: Seat) -> None:
        try:
            seat.take(said)
        except MeetingError as fault:
            heard.append(fault)

    with chair() as (made, port), seated(port, take), pytest.raises(MeetingError) as caught:
        made.assemble(lambda _: "torch is 1 there and 2 on node 0", seconds=60)
    assert [fault.got for fault in heard] == [caught.value.got]
    return caught.value


def seating(said: Hello) -> Callable[[Seat], None]:
    """Says hello, and does not mind being sent away."""

    def take(seat: Seat) -> None:
        with suppress(MeetingError):
            seat.take(said)

    return take


# -- coming together -----------------------------------------------------------------------------------------------


def test_a_machine_that_is_missing_is_named() -> None:
    with (
        chair(nodes=3) as (made, port),
        seated(port, seating(hello(node=2, host="three"))),
        pytest.raises(MeetingError, match="not all machines are here after 1 s") as caught,
    ):
        made.assemble(fit, seconds=1)
    assert caught.value.got == "missing: node 1; here: node 0 (127.0.0.1), node 2 (three)"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (hello(token="other"), "it does not see the run folder that node 0 sees"),
        (hello(node=2), "there are nodes 0 to 1, and 0 is here"),
        (hello(problem="no such data file"), "no such data file"),
        (hello(), "torch is 1 there and 2 on node 0"),
    ],
)
def test_a_machine_that_cannot_take_part_is_refused_by_name(said: Hello, reason: str) -> None:
    fault = refused(said)

    assert fault.got == reason
    assert fault.what == f"node {said.node} (two) cannot take part"


def test_the_same_machine_twice_is_refused() -> None:
    with (
        chair(nodes=3) as (made, port),
        seated(port, seating(hello())),
        seated(port, seating(hello(host="again"))),
        pytest.raises(MeetingError) as caught,
    ):
        made.assemble(fit, seconds=60)
    assert re.fullmatch(r"node 1 is here already, from (two|again)", caught.value.got)


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MeetingError, match="cannot listen where the machines are to meet") as caught:
            open_chair(HERE, port, 2, TOKEN)
    assert caught.value.got == f"127.0.0.1:{port}: Address already in use"


def test_nobody_at_the_address() -> None:
    port = free_port(HERE)
    with pytest.raises(MeetingError, match="node 0 does not answer after 0 s") as caught:
        find_chair(HERE, port, seconds=0)
    assert caught.value.got == f"127.0.0.1:{port}: Connection refused"


def test_a_stranger_at_the_port_disturbs_nobody() -> None:
    with chair() as (made, port), socket.create_connection((HERE, port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with seated(port, seating(hello())):
            made.assemble(fit, seconds=60)


def test_silence_is_the_end_of_a_connection() -> None:
    with socket.create_server((HERE, 0)) as server, socket.create_connection(server.getsockname()):
        wire = Wire(server.accept()[0], silence=0.1)
        with pytest.raises(WireError, match="not heard of for 0 s"):
            wire.receive()
        wire.close()


def test_signs_of_life_are_heard_and_are_no_messages() -> None:
    with socket.create_server((HERE, 0)) as server:
        one = Wire(socket.create_connection(server.getsockname()), beat=0.02)
        two = Wire(server.accept()[0], silence=5)
        one.keep_alive()
        assert two._receive() == {"beat": 1}
        one.send({"beat": 1})
        one.send({"stop": "SIGTERM"})
        assert two.receive() == {"stop": "SIGTERM"}
        one.close()
        with pytest.raises(WireError, match="the connection was closed"):
            two.receive()
        two.close()


# -- ranks on both -------------------------------------------------------------------------------------------------


def test_ranks_of_both_machines_have_one_numbering(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "say(f\"{rank} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_ADDR']}\")")
    lines: list[str] = []
    port = free_port(HERE)
    with agent(ranks, port) as other:
        with chair(port=port) as (made, _):
            made.assemble(fit, seconds=60)
            result = run_together(ranks.spec(processes=1, nodes=2), made, lines.append)
            made.ends_with(0)
        assert other.stdout is not None
        assert other.stdout.read() == "seated\n1 of 2 at 127.0.0.1\nend: 0 \n"
        assert other.wait() == 0
    assert result == NodeResult(exit_code=0)
    assert lines == ["0 of 2 at 127.0.0.1"]


@pytest.mark.parametrize(("who", "name"), [(0, "node 0 (127.0.0.1): rank 0"), (1, "node 1 (two): rank 1")])
def test_a_failure_on_one_machine_ends_both_and_is_the_cause(tmp_path: Path, who: int, name: str) -> None:
    ranks = stand_in(tmp_path, f"meet()\nif rank == {who}: sys.exit('error: boom')\nforever()")
    with chair() as (made, port), agent(ranks, port):
        made.assemble(fit, seconds=60)
        result = run_together(ranks.spec(processes=1, nodes=2), made, lambda _: None)

    assert result.exit_code == 1
    assert result.cause == f"{name} ended with exit code 1: boom (log: {tmp_path / 'logs' / f'rank{who}.log'})"


def test_a_killed_agent_is_the_cause_and_nobody_is_left(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "(folder / f'pid{rank}').write_text(str(os.getpid()))\nmeet()\nsay('ready')\nforever()")
    gone: list[Gone] = []
    with chair() as (made, port), agent(ranks, port) as other:
        made.assemble(fit, seconds=60)

        def kill(_: str) -> None:
            gone.extend(Gone(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1))
            other.kill()

        result = run_together(ranks.spec(processes=1, nodes=2), made, kill)

    assert [one.wait() for one in gone] == [True, True]
    assert result.exit_code == 74, "nothing is wrong with the training: the same commands go on"
    assert result.cause.startswith("node 1 (two): its agent was killed, or the machine is lost (the connection ")


def test_a_killed_node_0_ends_the_other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here node 0 is only its connection: it goes away while the rank of node 1 runs."""
    monkeypatch.setattr("trainer_launch.chair.HANG_UP_SECONDS", 0.1)  # nobody is left to wait for
    ranks = stand_in(tmp_path, "say('ready')\nforever()")
    with chair() as (made, port), agent(ranks, port) as other:
        made.assemble(fit, seconds=60)
        made.start_ranks({"port": 29555, "arguments": [str(tmp_path)]})
        assert other.stdout is not None
        assert [other.stdout.readline(), other.stdout.readline()] == ["seated\n", "ready\n"]
        for seat in made._seats.values():
            seat.wire.close()
        last = other.stdout.read()
        assert other.wait() == 74
    assert last.startswith("end: 74 node 0 (127.0.0.1): its agent was killed, or the machine is lost (")


LISTENING = """
def stop(number, frame):
    say(f"rank {rank} got {signal.Signals(number).name}")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
meet()
say("ready")
forever()
"""


@pytest.mark.parametrize("to_the_other", [False, True])
def test_a_signal_to_one_machine_stops_both_in_good_order(tmp_path: Path, to_the_other: bool) -> None:
    ranks = stand_in(tmp_path, LISTENING)
    lines: list[str] = []
    with chair() as (made, port), agent(ranks, port) as other:
        made.assemble(fit, seconds=60)

        def act(text: str) -> None:
            lines.append(text)
            if text == "ready":
                os.kill(other.pid if to_the_other else os.getpid(), signal.SIGUSR1)

        result = run_together(ranks.spec(processes=1, nodes=2), made, act)

    assert result == NodeResult(exit_code=75, cause="stopped in good order", signal="SIGUSR1")
    assert lines[-1] == "rank 0 got SIGUSR1"
    assert "rank 1 got SIGUSR1" in ranks.log(1)


# -- the first cause -----------------------------------------------------------------------------------------------


def test_who_only_lost_a_peer_is_not_the_cause() -> None:
    lost = NodeResult(exit_code=1, cause="closed by peer", lost_peer=True)
    own = NodeResult(exit_code=3, cause="boom")
    done, stopped = NodeResult(exit_code=0), NodeResult(exit_code=75)

    assert first_cause({0: lost, 1: own, 2: lost}, [2, 0, 1]) == (1, own)
    assert first_cause({0: lost, 1: lost}, [1, 0]) == (1, lost)
    assert first_cause({0: own, 1: own}, []) == (0, own)
    assert first_cause({0: done, 1: stopped}, []) == (1, stopped)
    assert first_cause({0: done, 1: done}, []) == (0, done)
