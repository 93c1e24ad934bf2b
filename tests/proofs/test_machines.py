"""Runs on two machines that are loopback addresses of this one: the course of one machine, faults, signals, real sshd.

A short one is in tests/cli/test_two_machines.py.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
from cli_fixtures import ENVIRONMENT, Ended, trainer, trainer_until
from layout_fixtures import SMOKE
from machines_fixtures import stand_in_ssh

from trainer.paths import RunFolder
from trainer_launch.run import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HERE = "127.0.0.1"
SHORT = ["+experiment=smoke", "launch.device=cpu", "launch.threads=1", "model.dtype=float32", "run.cache=cache"]
LONG = [*SMOKE, "optim.max_steps=4000", "eval.every=2000", "eval.generate_rows=0"]


def two_machines() -> list[str]:
    address = f"launch.address={HERE}:{free_port(HERE)}"
    return ["launch=torchrun", "launch.nodes=2", address, "launch.processes=1", "launch.meet_seconds=120"]


def beside(cwd: Path, words: list[str], act: Callable[[str, subprocess.Popen[str]], None]) -> tuple[Ended, Ended]:
    """Both machines; ``act`` is called for every line of node 0, with the process of node 1."""
    started: list[Ended] = []
    with subprocess.Popen(
        [sys.executable, "-m", "trainer", *words, "--node-rank", "1"],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as other:

        def collect() -> None:
            assert other.stdout is not None
            text = other.stdout.read()
            started.append(Ended(other.wait(), text, ""))

        reader = Thread(target=collect)
        reader.start()
        ended = trainer_until(cwd, [*words, "--node-rank", "0"], lambda line, _: act(line, other))
        reader.join()
    return ended, started[0]


def nothing(_line: str, _process: subprocess.Popen[str]) -> None:
    return


def figures(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_two_machines_take_the_course_of_one_with_two_ranks(tmp_path: Path) -> None:
    one = trainer(tmp_path, *SHORT, "launch.processes=2", "run.dir=one")
    assert one.code == 0, one.out + one.err
    first, second = beside(tmp_path, [*SHORT, *two_machines(), "run.dir=two"], nothing)
    assert (first.code, second.code) == (0, 0), first.out + second.out
    assert len(figures(tmp_path / "one")) == 8
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    assert (tmp_path / "two" / "DONE").exists()
    first, second = beside(tmp_path, [*SHORT, *two_machines(), "run.dir=two"], nothing)
    assert (first.code, second.code) == (0, 0)
    assert "everything was done before" in first.out
    assert "nothing is left to do for node 1" in second.out


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_agent_ends_the_other_machine_with_the_cause(tmp_path: Path, which: int) -> None:
    words = [*LONG, *two_machines()]
    done: list[str] = []

    def kill(line: str, other: subprocess.Popen[str]) -> None:
        if line.startswith("train ") and not done:
            done.append(line)
            if which == 1:
                other.kill()

    if which == 1:
        first, second = beside(tmp_path, words, kill)
        assert (first.code, second.code) == (75, -signal.SIGKILL), first.out + second.out
        survivor, name = first, "node 1 ("
    else:
        with ExitStack() as stack:
            first = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "trainer", *words, "--node-rank", "0"],
                    cwd=tmp_path,
                    env=ENVIRONMENT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            follower = Thread(
                target=lambda: done.append(
                    trainer(tmp_path, *words, "--node-rank", "1").err  # ends by itself once node 0 is gone
                )
            )
            follower.start()
            assert first.stdout is not None
            for line in first.stdout:
                if line.startswith("train "):
                    first.kill()
            follower.join()
        survivor, name = Ended(75, "", done[-1]), f"node 0 ({HERE})"
    (cause,) = [line for line in (survivor.out + survivor.err).splitlines() if line.startswith("error: ")]
    assert cause.startswith(f"error: {name}")
    assert "its agent was killed, or the machine is lost (the connection " in cause


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_rank_is_named_on_both_machines(tmp_path: Path, which: int) -> None:
    """``which``: the rank, which is the only one of its machine; its agent's only child."""
    words = [*LONG, *two_machines()]
    done: list[str] = []

    def kill(line: str, other: subprocess.Popen[str]) -> None:
        if line.startswith("train ") and not done:
            done.append(line)
            for process in Path("/proc").glob("[0-9]*"):
                told = (process / "environ").read_bytes() if _readable(process / "environ") else b""
                command = (process / "cmdline").read_bytes() if _readable(process / "cmdline") else b""
                if f"RANK={which}".encode() in told.split(b"\0") and str(tmp_path).encode() in command:
                    signal.pidfd_send_signal(_open(process), signal.SIGKILL)

    first, second = beside(tmp_path, words, kill)
    assert (first.code, second.code) == (75, 75), first.out + second.out
    log = RunFolder(tmp_path / "run").rank_log(which)
    for ended in (first, second):
        (cause,) = [line for line in ended.out.splitlines() if line.startswith("error: ")]
        assert cause.startswith(f"error: node {which} (")
        assert f"rank {which} was ended by SIGKILL" in cause
        assert str(log) in cause


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def _open(process: Path) -> int:
    import os

    return os.pidfd_open(int(process.name))


