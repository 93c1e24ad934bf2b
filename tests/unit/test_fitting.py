"""Which layout is taken: the fastest that fits, the reasons against the others, and what is said where nothing fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import which_layout
from plan_fixtures import planned, refused
from which_layout import CASES, answer, case_of, page_with

from trainer import capacity
from trainer.config import Config, ParallelConfig
from trainer.console import gigabytes
from trainer.drive import overview, run, stages
from trainer.drive.prepared import Base, PreparedView, Split, settled
from trainer.errors import EXIT_DONE, ConfigError, Problem
from trainer.fitting import Candidate, candidates, choose, components, consider, memory_of
from trainer.imagined import imagined
from trainer.layout import Devices
from trainer.memory import Adapter, estimate, lora_parameters
from trainer.paths import RunFolder
from trainer.plan import RunPlan, dump_plan, estimate_memory, layout_of, load_plan, zero_spec

GB = 10**9
EIGHT = Devices(gpus=8, cores=64, gpu_memory=80 * GB, main_memory=10**12)


def model_folder(home: Path, **changed: Any) -> str:
    """A folder with the config of an 8 B Llama and nothing in its weights."""
    folder = home / "llama"
    folder.mkdir(exist_ok=True)
    config = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return f"model.path={folder}"


# -- the twelve cases ----------------------------------------------------------------------------------------------

TAKEN = {
    ("1 B", 24, 1): (None, "one process"),
    ("1 B", 80, 1): ("one process", "one process"),
    ("3 B", 24, 8): ("fsdp, reduced each time, checkpointing", "ddp"),
    ("3 B", 80, 1): ("one process, checkpointing", "one process"),
    ("8 B", 24, 1): (None, "one process, checkpointing"),
    ("8 B", 40, 8): ("zero3, optimizer offloaded, weights offloaded, checkpointing", "fsdp"),
    ("8 B", 80, 1): (None, "one process"),
    ("8 B", 80, 8): ("fsdp, reduced each time", "ddp"),
    ("8 B", 141, 1): (None, "one process"),
    ("8 B", 40, 64): ("fsdp, checkpointing", "fsdp"),
    ("70 B", 80, 8): (None, "fsdp, reduced each time, generates by layers, checkpointing"),
    ("70 B", 141, 64): ("fsdp, generates by layers, checkpointing", "fsdp, generates by layers"),
}


@pytest.mark.parametrize("named", CASES, ids=str)
def test_what_is_taken_for_a_model_and_gpus(named: tuple[str, int, int]) -> None:
    found = [answer(case_of(*named, method)) for method in ("full", "lora")]
    assert tuple(None if each.taken is None else each.taken.label for each in found) == TAKEN[named]
    for each in found:
        assert all(entry.why_not for entry in each.seen[:-1])
        assert bool(each.seen[-1].why_not) == (each.taken is None)
        assert each.taken is None or each.seen[-1].needed <= 0.9 * named[1] * GB


def test_the_page_has_the_tables_that_the_estimator_prints() -> None:
    page = which_layout.PAGE.read_text(encoding="utf-8")
    assert page_with(page) == page, "python bench/which_layout.py --write"
    assert all(f"| {model} | {gpus} x {each} GB |" in page for model, each, gpus in CASES)


def test_what_was_measured_on_an_h100() -> None:
    """docs/gpu.md: LoRA took 30.2 GiB, all weights ran out of 79 GiB; eager, chunks of 1024, torch 2.11."""
    shape = which_layout.MODELS["1 B"]
    count = lora_parameters(shape, rank=16, targets=["all-linear"], adapted_layers=16)
    adapter = Adapter(rank=16, linears=frozenset(shape.linears), layers=16, parameters=count)
    given: dict[str, Any] = {"dtype": "bfloat16", "strategy": "single", "repeats_keys": True}
    lora = estimate(shape, method="lora", capacity=16384, adapter=adapter, **given)
    assert lora.step / 2**30 == pytest.approx(30.2, rel=0.1)
    assert estimate(shape, method="full", capacity=32768, **given).step > 79 * 2**30


# -- the order -----------------------------------------------------------------------------------------------------


def labels(config: Config, **changed: Any) -> list[str]:
    given = {"world_size": 8, "accumulation": 2, "device": "cuda", "deepspeed": True, **changed}
    return [candidate.label for candidate in candidates(config, **given)]


def test_layouts_are_tried_fastest_first() -> None:
    each = "fsdp, reduced each time"
    shared = ["ddp", "fsdp, layers kept", "fsdp", each, f"{each}, generates by layers"]
    offloaded = [
        "zero3, optimizer offloaded",
        "zero3, optimizer offloaded, weights offloaded",
        "zero3, generates by layers, optimizer offloaded, weights offloaded",
    ]
    everything = [*shared, *(f"{label}, checkpointing" for label in (*shared, *offloaded))]
    assert labels(Config()) == everything
    once = ["ddp", "fsdp, layers kept", "fsdp", "fsdp, generates by layers"]
    assert labels(Config(), accumulation=1)[:5] == [*once, "ddp, checkpointing"]
    assert labels(Config(), deepspeed=False) == labels(Config(), device="cpu") == everything[:10]
    assert labels(Config(), world_size=1) == ["one process", "one process, checkpointing"]


def test_what_was_asked_for_is_not_changed() -> None:
    config = Config()
    config.model.activation_checkpointing = False
    assert len(labels(config)) == 8
    assert not any("checkpointing" in label for label in labels(config))
    config.model.activation_checkpointing = True
    assert labels(config)[0] == "ddp, checkpointing"
    config.parallel = ParallelConfig(name="fsdp", reshard_after_forward=False)
    assert labels(config) == ["fsdp, layers kept, checkpointing"]
    half = Config()
    half.model.dtype = "float16"
    assert labels(half) == ["ddp", "ddp, checkpointing"], "the others have no loss scale"
    compiled = Config()
    compiled.model.compile = True
    assert not any("zero3" in label for label in labels(compiled))


def test_less_on_a_rank_is_what_the_order_pays_for() -> None:
    """Every fsdp of the list needs less than the one before it."""
    case = case_of("8 B", 80, 8, "full")
    options = candidates(case.config, world_size=8, accumulation=8, device="cuda", deepspeed=True)
    needs = [memory_of(case, option) for option in options[:10]]
    steps = [memory.step for memory in needs if memory is not None]
    assert steps[:5] == sorted(steps[:5], reverse=True)
    assert steps[5:] == sorted(steps[5:], reverse=True)


def test_what_is_offloaded_has_to_fit_into_the_main_memory() -> None:
    case = case_of("8 B", 40, 8, "full")
    case = replace(case, shape=replace(case.shape, layers=20), main_room=50 * GB)
    zero3 = Candidate(
        strategy="zero3", parallel=ParallelConfig(name="zero3", offload_optimizer=True), checkpointing=True
    )
    found = consider(case, zero3, reserve=0.1)
    assert found is not None
    assert found.why_not == "needs 86.6 GB of 45.0 GB main memory for what it offloads"
    enough = consider(replace(case, main_room=10**12), zero3, reserve=0.1)
    assert enough is not None
    assert enough.why_not == ""


def test_memory_that_nobody_knows_refuses_nothing() -> None:
    case = replace(case_of("70 B", 80, 1, "full"), room=None)
    options = candidates(case.config, world_size=1, accumulation=1, device="cuda", deepspeed=True)
    assert choose(case, options) == (options[0], [])


# -- in a plan -----------------------------------------------------------------------------------------------------


def test_the_plan_takes_what_fits_and_the_ranks_go_by_it(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    plan = planned(tmp_path, *words, devices=EIGHT)
    assert (plan.strategy, plan.parallel.name, plan.checkpointing) == ("fsdp", "fsdp", False)
    assert plan.parallel.reduce_every_micro_batch
    assert plan.config.parallel == ParallelConfig(), "the config stays what was written"
    assert [entry.label for entry in plan.considered] == ["ddp", "fsdp, layers kept", "fsdp", "fsdp, reduced each time"]
    assert plan.considered[0].why_not.startswith("does not fit: optimizer 64.2 GB, weights 32.1 GB")
    memory = estimate_memory(plan)
    assert memory is not None
    assert memory.peak == plan.considered[-1].needed
    assert load_plan(dump_plan(plan)) == plan
    large = planned(tmp_path, *words, devices=replace(EIGHT, gpu_memory=400 * GB))
    assert (large.strategy, large.identity) == ("ddp", plan.identity)
    assert planned(tmp_path, *words, "parallel.memory_reserve=0.5", devices=EIGHT).checkpointing


def test_offloading_reaches_deepspeed(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "method=full", "optim.batch_packs=64", "packing.capacity=1024")
    plan = planned(tmp_path, *words, devices=replace(EIGHT, gpus=2, gpu_memory=62 * GB))
    spec = zero_spec(plan)
    assert spec is not None
    assert (spec.stage, spec.offload_optimizer) == (3, True)


def test_a_layout_that_was_asked_for_may_use_the_reserve(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    needed = planned(tmp_path, *words, "parallel=fsdp", devices=replace(EIGHT, gpu_memory=None))
    memory = estimate_memory(needed)
    assert memory is not None
    just = replace(EIGHT, gpu_memory=memory.peak)
    assert layout_of(planned(tmp_path, *words, "parallel=fsdp", devices=just)).label == "fsdp"
    doubtful = replace(just, gpu_memory=int(memory.peak / 1.09))
    assert planned(tmp_path, *words, "parallel=fsdp", devices=doubtful).strategy == "fsdp"
    problem = refused(tmp_path, *words, "parallel=fsdp", devices=replace(just, gpu_memory=int(memory.peak / 1.11)))
    assert problem.got.startswith("fsdp: ")
    assert problem.do.startswith("parallel=auto, which would take fsdp, reduced each time")


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_a_model_larger_than_all_memory_is_refused_with_figures(tmp_path: Path, name: str) -> None:
    small = replace(EIGHT, gpu_memory=24 * GB, main_memory=64 * GB)
    words = (model_folder(tmp_path), "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    problem = refused(tmp_path, *words, f"parallel={name}", devices=small)
    assert (problem.what, problem.where) == ("the training does not fit into the memory", "parallel.name")
    assert " GB (" in problem.got
    assert problem.allowed.endswith("(a GPU: 24.0 GB less 10% reserve)" if name == "auto" else "(a GPU: 24.0 GB)")
    assert "method=lora (ddp, checkpointing)" in problem.do


@pytest.mark.parametrize(("method", "taken"), [("full", True), ("lora", False)])
def test_rows_of_added_tokens_beside_an_adapter_leave_zero3_out(method: Literal["full", "lora"], taken: bool) -> None:
    config = case_of("8 B", 40, 8, method).config
    config = replace(config, model=replace(config.model, add_tokens=["x"]))
    found = candidates(config, world_size=8, accumulation=1, device="cuda", deepspeed=True)
    assert any(one.strategy == "zero3" for one in found) == taken


def test_shorter_packs_or_more_gpus_are_named_where_they_help(tmp_path: Path) -> None:
    one = Devices(gpus=1, cores=8, gpu_memory=20 * GB)
    words = (model_folder(tmp_path), "packing.capacity=32768")
    assert "packing.capacity=1024 (one process, checkpointing)" in refused(tmp_path, *words, devices=one).do
    tight = Devices(gpus=8, cores=8, gpu_memory=36 * GB, deepspeed=False)
    problem = refused(tmp_path, model_folder(tmp_path), "method=full", "packing.capacity=8", devices=tight)
    assert "GPUs of this size" in problem.do


def test_on_cpus_the_main_memory_is_shared_by_the_ranks(tmp_path: Path) -> None:
    laptop = Devices(gpus=0, cores=8, main_memory=40 * GB)
    words = (model_folder(tmp_path), "method.targets=[q_proj]", "packing.capacity=64")
    problem = refused(tmp_path, *words, "launch.processes=2", devices=laptop)
    assert problem.allowed == "18.0 GB (main memory for a rank: 20.0 GB less 10% reserve)"
    assert problem.do == "a smaller model, or a machine with more memory"
    assert planned(tmp_path, *words, devices=laptop).strategy == "single"


# -- packing.capacity=auto -----------------------------------------------------------------------------------------


def test_the_largest_pack_that_fits(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "packing.capacity=auto", "optim.batch_tokens=524288")
    plan = planned(tmp_path, *words, devices=EIGHT)
    assert (plan.config.packing.capacity, plan.strategy) == (8192, "ddp")
    assert plan.capacity_reason == "16,384 does not fit with ddp"
    assert plan.batch_packs * 8192 == 524288
    large = planned(tmp_path, *words, devices=replace(EIGHT, gpu_memory=400 * GB))
    assert large.config.packing.capacity == 32768
    assert large.capacity_reason == "the largest up to 32,768 that divides optim.batch_tokens=524,288 among 8 rank(s)"
    assert large.identity != plan.identity
    assert planned(tmp_path, *words[:1], "packing.capacity=8192", words[2], devices=EIGHT).identity == plan.identity


def test_packs_divide_the_batch_and_stay_within_the_context(tmp_path: Path) -> None:
    large = replace(EIGHT, gpu_memory=400 * GB)
    odd = planned(tmp_path, model_folder(tmp_path), "packing.capacity=auto", "optim.batch_tokens=49152", devices=large)
    assert (odd.config.packing.capacity, odd.batch_packs) == (2048, 24)
    short = model_folder(tmp_path, max_position_embeddings=4096)
    plan = planned(tmp_path, short, "packing.capacity=auto", "optim.batch_tokens=524288", devices=large)
    assert plan.config.packing.capacity == 4096


@pytest.mark.parametrize(
    ("words", "devices", "where", "do"),
    [
        ([], EIGHT, "optim.batch_tokens", "optim.batch_tokens=131072 optim.batch_packs=null"),
        (["optim.batch_packs=8"], EIGHT, "optim.batch_tokens", "optim.batch_tokens=131072"),
        (["optim.batch_tokens=3000"], EIGHT, "optim.batch_tokens", "optim.batch_tokens=16384"),
        (["optim.batch_tokens=65536"], replace(EIGHT, gpu_memory=None), "packing.capacity", "launch.gpu_memory_gb"),
        (
            ["optim.batch_tokens=65536", "model.path=org/name"],
            EIGHT,
            "packing.capacity",
            "hf download org/name config.json",
        ),
    ],
)  # fmt: skip
def test_packs_that_cannot_be_chosen(tmp_path: Path, words: list[str], devices: Devices, where: str, do: str) -> None:
    problem = refused(tmp_path, "packing.capacity=auto", *words, devices=devices)
    assert problem.where == where
    assert do in problem.do


def test_nothing_fits_whatever_the_pack(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "method=full", "packing.capacity=auto", "optim.batch_tokens=524288")
    problem = refused(tmp_path, *words, devices=replace(EIGHT, gpu_memory=8 * GB))
    assert problem.what == "the training does not fit into the memory"
    assert capacity.SMALLEST < capacity.USUAL < capacity.LARGEST


def test_a_capacity_is_a_number_or_the_word(tmp_path: Path) -> None:
    problem = refused(tmp_path, "packing.capacity=4")
    assert problem.allowed == "a whole number >= 8 or auto"
    assert refused(tmp_path, "packing.capacity=automatic").got == "automatic (text)"


# -- GPUs that are not here ----------------------------------------------------------------------------------------

LAPTOP = Devices(gpus=0, cores=8, main_memory=16 * GB)
STATED = ("launch.gpu_memory_gb=80", "launch.processes=8")


def test_gpus_that_are_not_here_are_only_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model_folder(tmp_path), "method=full", "optim.batch_packs=64", *STATED)
    problem = refused(tmp_path, *words, devices=LAPTOP)
    assert (problem.what, problem.got) == ("describes GPUs that this machine does not have", "8 of 80 GB")
    assert problem.allowed == "null: there is no GPU here"
    monkeypatch.setattr(run, "devices_here", lambda config: LAPTOP)
    config = planned(tmp_path, *words, devices=replace(EIGHT, gpu_memory=80 * GB)).config
    assert run.do_new("plan", config, cwd=tmp_path, command="") == EXIT_DONE
    printed = capsys.readouterr().out
    assert "8 x cuda" in printed
    assert "fsdp, layers kept" in printed
    assert "does not fit" in printed
    assert not (tmp_path / "outputs").exists(), "nothing is prepared for them"
    with pytest.raises(ConfigError, match="describes GPUs"):
        run.do_new("run", config, cwd=tmp_path, command="")


def refused_here(home: Path, devices: Devices, *words: str) -> Problem:
    return refused(home, *words, devices=devices)


def test_less_than_there_is_may_be_counted_on(tmp_path: Path) -> None:
    words = (model_folder(tmp_path), "launch.gpu_memory_gb=40")
    plan = planned(tmp_path, *words, devices=EIGHT)
    assert plan.machine is not None
    assert plan.machine.gpu_memory == 40 * GB
    assert planned(tmp_path, words[0], "launch.gpu_memory_gb=60", devices=replace(EIGHT, gpu_memory=None)).strategy
    assert refused_here(tmp_path, EIGHT, words[0], "launch.gpu_memory_gb=81").allowed == "8 GPUs of 80.0 GB"
    assert "no effect" in refused_here(tmp_path, EIGHT, *words, "launch.device=cpu").what
    config = Config()
    config.launch.gpu_memory_gb, config.launch.device = 80.0, "cpu"
    assert imagined(config, LAPTOP) is None


# -- a model that comes to the disk with prepare -------------------------------------------------------------------


def prepared(folder: Path, dtype: str = "bfloat16") -> PreparedView:
    split = Split(rows=1, documents=1, tokens=1, targets=1, longest=1, arena="")
    return PreparedView(
        base=Base(name="x", directory=str(folder), parameters=1), dtype=dtype, dtype_reason="", train=split
    )


def test_the_layout_is_chosen_again_when_the_model_is_there(tmp_path: Path) -> None:
    model_folder(tmp_path)
    words = ("model.path=org/name", "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    before = planned(tmp_path, *words, devices=EIGHT)
    assert (before.strategy, before.considered) == ("ddp", [])
    after = settled(before, prepared(tmp_path / "llama"))
    assert (after.strategy, after.identity) == ("fsdp", before.identity)
    with pytest.raises(ConfigError, match="does not fit into the memory"):
        settled(replace(before, machine=replace(EIGHT, gpu_memory=8 * GB)), prepared(tmp_path / "llama"))
    longer = settled(before, prepared(tmp_path / "llama", dtype="float32"))
    assert longer.considered[0].needed != after.considered[0].needed
    assert settled(before, prepared(tmp_path / "nowhere")) == before


def test_the_ranks_are_told_of_the_layout_that_was_chosen_again(tmp_path: Path) -> None:
    model_folder(tmp_path)
    words = ("model.path=org/name", "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    plan, folder = planned(tmp_path, *words, devices=EIGHT), RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.prepared_json.write_bytes(msgspec.json.encode(prepared(tmp_path / "llama")))
    job = stages.DriverJob(plan=plan, folder=folder, lock=0, command="", programs=stages.Programs())
    told = stages._settle(job)
    assert told.plan.strategy == "fsdp"
    assert load_plan(folder.plan_json.read_bytes()) == told.plan
    folder.plan_json.unlink()
    assert stages._settle(told) is told
    assert not folder.plan_json.exists(), "nothing new, nothing written"


def test_a_config_in_the_cache_of_the_hub_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path)
    stored = tmp_path / "hub" / "models--org--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("c" * 40)
    (stored / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (tmp_path / "llama/config.json").rename(stored / "snapshots" / ("c" * 40) / "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("model.path=org/name", "method=full", "optim.batch_packs=64", "packing.capacity=4096")
    assert planned(tmp_path, *words, devices=EIGHT).strategy == "fsdp"
    assert planned(tmp_path, *words, "model.revision=other", devices=EIGHT).considered == []


# -- what is printed -----------------------------------------------------------------------------------------------


def test_the_plan_shows_every_layout_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (model_folder(tmp_path), "method=full", "optim.batch_tokens=262144", "packing.capacity=auto")
    plan: RunPlan = planned(tmp_path, *words, devices=EIGHT)
    rows = [overview.layout_row(entry) for entry in plan.considered]
    assert rows[0][:3] == ["ddp", gigabytes(plan.considered[0].needed), "72.0 GB"]
    assert rows[-1][3] == "taken"
    assert dict(overview.devices_rows(plan))["layout"].endswith("; 72.0 GB for a rank, 10% kept in reserve")
    (packs,) = overview.capacity_rows(plan)
    assert packs[1].startswith(f"{plan.config.packing.tokens:,} tokens: ")
    overview.show_layouts(plan)
    assert "fsdp, layers kept" in capsys.readouterr().out
    memory = estimate_memory(plan)
    assert memory is not None
    text = overview.memory_text(memory)
    assert all(name in text for name, size in components(memory) if size)
    assert sum(size for _, size in components(memory)) == memory.step
