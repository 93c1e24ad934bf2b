"""Does it matter for the model which documents share a step? The same training under three packers, several seeds.

    python bench/packing_training.py [--from scratch|builtin] [--seeds 3] [--tokens 1000000] [--packers rfc bfd]
        [--minutes 30]

Licence texts are learnt as plain text, isolated in packs, with a token-weighted loss. All packers of a seed get the
same documents once an epoch, so the same tokens, and the same number of optimizer steps, initial weights and learning
rates; packs are shuffled in every case. Only which documents meet differs:

    rfc           ours: random order, packs closed out of a small pool
    bfd           ours: best-fit decreasing over the whole set
    bfd-grouped   TRL's own `pack_dataset` as it is called by default: best-fit decreasing of every 1000 rows, once

Printed: fill, held-out loss (5 % of the documents, the same ones in every run) before and after training, over seeds
and by length of document, the variance over steps of the mean log-length of a step's documents, and differences within
a seed, with whether they are more than chance makes. Each finished run is a line of `--results`; a study that was
stopped, or that `--minutes` ended after a whole seed, goes on from there. A CPU trains 2 layers of 128 in minutes, a
GPU 8 of 512; `builtin` is LoRA on SmolLM2-135M-Instruct: on a CPU, some thousand tokens on its upper layers.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from licence_texts import Start, documents
from packers import Ids, Packer, Packs, log_length_variance, steps_of
from training_report import Result, plot, summary, table
from training_sizes import GPU_TOKENS, SIZES, Device, Size
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trainer.batch import Batch
from trainer.console import run_and_report
from trainer.data.batches import PlannedStep, TrainingBatches, held_out_batches
from trainer.data.legal.store import installed_digest
from trainer.data.transfer import BatchShape, batch_maker
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import make_strategy
from trainer.evaluate.loss import HeldOutLoss, held_out_loss
from trainer.fingerprint import digest
from trainer.memory import loss_chunk
from trainer.model import builtin
from trainer.model.adapters import attach_lora
from trainer.model.attention import IMPLEMENTATION, register
from trainer.model.loss import PackedLoss
from trainer.model.quiet import without_progress_bars
from trainer.train.loop import train_step
from trainer.train.metrics import StepTimer
from trainer.train.optim import lr_schedule, make_optimizer
from trainer_kernels import PLAN_FORMAT, ArenaWriter, TokenArena

RESULT_FORMAT = 2
"""Raised whenever a result holds other things."""
HELD_OUT = 0.05
LONG, SHORT = 512, 64
"""Documents of at least ``LONG`` tokens are long, below ``SHORT`` short."""


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """The documents of one seed. ``held_out``: by length of the document; the lengths that none has are left out."""

    train: TokenArena
    held_out: dict[str, TokenArena]
    vocabulary: int
    pad: int


# ---- documents


def chosen(lengths: Ids, size: Size, seed: int) -> tuple[Ids, Ids]:
    """Ids of the documents to train on and of the held-out ones, both in random order.

    The split is the same for all seeds, so that the seeds tell how training varies and not what it is measured on.
    """
    order = np.random.default_rng(0).permutation(len(lengths)).astype(np.int32)
    border = max(1, round(HELD_OUT * len(lengths)))
    rest = np.random.default_rng([1, seed]).permutation(order[border:])
    return _up_to(size.tokens // size.epochs, rest, lengths), _up_to(size.held_out, order[:border], lengths)


def _up_to(tokens: int, order: Ids, lengths: Ids) -> Ids:
    """As many documents as fit in ``tokens``, at least one."""
    return order[: max(1, int(np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), tokens, side="right")))]


def prepare(start: Start, size: Size, seed: int, *, cache: Path, folder: Path) -> Data:
    """Cut the documents at the capacity, split them, and write arenas below ``folder``."""
    found = documents(start, size.vocabulary, cache)
    rows = found.cut(size.capacity)
    lengths = np.array([len(row) for row in rows], np.int32)
    train, held_out = chosen(lengths, size, seed)
    buckets = {
        "long": held_out[lengths[held_out] >= LONG],
        "middle": held_out[(lengths[held_out] < LONG) & (lengths[held_out] >= SHORT)],
        "short": held_out[lengths[held_out] < SHORT],
    }
    return Data(
        train=write_arena(folder / "train", [rows[number] for number in train]),
        held_out={
            name: write_arena(folder / name, [rows[number] for number in ids])
            for name, ids in buckets.items()
            if len(ids)
        },
        vocabulary=found.vocabulary,
        pad=found.pad,
    )


def write_arena(path: Path, rows: Sequence[Ids]) -> TokenArena:
    """Documents of which every token but the first is learnt."""
    with ArenaWriter(path) as writer:
        for ids in rows:
            writer.add(ids, np.arange(len(ids)) > 0)
        return writer.close()


# ---- training


def model_of(start: Start, size: Size, vocabulary: int, pad: int, seed: int, cache: Path) -> torch.nn.Module:
    """The model to train; its random weights depend on ``seed`` alone."""
    torch.manual_seed(seed)
    if start == "builtin":
        with without_progress_bars():
            base = AutoModelForCausalLM.from_pretrained(
                builtin.smollm2(cache), dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION
            )
        model = cast(PreTrainedModel, base)
        layers = range(size.first_layer, model.config.num_hidden_layers)
        return attach_lora(model, rank=size.rank, alpha=2 * size.rank, layers=layers)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        num_key_value_heads=max(1, size.width // 64),
        max_position_embeddings=size.capacity,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=pad,
    )
    config._attn_implementation = IMPLEMENTATION
    return LlamaForCausalLM(config)


class Named:
    """Stands in for the batches of a run where the loop wants a name for a pack that went wrong."""

    def describe(self, index: int, rank: int, micro_batch: int) -> str:
        """Which pack."""
        return f"pack {micro_batch + 1} of step {index + 1}"


def planned(steps: Sequence[Packs], arena: TokenArena) -> Iterator[PlannedStep]:
    """``steps`` as the loop wants them."""
    for index, packs in enumerate(steps):
        targets = sum(int(arena.targets[ids].sum(dtype=np.int64)) for ids in packs)
        yield PlannedStep(index=index, num_targets=targets, epoch=0.0, documents=tuple(packs))


def train(
    ranks: Ranks, start: Start, size: Size, data: Data, steps: Sequence[Packs], seed: int, cache: Path
) -> tuple[dict[str, HeldOutLoss], dict[str, HeldOutLoss]]:
    """Train on ``steps`` with the trainer's own loss, optimizer and step; the held-out loss by length of document,
    before and after.
    """
    device = ranks.device
    dtype = torch.float32 if device.type == "cpu" and start == "scratch" else torch.bfloat16
    model = model_of(start, size, data.vocabulary, data.pad, seed, cache)
    kind = "cuda" if device.type == "cuda" else "cpu"
    chunk = loss_chunk("single", kind, size.capacity, data.vocabulary)
    loss = PackedLoss(model, chunk=chunk, compute_dtype=dtype)
    strategy = make_strategy("single", ranks, dtype=dtype, clip_norm=1.0)
    decay = 0.1 if start == "scratch" else 0.0
    strategy.prepare(loss, lambda it: make_optimizer(it, lr=size.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay))
    factor = lr_schedule("cosine", steps=len(steps), warmup=0.05, min_ratio=0.1)
    shape = BatchShape(positions=size.capacity, documents=max(len(ids) for packs in steps for ids in packs))
    maker = batch_maker(data.train, device=device, shape=shape, pad_token_id=data.pad)
    source = cast(TrainingBatches, Named())

    def measure() -> dict[str, HeldOutLoss]:
        return {
            name: held_out_loss(strategy.module, batches(arena, size, ranks, data.pad))
            for name, arena in data.held_out.items()
        }

    before = measure()
    strategy.module.train()
    for step in planned(steps, data.train):
        lr = size.lr * factor(step.index)
        outcome = train_step(
            strategy, source, step, maker.fresh, lr=lr, seed=seed, stop=lambda: False, timer=StepTimer()
        )
        if outcome.fault is not None:
            raise outcome.fault
    return before, measure()


def batches(arena: TokenArena, size: Size, ranks: Ranks, pad: int) -> Iterator[Batch]:
    """Every document of ``arena`` once."""
    return held_out_batches(arena, capacity=size.capacity, rank=0, world_size=1, device=ranks.device, pad_token_id=pad)


# ---- the study


def one_run(
    ranks: Ranks, start: Start, size: Size, data: Data, packer: Packer, seed: int, *, cache: Path, key: str
) -> Result:
    """Pack, train and measure once."""
    lengths = data.train.lengths
    steps = steps_of(packer, lengths, capacity=size.capacity, packs_per_step=size.packs, epochs=size.epochs, seed=seed)
    began = time.perf_counter()
    before, losses = train(ranks, start, size, data, steps, seed, cache)
    count = sum(map(len, steps))
    tokens = size.epochs * int(lengths.sum(dtype=np.int64))
    return Result(
        key=key,
        packer=packer,
        seed=seed,
        documents=len(lengths),
        tokens=tokens,
        steps=len(steps),
        fill=tokens / (count * size.capacity),
        variance=log_length_variance(lengths, steps),
        before=together(before).mean,
        loss=together(losses).mean,
        by_length={name: loss.mean for name, loss in losses.items()},
        held_out=together(losses).targets,
        seconds=round(time.perf_counter() - began, 1),
    )


def together(losses: dict[str, HeldOutLoss]) -> HeldOutLoss:
    """The loss over documents of all lengths."""
    return HeldOutLoss(sum(loss.nll for loss in losses.values()), sum(loss.targets for loss in losses.values()))


def study(
    start: Start,
    size: Size,
    device: Device,
    packers: Sequence[Packer],
    seeds: int,
    *,
    threads: int | None,
    cache: Path,
    results: Path,
    minutes: float | None = None,
) -> list[Result]:
    """The result of every packer and seed: those in the file ``results``, and the others, which are appended to it.

    With ``minutes``, those of the whole seeds that there are when another one would take longer, at least one.
    """
    began = time.perf_counter()
    key = study_key(start, size, device)
    done = read_results(results, key)
    register()
    ranks = start_ranks(device=device, world_size=1, threads=threads)
    for seed in range(seeds):
        missing: list[Packer] = [packer for packer in packers if (packer, seed) not in done]
        if not missing:
            continue
        taken = max((run.seconds for run in done.values()), default=0.0) * len(missing)
        if minutes is not None and seed > 0 and time.perf_counter() - began + taken > 60 * minutes:
            print(f"{seed} of {seeds} seeds: another would end after the {minutes:g} minutes; the same command goes on")
            seeds = seed
            break
        with tempfile.TemporaryDirectory() as folder:
            data = prepare(start, size, seed, cache=cache, folder=Path(folder))
            for packer in missing:
                made = one_run(ranks, start, size, data, packer, seed, cache=cache, key=key)
                done[packer, seed] = made
                append_result(results, made)
                print(
                    f"seed {seed}  {packer:12} {made.loss:.4f} nats/token  {made.steps} steps, {made.tokens:,} tokens, "
                    f"{made.seconds:.0f} s",
                    flush=True,
                )
    return [done[packer, seed] for packer in packers for seed in range(seeds)]


def study_key(start: Start, size: Size, device: Device) -> str:
    """What all results that may be compared have in common."""
    versions = [RESULT_FORMAT, installed_digest(), PLAN_FORMAT, version("trl")]
    return digest([start, asdict(size), device, HELD_OUT, LONG, SHORT, versions])[:16]


def read_results(path: Path, key: str) -> dict[tuple[str, int], Result]:
    """The finished runs of this study by packer and seed."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    found = [Result(**line) for line in lines if line["key"] == key]
    return {(line.packer, line.seed): line for line in found}


