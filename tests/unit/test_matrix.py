"""The table of methods and layouts in docs/layouts.md, cell by cell; groups of ranks; layouts that are not offered."""

import re
from pathlib import Path

import pytest
from plan_fixtures import GPUS, planned, refused

from trainer.compose import compose
from trainer.errors import ConfigError
from trainer.layout import Devices
from trainer.plan import estimate_memory
from trainer.rules.matrix import REFUSED, MethodName

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text("utf-8")
METHOD_WORDS = {"full": ["method=full"], "lora": ["method=lora"], "qlora": ["method=qlora"]}


def table() -> dict[tuple[str, str], str]:
    """(method with its settings, layout) to the word in the cell."""
    rows = [
        re.findall(r"[^|]+", line)
        for line in PAGE.splitlines()
        if line.startswith(("| `method=`", "| `full", "| `lora", "| `qlora"))
    ]
    head, *body = [[cell.strip() for cell in row] for row in rows]
    layouts = [cell.strip("`") for cell in head[1:]]
    return {(row[0], layout): cell for row in body for layout, cell in zip(layouts, row[1:], strict=True)}


CELLS = table()


def words(method: str, layout: str) -> list[str]:
    name, *settings = re.findall(r"`([^`]+)`", method)
    alone = ["launch.processes=1"] if layout == "auto" else []
    return [*METHOD_WORDS[name], *settings, f"parallel={layout}", *alone]


def test_the_table_names_every_method_and_every_layout() -> None:
    conf = Path(__file__).parents[2] / "conf"
    assert {layout for _, layout in CELLS} == {file.stem for file in (conf / "parallel").glob("*.yaml")}
    methods = {re.findall(r"`([^`]+)`", method)[0] for method, _ in CELLS}
    assert methods == {file.stem for file in (conf / "method").glob("*.yaml")}
    assert {(m, layout) for (m, layout), cell in CELLS.items() if cell != "yes" and " with " not in m} == {
        (f"`{method}`", layout) for method, layout in REFUSED
    }


@pytest.mark.parametrize(("method", "layout"), CELLS, ids=lambda word: word.replace("`", ""))
def test_a_cell_says_what_the_plan_does(tmp_path: Path, method: str, layout: str) -> None:
    cell = CELLS[method, layout]
    if cell == "yes":
        plan = planned(tmp_path, *words(method, layout))
        assert plan.strategy == ("single" if layout == "auto" else layout)
        assert estimate_memory(plan) is not None
        return
    problem = refused(tmp_path, *words(method, layout))
    assert problem.where == "parallel.name"
    name: MethodName = "qlora"
    reason = REFUSED[name, layout]
    number = re.fullmatch(r"refused \((\d)\)", cell)
    assert number is not None, cell
    assert problem.what == f"cannot hold a base in 4 bits: under {layout} it {reason}"
    assert f"\n{number[1]}. The base {reason}.\n" in PAGE


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
