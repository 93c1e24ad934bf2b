"""FSDP2 with two real ranks: the course of one process, really sharded, killed, moved to and from other strategies."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsdp_fixtures
import numpy as np
import pytest
import sliced_fixtures
from train_fixtures import Run, make_arena, read_metrics, run_calls, run_ranks, train_run

from trainer.distributed.ranks import Ranks, start_ranks
from trainer.train.checkpoint.format import published, read_manifest

CLOCK = {"tokens_per_second", "seconds", "memory_gb"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_arena(folder / "train")
    make_arena(folder / "validation", documents=12, seed=9)
    return folder


def with_data(folder: Path, data: Path) -> str:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / split).symlink_to(data / split)
    return str(folder)


def bits(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read_metrics(folder)]


def files(folder: Path) -> dict[str, dict[str, str]]:
    """Digest of every file of every checkpoint."""
    manifests = {path.name: read_manifest(path) for path in published(folder / "checkpoints")}
    return {name: {file: info.sha256 for file, info in found.files.items()} for name, found in manifests.items()}


def differences(one: Path, two: Path, name: str) -> np.ndarray:
    """Of each step that has ``name``: relative above 1, absolute below."""
    pairs = [(a[name], b[name]) for a, b in zip(read_metrics(one), read_metrics(two), strict=True) if name in a]
    return np.array([abs(a - b) / max(1.0, abs(a)) for a, b in pairs])


def both(tmp_path: Path, data: Path, run: Run) -> int:
    """``run`` by one process and by two of fsdp; returns the number of steps."""
    train_run(replace(run, folder=with_data(tmp_path / "one", data)), start_ranks(device="cpu", world_size=1))
    sharded = replace(run, folder=with_data(tmp_path / "two", data), world_size=2, strategy="fsdp")
    ended = run_ranks(sharded)
    assert [code for code, _ in ended] == [0, 0], ended
    return len(read_metrics(tmp_path / "one"))


@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_take_the_course_of_one(tmp_path: Path, data: Path, lora: bool) -> None:
    """The norm too: a wrong scale of the gradients hides behind Adam."""
    assert both(tmp_path, data, Run(folder="", lora=lora, dropout=0.1, lr=1e-3, packs=4, max_steps=30)) == 30
    for name in ("loss", "grad_norm", "val_loss"):
        found = differences(tmp_path / "one", tmp_path / "two", name)
        assert found.max() <= 1e-5, name
        assert found.mean() <= 1e-6, name


@pytest.mark.parametrize(
    "special",
    [
        {"variant": "tied"},
        {"variant": "frozen"},
        {"variant": "checkpointed"},
        {"variant": "checkpointed", "reshard": False, "reduce_every": True},
        {"lora": True, "dora": True, "variant": "checkpointed"},
        {"lora": True, "dtype": "bfloat16"},
    ],
    ids=lambda special: "-".join(map(str, special.values())),
)
def test_every_kind_of_model_takes_the_same_course(tmp_path: Path, data: Path, special: dict[str, object]) -> None:
    """LoRA in bfloat16 as well: its base is stored in it, and adapters are cast where autocast would cast them."""
    run = replace(Run(folder="", dropout=0.1, lr=1e-3, packs=4, max_steps=6), **special)  # type: ignore[arg-type]
    assert both(tmp_path, data, run) == 6
    for name in ("loss", "grad_norm", "val_loss"):
        assert differences(tmp_path / "one", tmp_path / "two", name).max() <= 1e-6, name


def test_full_fine_tuning_in_bfloat16_differs_by_the_rounding_of_norm_weights(tmp_path: Path, data: Path) -> None:
    assert both(tmp_path, data, Run(folder="", dtype="bfloat16", lr=1e-3, packs=4, max_steps=6)) == 6
    assert differences(tmp_path / "one", tmp_path / "two", "loss").max() <= 1.5e-4
    assert differences(tmp_path / "one", tmp_path / "two", "grad_norm").max() <= 1.5e-3


@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_equals_a_straight_one(tmp_path: Path, data: Path, lora: bool) -> None:
    run = Run(folder="", lora=lora, dropout=0.1, world_size=2, strategy="fsdp", packs=4, max_steps=10)
    straight = replace(run, folder=with_data(tmp_path / "straight", data))
    assert [code for code, _ in run_ranks(straight)] == [0, 0]
    other = replace(run, folder=with_data(tmp_path / "other", data))
    assert -9 in [code for code, _ in run_ranks(replace(other, kill_at=6))]
    assert len(bits(tmp_path / "other")) == 5
    assert [code for code, _ in run_ranks(other)] == [0, 0]
    assert bits(tmp_path / "other") == bits(tmp_path / "straight")
    assert files(tmp_path / "other") == files(tmp_path / "straight")


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_moves_from_one_strategy_to_another(tmp_path: Path, data: Path, lora: bool) -> None:
    """One process, fsdp, ddp, fsdp again, one process: the course of one process all the way."""
    run = Run(folder="", lora=lora, dropout=0.1, lr=1e-3, packs=4, max_steps=10, validate_every=10)
    train_run(replace(run, folder=with_data(tmp_path / "one", data)), start_ranks(device="cpu", world_size=1))
    moved = replace(run, folder=with_data(tmp_path / "two", data))
    sharded, replicas = replace(moved, world_size=2, strategy="fsdp"), replace(moved, world_size=2, strategy="ddp")
    for stop_at, here in ((2, moved), (4, sharded), (6, replicas), (8, sharded)):
        assert {code for code, _ in run_ranks(replace(here, stop_at=stop_at))} == {75}
    assert [code for code, _ in run_ranks(moved)] == [0]
    for name in ("loss", "grad_norm"):
        found = differences(tmp_path / "one", tmp_path / "two", name)
        assert found.max() <= 1e-5, name
        assert found.mean() <= 1e-6, name


def test_slices_of_a_base_are_what_a_whole_load_gives(tmp_path: Path) -> None:
    for name in ("plain", "tied"):
        sliced_fixtures.write_base(tmp_path / name, tied=name == "tied")
    ended = run_calls(partial(sliced_fixtures.slices_are_what_a_whole_load_gives, tmp_path, "fsdp"), tmp_path)
    assert [code for code, _ in ended] == [0, 0], "\n".join(output for _, output in ended)


@pytest.mark.parametrize(
    "shown",
    [
        fsdp_fixtures.every_rank_owns_a_part,
        fsdp_fixtures.fragments_stand_where_their_rows_do,
        fsdp_fixtures.gradients_are_reduced_once_in_a_step,
        fsdp_fixtures.layers_are_given_back,
        fsdp_fixtures.the_forward_pass_reads_what_was_loaded,
        fsdp_fixtures.whole_parameters_are_on_the_first_rank,
        fsdp_fixtures.answers_are_those_of_a_whole_model,
        fsdp_fixtures.a_mixed_outer_group_trains,
        fsdp_fixtures.a_rank_may_have_no_rows,
        fsdp_fixtures.ranks_with_other_weights_are_refused,
    ],
    ids=lambda shown: shown.__name__,
)
def test_on_two_ranks(tmp_path: Path, shown: Callable[[Ranks], None]) -> None:
    ended = run_calls(shown, tmp_path)
    assert [code for code, _ in ended] == [0, 0], "\n".join(output for _, output in ended)
