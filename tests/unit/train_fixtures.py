"""A training run small enough for a test: a random Llama of 64 x 2, an arena of random documents, our own loop.

A run that is really killed has to be a process, and two ranks have to be two: ``run_ranks`` starts them.
"""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.console import run_and_report
from trainer.data.batches import TrainingBatches, held_out_batches
from trainer.data.scheduling import ScheduleOptions, training_schedule
from trainer.distributed.fsdp import Sharding
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import Strategy, StrategyName, make_strategy
from trainer.evaluate.loss import held_out_loss
from trainer.model.adapters import (
    attach_lora,
    decoder_layer_modules,
    enable_activation_checkpointing,
    freeze,
    inner_model,
)
from trainer.model.attention import IMPLEMENTATION, register
from trainer.model.load import load_model, settle
from trainer.model.loss import PackedLoss
from trainer.model.precision import torch_dtype
from trainer.model.slices import (
    ReadSlice,
    parameter_names,
    plan_slices,
    slice_reader,
    standing_in,
    stored_tensors,
    without_numbers,
)
from trainer.rank.sliced import fill_added_rows
from trainer.train.checkpoint.behind import Saver
from trainer.train.checkpoint.fence import claim_together
from trainer.train.checkpoint.format import Checkpoint
from trainer.train.checkpoint.publish import retain
from trainer.train.checkpoint.resume import find_agreed, find_resumable, load
from trainer.train.guard import FaultPolicy, Judge, NonFiniteAction, StopFlag
from trainer.train.loop import Hooks, Settings, train
from trainer.train.metrics import MetricsFile, StepRecord
from trainer.train.optim import lr_schedule, make_optimizer
from trainer.train.state import TrainState
from trainer.train.watchdog import Watchdog
from trainer_kernels import ArenaWriter, Schedule, TokenArena
from trainer_launch.zero import Stage, ZeroSpec

VOCABULARY = 67
CAPACITY = 96
IDENTITY, BASE = "0123456789", "base"
STAGES: dict[StrategyName, Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}
Variant = Literal["plain", "tied", "frozen", "checkpointed", "4-bit", "added", "added-tied"]
"""What is special about a tiny model: tied embeddings; a layer and the embeddings frozen; activation checkpointing; the
base in 4 bits; LoRA that trains the rows of ``ADDED`` tokens too, also of tied embeddings."""
ADDED = [9, 20, 66]
TIED = ("tied", "added-tied")


def tiny_config(dropout: float = 0.0, *, tied: bool = False) -> LlamaConfig:
    """A Llama of hidden size 64 with 2 layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
    )


def tiny_model(dropout: float = 0.0, seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    """The same random weights for the same seed."""
    register()
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(tiny_config(dropout, tied=tied), attn_implementation=IMPLEMENTATION)


@contextmanager
def on_disk(model: LlamaForCausalLM) -> Iterator[Path]:
    """A folder with ``model``, for as long as it is needed."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        yield Path(folder)


def in_4_bits(model: LlamaForCausalLM, dtype: torch.dtype) -> nn.Module:
    """``model`` as it comes out of the loader with its linear layers in 4 bits."""
    with on_disk(model) as folder:
        return cast(nn.Module, load_model(folder, dtype=dtype, quantize="nf4"))


def tiny_loss(
    *,
    lora: bool,
    dropout: float = 0.0,
    compute_dtype: torch.dtype = torch.float32,
    variant: Variant = "plain",
    dora: bool = False,
    chunk: int = 16,
    base: nn.Module | None = None,
) -> PackedLoss:
    """The module that is trained: full, or adapters with dropout on a base frozen in the compute dtype.

    ``base``: None for the tiny model.
    """
    model = tiny_model(dropout, tied=variant in TIED) if base is None else base
    if variant == "frozen":
        freeze(inner_model(model), 1, True)
    if variant == "4-bit":
        model = in_4_bits(cast(LlamaForCausalLM, model), compute_dtype)
    if lora:
        model = model if variant == "4-bit" else cast(nn.Module, model).to(compute_dtype)
        torch.manual_seed(7)
        tokens = ADDED if variant.startswith("added") else []
        model = attach_lora(model, rank=4, alpha=8.0, dropout=dropout, dora=dora, tokens=tokens)  # type: ignore[arg-type]
    if variant == "checkpointed":
        enable_activation_checkpointing(model)
    return PackedLoss(model, chunk=chunk, compute_dtype=compute_dtype)


