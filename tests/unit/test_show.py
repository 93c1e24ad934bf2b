"""What ``show`` says of a run, and of several, as a user sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from export_fixtures import base_folder, write_run
from look_fixtures import checkpoint

from trainer.__main__ import act
from trainer.config import Config, OptimConfig
from trainer.drive.lock import hold
from trainer.drive.look.terminal import BARS, sparkline
from trainer.errors import RunError, UserError
from trainer.markers import Marker, write_marker
from trainer.paths import CHECKOUT, RunFolder
from trainer.train.checkpoint.format import FORMAT, checkpoint_path


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "a")
    write_run(folder, base_folder(tmp_path / "cache"))
    checkpoint(folder, 2, best=2)
    checkpoint(folder, 4, best=2)
    return folder


def shown(capsys: pytest.CaptureFixture[str], *runs: RunFolder, options: Sequence[str] = ()) -> list[list[str]]:
    assert act(["show", *options, *(str(run.root) for run in runs)], Path.cwd()) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_run_shows_stages_curves_scores_and_checkpoints(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, run)
    assert " ".join(lines[0]).endswith("not running; finished stages: train")
    assert ["train", "0:12", "steps", "2"] in lines
    assert ["export", "-", "not", "done"] in lines
    assert ["loss", "█▁", "2", "->", "1,", "between", "1", "and", "2"] in lines
    assert ["val_loss", "▁", "1.5", "->", "1.5,", "between", "1.5", "and", "1.5"] in lines
    assert ["tokens", "per", "second", "75", "(median", "of", "2", "steps)"] in lines
    assert "exact_match 0.0000 (0.0000 to 0.4899) 0.5000 (0.1500 to 0.8500)" in [" ".join(line) for line in lines]
    found = {line[0]: (line[1], " ".join(line[6:])) for line in lines if line and line[0].startswith("step-")}
    assert found == {
        "step-00000004": ("last", "whole, by sizes, 2 rank(s)"),
        "step-00000002": ("best", "whole, by sizes, 2 rank(s)"),
    }


def test_a_damaged_checkpoint_is_named(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with (checkpoint_path(run.checkpoints, 4) / "rank0.safetensors").open("r+b") as handle:
        handle.write(b"x")
    quick = [" ".join(line) for line in shown(capsys, run)]
    assert not any("DAMAGED" in line for line in quick), "its size has not changed"
    assert any(line.startswith("hashes: python -m trainer show --verify") for line in quick)
    words = [" ".join(line) for line in shown(capsys, run, options=["--verify"])]
    assert any("DAMAGED: rank0.safetensors has other contents than were written" in line for line in words)
    assert any(line.startswith("step-00000002 best") and "whole, hashes checked" in line for line in words)


def test_a_cut_checkpoint_is_seen_at_a_glance(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with (checkpoint_path(run.checkpoints, 4) / "rank0.safetensors").open("r+b") as handle:
        handle.truncate(999)
    words = [" ".join(line) for line in shown(capsys, run)]
    assert any("DAMAGED: rank0.safetensors has 999 of 1000 bytes" in line for line in words)


def test_a_checkpoint_of_another_version_is_not_called_damaged(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint_path(run.checkpoints, 4) / "manifest.json").write_text('{"format": 1, "other": "fields"}')
    words = [" ".join(line) for line in shown(capsys, run)]
    (line,) = [line for line in words if line.startswith("step-00000004")]
    assert line.endswith(f"of format 1, and this version reads {FORMAT}")
    assert not any("DAMAGED" in line for line in words)


def test_options_of_show_belong_to_show(run: RunFolder) -> None:
    with pytest.raises(UserError, match="--verify belongs to show"):
        act(["train", "--verify", str(run.root)], Path.cwd())
    with pytest.raises(UserError, match="--html FILE belongs to show"):
        act(["train", "--html", "x.html", str(run.root)], Path.cwd())


def test_a_run_that_is_being_worked_on_says_by_whom(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(run.lock, "train"):
        first = " ".join(shown(capsys, run)[0])
    assert f"running: 'train' of process {os.getpid()} on " in first
    assert "running:" not in " ".join(shown(capsys, run)[0]).replace("not running", "")


def test_several_runs_are_compared(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunFolder(tmp_path / "b")
    write_run(other, tmp_path / "cache", Config(optim=OptimConfig(lr=3e-4)))
    tuned = json.loads((other.evaluation / "tuned.json").read_text())
    tuned["metrics"]["exact_match"] = 0.75
    (other.evaluation / "tuned.json").write_text(json.dumps(tuned))
    other.metrics_jsonl.unlink()
    lines = shown(capsys, run, other)
    assert ["optim.lr", str(Config().optim.lr), "0.0003"] in lines
    assert not [line for line in lines if line[:1] == ["optim.epochs"]]
    assert ["lowest", "validation", "loss", "1.5000", "-"] in lines
    assert "test exact_match 0.5000 (0.1500 to 0.8500) 0.7500 (0.3006 to 0.9544)" in [" ".join(line) for line in lines]
    assert ["time", "of", "all", "stages", "0:12", "0:12"] in lines


def test_two_runs_that_are_alike_say_so(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, run, run).count(["nothing", "differs"]) == 2


def test_a_run_that_has_only_begun(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.metrics_jsonl.write_text(run.metrics_jsonl.read_text().splitlines()[0] + '\n{"step": 2, "lo')
    (run.stages / "train.json").unlink()
    lines = shown(capsys, run)
    assert " ".join(lines[0]).endswith("not running; finished stages: none, 1 steps trained")
    assert ["train", "-", "not", "done"] in lines


def test_a_record_that_is_no_record_is_refused(run: RunFolder) -> None:
    run.metrics_jsonl.write_text("not json\n")
    with pytest.raises(RunError, match="the record of this run has a line that is not a step"):
        act(["show", str(run.root)], Path.cwd())


@pytest.mark.parametrize(
    "words", [["show"], ["show", "RUN", "optim.lr=1"], ["show", "RUN", "-m"], ["show", "RUN", "--cfg", "job"]]
)
def test_show_wants_runs_and_nothing_else(run: RunFolder, words: list[str]) -> None:
    with pytest.raises(UserError, match="show looks at runs as they are") as fault:
        act([str(run.root) if word == "RUN" else word for word in words], Path.cwd())
    assert fault.value.exit_code == 2


def test_curves_have_the_shape_of_their_figures() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == BARS[0] + BARS[4] + BARS[7]
    assert sparkline([5.0, 5.0]) == BARS[0] * 2
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == BARS[0] * 2 + BARS[7] * 2


def test_looking_needs_no_torch(run: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.__main__ import act;"
        f"act(['show', {str(run.root)!r}], Path.cwd());"
        "sys.exit(' '.join({'torch', 'numpy', 'numba'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_other_validation_figures_are_curves_too(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    for step, record in enumerate(records):
        record |= {
            "val_accuracy": 0.25 + step / 2,
            "seconds": {"data": 0.5, "forward_backward": 1.5},
            "grad_norm": "nan",
        }
    run.metrics_jsonl.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = shown(capsys, run)
    assert ["val_accuracy", "▁█", "0.25", "->", "0.75,", "between", "0.25", "and", "0.75"] in lines
    assert " ".join(["time of a step", "2 s on average: data 25.0 %, forward_backward 75.0 %"]) in [
        " ".join(x) for x in lines
    ]
    assert not [line for line in lines if line[:1] == ["grad_norm"]]


def test_finished_runs_are_done(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_marker(run, Marker(stage="card", inputs="c", seconds=3.0, finished="2026-01-01T00:00:00+00:00"))
    run.done.write_text("0123456789\n")
    lines = shown(capsys, run)
    assert lines[0][-1] == "done"
    assert ["together", "0:15"] in lines
