"""Whole training steps on one GPU beside TRL's SFTTrainer: packed, the same attention kernel, Liger on their side.

    python bench/gpu_step.py [--steps 14] [--rounds 2] [--cases full:32768 lora:16384] [--layers 16]

A Llama of 1.24 B parameters with random weights (vocabulary 128256) on 6000 documents of random tokens, lognormal
lengths (median 350, up to 4096). Both sides see the same documents and run in turn, each as a process of its own. Ours
is what a run does: `TrainingBatches`, `PackedLoss`, the strategy and `train_step`. TRL gets packing (bfd), its Liger
losses and layers, a fused optimizer, and our document boundaries for the same `varlen_attn`, which it cannot use alone.
Real tokens only are counted; the first steps are left out. Sides: `ours`, `ours-eager` (nothing compiled),
`ours-profile` (prints where the time goes), `trl` (weights and AdamW's moments in bfloat16, which loses small updates),
`trl-float32` (as ours, and as its own default).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_STEPS = 4
DOCUMENTS = 6000
VOCABULARY = 128256


def main() -> None:
    """Measure all cases in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=["full:32768", "lora:16384"])
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, method, capacity = arguments.one.split(":")
        result = SIDES[side](method, int(capacity), arguments.steps, arguments.layers)
        print(json.dumps(result))
        return
    for case in arguments.cases:
        rates: dict[str, list[float]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                result = in_process_of_its_own(side, case, arguments.steps, arguments.layers)
                rates[side].append(result["rate"])
                print(
                    f"{case:12s} {side:14s} {result['rate']:9,.0f} tokens/s  peak {result['peak_gib']:.1f} GiB",
                    flush=True,
                )
        if {"ours", "trl"} <= set(rates):
            ratio = statistics.median(rates["ours"]) / statistics.median(rates["trl"])
            print(f"{case:12s} ours / TRL: {ratio:.3f}", flush=True)


def in_process_of_its_own(side: str, case: str, steps: int, layers: int) -> dict[str, float]:
    """Run one side in a fresh process and read its figures."""
    command = [sys.executable, __file__, "--one", f"{side}:{case}", "--steps", str(steps), "--layers", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{case} {side}: failed with {done.returncode}")
        return {"rate": float("nan"), "peak_gib": float("nan")}
    return json.loads(done.stdout.strip().splitlines()[-1])


def documents() -> list[np.ndarray]:
    """The rows of both sides: random ids, lengths as chat data has them."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(350), 1.0, DOCUMENTS), 16, 4096).astype(np.int32)
    return [random.integers(10, VOCABULARY, length).astype(np.int32) for length in lengths]


def llama(layers: int, dtype: Any, attention: str) -> Any:
    """1.24 B parameters, on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(dtype)


def ours(
    method: str, capacity: int, steps: int, layers: int, *, compiled: bool = True, profiled: bool = False
) -> dict[str, float]:
    """Median real tokens per second of our steps."""
    import torch

    from trainer.data.batches import TrainingBatches
    from trainer.data.scheduling import ScheduleOptions, training_schedule
    from trainer.distributed.ranks import start_ranks
    from trainer.distributed.strategy import make_strategy
    from trainer.memory import loss_chunk
    from trainer.model.adapters import attach_lora
    from trainer.model.attention import IMPLEMENTATION, register
    from trainer.model.compiling import compile_layers
    from trainer.model.loss import PackedLoss
    from trainer.train.loop import train_step
    from trainer.train.metrics import StepTimer
    from trainer.train.optim import make_optimizer
    from trainer_kernels import ArenaWriter

    register()
    ranks = start_ranks(device="cuda", world_size=1)
    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = llama(layers, dtype, IMPLEMENTATION)
    if method == "lora":
        model = attach_lora(model, rank=16, alpha=32)
    if compiled:
        compile_layers(model)
    chunk = loss_chunk("single", "cuda", capacity, VOCABULARY)
    loss = PackedLoss(model, chunk=chunk, compute_dtype=torch.bfloat16, compiled=compiled)
    strategy = make_strategy("single", ranks, dtype=torch.bfloat16, clip_norm=1.0)
    strategy.prepare(
        loss, lambda module: make_optimizer(module, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "arena"
        with ArenaWriter(path) as writer:
            for ids in documents():
                writer.add(ids, np.arange(len(ids)) > 0)
            arena = writer.close()
        plan = training_schedule(arena.lengths, arena.targets, ScheduleOptions(capacity=capacity, max_steps=steps))
        source = TrainingBatches(arena, plan, capacity=capacity, rank=0, device=ranks.device, pad_token_id=0)
        loss.train()
        rates: list[float] = []
        with source.ahead(0) as load, kernels(profiled) as table:
            for planned in source.steps(0):
                torch.cuda.synchronize()
                began = time.perf_counter()
                outcome = train_step(
                    strategy, source, planned, load, lr=1e-5, seed=0, stop=lambda: False, timer=StepTimer()
                )
                torch.cuda.synchronize()
                rates.append(outcome.tokens / (time.perf_counter() - began))
                table.step()
    return figures(rates)


class NoTable:
    """Stands in for the profiler."""

    def step(self) -> None:
        """Nothing."""


@contextmanager
def kernels(wanted: bool) -> Iterator[Any]:
    """Print where the time of three steps goes, kernel by kernel, if ``wanted``."""
    if not wanted:
        yield NoTable()
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    when = schedule(wait=WARM_UP_STEPS + 1, warmup=1, active=3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], schedule=when) as found:
        yield found
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=80)
    print(table, file=sys.stderr)


def trl(method: str, capacity: int, steps: int, layers: int, *, weights: str = "bfloat16") -> dict[str, float]:
    """Median real tokens per second of TRL's steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from trainer.model import builtin
    from trainer.model.attention import IMPLEMENTATION, MARKER_SHAPE, register

    register()
    model = llama(layers, getattr(torch, weights), IMPLEMENTATION)
    clock: dict[str, list[float]] = {"tokens": [], "seconds": []}

    class Timer(TrainerCallback):
        """Times the optimizer steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            clock["seconds"].append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(builtin.tiny(Path(scratch), []))
        config = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            max_length=capacity,
            packing=True,
            bf16=True,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            use_liger_kernel=True,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": ids.tolist()} for ids in documents()]),
            processing_class=tokenizer,
            peft_config=adapter if method == "lora" else None,
            callbacks=[Timer()],
        )
        collate = trainer.data_collator

        def with_boundaries(features: list[dict[str, Any]]) -> Any:
            batch = collate(features)
            starts = torch.nonzero(batch["position_ids"][0] == 0)[:, 0]
            total = batch["input_ids"].shape[1]
            boundaries = torch.cat([starts, torch.tensor([total])]).to(torch.int32)
            longest = int(boundaries.diff().max())
            clock["tokens"].append(total)
            batch["attention_mask"] = torch.ones(MARKER_SHAPE, dtype=torch.bool)
            batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            batch |= {"max_length_q": longest, "max_length_k": longest}
            return batch

        trainer.data_collator = with_boundaries
        trainer.train()
    return figures([tokens / seconds for tokens, seconds in zip(clock["tokens"], clock["seconds"], strict=False)])


def figures(rates: list[float]) -> dict[str, float]:
    """Median without the warm-up, and the peak of this process."""
    import torch

    return {"rate": statistics.median(rates[WARM_UP_STEPS:]), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


SIDES = {
    "ours": ours,
    "ours-eager": partial(ours, compiled=False),
    "ours-profile": partial(ours, profiled=True),
    "trl": trl,
    "trl-float32": partial(trl, weights="float32"),
}

if __name__ == "__main__":
    main()