def test_ctrl_c_saves_on_both_and_the_same_command_goes_on(tmp_path: Path) -> None:
    ssh = ["launch.hosts=[127.0.0.1,127.0.0.2]", f"launch.ssh=[{stand_in_ssh(tmp_path)}]"]
    words = ["train", *LONG, *two_machines()[2:], "launch=torchrun", *ssh]
    asked: list[str] = []

    def interrupt(line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("[127.0.0.1] train ") and not asked:
            asked.append(line)
            process.send_signal(signal.SIGINT)

    stopped = trainer_until(tmp_path, words, interrupt)
    assert stopped.code == 75, stopped.out
    assert "Nothing is lost; to continue, type:" in stopped.out
    reached = len(figures(tmp_path / "run"))
    assert 0 < reached < 4000
    asked.clear()
    again = trainer_until(tmp_path, words, interrupt)
    assert again.code == 75, again.out
    assert len(figures(tmp_path / "run")) > reached
    assert any("continuing after step" in line for line in again.words()), again.out


def test_two_machines_with_other_settings_do_not_begin(tmp_path: Path) -> None:
    words = [*SHORT, *two_machines(), "run.dir=run"]
    started: list[Ended] = []
    thread = Thread(target=lambda: started.append(trainer(tmp_path, *words, "optim.lr=0.5", "--node-rank", "1")))
    thread.start()
    first = trainer(tmp_path, *words, "--node-rank", "0")
    thread.join()
    assert (first.code, started[0].code) == (2, 2)
    for ended in (first, started[0]):
        assert "optim.lr is 0.5 there and 0.003 on node 0" in ended.err
    assert not (tmp_path / "run" / "prepared.json").exists()


@pytest.mark.skipif(shutil.which("sshd") is None, reason="openssh-server is not installed (apt install openssh-server)")
@pytest.mark.skipif(not Path("/run/sshd").is_dir(), reason="sshd has no folder to drop its rights in (mkdir /run/sshd)")
def test_real_ssh(tmp_path: Path) -> None:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "user.pub").read_text())
    port = free_port(HERE)
    daemon = [str(shutil.which("sshd")), "-D", "-e", "-p", str(port), "-h", str(tmp_path / "host"), "-f", "/dev/null"]
    options = [f"AuthorizedKeysFile={tmp_path / 'authorized'}", "StrictModes=no", "PidFile=none", "UsePAM=no"]
    daemon += [word for option in options for word in ("-o", option)]
    client = ["ssh", "-p", str(port), "-i", str(tmp_path / "user"), "-F", "/dev/null"]
    client += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    words = ["launch=torchrun", "launch.hosts=[127.0.0.1,127.0.0.2]", f"launch.ssh={json.dumps(client)}"]
    with subprocess.Popen(daemon, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert "listening" in server.stderr.readline()
            ended = trainer(tmp_path, "train", *SHORT, *words, *two_machines()[2:], "run.dir=run")
        finally:
            server.terminate()
    assert ended.code == 0, ended.out + ended.err
    assert len(figures(tmp_path / "run")) == 8
