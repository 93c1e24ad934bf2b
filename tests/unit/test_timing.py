"""Packs by time: what the ratio is, that packs then take equally long, what waiting costs, what a run measures."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from train_fixtures import make_arena, schedule_for

from trainer.data.batches import TrainingBatches
from trainer.data.scheduling import ScheduleOptions, packs_by_time, training_schedule
from trainer.data.timing import WARM_UP, cost_ratio, measured_ratio, sync_of, waiting_share
from trainer.memory import SMOLLM2_135M, ModelShape
from trainer.rank.job import Job
from trainer.rank.training import suggest_cost_ratio
from trainer.train.metrics import MetricsFile
from trainer_kernels import CostModel, Schedule
from trainer_kernels.schedule import Sync

LLAMA_8B = ModelShape(
    hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256, tied=False,
    max_positions=8192,
)  # fmt: skip
RATIO = 1e-3
CAPACITY = 2048


def uneven_lengths(longest: int) -> np.ndarray:
    """Lognormal, as chats are: most documents are short, most tokens are in long ones."""
    random = np.random.default_rng(0)
    return np.clip(random.lognormal(5, 1.2, 4000), 4, longest).astype(np.int32)


def scheduled(
    lengths: np.ndarray, *, ratio: float, world_size: int = 8, accumulation: int = 1, sync: Sync = "step"
) -> Schedule:
    options = ScheduleOptions(
        capacity=CAPACITY, seed=1, world_size=world_size, accumulation=accumulation, cost_ratio=ratio, sync=sync
    )
    return training_schedule(lengths, np.ones_like(lengths), options)


def test_the_ratio_of_a_model_is_that_of_its_flop():
    # 6 x 32 layers x 4096 wide over 6 x (8.03 B less the 0.53 B of the input embedding)
    assert cost_ratio(LLAMA_8B, frozen_base=False) == pytest.approx(6 * 32 * 4096 / (6 * 7.504e9), rel=1e-3)
    assert cost_ratio(SMOLLM2_135M, frozen_base=True) == pytest.approx(
        1.5 * cost_ratio(SMOLLM2_135M, frozen_base=False)
    )


def test_packs_by_time_take_equally_long_and_nobody_waits():
    lengths = uneven_lengths(longest=800)
    weights = CostModel(1.0, RATIO).weight(lengths)
    by_tokens, by_time = scheduled(lengths, ratio=0.0), scheduled(lengths, ratio=RATIO)
    assert waiting_share(by_tokens, weights) > 0.05
    assert waiting_share(by_time, weights) < 0.002
    packs = by_time.plan(0)
    assert packs.fill > 0.995
    assert max(int(lengths[packs.pack(i)].sum()) for i in range(len(packs))) <= CAPACITY
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))


def test_a_document_that_takes_longer_than_a_pack_leaves_the_packs_and_deals_them_by_time():
    lengths = uneven_lengths(longest=CAPACITY)
    assert not packs_by_time(lengths, ScheduleOptions(capacity=CAPACITY, cost_ratio=RATIO))
    assert packs_by_time(lengths // 4 + 1, ScheduleOptions(capacity=CAPACITY, cost_ratio=RATIO))
    assert not packs_by_time(lengths // 4 + 1, ScheduleOptions(capacity=CAPACITY))
    weights = CostModel(1.0, RATIO).weight(lengths)
    plain = scheduled(lengths, ratio=0.0, world_size=4, accumulation=8)
    for sync in ("micro", "step"):
        dealt = scheduled(lengths, ratio=RATIO, world_size=4, accumulation=8, sync=sync)
        assert dealt.num_steps == plain.num_steps
        for step in range(plain.num_steps):  # who does which pack differs, what a step learns from does not
            ours = np.sort(np.concatenate(dealt.documents(step)))
            assert np.array_equal(ours, np.sort(np.concatenate(plain.documents(step))))
        same_sync = scheduled(lengths, ratio=0.0, world_size=4, accumulation=8, sync=sync)
        assert waiting_share(dealt, weights) < waiting_share(same_sync, weights) / 2


def test_replicas_wait_once_per_step_and_sharded_ranks_in_every_micro_batch():
    lengths = uneven_lengths(longest=800)
    weights = CostModel(1.0, RATIO).weight(lengths)
    shares = {
        sync: waiting_share(scheduled(lengths, ratio=0.0, accumulation=8, sync=sync), weights)
        for sync in ("micro", "step")
    }
    assert shares["micro"] > 2 * shares["step"]
    assert waiting_share(scheduled(lengths, ratio=0.0, world_size=1), weights) == 0.0
    assert [sync_of(name) for name in ("single", "ddp", "zero1")] == ["step"] * 3
    assert [sync_of(name) for name in ("fsdp", "zero2", "zero3")] == ["micro"] * 3


def test_the_measured_ratio_is_found_in_noise_and_only_there():
    random = np.random.default_rng(3)
    tokens = random.uniform(8000, 12000, 100)
    pairs = random.uniform(1e6, 9e6, 100)
    seconds = 0.05 + 1e-4 * tokens + 1e-7 * pairs
    noisy = seconds + random.normal(0, 0.01, 100)
    found = measured_ratio(tokens, pairs, noisy)
    assert found is not None
    assert found.steps == 100
    assert abs(found.ratio - 1e-3) < 3 * found.error < 1e-3
    assert measured_ratio(tokens[:19], pairs[:19], seconds[:19]) is None, "too few steps"
    assert measured_ratio(tokens, 500 * tokens, seconds) is None, "the two cannot be told apart"
    assert measured_ratio(tokens, pairs, 0.05 + 1e-4 * tokens + random.normal(0, 0.01, 100)) is None, "no sign of it"
    assert measured_ratio(tokens, pairs, 2 - 1e-4 * tokens + 1e-7 * pairs) is None, "less time for more tokens"


def test_a_run_measures_its_steps_but_those_of_the_warm_up_and_of_processes_before(tmp_path: Path):
    """Steps 1 to 10 are of another process, and 11 to 13 compile."""
    arena = make_arena(tmp_path / "train", documents=400)
    plan = schedule_for(arena, world_size=1, packs=2, epochs=1.0, max_steps=None)
    source = TrainingBatches(arena, plan, capacity=96, rank=0, device=torch.device("cpu"), pad_token_id=0)
    lines: list[str] = []
    for step in range(1, source.num_steps + 1):
        tokens, pairs = source.work(step - 1)
        seconds = 9.0 * step if step <= 10 + WARM_UP else 0.05 + 1e-4 * tokens + 1e-6 * pairs
        lines.append(json.dumps({"step": step, "seconds": {"forward": seconds, "validation": 50.0 * step}}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    said: list[str] = []
    job = cast(Job, SimpleNamespace(say=said.append))
    assert suggest_cost_ratio(job, source, metrics, 10)["measured_cost_ratio"] == pytest.approx(1e-2)
    assert said[0].startswith(f"measured over {source.num_steps - 13} steps: packing.cost_ratio=0.01 ")
    assert suggest_cost_ratio(job, source, metrics, source.num_steps - 20) == {}, "too few are left"
