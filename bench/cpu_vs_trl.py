"""Training throughput of the built-in job beside TRL's SFTTrainer: what the claim "faster than TRL" rests on.

    python bench/cpu_vs_trl.py [--steps 10] [--rounds 3] [overrides ...]

Both sides train the same rows, base, adapter and precision on the same machine, in turn (ours, TRL padded, TRL packed,
ours, ...), each as a process of its own. Ours is the product: `python -m trainer train +experiment=legal_lora`, read
from its metrics.jsonl. TRL gets its best of two: padded batches grouped by length, and packed rows. Real tokens are
counted on both sides, padding is not; the first steps (warm-up, compilation) are left out; medians and ratios are
printed, and one JSON line for machines. TRL's packed rows attend across documents where flash attention is missing
(it warns), so that row is faster than a correct one would be: it is in TRL's favour.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
LORA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(folder: Path, steps: int, overrides: list[str]) -> float:
    """Median real tokens per second of our training steps; runs the command a user would type."""
    command = [sys.executable, "-m", "trainer", "train", "+experiment=legal_lora", f"run.dir={folder}"]
    command += [f"optim.max_steps={steps}", "eval.every=100000", "checkpoint.every=100000"]
    # No gate, and nearly no validation at the end: neither belongs to the training steps that are measured.
    command += ["eval.max_loss=null", "data.max_validation_rows=8", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_second"] for line in lines[WARM_UP_STEPS:])


def trl(run: Path, steps: int, *, packed: bool, out: Path) -> float:
    """Median real tokens per second of TRL's steps on the rows of the prepared ``run``."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from trainer.model.adapters import parse_layers
    from trainer.plan import load_plan
    from trainer_kernels import TokenArena

    prepared = json.loads((run / "prepared.json").read_text())
    plan = load_plan((run / "plan.json").read_bytes())
    method, capacity = plan.config.method, plan.config.packing.tokens
    arena = TokenArena.open(prepared["train"]["arena"])
    rows: list[dict[str, Any]] = []
    for start, length in zip(arena.starts, arena.lengths, strict=True):
        stored = arena.tokens[start : start + length]
        ids = (stored & 0x7FFFFFFF).tolist()
        rows.append({"input_ids": ids, "completion_mask": (stored >= 0).astype(int).tolist(), "length": len(ids)})
    dtype = getattr(torch, prepared["dtype"])
    model = AutoModelForCausalLM.from_pretrained(prepared["base"]["directory"], dtype=dtype)
    layers = parse_layers(method.layers, model.config.num_hidden_layers) if method.layers else None
    adapter = LoraConfig(
        r=method.rank,
        lora_alpha=int(method.alpha),
        lora_dropout=method.dropout,
        target_modules=LORA_NAMES,
        layers_to_transform=list(layers) if layers is not None else None,
        task_type="CAUSAL_LM",
    )
    # A padded batch of about as many real tokens as one pack, so that both sides do the same work per step.
    batch = max(1, round(capacity / (sum(row["length"] for row in rows) / len(rows))))
    config = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1 if packed else batch,
        gradient_accumulation_steps=1,
        learning_rate=plan.config.optim.lr,
        max_length=capacity,
        packing=packed,
        train_sampling_strategy="random" if packed else "group_by_length",
        length_column_name="length",
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        completion_only_loss=True,
    )
    clock = StepClock()

    class Timer(TrainerCallback):
        """Marks the borders of the optimizer steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(prepared["tokenizer"]),
        peft_config=adapter,
        callbacks=[Timer()],
    )
    collate = trainer.data_collator

    def counting(features: list[dict[str, Any]]) -> Any:
        clock.collated(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    return clock.median()


class StepClock:
    """Seconds and real tokens of each step. Batches are collated one ahead of the step that uses them at most."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.started = 0.0

    def collated(self, tokens: int) -> None:
        """A batch with this many real tokens was made; batches are used in the order in which they are made."""
        self.tokens.append(tokens)

    def begin(self) -> None:
        """A step starts."""
        self.started = time.perf_counter()

    def end(self) -> None:
        """A step ended."""
        self.seconds.append(time.perf_counter() - self.started)

    def median(self) -> float:
        """Median tokens per second without the warm-up steps."""
        rates = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=False)]
        return statistics.median(rates[WARM_UP_STEPS:])


def in_process_of_its_own(kind: str, run: Path, steps: int) -> float:
    """Run one side of TRL in a fresh process and read its figure."""
    command = [sys.executable, __file__, "--one", kind, "--run", str(run), "--steps", str(steps)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.strip().splitlines()[-1])


def main() -> None:
    """Measure all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=["trl_padded", "trl_packed"], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.one:
            packed = arguments.one == "trl_packed"
            print(trl(arguments.run, arguments.steps, packed=packed, out=Path(scratch)))
            return
        rates: dict[str, list[float]] = {"ours": [], "trl_padded": [], "trl_packed": []}
        for turn in range(arguments.rounds):
            folder = Path(scratch) / f"ours-{turn}"
            rates["ours"].append(ours(folder, arguments.steps, arguments.overrides))
            for kind in ("trl_padded", "trl_packed"):
                rates[kind].append(in_process_of_its_own(kind, folder, arguments.steps))
            print(f"round {turn + 1}: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()))
    best = max(("trl_padded", "trl_packed"), key=lambda name: statistics.median(rates[name]))
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[best], strict=True)]
    for name, values in rates.items():
        print(f"{name:11s} {statistics.median(values):8.1f} real tokens/s (median of {len(values)} rounds)")
    print(f"ours / {best}: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    print(json.dumps({"rates": rates, "best_peer": best, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
