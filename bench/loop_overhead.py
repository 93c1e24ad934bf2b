"""What our training loop costs beside a bare forward, backward and optimizer step; and what a second process brings.

    OMP_NUM_THREADS=1 python bench/loop_overhead.py [--steps 60] [--hidden 256] [--layers 6]

One model, one optimizer, the same packs. "Bare" is model(batch), backward, clip, step, zero_grad over batches that lie
ready. "Loop" is what a run does around them: batches made ahead by a thread, seeds, agreed decisions, guards, metrics
on disk. The two take turns, a few steps each, so that a busy machine slows both; the medians of their steps are
compared. The goal: at most 1 % of a step of 100 ms, which is 1 ms; what the loop adds is printed in both.

Scaling: tokens per second of two processes (ddp, gloo, one thread each) over those of one. On two free cores; with
anything else running it says more about that than about us.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.batches import TrainingBatches
from trainer.data.scheduling import ScheduleOptions, training_schedule
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import Strategy, make_strategy
from trainer.model.attention import IMPLEMENTATION, register
from trainer.model.loss import PackedLoss
from trainer.train.guard import Judge, StopFlag
from trainer.train.loop import Hooks, Settings, train
from trainer.train.metrics import MetricsFile, StepRecord
from trainer.train.optim import make_optimizer
from trainer.train.state import TrainState
from trainer_kernels import ArenaWriter, TokenArena

VOCABULARY, CAPACITY, TURN, WARM_UP = 4096, 512, 5, 2


def make_loss(hidden: int, layers: int) -> PackedLoss:
    """A random Llama, all of it trained, the same for everybody."""
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CAPACITY,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=IMPLEMENTATION)
    return PackedLoss(cast(nn.Module, model))


def make_documents(folder: Path) -> None:
    """Enough short documents for any number of steps."""
    random = np.random.default_rng(0)
    with ArenaWriter(folder) as writer:
        for _ in range(400):
            length = int(random.integers(20, 200))
            writer.add(random.integers(3, VOCABULARY, length).astype(np.int32), np.ones(length, bool), None)
        writer.close({})


def batches_of(folder: Path, ranks: Ranks, *, steps: int, packs: int) -> TrainingBatches:
    """``packs`` to a step, shared among the ranks."""
    arena = TokenArena.open(folder)
    options = ScheduleOptions(
        capacity=CAPACITY,
        seed=0,
        epochs=1.0,
        max_steps=steps,
        world_size=ranks.world_size,
        accumulation=packs // ranks.world_size,
    )
    schedule = training_schedule(arena.lengths, arena.targets, options)
    return TrainingBatches(arena, schedule, capacity=CAPACITY, rank=ranks.rank, device=ranks.device, pad_token_id=0)


def loop_steps(strategy: Strategy, source: TrainingBatches, folder: Path) -> list[float]:
    """Seconds from one recorded step of ``train`` to the next."""
    metrics, times = MetricsFile(folder / "metrics.jsonl"), list[float]()

    def record(step: StepRecord, figures: object) -> None:
        metrics.append(step, {})
        times.append(time.perf_counter())

    hooks = Hooks(validate=None, save=lambda state, required: None, record=record, warn=print)
    never = 10**9
    settings = Settings(
        seed=0, lr=lambda step: 1e-4, validate_every=never, save_every=never, spike_factor=4.0,
        judge=Judge(metric="loss", patience=None, min_improvement=0.0),
    )  # fmt: skip
    with StopFlag() as stop:
        train(strategy, source, settings, hooks, TrainState(), stop)
    return [after - before for before, after in pairwise(times)]


def bare_steps(strategy: Strategy, source: TrainingBatches) -> list[float]:
    """Seconds of forward, backward, clipping and step over batches that lie ready."""
    ready = [(step.num_targets, [source.load(documents) for documents in step.documents]) for step in source.steps(0)]
    parameters, optimizer, times = list(strategy.trainable.values()), strategy.optimizer, list[float]()
    strategy.module.train()
    for targets, batches in ready:
        start = time.perf_counter()
        for batch in batches:
            (strategy.module(batch) / targets).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def prepared(ranks: Ranks, hidden: int, layers: int) -> Strategy:
    """One process or DDP around the model."""
    kind = "single" if ranks.world_size == 1 else "ddp"
    strategy = make_strategy(kind, ranks, dtype=torch.float32, clip_norm=1.0)
    strategy.prepare(
        make_loss(hidden, layers),
        lambda module: make_optimizer(module, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    )
    return strategy


def overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Median step of both, by turns in one process."""
    ranks = start_ranks(device="cpu", world_size=1, threads=1)
    strategy = prepared(ranks, arguments.hidden, arguments.layers)
    source = batches_of(folder, ranks, steps=TURN + 1, packs=1)
    found: dict[str, list[float]] = {"bare": [], "loop": []}
    for turn in range(WARM_UP + arguments.steps // TURN):
        for name, measured in (("bare", bare_steps(strategy, source)), ("loop", loop_steps(strategy, source, folder))):
            found[name] += measured if turn >= WARM_UP else []
    bare, loop = (statistics.median(found[name]) for name in ("bare", "loop"))
    return {"bare_ms": 1e3 * bare, "loop_ms": 1e3 * loop, "overhead": loop / bare - 1.0, "adds_ms": 1e3 * (loop - bare)}


def scaling_rank(folder: str, arguments: argparse.Namespace, port: int, world_size: int, rank: int) -> None:
    """One of ``world_size`` processes; rank 0 writes its median step."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})  # noqa: TID251
    ranks = start_ranks(device="cpu", world_size=world_size, threads=1)
    place = Path(folder) / f"of{world_size}-{rank}"
    place.mkdir()
    source = batches_of(Path(folder), ranks, steps=arguments.steps // 2, packs=4)
    times = loop_steps(prepared(ranks, arguments.hidden, arguments.layers), source, place)
    (place / "median.json").write_text(json.dumps(statistics.median(times[WARM_UP:])))
    ranks.close()


def scaling(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Speed of two processes over that of one, on the same packs."""
    seconds: dict[int, float] = {}
    for world_size, port in ((1, 0), (2, arguments.port)):
        started = [
            get_context("spawn").Process(target=scaling_rank, args=(str(folder), arguments, port, world_size, rank))
            for rank in range(world_size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a rank ended with {process.exitcode}")
        seconds[world_size] = json.loads((folder / f"of{world_size}-0" / "median.json").read_text())
    return {"one_ms": 1e3 * seconds[1], "two_ms": 1e3 * seconds[2], "speedup": seconds[1] / seconds[2]}


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--port", type=int, default=29653)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "arena"
        make_documents(folder)
        found = overhead(folder, arguments) | scaling(folder, arguments)
    print(
        f"bare step {found['bare_ms']:.1f} ms, in the loop {found['loop_ms']:.1f} ms: {100 * found['overhead']:+.1f} %"
    )
    print(f"the loop adds {found['adds_ms']:.2f} ms to a step: {found['adds_ms']:.2f} % of one of 100 ms (goal: 1 %)")
    took = f"{found['two_ms']:.0f} ms where one takes {found['one_ms']:.0f}"
    print(f"two processes take {took}: {found['speedup']:.2f} times as fast")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
