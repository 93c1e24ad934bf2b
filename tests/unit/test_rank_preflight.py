"""What ranks check before anything is loaded: who is missing, whether sums are right, whether all run one code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainer.distributed import preflight
from trainer.distributed.preflight import MeetingPoint, check_sum, meet, meeting_point, require_same_code
from trainer.errors import RunError, TrainingFault
from trainer.fingerprint import code_digest
from trainer_launch.run import free_port

HERE = "127.0.0.1"


def test_the_launchers_meeting_point_is_read() -> None:
    ours = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    assert meeting_point(ours) == MeetingPoint(host="n0", port=29500, prefix="trimtab")
    torchruns = {**ours, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert meeting_point(torchruns) == MeetingPoint(host="n0", port=29500, kept=True, prefix="trimtab/2")


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "n0"}, {"MASTER_ADDR": "n0", "MASTER_PORT": "x"}])
def test_no_meeting_point_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(RunError, match="the launcher's variables are incomplete"):
        meeting_point(given)


def test_ranks_that_are_missing_are_named() -> None:
    point = MeetingPoint(host=HERE, port=free_port(HERE))
    with pytest.raises(RunError, match="not all ranks are here after 0 s") as caught:
        meet(point, 0, 4, seconds=0.2)
    assert caught.value.problems[0].got == "missing: rank 1, 2, 3 of 4"


def test_rank_0_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match="rank 1 does not reach rank 0"):
        meet(MeetingPoint(host=HERE, port=free_port(HERE)), 1, 2, seconds=0.2)


def test_a_port_in_use_is_named() -> None:
    point = MeetingPoint(host=HERE, port=free_port(HERE))
    held = dist.TCPStore(HERE, point.port, 1, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(RunError, match="rank 0 cannot listen") as caught:
        meet(point, 0, 2, seconds=0.2)
    assert "EADDRINUSE" in caught.value.problems[0].got  # what makes the agent try another port
    del held


def test_sums_are_compared_with_what_they_have_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_sum(0, 1, None)
        monkeypatch.setattr(dist, "all_reduce", lambda values: values[7:9].add_(1))
        with pytest.raises(TrainingFault, match="the ranks do not add up right") as caught:
            check_sum(0, 1, None)
    finally:
        dist.destroy_process_group()
    assert caught.value.problems[0].got == "2 of 1024 sums over 1 ranks are wrong on rank 0"


def test_a_rank_with_other_code_is_named() -> None:
    same = ("a", "0" * 64, torch.__version__)
    require_same_code([same, ("b", "0" * 64, torch.__version__)])
    with pytest.raises(RunError, match="the ranks do not run the same code") as caught:
        require_same_code([same, same, ("b", "1" * 64, torch.__version__), ("c", "0" * 64, "2.0")])
    got = caught.value.problems[0].got
    assert got.endswith("; rank 2 on b has other code; rank 3 on c has torch 2.0")


def test_the_digest_of_the_code_is_of_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest()
    assert re.fullmatch("[0-9a-f]{64}", before)
    monkeypatch.setattr("trainer.fingerprint.file_digest", lambda path: path.name)
    assert code_digest() != before


def test_ranks_that_hang_leave(tmp_path: Path) -> None:
    script = (
        "import signal\nfrom trainer.distributed.preflight import no_longer_than\n"
        "with no_longer_than(0.1, 3): signal.pause()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert "rank 3: the ranks have met, but could not compute together within 0 s" in done.stderr


def test_what_is_fast_enough_stays() -> None:
    with preflight.no_longer_than(60, 0):
        pass
