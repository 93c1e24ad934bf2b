"""Bad configs as users write them: every problem at once, with place, given, allowed and advice; without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.compose import compose
from trainer.errors import EXIT_USER, ConfigError, Problem


def problems(tmp_path: Path, *overrides: str, config_dir: Path | None = None) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir=config_dir, cwd=tmp_path)
    assert caught.value.exit_code == EXIT_USER
    return caught.value.problems


def problem(tmp_path: Path, *overrides: str) -> Problem:
    (only,) = problems(tmp_path, *overrides)
    return only


def experiment(tmp_path: Path, text: str, name: str = "mine") -> None:
    path = tmp_path / f"conf/experiment/{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_everything_wrong_with_a_command_line_is_said_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "experiment=legal_lroa",
        "methd=full",
        "model=tinny",
        "optim.learning_rate=3",
        "optim.lr=fast",
        "optim.schedule=cosin",
        "optim.betas=[0.9]",
        "method.rank=0",
        "data.train=a,b",
        "legal_lora",
        "lr=3",
        "hydra.run.dir=x",
        "data.validation_share=1.5",
        "guard.spike_action=[stop]",
        "run=mine",
    )
    assert [(entry.where, entry.what, entry.got) for entry in found] == [
        ("command line: experiment", "unknown experiment", "legal_lroa"),
        ("command line: methd", "unknown key", "methd"),
        ("command line: model", "unknown choice of the group 'model'", "tinny"),
        ("command line: optim.learning_rate", "unknown key", "learning_rate"),
        ("command line: data.train", "several values for one run", "a,b"),
        ("command line", "cannot read this override", "legal_lora"),
        ("command line: lr", "unknown key", "lr"),
        ("command line: hydra.run.dir", "Hydra's own settings have no effect here", "hydra.run.dir=x"),
        ("command line: run", "does not fit", "mine (text)"),
        ("command line: data.validation_share", "does not fit", "1.5 (number)"),
        ("command line: method.rank", "does not fit", "0 (whole number)"),
        ("command line: optim.lr", "does not fit", "fast (text)"),
        ("command line: optim.betas", "does not fit", "[0.9] (list)"),
        ("command line: optim.schedule", "does not fit", "cosin (text)"),
        ("command line: guard.spike_action", "does not fit", "['stop'] (list)"),
    ]


@pytest.mark.parametrize(
    ("override", "allowed", "do"),
    [
        ("experiment=legal_lroa", "legal_full, legal_lora, legal_sft, smoke", "did you mean 'legal_lora'?"),
        ("method=lroa", "full, lora, qlora", "did you mean 'lora'?"),
        ("methd=full", "run, model, data, task, method, optim, packing", "did you mean 'method'?"),
        ("optim.learning_rate=1", "lr, betas, eps", "did you mean 'optim.lr'?"),
        ("lora_r=8", "run, model, data", "did you mean 'method.rank'?"),
        ("rank=8", "run, model, data", "did you mean 'method.rank'?"),
        ("data.lr=8", "kind, train, validation", "did you mean 'optim.lr'?"),
        ("optim.shedule=linear", "lr, betas, eps", "did you mean 'schedule'?"),
        ("optim.xyzzy=1", "lr, betas, eps", "remove it"),
        ("+optim.xyzzy=1", "lr, betas, eps", "remove it"),
        ("++optim.xyzzy=1", "lr, betas, eps", "remove it"),
        ("~optim.xyzzy", "lr, betas, eps", "remove it"),
        ("optim.lr.x=1", "optim.lr = a number > 0", ""),
        ("data.over_long=trunkate", "error, drop, truncate, split", "did you mean 'truncate'?"),
        ("optim.lr=null", "a number > 0", ""),
        ("optim.lr=nan", "a number > 0", ""),
        ("optim.lr=inf", "a number > 0", ""),
        ("method.rank=8.5", "a whole number >= 1", ""),
        ("method.rank=true", "a whole number >= 1", ""),
        ("method.rslora=1", "true or false", ""),
        ("method.dropout=1.0", "a number >= 0 and < 1", ""),
        ("eval.patience=0", "a whole number >= 1, or null", ""),
        ("data.train=[1]", "text", 'put it in quotes: "1"'),
        ("data.train={a: 1}", "a list: [text, ...]", ""),
        ("data.columns=x", "pairs: {name: text, ...}", ""),
        ("data.columns={prompt: true}", "text", 'put it in quotes: "true"'),
        ("eval.baselines=[few_shot]", "zero_shot", "did you mean 'zero_shot'?"),
        ("data.mixture=[a.jsonl]", "a section with the keys path, weight", ""),
        ("data.mixture=[{path: a, wieght: 1}]", "path, weight", "did you mean 'weight'?"),
        ("data.mixture=[{weight: 1}]", "text", ""),
        ("data.mixture.x=1", "data.mixture = a list", ""),
        ("model.path=${model.pth}", "${section.key} of a key that exists", "check the name"),
        ("model.path=${oc.env:HOME}", "${section.key}", "where the shell fills in variables"),
        ("model.path=???", "", "give it a value"),
        ("model@data=tiny", "group=choice", "remove '@data'"),
        ("model=[tiny]", "smollm2, tiny", ""),
        ("data.system=Answer (shortly", "key=value", "data.system='Answer (shortly'"),
        ("legal_lroa", "key=value", "did you mean 'legal_lora'?"),
        ("legal_lora", "key=value", "write experiment=legal_lora"),
        ("optim.lr=range(1,3)", "one value", "-m optim.lr=range(1,3)"),
        ("~method.rank=8", "8", "~method.rank"),
        ("data.mixture.3.path=x", "", "check the key"),
    ],
)
def test_one_problem(tmp_path: Path, override: str, allowed: str, do: str) -> None:
    found = problem(tmp_path, override)
    assert allowed in found.allowed
    assert do in found.do
    assert found.where.startswith("command line")


def test_a_key_in_an_experiment_is_reported_with_its_file(tmp_path: Path) -> None:
    experiment(
        tmp_path, "# @package _global_\noptim: {lr: fast, learning_rat: 1}\nmetod: {}\ntask: {labels: [yes, no]}\n"
    )
    found = problems(tmp_path, "experiment=mine")
    assert [(entry.where, entry.got) for entry in found] == [
        ("conf/experiment/mine.yaml: task.labels[0]", "true (true or false)"),
        ("conf/experiment/mine.yaml: task.labels[1]", "false (true or false)"),
        ("conf/experiment/mine.yaml: optim.lr", "fast (text)"),
        ("conf/experiment/mine.yaml: optim.learning_rat", "learning_rat"),
        ("conf/experiment/mine.yaml: metod", "metod"),
    ]
    assert found[-1].do == "did you mean 'method'?"


def test_the_last_place_that_set_a_key_is_named(tmp_path: Path) -> None:
    experiment(tmp_path, "# @package _global_\noptim: {lr: fast}\n", "low")
    experiment(tmp_path, "# @package _global_\ndefaults: [low, _self_]\nmethod: {rank: x}\n", "high")
    found = problems(tmp_path, "experiment=high", "method.alpha=y")
    assert [entry.where for entry in found] == [
        "conf/experiment/high.yaml: method.rank",
        "command line: method.alpha",
        "conf/experiment/low.yaml: optim.lr",
    ]
    compose(["experiment=high", "method.rank=4", "optim.lr=1"], config_dir=None, cwd=tmp_path)


def test_a_file_that_hides_a_shipped_one_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/tiny.yaml").write_text("pth: x\npath: 3\n")
    found = problems(tmp_path, "model=tiny")
    assert [entry.where for entry in found] == ["conf/model/tiny.yaml: model.path", "conf/model/tiny.yaml: model.pth"]


def test_wrong_defaults_lists_do_not_hide_wrong_values(tmp_path: Path) -> None:
    experiment(
        tmp_path,
        "# @package _global_\n"
        "defaults:\n  - nothing\n  - override /method: lroa\n  - override /tracker: x\n  - _self_\noptim: {lr: fast}\n",
    )
    found = problems(tmp_path, "experiment=mine", "method.rank=x")
    assert [(entry.where, entry.what, entry.got) for entry in found] == [
        ("conf/experiment/mine.yaml: defaults", "unknown experiment", "nothing"),
        ("conf/experiment/mine.yaml: defaults", "unknown choice of the group 'method'", "lroa"),
        ("conf/experiment/mine.yaml: defaults", "unknown group", "tracker"),
        ("command line: method.rank", "does not fit", "x (text)"),
        ("conf/experiment/mine.yaml: optim.lr", "does not fit", "fast (text)"),
    ]


@pytest.mark.parametrize(
    ("text", "what", "got"),
    [
        ("# @package _global_\nmethod: {rank: 1\n", "not a readable YAML file", "line 3"),
        ("# @package _global_\nmethod: {}\nmethod: {}\n", "not a readable YAML file", "duplicate"),
        (
            "# @package _global_\na: !!python/object/apply:os.system [echo]\n",
            "not a readable YAML file",
            "could not determine a constructor",
        ),
        ("# @package _global_\n- a\n- b\n", "not a mapping of keys", ""),
        ("# @package _global_\nmodel: {_target_: os.system}\n", "unknown key", "_target_"),
        ("# @package _global_\noptim: [1]\n", "does not fit", "[1] (list)"),
        ("# @package _global_\noptim:\n", "does not fit", "null"),
        ("method: {rank: 2}\n", "would set keys of the section 'experiment' only", ""),
        ("# @package _global_\ndefaults: [mine]\n", "the files cannot be composed", ""),
        ("# @package _global_\nmodel: {revision: 12345e7}\n", "does not fit", "number"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path: Path, text: str, what: str, got: str) -> None:
    experiment(tmp_path, text)
    found = problem(tmp_path, "experiment=mine")
    assert found.what == what
    assert got in found.got
    assert found.where.startswith("conf/experiment/mine.yaml")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    experiment(tmp_path, "")
    (tmp_path / "conf/experiment/mine.yaml").write_bytes(b"# @package _global_\nrun: {name: caf\xe9}\n")
    assert "utf-8" in problem(tmp_path, "experiment=mine").got


def test_an_experiment_without_its_package_line_says_so(tmp_path: Path) -> None:
    experiment(tmp_path, "method: {rank: 2}\n")
    assert "# @package _global_" in problem(tmp_path, "experiment=mine").do


def test_a_config_folder_that_is_not_there(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, config_dir=tmp_path / "nowhere")
    assert (found.where, found.what) == ("--config-dir", "there is no such config folder")


def test_secrets_are_refused_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    key = "hf_" + "A1b2C3d4E5" * 3
    found = problems(
        tmp_path, f"model.path={key}", "data.columns={prompt: correct-horse-battery}", f"wandb.api_key={key}", key
    )
    assert [(entry.where, entry.what) for entry in found] == [
        ("command line: wandb.api_key", "unknown key"),
        ("command line", "cannot read this override"),
        ("command line: model.path", "looks like a secret"),
        ("command line: data.columns.prompt", "looks like a secret"),
    ]
    text = "\n".join(str(entry) for entry in found)
    assert key not in text
    assert "correct-horse-battery" not in text


DRIVER = """
import sys
from pathlib import Path
from trainer.compose import compose
from trainer.plan import Devices, make_plan
from trainer.errors import ConfigError
try:
    config = compose(sys.argv[1:], config_dir=None, cwd=Path.cwd())
    make_plan(config, devices=Devices(gpus=0, cores=2), cwd=Path.cwd())
except ConfigError as error:
    print(error)
heavy = ("torch", "transformers", "datasets", "accelerate", "peft", "numba", "numpy", "trainer_kernels")
print("heavy:", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("override", ["optim.lr=fast", "data.train=missing.jsonl"])
def test_config_errors_need_neither_torch_nor_numpy(tmp_path: Path, override: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER, override],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert override.partition("=")[0] in done.stdout
    assert "heavy: []" in done.stdout
