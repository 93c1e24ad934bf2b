"""The command line: words sorted into verb, run folders, overrides and options."""

import signal
from pathlib import Path

import pytest

from trainer import __main__ as command_line
from trainer import __version__
from trainer.__main__ import act, sort_words
from trainer.drive.run import VERBS
from trainer.errors import ConfigError, RunError, UserError


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "a=1" / "0123456789"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    return str(folder.relative_to(tmp_path))


def test_no_verb_means_run() -> None:
    words = sort_words(["+experiment=smoke", "~model.revision", "optim.lr=1e-4"])

    assert (words.verb, words.runs) == ("run", ())
    assert words.overrides == ("+experiment=smoke", "~model.revision", "optim.lr=1e-4")


def test_words_may_stand_in_any_order(run_folder: str) -> None:
    words = sort_words(["--cfg", "job", "export.merged=false", "export", "--config-dir=conf2", run_folder, "-m"])

    assert (words.verb, words.runs, words.overrides) == ("export", (Path(run_folder),), ("export.merged=false",))
    assert (words.show_config, words.config_dir, words.multirun) == (True, Path("conf2"), True)


def test_a_run_folder_alone_is_continued(run_folder: str) -> None:
    words = sort_words([run_folder])

    assert (words.verb, words.runs, words.overrides) == ("run", (Path(run_folder),), ())


def test_an_unknown_verb_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown verb") as caught:
        sort_words(["trian", "+experiment=smoke"])

    problem = caught.value.problems[0]
    assert (problem.got, problem.do) == ("trian", "did you mean 'train'?")
    assert problem.allowed.startswith(
        "run, plan, prepare, train, evaluate, export, verify, show, sweep, agent, sync, help;"
    )


@pytest.mark.parametrize("words", [["--cfg", "job", "agent", "me/p/sw1"], ["tracking=wandb", "agent", "me/p/sw1"]])
def test_an_agent_that_does_not_stand_first_is_told_to(words: list[str]) -> None:
    with pytest.raises(UserError, match="agent stands first and takes one sweep") as caught:
        sort_words(words)
    assert caught.value.problems[0].do == "python -m trainer agent ENTITY/PROJECT/ID"


@pytest.mark.parametrize("words", [["agent", "--help"], ["agent", "me/p/sw1", "-h"]])
def test_help_of_the_agent_starts_none(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "do_agent", lambda *_: pytest.fail("an agent was started"))
    assert act(words, tmp_path) == 0
    assert "agent      one trial of a W&B sweep" in capsys.readouterr().out


def test_an_experiment_without_its_key_is_explained() -> None:
    with pytest.raises(UserError, match="unknown verb") as caught:
        sort_words(["legal_lora"])

    assert caught.value.problems[0].do.endswith("for example +experiment=legal_lora")


@pytest.mark.parametrize("words", [["train", "nowhere"], ["outputs"]])
def test_a_folder_without_a_run_is_named(run_folder: str, words: list[str]) -> None:
    with pytest.raises(UserError, match="not a run folder") as caught:
        sort_words(words)

    assert caught.value.problems[0].got == words[-1]


@pytest.mark.parametrize("option", ["--confdir", "--config", "--cfg=all", "--config-dir"])
def test_a_wrong_option_is_reported_like_everything_else(option: str) -> None:
    with pytest.raises(UserError, match=option.partition("=")[0]) as caught:
        sort_words([option])

    assert caught.value.problems[0].do == "python -m trainer --help"


def test_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert act(["--version"], tmp_path) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"]])
def test_help_names_verbs_groups_experiments_and_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert act(words, tmp_path) == 0

    printed = capsys.readouterr().out
    for expected in (*VERBS, "legal_lora", "optim.lr", "--config-dir DIR", "method     full, lora"):
        assert expected in printed


def test_cfg_job_prints_the_config_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert act(["+experiment=smoke", "optim.lr=0.125", "--cfg", "job"], tmp_path) == 0

    assert "  lr: 0.125\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_config_folder_of_ones_own_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nrun:\n  seed: 77\n")

    assert act(["+experiment=mine", "--config-dir", str(tmp_path / "own"), "--cfg", "job"], tmp_path) == 0

    assert "  seed: 77\n" in capsys.readouterr().out


