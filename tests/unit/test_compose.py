"""Composition: what Hydra users expect of groups, overrides and experiments, and which config comes out."""

from pathlib import Path

import pytest
import yaml

from trainer.compose import compose, config_text, expand_multirun, help_text
from trainer.config import Config
from trainer.errors import ConfigError


def composed(tmp_path: Path, *overrides: str, config_dir: Path | None = None) -> Config:
    return compose(overrides, config_dir=config_dir, cwd=tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_both_ways_to_name_an_experiment_give_the_same_config(tmp_path: Path) -> None:
    with_plus = composed(tmp_path, "+experiment=legal_lora")
    assert composed(tmp_path, "experiment=legal_lora") == with_plus
    assert composed(tmp_path, "++experiment=legal_lora") == with_plus
    assert with_plus.run.name == "legal_lora"
    assert with_plus.method.rank == 8
    assert with_plus.data.kind == "legal"


def test_without_overrides_the_defaults_of_the_dataclasses_hold(tmp_path: Path) -> None:
    config = composed(tmp_path)
    assert config == Config()


def test_command_line_wins_over_experiment_and_group(tmp_path: Path) -> None:
    config = composed(tmp_path, "optim.lr=1e-4", "experiment=legal_lora", "data.max_train_rows=null", "task=chat")
    assert config.optim.lr == 1e-4
    assert config.data.max_train_rows is None
    assert config.task.name == "chat"
    assert config.task.max_new_tokens == 8  # the experiment's own keys stay, as in Hydra


def test_a_group_may_set_keys_of_another_section(tmp_path: Path) -> None:
    assert composed(tmp_path, "method=full").optim.lr == 2e-5
    assert composed(tmp_path, "method=full", "optim.lr=1").optim.lr == 1.0


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_plus_signs_set_known_keys(tmp_path: Path, sign: str) -> None:
    assert composed(tmp_path, f"{sign}method.rank=4").method.rank == 4


def test_tilde_brings_the_default_back(tmp_path: Path) -> None:
    assert composed(tmp_path, "experiment=legal_lora", "~method.rank").method.rank == Config().method.rank
    assert composed(tmp_path, "experiment=legal_lora", "~method.layers").method.layers is None
    assert composed(tmp_path, "experiment=legal_lora", "~method.rank=8").method.rank == Config().method.rank
    assert composed(tmp_path, "data.columns={prompt: q, text: t}", "~data.columns.text").data.columns == {"prompt": "q"}
    assert composed(tmp_path, "method=full", "~method").method == Config().method
    assert composed(tmp_path, "experiment=legal_lora", "~experiment") == Config()


def test_values_are_read_as_hydra_users_know(tmp_path: Path) -> None:
    config = composed(
        tmp_path,
        "optim.betas=[0.8,0.95]",
        "data.columns={prompt: question, completion: reply}",
        "data.columns.text=body",
        "task.labels=['yes, please','no']",
        "data.system='Be short: answer (yes) or no'",
        "optim.epochs=2",
        "model.revision=007",
        "run.name=2024",
        "data.mixture=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]",
        "data.mixture.1.weight=0.5",
    )
    assert config.optim.betas == [0.8, 0.95]
    assert config.data.columns == {"prompt": "question", "completion": "reply", "text": "body"}
    assert config.task.labels == ["yes, please", "no"]
    assert config.data.system == "Be short: answer (yes) or no"
    assert config.optim.epochs == 2.0
    assert isinstance(config.optim.epochs, float)
    assert config.model.revision == "007"
    assert config.run.name == "2024"
    assert [(part.path, part.weight) for part in config.data.mixture] == [("a.jsonl", 2.0), ("b.jsonl", 0.5)]


def test_one_path_needs_no_brackets(tmp_path: Path) -> None:
    assert composed(tmp_path, "data.train=my.jsonl").data.train == ["my.jsonl"]
    assert composed(tmp_path, "data.train=2024").data.train == ["2024"]
    assert composed(tmp_path, "data.train=hub:org/name/sub:train").data.train == ["hub:org/name/sub:train"]


def test_interpolations_are_filled_in(tmp_path: Path) -> None:
    config = composed(tmp_path, "run.name=${data.kind}-r${method.rank}", "experiment=legal_lora")
    assert config.run.name == "legal-r8"


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    write(tmp_path / "conf/experiment/mine.yaml", "# @package _global_\nmethod: {rank: 2}\n")
    write(tmp_path / "conf/model/tiny.yaml", "path: mine\n")
    extra = tmp_path / "it's here"
    write(extra / "experiment/mine.yaml", "# @package _global_\nmethod: {rank: 3}\n")
    assert composed(tmp_path, "experiment=mine", "model=tiny").model.path == "mine"
    assert composed(tmp_path, "experiment=mine").method.rank == 2
    assert composed(tmp_path, "experiment=mine", "model=tiny", config_dir=extra).model.path == "mine"
    assert composed(tmp_path, "experiment=mine", config_dir=extra).method.rank == 3
    assert composed(tmp_path, "experiment=smoke", config_dir=extra).model.path == "mine"


def test_an_experiment_builds_on_another(tmp_path: Path) -> None:
    write(
        tmp_path / "conf/experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - legal_lora\n  - override /optim: adamw\n  - _self_\nmethod: {rank: 2}\n",
    )
    write(tmp_path / "conf/experiment/team/a.yaml", "# @package _global_\ndefaults: [/experiment/mine, _self_]\n")
    write(tmp_path / "conf/experiment/team/b.yaml", "# @package _global_\ndefaults: [a, _self_]\nmethod: {alpha: 1}\n")
    config = composed(tmp_path, "experiment=team/b")
    assert (config.method.rank, config.method.alpha, config.data.max_train_rows) == (2, 1.0, 640)
    assert config.run.name == "b"


def test_several_experiments_are_laid_over_each_other(tmp_path: Path) -> None:
    write(tmp_path / "conf/experiment/a.yaml", "# @package _global_\nmethod: {rank: 2, alpha: 2}\n")
    write(tmp_path / "conf/experiment/b-2.yaml", "# @package _global_\nmethod: {rank: 3}\n")
    config = composed(tmp_path, "experiment=[a,b-2]")
    assert (config.method.rank, config.method.alpha, config.run.name) == (3, 2.0, "b-2")


def test_a_run_name_in_the_file_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "conf/experiment/a.yaml", "# @package _global_\nrun: {name: other}\n")
    assert composed(tmp_path, "experiment=a").run.name == "other"
    assert composed(tmp_path, "experiment=a", "run.name=mine").run.name == "mine"


