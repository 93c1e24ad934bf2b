"""What the plan makes of parallel=zero1, zero2 and zero3: layout, DeepSpeed's config, refusals, memory of a rank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from plan_fixtures import LLAMA_8B, planned, refused

from trainer.config import Config
from trainer.drive import run
from trainer.drive.folder import write_inputs
from trainer.layout import Devices
from trainer.memory import LOSS_CHUNK, MemoryEstimate, estimate, loss_chunk
from trainer.paths import RunFolder
from trainer.plan import estimate_memory, zero_spec
from trainer_launch.zero import BUCKET, Stage, ZeroError, ZeroSpec, deepspeed_config, deepspeed_json

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
ZERO: list[Literal["zero1", "zero2", "zero3"]] = ["zero1", "zero2", "zero3"]
WEIGHTS = LLAMA_8B.parameters
SHARE = WEIGHTS // 8
LARGEST = LLAMA_8B.vocabulary * LLAMA_8B.hidden


# -- layout and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZERO)
def test_the_plan_names_it_and_the_run_stays_the_same_run(tmp_path: Path, name: str) -> None:
    plan = planned(tmp_path, f"parallel={name}")
    assert (plan.strategy, plan.world_size, plan.accumulation) == (name, 4, 2)
    assert plan.identity == planned(tmp_path, "launch.processes=1").identity


@pytest.mark.parametrize("name", ZERO)
def test_one_rank_is_refused(tmp_path: Path, name: str) -> None:
    problem = refused(tmp_path, f"parallel={name}", "launch.processes=1")
    assert (problem.what, problem.where) == ("needs at least two ranks", "parallel.name")
    assert problem.got == f"{name} with 1 rank"


@pytest.mark.parametrize("name", ZERO)
def test_without_deepspeed_the_plan_says_what_to_install(tmp_path: Path, name: str) -> None:
    problem = refused(tmp_path, f"parallel={name}", devices=Devices(gpus=4, cores=8, deepspeed=False))
    assert (problem.what, problem.where) == ("needs DeepSpeed, which is not installed", "parallel.name")
    assert (problem.got, problem.allowed) == (name, "auto, ddp, fsdp")
    assert problem.do == "pip install -c constraints.txt -e '.[deepspeed]', or parallel=fsdp"
    assert planned(tmp_path, "parallel=fsdp", devices=Devices(gpus=4, cores=8, deepspeed=False)).strategy == "fsdp"


@pytest.mark.parametrize("found", ["deepspeed", "bitsandbytes"])
def test_the_driver_looks_what_is_installed(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: object() if name == found else None)
    monkeypatch.setattr(run, "visible_gpus", lambda: 0)
    devices = run.devices_here(Config())
    assert (devices.deepspeed, devices.bitsandbytes) == (found == "deepspeed", found == "bitsandbytes")


def test_compiled_layers_are_refused_with_zero3(tmp_path: Path) -> None:
    problem = refused(tmp_path, "parallel=zero3", "model.compile=true")
    assert problem.where == "model.compile"
    assert "gathers the weights of a layer piece by piece" in problem.what
    planned(tmp_path, "parallel=zero2", "model.compile=true")


@pytest.mark.parametrize("name", ZERO)
def test_float16_is_refused_by_name(tmp_path: Path, name: str) -> None:
    problem = refused(tmp_path, f"parallel={name}", "model.dtype=float16")
    assert problem.what == f"cannot be trained by {name}: float16 needs a loss scale, which it does not have"


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_on_cpus_there_is_nowhere_to_move_to(tmp_path: Path, name: str) -> None:
    words = (f"parallel={name}", "parallel.offload_optimizer=true")
    problem = refused(tmp_path, *words, "launch.device=cpu", "launch.processes=2")
    assert problem.what == "has nowhere to go: on CPUs everything is in main memory already"
    assert (problem.where, problem.allowed) == ("parallel.offload_optimizer", "false")
    assert planned(tmp_path, *words).strategy == name


@pytest.mark.parametrize(
    ("words", "where", "do"),
    [
        (["parallel.offload_optimizer=true"], "parallel.offload_optimizer", "parallel=zero1 or parallel=zero2 or"),
        (["parallel=zero2", "parallel.offload_parameters=true"], "parallel.offload_parameters", "parallel=zero3, or"),
        (["parallel=zero2", "parallel.keep_whole_below=0"], "parallel.keep_whole_below", "parallel=zero3, or"),
        (
            ["parallel=zero1", "parallel.gather_for_generation=false"],
            "parallel.gather_for_generation",
            "or parallel=ze",
        ),
        (["parallel=zero3", "parallel.reshard_after_forward=false"], "parallel.reshard_after_forward", "parallel=fsdp"),
    ],
)
def test_a_setting_of_another_strategy_is_refused(tmp_path: Path, words: list[str], where: str, do: str) -> None:
    problem = refused(tmp_path, *words)
    assert problem.where == where
    assert problem.what.startswith("has no effect with parallel.name=")
    assert do in problem.do


# -- DeepSpeed's config --------------------------------------------------------------------------------------------


def test_one_plan_makes_the_config_and_the_file(tmp_path: Path) -> None:
    plan = planned(tmp_path, "parallel=zero3", "parallel.keep_whole_below=7", "parallel.offload_optimizer=true")
    spec = zero_spec(plan)
    assert spec is not None
    assert spec == ZeroSpec(stage=3, world_size=4, accumulation=2, keep_whole_below=7, offload_optimizer=True)
    folder = RunFolder(tmp_path / "run")
    write_inputs(folder, plan)
    assert json.loads(folder.deepspeed_json.read_text()) == deepspeed_config(spec)
    write_inputs(folder, planned(tmp_path, "parallel=fsdp"))
    assert not folder.deepspeed_json.exists(), "a file of another layout says what nobody does"
    assert zero_spec(planned(tmp_path)) is None


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("zero2", ZeroSpec(stage=2, world_size=4, accumulation=3)),
        (
            "zero3_offloaded",
            ZeroSpec(
                stage=3,
                world_size=16,
                accumulation=2,
                keep_whole_below=100_000,
                offload_optimizer=True,
                offload_parameters=True,
            ),
        ),
    ],
)
def test_the_text_is_the_one_on_record(name: str, spec: ZeroSpec) -> None:
    path = GOLDEN / f"{name}.json"
    assert deepspeed_json(spec) == path.read_text(), f"if this is meant, put the new text into {path}"


def test_what_deepspeed_is_told() -> None:
    """A default that is left out is not "off": DeepSpeed clips at 1 by itself."""
    told = json.loads(deepspeed_json(ZeroSpec(stage=2, world_size=4, accumulation=3)))
    assert told["gradient_clipping"] == 0
    assert (told["train_batch_size"], told["train_micro_batch_size_per_gpu"]) == (12, 1)
    assert told["gradient_accumulation_steps"] == 3
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(told)
    assert told["zero_optimization"]["stage"] == 2
    assert told["zero_optimization"]["compute_grad_norm"] is False


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_is_told_as_well(stage: Stage) -> None:
    spec = ZeroSpec(stage=stage, world_size=2, accumulation=1, offload_optimizer=True, offload_parameters=stage == 3)
    told = json.loads(deepspeed_json(spec))["zero_optimization"]
    assert told["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in told) == (stage == 3)
    assert "compute_grad_norm" not in told, "without it stages 1 and 2 refuse to offload"
    assert ("stage3_param_persistence_threshold" in told) == (stage == 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"stage": 3, "keep_whole_below": -1}, "keep_whole_below must be at least 0, got -1"),
        ({"offload_parameters": True}, "only stage 3 divides weights, got stage 2"),
        ({"keep_whole_below": 1}, "only stage 3 divides weights, got stage 2"),
    ],
)
def test_a_spec_without_a_layout_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ZeroError, match=message):
        ZeroSpec(**{"stage": 2, "world_size": 2, "accumulation": 1, **wrong})  # type: ignore[arg-type]


# -- memory --------------------------------------------------------------------------------------------------------


def full(stage: Stage, *, accumulation: int = 1, gathers: bool = True, **changed: bool) -> MemoryEstimate:
    spec = replace(ZeroSpec(stage=stage, world_size=8, accumulation=accumulation), **changed)  # type: ignore[arg-type]
    return estimate(
        LLAMA_8B, method="full", dtype="float32", capacity=4096, strategy=ZERO[stage - 1], zero=spec,
        gather_for_generation=gathers,
    )  # fmt: skip


def test_each_stage_divides_one_thing_more() -> None:
    one, two, three = full(1), full(2), full(3)
    assert one.optimizer == two.optimizer == three.optimizer == 12 * SHARE
    assert (one.gradients, two.gradients, three.gradients) == (4 * WEIGHTS + 4 * SHARE, 4 * SHARE, 4 * SHARE)
    assert (one.parameters, two.parameters, three.parameters) == (4 * WEIGHTS, 4 * WEIGHTS, 4 * SHARE)
    assert one.communication == two.communication == 4 * BUCKET
    assert three.communication == 4 * BUCKET + 4 * (2 * BUCKET + LARGEST)
    assert one.step > two.step > three.step
    assert full(2, accumulation=2).gradients == 8 * SHARE


def test_what_is_there_at_other_times() -> None:
    assert full(1).loading == full(2).loading == 8 * WEIGHTS + 4 * SHARE
    assert full(3).loading == 4 * WEIGHTS + 4 * SHARE
    assert (full(1).generating, full(3, gathers=False).generating) == (0, 0)
    assert full(3).generating == 16 * SHARE + 4 * WEIGHTS


def test_what_is_offloaded_is_not_on_the_device() -> None:
    for stage in (1, 2, 3):
        found = full(stage, offload_optimizer=True)
        assert (found.optimizer, found.gradients) == (0, 4 * WEIGHTS if stage == 1 else 0)
        assert found.offloaded == 16 * SHARE
    everything = full(3, offload_optimizer=True, offload_parameters=True)
    assert (everything.parameters, everything.offloaded) == (0, 20 * SHARE)


def test_in_16_bits_stage_3_keeps_casts_of_all_layers() -> None:
    """With checkpointing too, until the loss is there: autocast's cache has them. Then they are those of one layer."""
    spec = ZeroSpec(stage=3, world_size=8, accumulation=1)

    def found(checkpointing: bool) -> MemoryEstimate:
        return estimate(
            LLAMA_8B, method="full", dtype="bfloat16", capacity=64, strategy="zero3", zero=spec,
            checkpointing=checkpointing,
        )  # fmt: skip

    layer = 2 * (LLAMA_8B.layer_parameters - 2 * LLAMA_8B.hidden)
    kept, again = found(False), found(True)
    assert (kept.parameters, kept.copies, again.copies) == (4 * SHARE, 32 * layer, layer)
    assert again.logits == kept.logits + 31 * layer


def test_the_plan_asks_for_the_layout_it_has(tmp_path: Path) -> None:
    found = {name: estimate_memory(planned(tmp_path, f"parallel={name}", "method=full")) for name in ("ddp", *ZERO)}
    optimizer = {name: each.optimizer for name, each in found.items() if each is not None}
    assert optimizer["ddp"] > optimizer["zero1"] == optimizer["zero2"] == optimizer["zero3"] > 0
    assert loss_chunk("zero3", "cuda", 4096, 50_000) == 4096, "ranks that project unlike often would wait forever"
    assert loss_chunk("zero2", "cpu", 4096, 50_000) == loss_chunk("fsdp", "cpu", 4096, 50_000) == LOSS_CHUNK


def test_chunks_of_the_loss_are_larger_on_a_gpu() -> None:
    assert loss_chunk("single", "cuda", 65_536, 128_256) == 4185
    assert loss_chunk("ddp", "cuda", 65_536, 2_000_000) == LOSS_CHUNK
