"""Ports, GPUs, and the exact words that start ranks."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_fixtures import stand_in

from trainer.paths import RunFolder
from trainer_launch import leash
from trainer_launch.command import accelerate_config, accelerate_line, rank_arguments, rank_environment, torchrun_line
from trainer_launch.devices import count_listed, narrowed, visible_gpus
from trainer_launch.run import free_port, run, write_hand_files
from trainer_launch.spec import LaunchError, LaunchSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"


def spec(**changed: object) -> LaunchSpec:
    given: dict[str, object] = {
        "run_dir": "/runs/my run",
        "arguments": ("/runs/my run", "--stages", "train,export"),
        "processes": 2,
        "threads": 4,
        "python": "/env/bin/python",
    }
    return LaunchSpec(**{**given, **changed})  # type: ignore[arg-type]


TWO_MACHINES = {"nodes": 2, "node_rank": 1, "master_addr": "n1", "master_port": 29500}


# -- the record ----------------------------------------------------------------------------------------------------


def record(this: LaunchSpec, device: str) -> str:
    """All that is made of a spec, as one text."""
    parts = [shlex.join(rank_arguments(this))]
    for local in range(this.processes):
        parts += [f"# local rank {local}", *(f"{k}={v}" for k, v in rank_environment(this, local).items())]
    parts += ["# torchrun", torchrun_line(this), "# accelerate", accelerate_line(this, "/runs/my run/accelerate.yaml")]
    parts += ["# accelerate.yaml", accelerate_config(this, device=device)]  # type: ignore[arg-type]
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("name", "this", "device"),
    [
        ("one_cpu_rank", spec(processes=1), "cpu"),
        ("two_cpu_ranks", spec(master_port=29501), "cpu"),
        ("two_machines_with_gpus", spec(**TWO_MACHINES), "cuda"),
    ],
)
def test_words_are_those_on_record(name: str, this: LaunchSpec, device: str) -> None:
    path = GOLDEN / f"{name}.txt"

    assert record(this, device) == path.read_text(), f"if this is meant, put the new text into {path}"


def test_accelerate_yaml_is_yaml() -> None:
    assert yaml.safe_load(accelerate_config(spec(), device="cpu"))["num_processes"] == 2


def test_the_log_of_a_rank_is_where_the_run_folder_says() -> None:
    assert spec().log(1) == RunFolder(Path("/runs/my run")).rank_log(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"node_rank": 1}, "node_rank must be from 0 to 0, got 1"),
        ({"master_port": 65536}, "master_port must be from 0 to 65535, got 65536"),
        ({"nodes": 2}, "master_port must be given with several machines: all of them need the same one"),
    ],
)
def test_a_spec_that_cannot_be_started_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=f"^{re.escape(message)}$"):
        spec(**changed)


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_lines_for_the_shell_start_both_ranks(tmp_path: Path, launcher: str) -> None:
    # One write for the whole line: both ranks share the pipe, and print() sends text and line end one by one.
    words = "f\"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']}\\n\""
    ranks = stand_in(tmp_path, f"os.write(1, {words}.encode())")
    lines = write_hand_files(ranks.spec(), tmp_path / "launch", device="cpu")
    line = lines[0] if launcher == "torchrun" else lines[1]

    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert {text for text in done.stdout.splitlines() if text.startswith("rank")} == {
        "rank 0 of 2, 1",
        "rank 1 of 2, 1",
    }


# -- ports ---------------------------------------------------------------------------------------------------------


def test_a_free_port_can_be_listened_on() -> None:
    port = free_port("127.0.0.1")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


TAKEN = """
port = os.environ["MASTER_PORT"]
with open(folder / "ports", "a") as ports:
    ports.write(port + "\\n")
if len((folder / "ports").read_text().split()) <= int((folder / "refusals").read_text()):
    sys.exit(f"DistNetworkError: port {port}: EADDRINUSE, address already in use")
"""


@pytest.mark.parametrize(("refusals", "starts", "code"), [(0, 1, 0), (1, 2, 0), (9, 3, 1)])
def test_a_port_that_was_taken_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int, starts: int, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = stand_in(tmp_path, TAKEN)
    (tmp_path / "refusals").write_text(str(refusals))
    lines: list[str] = []

    result = run(ranks.spec(processes=1, port=0), lines.append)

    ports = (tmp_path / "ports").read_text().split()
    said = [line for line in lines if line.startswith("warning")]
    assert (result.exit_code, len(ports)) == (code, starts)
    assert said == [
        f"warning: port {port} was taken meanwhile; starting the ranks again with another one" for port in ports[:-1]
    ]


def test_a_given_port_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = stand_in(tmp_path, TAKEN)
    (tmp_path / "refusals").write_text("9")

    assert run(ranks.spec(processes=1, port=29777), lambda _: None).exit_code == 1
    assert (tmp_path / "ports").read_text().split() == ["29777"]


# -- the leash -----------------------------------------------------------------------------------------------------


def test_a_process_whose_starter_is_gone_does_not_begin(tmp_path: Path) -> None:
    witness = tmp_path / "began"
    command = [sys.executable, "-c", f"open({str(witness)!r}, 'w')"]

    done = subprocess.run([sys.executable, leash.__file__, "1", *command], check=False)

    assert done.returncode == 137
    assert not witness.exists()


# -- GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "visible", "expected"),
    [
        (4, None, 4),
        (4, "", 0),
        (4, "-1", 0),
        (4, "0,2", 2),
        (4, "0, 3", 2),
        (4, "0,9,1", 1),
        (4, "GPU-1a2b,GPU-3c4d", 2),
        (1, "MIG-1,MIG-2", 2),
        (0, "0,1", 0),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(present: int, visible: str | None, expected: int) -> None:
    assert narrowed(present, visible) == expected


LISTED = "GPU 0: NVIDIA H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA H100 (UUID: GPU-c)\n"


def test_gpus_are_counted_and_their_slices_are_not() -> None:
    assert count_listed(LISTED) == 2


@pytest.mark.parametrize(("ending", "expected"), [("exit 0", 1), ("exit 9", 0)])
def test_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, expected: int) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n{ending}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    assert visible_gpus() == expected
