"""Measured peaks of optimizer steps against the estimate that the plan goes by.

    python bench/memory.py [--device cuda] [--cases full:1b:8192 lora:3b:8192:checkpointing ...] [--eager]

Llamas of 1.24 B and 3.21 B weights (the shapes of Llama 3.2, random values) take two optimizer steps of two
micro-batches each, every case in a process of its own, and the table says what torch allocated at most, what
`trainer.memory` had estimated, and the ratio (goal: 0.90 to 1.10). A case is METHOD:SHAPE:TOKENS[:checkpointing]. On
a CPU what torch allocated is read from its profiler, which shows that the plumbing works (`--device cpu --cases
full:tiny:512`); kernels are others there, and layers are eager.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from trainer.console import gigabytes
from trainer.fitting import has_grouped_attention
from trainer.memory import Adapter, MemoryEstimate, ModelShape, estimate, lora_parameters, loss_chunk

Device = Literal["cpu", "cuda"]
CASES = [
    "full:1b:8192", "full:1b:32768:checkpointing", "full:3b:2048", "full:3b:8192:checkpointing",
    "lora:1b:8192", "lora:1b:16384", "lora:3b:8192", "lora:3b:32768:checkpointing",
]  # fmt: skip
RANK = 16
SHAPES = {
    "tiny": ModelShape(
        hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=352, vocabulary=512, tied=True,
        max_positions=0,
    ),
    "1b": ModelShape(
        hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocabulary=128256, tied=True,
        max_positions=0,
    ),
    "3b": ModelShape(
        hidden=3072, layers=28, heads=24, kv_heads=8, head_dim=128, intermediate=8192, vocabulary=128256, tied=True,
        max_positions=0,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A Llama of random weights and how it is trained, with documents of ``document`` tokens in packs of ``tokens``.

    ``targets`` and ``from_layer``: where the adapters are. ``frozen_layers``: full, and the embeddings with them.
    ``backend``: layers compiled by that backend of torch.compile; "": eager.
    """

    shape: ModelShape
    method: Literal["full", "lora"]
    tokens: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Device = "cpu"
    checkpointing: bool = False
    backend: str = ""
    chunk: int = 128
    document: int = 64
    micro_batches: int = 2
    targets: tuple[str, ...] = ("all-linear",)
    from_layer: int = 0
    frozen_layers: int = 0

    def estimated(self) -> MemoryEstimate:
        """What the plan would say."""
        return estimate(
            self.shape,
            method=self.method,
            dtype=self.dtype,
            capacity=self.tokens,
            strategy="single",
            adapter=self._adapter() if self.method == "lora" else None,
            frozen_layers=self.frozen_layers,
            frozen_embeddings=self.frozen_layers > 0,
            lowest_layer=self.from_layer,
            checkpointing=self.checkpointing,
            loss_chunk=self.chunk,
            accumulation=self.micro_batches,
            device=self.device,
            compiled=bool(self.backend),
            repeats_keys=not has_grouped_attention(),
        )

    def _adapter(self) -> Adapter:
        count, targets = self.shape.layers - self.from_layer, list(self.targets)
        weights = lora_parameters(self.shape, rank=RANK, targets=targets, adapted_layers=count)
        linears = frozenset(self.shape.linears) if targets == ["all-linear"] else frozenset(targets)
        return Adapter(rank=RANK, linears=linears, layers=count, parameters=weights)


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--eager", action="store_true", help="layers and loss without torch.compile")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(allocated_in_step(trial_of(arguments.one, arguments.device, eager=arguments.eager))))
        return
    print(f"{'case':32s} {'measured':>10s} {'estimated':>10s} {'ratio':>6s}")
    for case in arguments.cases:
        trial = trial_of(case, arguments.device, eager=arguments.eager)
        measured, expected = in_process_of_its_own(case, arguments.device, eager=arguments.eager), trial.estimated()
        print(table_row(case, measured, expected.step), flush=True)