def append_result(path: Path, result: Result) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(result)) + "\n")


def device_of(wanted: str) -> Device:
    """The device to train on; ``auto``: a GPU if there is one."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return cast(Device, wanted)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="start", choices=get_args(Start), default="scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="to train on in one run")
    parser.add_argument("--packs", type=int, help="per optimizer step")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--packers", nargs="+", choices=get_args(Packer), default=list(get_args(Packer)))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; otherwise torch's choice")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/trimtab"))
    parser.add_argument("--minutes", type=float, help="no seed is begun, after the first, that would end later")
    parser.add_argument("--results", type=Path, help="JSON lines; otherwise in the cache")
    parser.add_argument("--plot", type=Path, help="a PNG")
    return parser.parse_args()


def main() -> None:
    """Run what is missing and print the tables."""
    given = parsed()
    device, cache = device_of(given.device), given.cache.expanduser()
    changes: dict[str, Any] = {name: getattr(given, name) for name in ("tokens", "packs", "lr")}
    size = replace(SIZES[given.start, device], **{name: value for name, value in changes.items() if value is not None})
    if (given.start, device) == ("builtin", "cpu"):
        print(f"the built-in model on a CPU: {size.tokens:,} tokens a run, where a GPU takes {GPU_TOKENS:,}")
    found = study(
        given.start,
        size,
        device,
        given.packers,
        given.seeds,
        threads=given.threads,
        cache=cache,
        results=given.results or cache / "bench" / "packing_training.jsonl",
        minutes=given.minutes,
    )
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    title = f"{given.start}, {size.packs} packs of {size.capacity} per step, {found[0].tokens:,} tokens, lr {size.lr:g}"
    print(f"\n{title}\n{machine}, {date.today()}\n")
    print(table(found))
    if given.plot:
        plot(found, given.plot, title)
    print(json.dumps({"start": given.start, "device": machine, "size": asdict(size)} | summary(found)))


if __name__ == "__main__":
    sys.exit(run_and_report(main))
