"""Sweeps as a user types them: real trials of the smoke experiment, one killed, one pruned, stopped and resumed."""

import csv
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from cli_fixtures import Ended, trainer, trainer_until

from trainer.compose import compose, config_text
from trainer.markers import read_marker
from trainer.sweeps.folder import SweepFolder

SMOKE = (
    "sweep",
    "+experiment=smoke",
    "sweep=smoke",
    "launch.device=cpu",
    "optim.max_steps=24",
    "task.max_new_tokens=2",
)


def words(folder: Path, *more: str) -> list[str]:
    return [*SMOKE, f"run.cache={folder / 'cache'}", f"sweep.dir={folder / 'sweep'}", *more]


def state_of_trials(folder: SweepFolder) -> list[str]:
    with folder.trials_csv.open(encoding="utf-8", newline="") as table:
        return [line["state"] for line in csv.DictReader(table)]


def drivers(folder: SweepFolder) -> dict[int, int]:
    """Process of each trial that runs, by the trial's number."""
    locks = {int(lock.parent.name): lock for lock in folder.root.glob("trials/*/run.lock")}
    return {number: json.loads(lock.read_text())["pid"] for number, lock in locks.items() if lock.stat().st_size}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """Eight trials by two workers: the first is killed at its first checkpoint, later the sweep is stopped once."""
    home = tmp_path_factory.mktemp("home")
    folder = SweepFolder(home / "sweep")
    killed: list[int] = []
    stopped: list[str] = []

    def act(line: str, process: subprocess.Popen[str]) -> None:
        if line.startswith("trial 0: starts"):
            while not list(folder.run(0).checkpoints.glob("step-*")) and process.poll() is None:
                threading.Event().wait(0.02)
            killed.append(drivers(folder)[0])
            os.kill(killed[0], signal.SIGKILL)
        if line.startswith("trial 3: starts") and not stopped:
            stopped.append(line)
            process.send_signal(signal.SIGTERM)

    asked = words(home, "sweep.trials=8", "sweep.workers=2", "sweep.retries=1")
    first = trainer_until(home, asked, act)
    assert killed
    return home, first, trainer(home, *asked)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_eight_trials_with_one_killed_one_pruned_and_one_stop(searched: tuple[Path, Ended, Ended]) -> None:
    home, first, second = searched
    folder = SweepFolder(home / "sweep")

    assert first.code == 75, first.out
    assert "trial 0: ended by SIGKILL; it is started again (failure 1 of 1)" in first.out
    assert "every trial is where it was, and the same command goes on" in first.out
    assert second.code == 0, second.out + second.err
    states = state_of_trials(folder)
    assert len(states) == 8
    assert set(states) == {"complete", "pruned"}
    assert states[0] == "complete", "the killed one was continued"
    assert [path.name for path in sorted((folder.root / "trials").iterdir())] == [f"{n:04d}" for n in range(8)]


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_preparation_and_baseline_were_done_once(searched: tuple[Path, Ended, Ended]) -> None:
    folder = SweepFolder(searched[0] / "sweep")
    logs = [log.read_text() for log in sorted((folder.root / "logs").iterdir())]

    assert sum("zero_shot: measuring" in log for log in logs) == 1
    assert sum("tokens made:" in log for log in logs) == 1
    assert sum("baseline: from the cache" in log for log in logs) >= 6


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_the_killed_trial_went_on_from_its_checkpoint(searched: tuple[Path, Ended, Ended]) -> None:
    folder = SweepFolder(searched[0] / "sweep")
    log = folder.log(0).read_text()
    assert "continuing after step" in log
    lines = [json.loads(line) for line in folder.run(0).metrics_jsonl.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_the_results_can_be_read_and_the_best_composes(searched: tuple[Path, Ended, Ended]) -> None:
    home, _, second = searched
    folder = SweepFolder(home / "sweep")

    assert f"python -m trainer +experiment=best --config-dir {folder.conf}" in second.out
    page = folder.report_html.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert "cdn.plot.ly" not in page.split("</script>")[-1]
    for picture in (folder.importance_png, folder.parallel_png):
        assert picture.read_bytes().startswith(b"\x89PNG")
    best = compose(["+experiment=best"], config_dir=folder.conf, cwd=home)
    assert (best.run.name, best.export.merged, best.optim.max_steps) == ("best", True, 24)
    with folder.trials_csv.open(encoding="utf-8", newline="") as table:
        rows = [line for line in csv.DictReader(table) if line["state"] == "complete"]
    first = min(rows, key=lambda line: float(line["val_loss"]))
    assert best.optim.lr == float(first["optim.lr"])
    assert best.method.rank == int(first["method.rank"])
    marker = read_marker(folder.run(int(first["trial"])), "train")
    assert marker is not None
    assert marker.summary["best_loss"] == float(first["val_loss"])
    (home / "conf" / "experiment").mkdir(parents=True)
    copied = home / "conf" / "experiment" / "best.yaml"
    copied.write_bytes(folder.best_yaml.read_bytes())
    assert config_text(compose(["+experiment=best"], config_dir=None, cwd=home)) == config_text(best)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_joining_with_other_settings_is_refused(searched: tuple[Path, Ended, Ended]) -> None:
    home = searched[0]
    ended = trainer(home, *words(home, "sweep.trials=8", "optim.clip_norm=0.5"))
    assert ended.code == 2
    assert "this folder holds a sweep with other settings" in ended.err
    assert "optim.clip_norm=0.5" in ended.err


# -- refused before the first trial ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["sweep=smoke", "sweep.trails=3"], ["sweep.trails: unknown key", "did you mean 'trials'?"]),
        (["sweep=smoke", "sweep.trials=0"], ["sweep.trials: does not fit"]),
        (["sweep=smok"], ["unknown sweep", "did you mean 'smoke'?"]),
        ([], ["which sweep?", "sweep=smoke"]),
        (["sweep=mine.yaml"], ["parameters.optim.lrr: unknown key", "did you mean 'lr'?"]),
        (["sweep=other.yaml"], ["metric.name: the run never reports this figure", "did you mean 'val_loss'?"]),
        (["sweep=smoke", "optim.lr=1"], ["optim.lr: is swept, and cannot be fixed as well"]),
        (["sweep=smoke", "sweep.dir=/proc/sweep"], ["the folder of the sweep cannot be written", "/proc/sweep"]),
        (["sweep=smoke", "launch=slurm"], ["a trial is a run on this machine"]),
        (["sweep=smoke", "--cfg", "job"], ["a sweep makes runs of its own"]),
    ],
)
def test_what_is_refused_before_the_first_trial(tmp_path: Path, more: list[str], said: list[str]) -> None:
    text = "method: random\nmetric: {{name: {metric}}}\nparameters: {{{key}: {{values: [0.1, 0.2]}}}}\n"
    text += 'command: [python, -m, trainer, "${{args_no_hyphens}}"]\n'
    (tmp_path / "mine.yaml").write_text(text.format(metric="val_loss", key="optim.lrr"))
    (tmp_path / "other.yaml").write_text(text.format(metric="val_los", key="optim.lr"))

    ended = trainer(tmp_path, "sweep", "+experiment=smoke", *more)

    assert (ended.code, ended.out) == (2, "")
    for part in said:
        assert part in ended.err
    assert "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "other.yaml"]
