"""The agent of one machine, with real processes: exit codes, causes, signals, and that nobody is left behind."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fixtures import Gone, StandIn, stand_in

from trainer_launch.node import run_node, supervise
from trainer_launch.verdict import NodeResult, last_words

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # ``-m stand_in`` is found in the current folder


class Lines:
    """Collects lines; ``at`` a line, does something to this process (as a user's Ctrl-C would)."""

    def __init__(self, at: str = "", send: tuple[signal.Signals, ...] = ()) -> None:
        self.seen: list[str] = []
        self._at, self._send = at, list(send)

    def __call__(self, text: str) -> None:
        self.seen.append(text)
        if self._at and text.startswith(self._at) and self._send:
            os.kill(os.getpid(), self._send.pop(0))


def supervised(ranks: StandIn, lines: Lines, *, grace: float = 20.0) -> NodeResult:
    return supervise([ranks.child(0, shown=True), ranks.child(1)], lines, grace=grace)


def test_ranks_get_their_numbers_and_rank_0_is_shown(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "say(f\"{rank} of {os.environ['WORLD_SIZE']}, local {os.environ['LOCAL_RANK']}\")")
    lines = Lines()

    result = run_node(ranks.spec(), lines)

    assert result == NodeResult(exit_code=0)
    assert lines.seen == ["0 of 2, local 0"]
    assert ranks.log(1).splitlines()[1:] == ["1 of 2, local 1"]


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((76, 76), 76), ((3, 3), 3)]
)
def test_exit_codes_pass_through(tmp_path: Path, codes: tuple[int, int], expected: int) -> None:
    ranks = stand_in(tmp_path, f"sys.exit({codes}[rank])")

    result = supervised(ranks, Lines())

    assert result.exit_code == expected


def test_a_rank_that_ended_well_waits_for_the_one_that_publishes(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "if rank == 1: held = open(folder / 'meet', 'w'); sys.exit(75)\n"
        "wait_for_the_end_of_the_other(); say('published'); sys.exit(75)",
    )
    lines = Lines()

    assert supervised(ranks, lines, grace=0.0).exit_code == 75
    # Rank 1 may be seen to end only after rank 0 has ended, and is then told of: its file closes a moment before.
    assert lines.seen[:1] == ["published"]


def test_one_that_hangs_after_all_is_published_is_ended_with_a_warning(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "meet()\nif rank == 0: sys.exit(75)\nforever()")
    lines = Lines()

    result = supervised(ranks, lines, grace=0.2)

    assert result == NodeResult(exit_code=75, cause="stopped in good order")
    assert lines.seen == ["warning: rank 1 did not end 0 s after rank 0; ended it"]


def test_first_cause_names_rank_reason_and_log(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "if rank == 1: raise RuntimeError('boom on rank 1')\nforever()")

    result = supervised(ranks, Lines())

    log = tmp_path / "logs" / "rank1.log"
    assert result.cause == f"rank 1 ended with exit code 1: RuntimeError: boom on rank 1 (log: {log})"
    assert (result.exit_code, result.log, result.shown) == (1, str(log), False)


def test_a_rank_that_only_lost_its_peer_is_not_the_cause(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "if rank == 1: wait_for_the_end_of_the_other(); sys.exit('error: loss is not finite')\n"
        "held = open(folder / 'meet', 'w'); sys.exit('RuntimeError: Connection closed by peer')",
    )

    result = supervised(ranks, Lines())

    assert result.cause.startswith("rank 1 ended with exit code 1: loss is not finite")


def test_a_fault_that_all_ranks_found_is_the_one_already_shown(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "held = open(folder / 'meet', 'w') if rank == 1 else wait_for_the_end_of_the_other()\n"
        "print('error: the template cannot mask'); sys.exit(2)",
    )

    result = supervised(ranks, Lines())

    assert (result.exit_code, result.shown) == (2, True)
    assert result.cause.startswith("rank 0 ")


def test_when_one_dies_the_other_is_asked_to_end(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "def asked(*_): say('asked'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        "meet()\n"
        "if rank == 1: sys.exit(9)\n"
        "forever()",
    )
    lines = Lines()

    result = supervised(ranks, lines)

    assert (result.exit_code, lines.seen) == (9, ["asked"])


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmeet()\nif rank == 1: sys.exit(9)\nforever()"
    )

    result = supervised(ranks, Lines(), grace=0.2)

    assert result.cause.startswith("rank 1 ended with exit code 9")


