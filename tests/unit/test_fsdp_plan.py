"""What the plan makes of parallel=fsdp: the layout, what it refuses, and the memory of a rank."""

from dataclasses import replace
from pathlib import Path

import pytest
from plan_fixtures import LLAMA_8B, planned, refused

from trainer.drive.overview import memory_text
from trainer.memory import Adapter, Shards, estimate, lora_parameters
from trainer.plan import estimate_memory

EIGHT = Shards(ranks=8, keep_layers=False, whole_gradients=False, gather_for_generation=True)
OUTER = LLAMA_8B.embedding_parameters + LLAMA_8B.hidden
LAYER = LLAMA_8B.layer_parameters


def test_the_plan_names_it_and_the_run_stays_the_same_run(tmp_path: Path) -> None:
    plan = planned(tmp_path, "parallel=fsdp")
    assert (plan.strategy, plan.world_size, plan.accumulation) == ("fsdp", 4, 2)
    assert plan.identity == planned(tmp_path).identity == planned(tmp_path, "launch.processes=1").identity
    assert planned(tmp_path).strategy == "ddp", "who asks for nothing gets replicas"
    other = planned(tmp_path, "parallel=fsdp", "parallel.reduce_every_micro_batch=true")
    assert other.identity == plan.identity


def test_one_rank_is_refused(tmp_path: Path) -> None:
    problem = refused(tmp_path, "parallel=fsdp", "launch.processes=1")
    assert (problem.what, problem.where) == ("needs at least two ranks", "parallel.name")
    assert (problem.got, problem.allowed) == ("fsdp with 1 rank", "launch.processes of 2 or more")


def test_float16_is_refused_by_name(tmp_path: Path) -> None:
    problem = refused(tmp_path, "parallel=fsdp", "model.dtype=float16")
    assert problem.what == "cannot be trained by fsdp: float16 needs a loss scale, which it does not have"
    assert (problem.where, problem.do) == ("model.dtype", "model.dtype=bfloat16, or parallel=ddp")
    assert planned(tmp_path, "parallel=ddp", "model.dtype=float16").strategy == "ddp"


@pytest.mark.parametrize(
    "override", ["reshard_after_forward=false", "reduce_every_micro_batch=true", "gather_for_generation=false"]
)
def test_its_settings_mean_nothing_beside_another_strategy(tmp_path: Path, override: str) -> None:
    problem = refused(tmp_path, f"parallel.{override}")
    assert problem.what == "has no effect with parallel.name=auto"
    assert problem.where == f"parallel.{override.split('=')[0]}"
    assert planned(tmp_path, "parallel=fsdp", f"parallel.{override}").strategy == "fsdp"


# -- memory --------------------------------------------------------------------------------------------------------


def full(shards: Shards | None) -> dict[str, int]:
    strategy = "single" if shards is None else "fsdp"
    found = estimate(LLAMA_8B, method="full", dtype="bfloat16", capacity=4096, strategy=strategy, shards=shards)
    return {name: getattr(found, name) for name in found.__slots__} | {"step": found.step, "peak": found.peak}


def test_what_a_rank_owns_is_its_share() -> None:
    shared, weights = full(EIGHT), LLAMA_8B.parameters
    assert shared["parameters"] == -(-4 * weights // 8)
    assert shared["optimizer"] == weights
    assert shared["gradients"] == -(-4 * weights // 8) + 4 * OUTER, "and what is not reduced yet of the largest group"
    assert shared["communication"] == 4 * OUTER + 3 * 2 * LAYER + 4 * OUTER
    assert (shared["activations"], shared["trainable"]) == (full(None)["activations"], weights)


def test_whole_gradients_and_kept_layers_cost_what_they_spare_in_traffic() -> None:
    base, weights = full(EIGHT), LLAMA_8B.parameters
    assert full(replace(EIGHT, whole_gradients=True))["gradients"] - base["gradients"] == 4 * (weights - OUTER)
    assert full(replace(EIGHT, keep_layers=True))["communication"] - base["communication"] == 30 * 2 * LAYER


def test_the_peak_may_be_before_or_after_training() -> None:
    found = full(EIGHT)
    assert found["loading"] == 4 * LLAMA_8B.parameters
    assert found["generating"] == found["parameters"] + found["optimizer"] + 4 * OUTER + 32 * 2 * LAYER
    assert found["peak"] == found["step"] > found["loading"] > found["generating"]
    assert found["copies"] == 0, "layers are gathered in 16 bits"
    many = full(replace(EIGHT, ranks=64, gather_for_generation=False))
    assert many["generating"] == 0
    small = estimate(
        LLAMA_8B, method="full", dtype="bfloat16", capacity=64, strategy="fsdp", shards=replace(EIGHT, ranks=64)
    )
    assert small.peak == small.loading > small.step


def test_lora_divides_the_base_in_its_own_dtype() -> None:
    weights = lora_parameters(LLAMA_8B, rank=16, targets=["all-linear"], adapted_layers=32)
    adapter = Adapter(rank=16, linears=frozenset(LLAMA_8B.linears), layers=32, parameters=weights)
    found = estimate(
        LLAMA_8B,
        method="lora",
        dtype="bfloat16",
        capacity=4096,
        strategy="fsdp",
        shards=EIGHT,
        adapter=adapter,
    )
    assert found.loading == 2 * LLAMA_8B.parameters + 4 * weights
    assert found.parameters == -(-found.loading // 8)
    per_layer = weights // 32
    assert found.communication == 2 * OUTER + 3 * 2 * (LAYER + per_layer) + 4 * per_layer
    assert found.gradients == 4 * per_layer + -(-4 * weights // 8)


def test_the_plan_asks_for_the_layout_it_has(tmp_path: Path) -> None:
    """Whole gradients are there only where micro-batches add up."""
    once = estimate_memory(planned(tmp_path, "parallel=fsdp", "method=full", "optim.batch_packs=4"))
    added = estimate_memory(planned(tmp_path, "parallel=fsdp", "method=full"))
    each = estimate_memory(planned(tmp_path, "parallel=fsdp", "method=full", "parallel.reduce_every_micro_batch=true"))
    alone = estimate_memory(planned(tmp_path, "method=full", "launch.processes=1"))
    assert once is not None
    assert added is not None
    assert alone is not None
    assert once == each
    assert added.gradients > once.gradients
    assert "the whole model before it is cut" in memory_text(once)
    assert "; " not in memory_text(alone)
