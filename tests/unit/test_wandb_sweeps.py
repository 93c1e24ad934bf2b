"""Sweeps that W&B drives: what an agent types reaches the config, and the real client registers what is shipped."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_server import WandbServer

from trainer.compose import compose
from trainer.errors import ConfigError, Problem, RunError
from trainer.paths import shipped_conf
from trainer.sweeps.array import words_in_a_task
from trainer.sweeps.distributions import read_parameter
from trainer.sweeps.registration import (
    Registered,
    command_words,
    next_lines,
    number_of_trials,
    reason,
    register,
    registered_text,
    require_wandb_can,
)
from trainer.sweeps.space import parse_sweep
from trainer.sweeps.with_wandb import start_with_wandb
from trainer.sweeps.words import read_words
from trainer.tracking.figures import as_in_sweep_files, row_of

SHIPPED = sorted((shipped_conf() / "sweep").glob("*.yaml"))
SIGNS = "ab1.,=[]{}'\"\\$() :@/-#~+%\t"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A server, for clients that know no other: neither a key nor an address from this machine."""
    with WandbServer() as running:
        for name, value in {**running.environment, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        yield running


# -- values --------------------------------------------------------------------------------------------------------


def typed(name: str, value: object) -> str:
    """What an agent types for a parameter, in the words of its own code."""
    (word,) = create_sweep_command_args({"args": {name: {"value": value}}})["args_no_hyphens"]
    return word


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.tuples(st.just("model.revision"), st.text(alphabet=SIGNS, min_size=1, max_size=8)),
        st.tuples(
            st.just("model.revision"), st.sampled_from(["None", "null", "true", "1e-4", "007", "nan", "~", "!x"])
        ),
        st.tuples(st.just("optim.lr"), st.floats(min_value=1e-12, max_value=1.0, exclude_min=True)),
        st.tuples(st.just("method.rank"), st.integers(min_value=1, max_value=512)),
        st.tuples(st.just("checkpoint.asynchronous"), st.booleans()),
        st.tuples(
            st.just("method.targets"),
            st.lists(st.text(alphabet="abq_,=' ", min_size=1, max_size=5), min_size=1, max_size=3),
        ),
    )
)
def test_a_value_arrives_as_it_is_or_is_refused_by_name(tmp_path: Path, entry: tuple[str, object]) -> None:
    """Nothing in between: a trial never runs with something else than W&B's page says."""
    name, value = entry
    found: list[Problem] = []
    parameter = read_parameter(name, {"value": value}, f"sweep: parameters.{name}", found)
    assert (parameter is None) == bool(found)
    if parameter is None:
        assert name in found[0].where
        return
    assert parameter.override(value) == typed(name, value)
    try:
        config = compose(["+experiment=smoke", typed(name, value)], config_dir=None, cwd=tmp_path)
    except ConfigError:  # before the first trial as well: the check composes every value
        return
    section, key = name.split(".")
    got = {"model": config.model, "optim": config.optim, "method": config.method, "checkpoint": config.checkpoint}
    assert getattr(got[section], key) == _meant(value)


def _meant(value: object) -> object:
    """A text in quotes of Hydra's stands for what is in them; around it, spaces are nothing."""
    if isinstance(value, str):
        text = value.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            return text[1:-1].replace("\\" + text[0], text[0])
        return text
    return value


# -- what is registered --------------------------------------------------------------------------------------------


def test_the_command_line_becomes_part_of_the_sweep() -> None:
    path = shipped_conf() / "sweep" / "smoke.yaml"
    space = parse_sweep(path, Path.cwd())
    words = command_words(space, ["+experiment=smoke", "optim.max_steps=4", "launch.processes=2"])
    assert words == [
        *("${env}", "python", "-m", "trainer", "+experiment=smoke", "export=none"),
        *("optim.max_steps=4", "launch.processes=2", "tracking=wandb", "${args_no_hyphens}"),
    ]
    assert command_words(space, ["tracking=[wandb,tensorboard]"])[-2:] == [
        "tracking=[wandb,tensorboard]",
        "${args_no_hyphens}",
    ]
    body = yaml.safe_load(path.read_text())
    made = yaml.safe_load(registered_text(body, space, ["optim.max_steps=4"], 5))
    assert (made["run_cap"], made["name"], made["metric"]) == (5, "smoke", {"name": "val_loss", "goal": "minimize"})
    assert made["parameters"] == body["parameters"]


