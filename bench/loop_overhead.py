"""What our training loop costs beside a bare forward, backward and optimizer step; and what a second process brings.

    OMP_NUM_THREADS=1 python bench/loop_overhead.py [--turns 60] [--steps 30] [--hidden 256] [--layers 6]

One model, one optimizer, the same packs. "Bare" is model(batch), backward, clip, step, zero_grad over batches that lie
ready. "Loop" is what a run does around them: batches made ahead by a thread, seeds, agreed decisions, guards, metrics
on disk. What the loop adds does not depend on the size of the model, so both are measured on one whose step takes a few
milliseconds: beside a step of 100 ms a busy machine hides it. The two take turns of 20 steps, each as often first; the
difference of the medians of a turn is taken, and of these the median, with the quartiles. The goal: 1 % of a step of
100 ms, which is 1 ms.

Scaling: tokens per second of two processes (ddp, gloo, one thread each) over those of one, on a model whose step of
four packs takes a second. On two free cores; with anything else running it says more about that than about us.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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

TURN, WARM_UP = 20, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model and its packs."""

    hidden: int
    layers: int
    vocabulary: int
    capacity: int


SMALL = Shape(hidden=64, layers=2, vocabulary=256, capacity=128)
"""A step of 5 to 10 ms."""


def make_loss(shape: Shape) -> PackedLoss:
    """A random Llama, all of it trained, the same for everybody."""
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=shape.hidden // 64,
        max_position_embeddings=shape.capacity,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=IMPLEMENTATION)
    return PackedLoss(cast(nn.Module, model))


def make_documents(folder: Path, shape: Shape) -> None:
    """Enough short documents for any number of steps."""
    random = np.random.default_rng(0)
    with ArenaWriter(folder) as writer:
        for _ in range(400):
            length = int(random.integers(5, shape.capacity // 2))
            writer.add(random.integers(3, shape.vocabulary, length).astype(np.int32), np.ones(length, bool), None)
        writer.close({})


def batches_of(folder: Path, ranks: Ranks, *, capacity: int, steps: int, packs: int) -> TrainingBatches:
    """``packs`` to a step, shared among the ranks."""
    arena = TokenArena.open(folder)
    options = ScheduleOptions(
        capacity=capacity,
        seed=0,
        epochs=1.0,
        max_steps=steps,
        world_size=ranks.world_size,
        accumulation=packs // ranks.world_size,
    )
    schedule = training_schedule(arena.lengths, arena.targets, options)
    return TrainingBatches(arena, schedule, capacity=capacity, rank=ranks.rank, device=ranks.device, pad_token_id=0)


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


def prepared(ranks: Ranks, shape: Shape) -> Strategy:
    """One process or DDP around the model."""
    kind = "single" if ranks.world_size == 1 else "ddp"
    strategy = make_strategy(kind, ranks, dtype=torch.float32, clip_norm=1.0)
    strategy.prepare(
        make_loss(shape),
        lambda module: make_optimizer(module, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    )
    return strategy


def overhead(folder: Path, turns: int) -> dict[str, float]:
    """Milliseconds of both by turns in one process, and what the loop adds: its median and quartiles over the turns."""
    make_documents(folder, SMALL)
    ranks = start_ranks(device="cpu", world_size=1, threads=1)
    strategy = prepared(ranks, SMALL)
    source = batches_of(folder, ranks, capacity=SMALL.capacity, steps=TURN + 1, packs=1)
    measured: dict[str, Callable[[], list[float]]] = {
        "bare": lambda: bare_steps(strategy, source),
        "loop": lambda: loop_steps(strategy, source, folder),
    }
    medians: dict[str, list[float]] = {"bare": [], "loop": []}
    for turn in range(WARM_UP + turns):
        for name in ("bare", "loop") if turn % 2 else ("loop", "bare"):
            taken = 1e3 * statistics.median(measured[name]())
            medians[name] += [taken] if turn >= WARM_UP else []
    differences = [loop - bare for bare, loop in zip(medians["bare"], medians["loop"], strict=True)]
    low, adds, high = statistics.quantiles(differences, n=4)
    return {
        "bare_ms": statistics.median(medians["bare"]),
        "loop_ms": statistics.median(medians["loop"]),
        "adds_ms": adds,
        "adds_low_ms": low,
        "adds_high_ms": high,
    }


def scaling_rank(folder: str, shape: Shape, steps: int, port: int, world_size: int, rank: int) -> None:
    """One of ``world_size`` processes; rank 0 writes its median step."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})  # noqa: TID251
    ranks = start_ranks(device="cpu", world_size=world_size, threads=1)
    place = Path(folder) / f"of{world_size}-{rank}"
    place.mkdir()
    source = batches_of(Path(folder), ranks, capacity=shape.capacity, steps=steps, packs=4)
    times = loop_steps(prepared(ranks, shape), source, place)
    (place / "median.json").write_text(json.dumps(statistics.median(times[WARM_UP:])))
    ranks.close()


def scaling(folder: Path, shape: Shape, steps: int, port: int) -> dict[str, float]:
    """Speed of two processes over that of one, on the same packs."""
    make_documents(folder, shape)
    seconds: dict[int, float] = {}
    for world_size in (1, 2):
        started = [
            get_context("spawn").Process(target=scaling_rank, args=(str(folder), shape, steps, port, world_size, rank))
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
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--port", type=int, default=29653)
    arguments = parser.parse_args()
    shape = Shape(hidden=arguments.hidden, layers=arguments.layers, vocabulary=4096, capacity=512)
    with tempfile.TemporaryDirectory() as place:
        found = overhead(Path(place) / "small", arguments.turns)
        found |= scaling(Path(place) / "large", shape, arguments.steps, arguments.port)
    print(
        f"bare step {found['bare_ms']:.2f} ms, in the loop {found['loop_ms']:.2f} ms; the loop adds "
        f"{found['adds_ms']:.2f} ms (half of the turns: {found['adds_low_ms']:.2f} to {found['adds_high_ms']:.2f})"
    )
    print(f"which is {found['adds_ms']:.2f} % of a step of 100 ms (goal: 1 %)")
    took = f"{found['two_ms']:.0f} ms where one takes {found['one_ms']:.0f}"
    print(f"two processes take {took}: {found['speedup']:.2f} times as fast")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
