"""A whole run with sharded weights, killed on the way, and what it leaves beside what one process makes of it."""

import signal
import subprocess
from pathlib import Path

import pytest
from cli_fixtures import trainer, trainer_until
from launch_fixtures import Gone
from layout_fixtures import ALONE, METHODS, SMOKE, STEPS, again, answers, assert_equal, evaluation, steps, tensors

from trainer.paths import RunFolder

SHARDED = ["parallel=fsdp", "launch.processes=2"]
LAYER_BY_LAYER = [*SHARDED, "parallel.gather_for_generation=false"]


@pytest.mark.campaign
def test_a_killed_run_goes_on_and_exports_what_one_process_exports(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = [*SMOKE, *SHARDED]
    ranks: list[Gone] = []

    def kill(line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("step 8:"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks.extend(Gone(int(pid)) for pid in children)
            process.kill()

    killed = trainer_until(tmp_path, words, kill)
    assert killed.code == -signal.SIGKILL, killed.out
    assert ranks
    assert all(rank.wait() for rank in ranks)
    assert 4 <= len(steps(folder)) < STEPS
    ended = trainer(tmp_path, *words)
    assert ended.code == 0, ended.out + ended.err
    assert any(line.startswith("continuing after step") for line in ended.words())
    assert folder.done.exists()
    assert steps(folder) == list(range(1, STEPS + 1))

    exported, measured, answered = tensors(folder), evaluation(folder), answers(folder)
    assert any(name.startswith("adapter/") for name in exported)
    assert any(name.startswith("merged/") for name in exported)
    for layout in (ALONE, LAYER_BY_LAYER):
        again(tmp_path, folder, [*layout])
        assert_equal(tensors(folder), exported)
        assert answers(folder) == answered
        assert evaluation(folder)["metrics"] == measured["metrics"]
        assert evaluation(folder)["loss"] == pytest.approx(measured["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_fully_tuned_model_is_put_together_as_one_process_has_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    ended = trainer(tmp_path, *SMOKE, *SHARDED, *METHODS["full"], "optim.max_steps=4")
    assert ended.code == 0, ended.out + ended.err
    exported, answered = tensors(folder), answers(folder)
    again(tmp_path, folder, [*ALONE, *METHODS["full"], "optim.max_steps=4"])
    assert_equal(tensors(folder), exported)
    assert answers(folder) == answered


def test_the_plan_says_what_a_rank_holds(tmp_path: Path) -> None:
    ended = trainer(tmp_path, "plan", *SMOKE, *SHARDED)
    assert ended.code == 0, ended.out + ended.err
    text = " ".join(ended.out.split())
    assert "2 x cpu, 1 threads each, fsdp" in text
    assert "the whole model before it is cut" not in text
    assert "generating answers" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel=fsdp"], "fsdp with 1 rank"),
        ([*SHARDED, "model.dtype=float16"], "float16 with parallel=fsdp"),
        (["parallel=ddp", "launch.processes=2", "parallel.reshard_after_forward=false"], "parallel=fsdp, or remove it"),
    ],
)
def test_layouts_that_fsdp_cannot_have(tmp_path: Path, words: list[str], told: str) -> None:
    ended = trainer(tmp_path, "plan", *SMOKE, *words)
    assert ended.code == 2
    assert told in ended.err