def test_config_text_says_the_whole_config(tmp_path: Path) -> None:
    config = composed(tmp_path, "experiment=legal_lora", "data.system='Größe: §'")
    text = config_text(config)
    write(tmp_path / "conf/experiment/again.yaml", "# @package _global_\n" + text)
    assert "Größe: §" in text
    assert list(yaml.safe_load(text)) == [*Config.__dataclass_fields__]
    assert composed(tmp_path, "experiment=again") == config


def test_help_names_groups_experiments_and_every_key(tmp_path: Path) -> None:
    write(tmp_path / "conf/experiment/mine.yaml", "# @package _global_\n# What mine is for.\nmethod: {rank: 2}\n")
    text = help_text(config_dir=None, cwd=tmp_path)
    assert "method     full, lora" in text
    assert "What mine is for." in text
    assert "method.rank=16  (a whole number >= 1)" in text
    assert "      LoRA rank." in text
    assert "run.seed=0  (a whole number >= 0 and < 4294967296)" in text
    assert "`auto` probes once" in text, "no marks of markup"
    assert "``" not in text
    assert 'optim.schedule="cosine"  (constant, linear, cosine, warmup_stable_decay)' in text
    assert str(tmp_path / "conf") in text
    for section in Config.__dataclass_fields__.values():
        assert f"\n{section.name}: " in text


def test_multirun_expands_values_ranges_and_globs(tmp_path: Path) -> None:
    def runs(*overrides: str) -> list[list[str]]:
        return expand_multirun(overrides, config_dir=None, cwd=tmp_path)

    assert runs("optim.lr=1,2", "run.seed=3", "method.rank=choice(4,8)") == [
        ["optim.lr=1", "run.seed=3", "method.rank=4"],
        ["optim.lr=1", "run.seed=3", "method.rank=8"],
        ["optim.lr=2", "run.seed=3", "method.rank=4"],
        ["optim.lr=2", "run.seed=3", "method.rank=8"],
    ]
    assert runs("run.seed=range(0,3)") == [["run.seed=0"], ["run.seed=1"], ["run.seed=2"]]
    assert runs("+experiment=glob(legal_*)") == [
        ["+experiment=legal_full"],
        ["+experiment=legal_lora"],
        ["+experiment=legal_sft"],
    ]
    assert runs("data.train=[a,b]") == [["data.train=[a,b]"]]
    assert runs() == [[]]


def test_multirun_needs_values_that_can_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_multirun(["optim.lr=interval(0,1)", "nonsense"], config_dir=None, cwd=tmp_path)
    assert [problem.what for problem in caught.value.problems] == ["has no fixed values", "cannot read this override"]


def test_nothing_is_left_behind_in_hydra(tmp_path: Path) -> None:
    from hydra.core.global_hydra import GlobalHydra

    composed(tmp_path, "experiment=smoke")
    assert not GlobalHydra.instance().is_initialized()