def test_how_many_trials_there_are() -> None:
    random, grid = (
        parse_sweep(shipped_conf() / "sweep" / f"legal_lora{kind}.yaml", Path.cwd()) for kind in ("", "_grid")
    )
    assert [number_of_trials(random, None), number_of_trials(random, 6)] == [40, 6]
    assert [number_of_trials(grid, None), number_of_trials(grid, 6), number_of_trials(grid, 99)] == [12, 6, 12]
    assert number_of_trials(replace(random, run_cap=None), None) is None


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("run.dir=here", "would be the same for all trials"),
        ("run.name=mine", "would be the same for all trials"),
        ("tracking=none", "would tell W&B nothing"),
    ],
)
def test_what_trials_cannot_share(word: str, what: str) -> None:
    space = parse_sweep(shipped_conf() / "sweep" / "smoke.yaml", Path.cwd())
    with pytest.raises(ConfigError, match=what):
        require_wandb_can(space, ["+experiment=smoke", word])
    require_wandb_can(space, ["+experiment=smoke", "run.root=/scratch/me"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_real_client_takes_what_is_shipped(server: WandbServer, tmp_path: Path, path: Path) -> None:
    words = [sys.executable, "-m", "wandb", "sweep", "--project", "demo", str(path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (sweep,) = server.sweeps.values()
    assert sweep.config == yaml.safe_load(path.read_text())
    assert "tracking=wandb" in sweep.config["command"]
    assert f"demo/{sweep.name}" in done.stderr
    assert server.unknown == []


def test_a_sweep_is_registered_and_kept(server: WandbServer, tmp_path: Path) -> None:
    body = yaml.safe_load((shipped_conf() / "sweep" / "smoke.yaml").read_text())
    made = register(yaml.safe_dump(body), tmp_path / "kept", entity="loopback", project="demo")
    (sweep,) = server.sweeps.values()
    assert made.sweep == f"loopback/demo/{sweep.name}"
    assert made.page == f"{server.url}/loopback/demo/sweeps/{sweep.name}"
    assert yaml.safe_load((tmp_path / "kept" / f"{sweep.name}.yaml").read_text()) == body
    lines = dict(next_lines(made, 6))
    assert lines["here"] == f"wandb agent loopback/demo/{sweep.name}"
    assert lines["Slurm"] == f"sbatch --array=1-6%4 slurm/sweep.sbatch loopback/demo/{sweep.name}"


def test_no_key_and_a_key_that_is_refused(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refuses = True
    with pytest.raises(RunError) as refused:
        register("method: grid", tmp_path, entity=None, project="demo")
    assert "user is not logged in" in str(refused.value)
    assert server.environment["WANDB_API_KEY"] not in str(refused.value)
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(RunError) as refused:
        register("method: grid", tmp_path, entity=None, project="demo")
    assert refused.value.exit_code == 2
    assert "No API key configured" in refused.value.problems[0].got
    assert "wandb login" in refused.value.problems[0].do


def test_the_reason_is_the_line_that_says_it() -> None:
    said = "wandb: Creating\nwandb: ERROR Find detailed error logs at: /x\nError: Sweep a/b/c not found\n"
    assert reason(said) == "Error: Sweep a/b/c not found"
    assert reason("\n") == "no words"
    assert Registered("me/demo/sw1", "").id == "sw1"


# -- the verb ------------------------------------------------------------------------------------------------------

SLURM = ("launch=slurm", "launch.gres=gpu:2", "launch.time=4:00:00", "launch.prolog=['module load cuda']")


def sweep(cwd: Path, *words: str) -> int:
    asked = read_words(["+experiment=smoke", "sweep.engine=wandb", *words])
    return start_with_wandb(asked, config_dir=None, cwd=cwd)


def file(cwd: Path, **changed: object) -> str:
    """The shipped space, changed, as a file of ``cwd``."""
    body = yaml.safe_load((shipped_conf() / "sweep" / "smoke.yaml").read_text())
    (cwd / "mine.yaml").write_text(yaml.safe_dump({**body, **changed}))
    return "sweep=mine.yaml"


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        ({"parameters": {"optim.lrr": {"values": [1.0]}}}, (), "did you mean 'lr'?"),
        ({"parameters": {"run.time_limit": {"values": [None, 1]}}}, (), "null cannot be swept"),
        ({"metric": {"name": "val_acuracy"}}, (), "the run never reports this figure"),
        ({}, ("optim.lrr=1",), "command line: optim.lrr: unknown key"),
        ({}, ("sweep.pruner=median",), "sweep.pruner: has no effect with sweep.engine=wandb"),
        ({}, ("tracking.wandb_mode=offline",), "a sweep of W&B needs its server"),
        ({}, ("run.dir=here",), "would be the same for all trials"),
        ({}, (*SLURM, "launch.nodes=2"), "a trial of an array is on one machine"),
        ({}, (*SLURM, "launch.container=[apptainer]"), "has no effect on the tasks of a sweep"),
        ({"run_cap": None}, SLURM, "an array has a number of tasks"),
    ],
)
def test_nothing_is_registered_that_would_fail(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object],
    words: tuple[str, ...],
    said: str,
) -> None:
    sbatch(tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as refused:
        sweep(tmp_path, file(tmp_path, **changed), *words)
    assert said in str(refused.value)
    assert server.requests == []


def test_what_is_wrong_with_file_and_command_line_is_said_at_once(server: WandbServer, tmp_path: Path) -> None:
    changed = {"methd": "grid", "parameters": {"optim.lrr": {"values": [1.0]}}}
    with pytest.raises(ConfigError) as refused:
        sweep(tmp_path, file(tmp_path, **changed), "eval.evry=2")
    wheres = [problem.where for problem in refused.value.problems]
    assert wheres == ["mine.yaml: methd", "command line: eval.evry", "mine.yaml: parameters.optim.lrr"]


def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that takes everything."""
    tool = tmp_path / "bin" / "sbatch"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 4711\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")


def test_an_array_of_trials_is_submitted(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(tmp_path, monkeypatch)
    assert sweep(tmp_path, "sweep=smoke", "sweep.trials=6", "sweep.workers=2", *SLURM, "launch.processes=2") == 0
    ((name, made),) = server.sweeps.items()
    command = made.config["command"]
    assert "launch.processes=2" in command
    assert not any(word.startswith(("launch=", "launch.gres", "launch.time", "launch.prolog")) for word in command)
    assert made.config["run_cap"] == 6
    script = (tmp_path / "outputs" / "sweeps" / "wandb" / name / "array.sbatch").read_text().splitlines()
    logs = tmp_path / "outputs" / "sweeps" / "wandb" / name / "logs"
    for line in ("array=1-6%2", "gres=gpu:2", "time=4:00:00", "signal=USR1@120", f"output={logs}/task-%A_%a.log"):
        assert f"#SBATCH --{line}" in script
    assert "module load cuda" in script
    assert script[-1].endswith(f"-m trainer agent loopback/trimtab/{name}")
    out = capsys.readouterr().out
    assert "submitted array 4711: 6 tasks, a trial each" in out
    assert f"tail -F {logs}/task-4711_*.log" in out


def test_a_trial_in_a_task_is_started_on_the_spot() -> None:
    words = ["+experiment=smoke", "launch=slurm", "launch.gres=gpu:2", "optim.lr=1"]
    launch = compose([*words[:3], "launch.device=cuda", "launch.grace=60"], config_dir=None, cwd=Path.cwd()).launch
    assert words_in_a_task(words, launch) == [
        "+experiment=smoke",
        "optim.lr=1",
        "launch.device=cuda",
        "launch.grace=60",
    ]


def test_figures_have_the_names_of_sweep_files() -> None:
    row = row_of({"step": 3, "loss": 1.0, "val_loss": 0.5, "val_accuracy": 0.25})
    assert as_in_sweep_files(row) == {"val_loss": 0.5, "val_accuracy": 0.25}
    summary = {"best/loss": 0.4, "best/step": 3.0, "test/tuned/accuracy": 0.9, "test/tuned/rows": 40.0}
    assert as_in_sweep_files({**summary, "test/zero_shot/accuracy": 0.1}) == {"val_loss": 0.4, "test_accuracy": 0.9}