def test_a_rank_ended_by_a_signal_is_named_with_it(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nforever()")

    result = supervised(ranks, Lines())

    assert result.exit_code == 137
    assert result.cause.startswith("rank 1 was ended by SIGKILL (out of memory, or killed by someone)")


LISTENING = """
def stop(number, frame):
    say(f"rank {rank} got {signal.Signals(number).name}")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, stop)
if rank == 1: say("ready")  # before the meeting: the word of rank 0, after it, brings the signal to both
meet()
if rank == 0: say("ready")
forever()
"""


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_signals_reach_every_rank_once_and_75_comes_back(tmp_path: Path, sent: str, received: str) -> None:
    ranks = stand_in(tmp_path, LISTENING)
    lines = Lines("ready", (signal.Signals[sent],))
    before = signal.getsignal(signal.Signals[sent])

    result = supervised(ranks, lines)

    assert result == NodeResult(exit_code=75, cause="stopped in good order", signal=received)
    assert lines.seen == [
        "ready",
        "stopping in good order; Ctrl-C once more ends everything at once",
        f"rank 0 got {received}",
    ]
    assert ranks.log(1).splitlines()[1:] == ["ready", f"rank 1 got {received}"]
    assert signal.getsignal(signal.Signals[sent]) == before


def test_a_stop_before_the_ranks_can_listen_is_in_good_order_too(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "meet()\nsay('ready')\nforever()")

    result = supervised(ranks, Lines("ready", (signal.SIGTERM,)))

    assert result == NodeResult(exit_code=75, cause="stopped by SIGTERM", signal="SIGTERM")


def test_a_failure_while_stopping_is_a_failure(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "def stop(*_): sys.exit(75 if rank else 'error: the checkpoint could not be written')\n"
        "signal.signal(signal.SIGTERM, stop)\nmeet()\nsay('ready')\nforever()",
    )

    result = supervised(ranks, Lines("ready", (signal.SIGTERM,)))

    assert result.exit_code == 1
    assert result.cause.startswith("rank 0 ended with exit code 1: the checkpoint could not be written")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path,
        "signal.signal(signal.SIGINT, lambda *_: say('again') if rank == 0 else None)\nmeet()\nsay('again')\nforever()",
    )
    lines = Lines("again", (signal.SIGINT, signal.SIGINT))

    result = supervised(ranks, lines)

    assert result == NodeResult(exit_code=130, cause="ended at once at the second Ctrl-C", signal="SIGINT")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "meet()\nsay('ready')")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = supervised(ranks, Lines("ready", (signal.SIGHUP,)))
    finally:
        signal.signal(signal.SIGHUP, before)

    assert result == NodeResult(exit_code=0)


def test_what_a_rank_left_behind_is_ended(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "say(subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']).pid)")
    gone: list[Gone] = []

    result = supervise([ranks.child(0, shown=True)], lambda text: gone.append(Gone(int(text))))

    assert result.exit_code == 0
    assert gone[0].wait()


def test_ranks_die_with_a_killed_agent(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "(folder / f'pid{rank}').write_text(str(os.getpid()))\nmeet()\nsay('ready')\nforever()")
    script = (
        f"import sys; sys.path.insert(0, {str(LAUNCH)!r})\n"
        "from trainer_launch.node import run_node\nfrom trainer_launch.spec import LaunchSpec\n"
        f"run_node({ranks.spec()!r}, lambda text: print(text, flush=True))"
    )
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    with agent, agent.stdout:
        assert agent.stdout.readline() == "ready\n"
        gone = [Gone(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1)]
        agent.kill()

        assert [one.wait() for one in gone] == [True, True]


def test_an_open_file_is_inherited(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "os.write(int(os.environ['HANDLE']), b'from the rank')")
    with (tmp_path / "shared").open("w+") as shared:
        handle = shared.fileno()
        child = ranks.child(0, shown=True, variables={"HANDLE": str(handle)})

        assert supervise([child], Lines(), keep_open=(handle,)).exit_code == 0

    assert (tmp_path / "shared").read_text() == "from the rank"


def test_variables_of_other_launchers_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    ranks = stand_in(tmp_path, "say('ACCELERATE_MIXED_PRECISION' in os.environ)")
    lines = Lines()

    supervise([ranks.child(0, shown=True)], lines)

    assert lines.seen == [
        "warning: not passed on, because the run's config decides: ACCELERATE_MIXED_PRECISION",
        "False",
    ]


def test_logs_grow_over_starts_and_the_cause_is_of_the_last_one(tmp_path: Path) -> None:
    ranks = stand_in(
        tmp_path, "if not (folder / 'was').exists(): (folder / 'was').touch(); sys.exit('error: first')\nsys.exit(4)"
    )

    first = supervise([ranks.child(0)], Lines())
    second = supervise([ranks.child(0)], Lines())

    assert "error: first" in ranks.log(0)
    assert "first" in first.cause
    assert second.cause == f"rank 0 ended with exit code 4 (log: {tmp_path / 'logs' / 'rank0.log'})"


def test_of_a_bar_drawn_with_carriage_returns_the_last_state_is_shown(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "say('10 %\\r50 %\\r100 %')")
    lines = Lines()

    supervise([ranks.child(0, shown=True)], lines)

    assert lines.seen == ["100 %"]


def test_a_log_that_cannot_grow_does_not_stop_the_rank(tmp_path: Path) -> None:
    ranks = stand_in(tmp_path, "for number in range(400): say('x' * 50)\nsay('end')")
    lines = Lines()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # inherited, but a pipe has no size
    try:
        result = supervise([ranks.child(0, shown=True)], lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert result.exit_code == 0
    assert lines.seen[-1] == "end"
    assert [line for line in lines.seen if line.startswith("warning")] == [
        f"warning: {tmp_path / 'logs' / 'rank0.log'} is not written any further: File too large"
    ]


def test_last_words_prefer_the_error_to_what_comes_after_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: old\nerror: no space left\n  got: 0 bytes\ncleaning up\n")

    assert last_words(log, start=11) == "no space left"
    assert last_words(log, start=log.stat().st_size - 12) == "cleaning up"
    assert last_words(log, start=log.stat().st_size) == ""