def trial_of(case: str, device: Device, *, eager: bool) -> Trial:
    """What ``METHOD:SHAPE:TOKENS[:checkpointing]`` means."""
    method, name, tokens, *more = case.split(":")
    if method not in ("full", "lora") or name not in SHAPES or more not in ([], ["checkpointing"]):
        raise SystemExit(f"not a case: {case}; METHOD:SHAPE:TOKENS[:checkpointing], shapes are {', '.join(SHAPES)}")
    shape, on_gpu = SHAPES[name], device == "cuda"
    return Trial(
        shape=shape,
        method=cast(Any, method),
        tokens=int(tokens),
        device=device,
        checkpointing=bool(more),
        backend="inductor" if on_gpu and not eager else "",
        chunk=loss_chunk("single", device, int(tokens), shape.vocabulary) if on_gpu else 128,
        document=512 if on_gpu else 64,
    )


def in_process_of_its_own(case: str, device: Device, *, eager: bool) -> int | None:
    """Bytes at the peak of ``case``, measured in a fresh process; None where it failed."""
    command = [sys.executable, __file__, "--device", device, "--one", case, *(["--eager"] if eager else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else int(json.loads(done.stdout.strip().splitlines()[-1]))


def table_row(case: str, measured: int | None, expected: int) -> str:
    """One line: both figures and estimated over measured."""
    if measured is None:
        return f"{case:32s} {'failed':>10s} {gigabytes(expected):>10s}"
    return f"{case:32s} {gigabytes(measured):>10s} {gigabytes(expected):>10s} {expected / measured:6.3f}"


def make(trial: Trial) -> tuple[Any, Any]:
    """The module that is trained, and a pack in which every position is learnt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.model.adapters import (
        attach_lora,
        decoder_layer_modules,
        enable_activation_checkpointing,
        freeze,
        inner_model,
    )
    from trainer.model.attention import IMPLEMENTATION, register
    from trainer.model.loss import PackedLoss
    from trainer.model.selfcheck import probe_batch

    register()
    shape, dtype = trial.shape, getattr(torch, trial.dtype)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    config._attn_implementation = IMPLEMENTATION
    torch.manual_seed(0)
    with torch.device(trial.device):
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.float32 if trial.method == "full" else dtype)
    if trial.method == "lora":
        layers = range(trial.from_layer, shape.layers)
        model = attach_lora(model, rank=RANK, alpha=2 * RANK, targets=trial.targets, layers=layers)
    else:
        freeze(model, trial.frozen_layers, trial.frozen_layers > 0)
    if trial.checkpointing:
        enable_activation_checkpointing(model)
    if trial.backend:
        for layer in decoder_layer_modules(inner_model(model)):
            layer.compile(backend=trial.backend)
    model.train()
    ids = torch.randint(0, shape.vocabulary, (trial.tokens,)).tolist()
    documents = [ids[start : start + trial.document] for start in range(0, trial.tokens, trial.document)]
    batch = probe_batch(documents, torch.device(trial.device))
    everywhere = replace(batch, labels=batch.input_ids.clone(), num_targets=trial.tokens)
    return PackedLoss(model, chunk=trial.chunk, compute_dtype=dtype, compiled=trial.backend == "inductor"), everywhere


def allocated_in_step(trial: Trial) -> int:
    """Bytes at the peak of an optimizer step, the second one, when AdamW has its state."""
    import torch

    from trainer.train.optim import make_optimizer

    loss, batch = make(trial)
    optimizer = make_optimizer(loss, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def step() -> None:
        for _ in range(trial.micro_batches):
            loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if trial.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loss.parameters()}
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    held = sum(places.values()) + sum(tensor.untyped_storage().nbytes() for tensor in state)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    return held + highest(seen)


def highest(seen: Any) -> int:
    """The most bytes allocated at once while the profiler ``seen`` was looking, over what there was before."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