def test_several_runs_are_composed_before_the_first_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        act(["-m", "+experiment=smoke", "run.seed=1,oops"], tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_several_runs_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert act(["-m", "+experiment=smoke", "run.seed=1,2", "--cfg", "job"], tmp_path) == 0

    printed = capsys.readouterr().out
    assert "[1 of 2] +experiment=smoke run.seed=1\n" in printed
    assert "[2 of 2] +experiment=smoke run.seed=2\n" in printed
    assert "  seed: 2\n" in printed


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def pretend(verb: str, config: object, **_: object) -> int:
        done.append(config.run.seed)  # type: ignore[attr-defined]
        if done == [1]:
            raise RunError("this run folder is in use")
        return 1 if done == [1, 2] else 0

    monkeypatch.setattr(command_line, "do_new", pretend)

    assert act(["plan", "-m", "+experiment=smoke", "run.seed=1,2,3"], tmp_path) == 2
    assert done == [1, 2, 3]
    captured = capsys.readouterr()
    assert "this run folder is in use" in captured.err
    rows = [line.split() for line in captured.out.splitlines() if line.strip().startswith("run.seed=")]
    assert [row[:2] for row in rows] == [["run.seed=1", "2"], ["run.seed=2", "1"], ["run.seed=3", "done"]]
    assert f"{tmp_path}/outputs/smoke/" in captured.out


def test_a_grid_of_runs_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str, bool]] = []

    def pretend(words: list[str], *, config_dir: Path | None, cwd: Path, typed: str, multirun: bool) -> int:
        asked.append((list(words), typed, multirun))
        return 75

    monkeypatch.setattr(command_line, "do_sweep", pretend)

    assert act(["-m", "+experiment=smoke", "run.seed=1,2"], tmp_path) == 75
    assert asked == [
        (["+experiment=smoke", "run.seed=1,2"], "python -m trainer -m +experiment=smoke run.seed=1,2", True)
    ]


def test_a_run_that_is_stopped_ends_the_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int, str]] = []

    def pretend(verb: str, config: object, *, cwd: Path, command: str, words: list[str], node_rank: int | None) -> int:
        done.append((verb, config.run.seed, command))  # type: ignore[attr-defined]
        assert (words, node_rank) == (["train", "+experiment=smoke", "run.seed=1"], 1)  # one run of the series
        return 75

    monkeypatch.setattr(command_line, "do_new", pretend)

    assert act(["train", "-m", "+experiment=smoke", "run.seed=1,2", "--node-rank", "1"], tmp_path) == 75
    assert done == [("train", 1, "python -m trainer train -m +experiment=smoke run.seed=1,2 --node-rank 1")]


def test_several_run_folders_one_after_the_other(
    run_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "plan.json").write_text("{}")
    done: list[tuple[str, str, tuple[str, ...], str]] = []

    def pretend(verb: str, run: Path, overrides: tuple[str, ...], **given: object) -> int:
        done.append((verb, str(run), overrides, str(given["command"])))
        return 0

    monkeypatch.setattr(command_line, "do_existing", pretend)

    assert act(["evaluate", run_folder, "other", "task.max_new_tokens=9"], tmp_path) == 0
    assert done == [
        ("evaluate", run, ("task.max_new_tokens=9",), f"python -m trainer evaluate {run} task.max_new_tokens=9")
        for run in (run_folder, "other")
    ]


def test_multirun_is_for_new_runs(run_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="-m makes new runs"):
        act(["-m", run_folder], tmp_path)


def test_a_damaged_plan_is_named(run_folder: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the plan cannot be read"):
        act(["train", run_folder], tmp_path)


def test_a_signal_between_the_processes_is_a_stop_in_good_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal came first")

    monkeypatch.setattr(command_line, "act", interrupted)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert ended.value.code == 75
    assert capsys.readouterr().out == "stopped; nothing was being computed, and the same command continues\n"