@contextmanager
def tiny_loss_in_slices(
    *, lora: bool, dropout: float, compute_dtype: torch.dtype, variant: Variant, dora: bool, chunk: int
) -> Iterator[tuple[PackedLoss, ReadSlice]]:
    """The same without numbers, and what reads them out of files that are there for as long as this is open."""
    with on_disk(tiny_model(dropout, tied=variant in TIED)) as folder:
        model = without_numbers(folder, compute_dtype if lora else torch.float32)
        assert model is not None
        settle(model)
        names, places, base = parameter_names(model), plan_slices(model, stored_tensors(folder)), cast(nn.Module, model)
        assert isinstance(places, dict), places
        with standing_in(base):
            loss = tiny_loss(
                lora=lora,
                dropout=dropout,
                compute_dtype=compute_dtype,
                variant=variant,
                dora=dora,
                chunk=chunk,
                base=base,
            )
        fill_added_rows(loss.model, places)
        yield loss, slice_reader(loss, names, places)


def make_arena(folder: Path, documents: int = 60, seed: int = 0) -> TokenArena:
    """Documents of 3 to 40 tokens that repeat themselves, so there is something to learn; loss on their second half."""
    random = np.random.default_rng(seed)
    with ArenaWriter(folder) as writer:
        for _ in range(documents):
            length = int(random.integers(3, 41))
            ids = (random.integers(0, 8) * 8 + np.arange(length) % int(random.integers(2, 8))).astype(np.int32)
            writer.add(ids, np.arange(length) >= length // 2, None)
        return writer.close({})


def make_data(folder: Path) -> Path:
    """The arenas of both splits, in ``folder``."""
    make_arena(folder / "train")
    make_arena(folder / "validation", documents=12, seed=9)
    return folder


def with_data(folder: Path, data: Path) -> Path:
    """A run folder with links to the arenas in ``data``, so that several runs see the same data."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / split).symlink_to(data / split)
    return folder


def schedule_for(arena: TokenArena, *, world_size: int, packs: int, epochs: float, max_steps: int | None) -> Schedule:
    """A schedule of ``packs`` per step of 96 tokens each."""
    options = ScheduleOptions(
        capacity=CAPACITY,
        seed=3,
        epochs=epochs,
        max_steps=max_steps,
        world_size=world_size,
        accumulation=packs // world_size,
    )
    return training_schedule(arena.lengths, arena.targets, options)


def make_source(
    folder: Path, ranks: Ranks, *, packs: int, epochs: float = 3.0, max_steps: int | None = None
) -> TrainingBatches:
    """The batches of this rank out of the arena in ``folder``."""
    arena = TokenArena.open(folder / "train")
    plan = schedule_for(arena, world_size=ranks.world_size, packs=packs, epochs=epochs, max_steps=max_steps)
    return TrainingBatches(arena, plan, capacity=96, rank=ranks.rank, device=ranks.device, pad_token_id=0)


def tiny_strategy(
    ranks: Ranks,
    *,
    lora: bool,
    dropout: float = 0.0,
    lr: float = 2e-3,
    clip_norm: float = 0.5,
    weight_decay: float = 0.01,
    dtype: torch.dtype = torch.float32,
    kind: StrategyName | None = None,
    variant: Variant = "plain",
    dora: bool = False,
    reshard: bool = True,
    reduce_every: bool = False,
    together: int | None = None,
    gather: bool = True,
    accumulation: int = 1,
    keep_whole_below: int = 0,
    offload: bool = False,
    sliced: bool = False,
) -> tuple[Strategy, PackedLoss]:
    """A prepared strategy (None: single or ddp, by the number of ranks) around the tiny model, and its loss module."""
    chunk = (
        CAPACITY if kind == "zero3" else 16
    )  # a rank that projects more often than another would wait for it forever
    given: dict[str, Any] = {"lora": lora, "dropout": dropout, "compute_dtype": dtype, "variant": variant}
    given |= {"dora": dora, "chunk": chunk}
    kind = kind or ("single" if ranks.world_size == 1 else "ddp")
    with tiny_loss_in_slices(**given) if sliced else nullcontext((tiny_loss(**given), None)) as (loss, read):
        sharding = Sharding(
            layers=decoder_layer_modules(inner_model(loss.model)),
            reshard_after_forward=reshard,
            reduce_every_micro_batch=reduce_every,
            gather_for_generation=gather,
            ranks=together,
            offload=offload,
            read=read,
        )
        strategy = make_strategy(
            kind,
            ranks,
            dtype=dtype,
            clip_norm=clip_norm,
            sharding=sharding,
            zero=zero_spec(kind, ranks, accumulation=accumulation, keep_whole_below=keep_whole_below, offload=offload),
            gather_for_generation=gather,
            read=read,
        )
        strategy.prepare(
            loss, lambda module: make_optimizer(module, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
        )
    return strategy, loss


def zero_spec(
    kind: StrategyName, ranks: Ranks, *, accumulation: int, keep_whole_below: int, offload: bool
) -> ZeroSpec | None:
    """What DeepSpeed divides under ``kind``; None under the other strategies."""
    if kind not in STAGES:
        return None
    stage = STAGES[kind]
    return ZeroSpec(
        stage=stage,
        world_size=ranks.world_size,
        accumulation=accumulation,
        keep_whole_below=keep_whole_below if stage == 3 else 0,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One start of a tiny training run. ``kill_at``: SIGKILL to this process in that step, before it is recorded.

    ``stop_at``, ``pause_at``: SIGTERM, SIGSTOP to one rank there; ``poison_at``: its loss is not a number there.
    ``sliced``: no rank has the whole base; fsdp and zero3 read it from files.
    """

    folder: str
    lora: bool = False
    dropout: float = 0.0
    world_size: int = 1
    strategy: StrategyName | None = None
    variant: Variant = "plain"
    dora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    reshard: bool = True
    reduce_every: bool = False
    together: int | None = None
    keep_whole_below: int = 0
    offload: bool = False
    sliced: bool = False
    packs: int = 2
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-3
    clip_norm: float = 0.5
    validate_every: int = 4
    patience: int | None = None
    min_improvement: float = 0.0
    metric: str = "loss"
    keep: int = 2
    kill_at: int = 0
    stop_at: int = 0
    stop_rank: int = 0
    poison_at: int = 0
    poison_rank: int = 0
    nonfinite: NonFiniteAction = "stop"
    asynchronous: bool = True
    pause_at: int = 0
    pause_rank: int = 0
    hang_timeout: float = 0.0


def train_run(
    run: Run, ranks: Ranks, *, on_record: Callable[[StepRecord], None] = lambda _: None
) -> tuple[Strategy, TrainState, list[str]]:
    """Train as ``run`` says, from its newest checkpoint if it has one; returns also the warnings."""
    folder = Path(run.folder)
    warnings: list[str] = []
    source = make_source(folder, ranks, packs=run.packs, epochs=run.epochs, max_steps=run.max_steps)
    strategy, _ = tiny_strategy(
        ranks,
        lora=run.lora,
        dropout=run.dropout,
        lr=run.lr,
        clip_norm=run.clip_norm,
        dtype=torch_dtype(run.dtype),
        kind=run.strategy,
        variant=run.variant,
        dora=run.dora,
        reshard=run.reshard,
        reduce_every=run.reduce_every,
        together=run.together,
        accumulation=run.packs // run.world_size,
        keep_whole_below=run.keep_whole_below,
        offload=run.offload,
        sliced=run.sliced,
    )
    fence = claim_together(ranks, folder / "checkpoints")

    def newest() -> Checkpoint | None:
        return find_agreed(
            ranks,
            folder / "checkpoints",
            lambda: find_resumable(folder / "checkpoints", identity=IDENTITY, base=BASE, warn=warnings.append),
        )

    found = newest()
    state = TrainState() if found is None else load(strategy, found)
    metrics = MetricsFile(folder / "metrics.jsonl", still_ours=fence.check, warn=warnings.append)
    if ranks.is_first:
        metrics.continue_after(state.step - (state.pending is not None))
    stop = StopFlag()
    verified: set[int] = set()

    def validate() -> Mapping[str, float]:
        held_out = TokenArena.open(folder / "validation")
        batches = held_out_batches(
            held_out,
            capacity=CAPACITY,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            pad_token_id=0,
        )
        return {"loss": held_out_loss(strategy.inner, batches, ranks.sum_over_ranks).mean}

    def record(step: StepRecord, figures: Mapping[str, float]) -> None:
        on_record(step)
        if ranks.is_first:
            metrics.append(step, figures)

    def delete_old(state: TrainState) -> None:
        verified.add(state.step)
        retain(fence, keep=run.keep, best=state.best.step, verified=verified)

    saver = Saver(
        strategy,
        fence,
        ranks.aside() if run.asynchronous else None,
        identity=IDENTITY,
        base=BASE,
        before=metrics.sync,
        after=delete_old,
        warn=warnings.append,
    )

    def roll_back() -> TrainState | None:
        saver.finish()
        older = newest()
        return None if older is None else load(strategy, older)

    calls = iter(range(state.step * (run.packs // run.world_size), 10**9))

    def interfere(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if not strategy.inner.training:
            return output
        step, micro = divmod(next(calls), run.packs // run.world_size)
        step += 1
        if step == run.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == run.stop_at and ranks.rank == run.stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == run.pause_at and micro == 0 and ranks.rank == run.pause_rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        if step == run.poison_at and ranks.rank == run.poison_rank:
            return output * float("nan")
        return output

    strategy.inner.register_forward_hook(interfere)
    lr = lr_schedule("cosine", steps=source.num_steps, warmup=0.1)
    settings = Settings(
        seed=5,
        lr=lambda step: run.lr * lr(step),
        validate_every=run.validate_every,
        save_every=run.validate_every,
        judge=Judge(metric=run.metric, patience=run.patience, min_improvement=run.min_improvement),
        policy=FaultPolicy(nonfinite=run.nonfinite),
    )
    watchdog = Watchdog(folder / "signs", ranks.rank, ranks.world_size, timeout=run.hang_timeout)

    def boundary(phase: str, step: int) -> None:
        watchdog.enter(phase, step)
        saver.check()

    hooks = Hooks(
        validate=validate,
        save=lambda state, required: saver.save(state, required=required),
        record=record,
        warn=warnings.append,
        boundary=boundary,
        rollback=roll_back,
    )
    with stop, watchdog.watching() if run.hang_timeout else nullcontext():
        try:
            state = train(strategy, source, settings, hooks, state, stop)
        finally:
            saver.leave()
    return strategy, state, warnings


def weights_of(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters."""
    return {name: parameter.detach().clone() for name, parameter in strategy.trainable.items()}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Rank:
    """A started rank and the file that has its output."""

    process: BaseProcess
    log: Path


def start(run: Run, *, file_limit: int = 0) -> list[Rank]:
    """Start the ranks of ``run``, each a process of its own with torchrun's variables.

    They are forked from a server that has imported torch and transformers once; nothing was computed in it.
    ``file_limit``: largest file in bytes that they may write, 0: any.
    """
    return start_calls(partial(_train_run, run), Path(run.folder), run.world_size, file_limit=file_limit)


def start_calls(call: Callable[[Ranks], None], folder: Path, world_size: int, *, file_limit: int = 0) -> list[Rank]:
    """Start ranks that each do ``call``, a function of a module that another process finds; logs go to ``folder``."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train_fixtures"])
    # Python 3.11's server does not get our sys.path, and what it cannot import it leaves out without a word.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # noqa: TID251
        forkserver.ensure_running()
    started: list[Rank] = []
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    for rank in range(world_size):
        named = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        log = folder / f"rank{rank}.log"
        process = context.Process(target=_be_rank, args=(call, world_size, named, log, file_limit))
        process.start()
        started.append(Rank(process, log))
    return started


def wait_until_paused(rank: Rank) -> None:
    """Wait until a started rank has been stopped (SIGSTOP); its end counts as a failure."""
    stat = Path(f"/proc/{rank.process.pid}/stat")
    while stat.read_text().rpartition(") ")[2][0] != "T":
        rank.process.join(0.02)
        assert rank.process.exitcode is None, rank.log.read_text()


def finish(ranks: Sequence[Rank]) -> list[tuple[int, str]]:
    """Exit code and output of every rank. When one was killed, the others are ended, as the launcher does."""
    ended: list[tuple[int, str]] = []
    for rank in ranks:
        if any(code < 0 for code, _ in ended):
            rank.process.kill()
        rank.process.join(300)
        if rank.process.exitcode is None:
            rank.process.kill()
            raise TimeoutError(f"a rank hangs: {rank.log.read_text()}")
        ended.append((rank.process.exitcode, rank.log.read_text()))
    return ended


def run_ranks(run: Run, *, file_limit: int = 0) -> list[tuple[int, str]]:
    """Start ``run`` and wait for its end."""
    return finish(start(run, file_limit=file_limit))


def run_calls(call: Callable[[Ranks], None], folder: Path, world_size: int = 2) -> list[tuple[int, str]]:
    """Have ``world_size`` ranks do ``call`` and wait for their end."""
    return finish(start_calls(call, folder, world_size))


def _train_run(run: Run, ranks: Ranks) -> None:
    train_run(run, ranks)


def _be_rank(
    call: Callable[[Ranks], None], world_size: int, variables: Mapping[str, str], log: Path, file_limit: int
) -> None:
    """One rank, in its own process; the exit code is that of the error, as in the worker."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)  # noqa: TID251  (what a launcher does)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    def body() -> None:
        ranks = start_ranks(device="cpu", world_size=world_size, threads=1)
        try:
            call(ranks)
        finally:
            ranks.close()

    sys.exit(run_and_report(body))
