"""The table of methods and layouts in docs/layouts.md, cell by cell; groups of ranks; layouts that are not offered."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from plan_fixtures import GPUS, planned, refused

from trainer.compose import compose
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.fitting import candidates
from trainer.layout import Devices
from trainer.plan import RunPlan, estimate_memory, make_plan
from trainer.rules.matrix import REFUSED

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text("utf-8")
NOTES = dict(re.findall(r"^(\d)\. (?:The base|The rows of added tokens: it) (.+)\.$", PAGE, re.MULTILINE))
"""Reasons by their number below the table."""
ADDED = "model.add_tokens=[new]"
SETTINGS = {
    "full": ["", "method.freeze_layers=1", ADDED],
    "lora": ["", "method.rslora=true", "method.dora=true", "method.targets=[q_proj]", ADDED],
    "qlora": ["", "method.rslora=true", "method.dora=true", "method.targets=[q_proj]", ADDED],
}
"""All that a method may be set to and that a layout has to hold."""


def table() -> dict[tuple[str, str, str], str]:
    """(method, what it is set to, layout) to the word in the cell."""
    rows = [
        re.findall(r"[^|]+", line)
        for line in PAGE.splitlines()
        if line.startswith(("| `method=`", "| `full", "| `lora", "| `qlora"))
    ]
    head, *body = [[cell.strip() for cell in row] for row in rows]
    layouts = [cell.strip("`") for cell in head[1:]]
    named = [(*re.findall(r"`([^`]+)`", row[0]), "") for row in body]
    return {
        (name[0], name[1], layout): cell
        for name, row in zip(named, body, strict=True)
        for layout, cell in zip(layouts, row[1:], strict=True)
    }


CELLS = table()


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], RunPlan]:
    """Plans a cell. Composing takes half a second, so a row is composed once, and a column."""
    home = tmp_path_factory.mktemp("home")
    (home / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    @cache
    def composed(*words: str) -> Config:
        return compose(["model=tiny", "data.train=my.jsonl", *words], config_dir=None, cwd=home)

    def plan(method: str, setting: str, layout: str) -> RunPlan:
        config = composed(f"method={method}", *filter(None, [setting]))
        config = replace(config, parallel=composed(f"parallel={layout}").parallel)
        if layout == "auto":
            config = replace(config, launch=replace(config.launch, processes=1))
        return make_plan(config, devices=GPUS, cwd=home)

    return plan


def test_the_table_has_every_method_and_setting_in_every_layout() -> None:
    conf = Path(__file__).parents[2] / "conf"
    assert {file.stem for file in (conf / "method").glob("*.yaml")} == set(SETTINGS)
    layouts = [file.stem for file in (conf / "parallel").glob("*.yaml")]
    wanted = [(name, setting) for name, settings in SETTINGS.items() for setting in settings]
    assert set(CELLS) == {(*one, layout) for one in wanted for layout in layouts}
    plain = {(method, layout): cell for (method, setting, layout), cell in CELLS.items() if not setting}
    assert {one for one, cell in plain.items() if cell != "yes"} == set(REFUSED)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_cell_says_what_the_plan_does(plan_of: Callable[..., RunPlan], cell: tuple[str, str, str]) -> None:
    if CELLS[cell] == "yes":
        plan = plan_of(*cell)
        assert plan.strategy == ("single" if cell[2] == "auto" else cell[2])
        assert estimate_memory(plan) is not None
        return
    numbers = re.fullmatch(r"refused \((\d(?:, \d)*)\)", CELLS[cell])
    assert numbers is not None, CELLS[cell]
    with pytest.raises(ConfigError) as caught:
        plan_of(*cell)
    problems = caught.value.problems
    assert {problem.where for problem in problems} == {"parallel.name"}
    said = {problem.what.partition(" it ")[2] for problem in problems}
    assert said == {NOTES[number] for number in numbers[1].split(", ")}
    assert all(cell[2] not in problem.allowed.split(", ") and problem.do for problem in problems)


@pytest.mark.parametrize(("method", "setting"), dict.fromkeys(cell[:2] for cell in CELLS))
def test_what_is_refused_is_not_chosen_either(plan_of: Callable[..., RunPlan], method: str, setting: str) -> None:
    config = plan_of(method, setting, "auto").config
    options = candidates(config, world_size=4, accumulation=2, device="cuda", deepspeed=True)
    assert {CELLS[method, setting, option.strategy] for option in options} == {"yes"}


@pytest.mark.parametrize("name", ["ulysses", "context"])
def test_sequences_over_several_gpus_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"parallel={name}"], config_dir=None, cwd=tmp_path)
    (problem,) = caught.value.problems
    assert problem.what.startswith("is not offered: ")
    assert (problem.got, "docs/layouts.md" in problem.do) == (name, True)
    assert f"`parallel={name}`" in PAGE


@pytest.mark.parametrize("together", [1, 3, 8])
def test_groups_have_to_come_out_even(tmp_path: Path, together: int) -> None:
    problem = refused(tmp_path, "parallel=fsdp", f"parallel.shard_ranks={together}")
    assert (problem.where, problem.got) == ("parallel.shard_ranks", f"{together} with 4 ranks")
    assert (problem.allowed, problem.do) == ("2, 4", "parallel.shard_ranks=2")


def test_a_group_holds_what_all_ranks_would(tmp_path: Path) -> None:
    four, two = (planned(tmp_path, "parallel=fsdp", *more) for more in ([], ["parallel.shard_ranks=2"]))
    assert four.identity == two.identity
    held, more = estimate_memory(four), estimate_memory(two)
    assert held is not None
    assert more is not None
    assert more.optimizer == 2 * held.optimizer
    assert refused(tmp_path, "parallel.shard_ranks=2").what == "has no effect with parallel.name=auto"


def test_main_memory_is_for_gpus(tmp_path: Path) -> None:
    away = estimate_memory(planned(tmp_path, "parallel=fsdp", "parallel.offload_parameters=true"))
    here = estimate_memory(planned(tmp_path, "parallel=fsdp"))
    assert away is not None
    assert here is not None
    assert (away.parameters, away.optimizer) == (0, 0)
    assert away.gradients < here.gradients
    words = ("parallel=fsdp", "parallel.offload_parameters=true", "launch.device=cpu", "launch.processes=2")
    problem = refused(tmp_path, *words, devices=Devices(gpus=0, cores=GPUS.cores))
    assert problem.where == "parallel.offload_parameters"
    assert problem.what == "has nowhere to go: on CPUs everything is in main memory already"
