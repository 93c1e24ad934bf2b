"""What saving costs the training, and what verifying costs a resume, at the size of full fine-tuning of 135 M weights.

    python bench/saving.py [--steps 30] [--every 10] [--tokens 768] [--rounds 2] [--folder DIR]

A random Llama of SmolLM2-135M's shape is trained on random tokens (AdamW, float32 masters, 1.6 GB of state), in turn
without saving, with saves that the training waits for and with saves behind it. "blocked" is the time that the
training's thread spends in the save (the wait for the save before it included), as a share of the time of the steps
between two saves; "slower" is what the whole loop takes longer than without saves, which on a CPU includes the cores
that hashing and writing take away. Before it, a checkpoint of 1 GB is verified, beside plain sha256 of its files.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.distributed.ranks import start_ranks
from trainer.distributed.strategy import Strategy, make_strategy
from trainer.fingerprint import file_digest
from trainer.train.checkpoint.behind import Saver
from trainer.train.checkpoint.fence import claim
from trainer.train.checkpoint.format import published, verify
from trainer.train.checkpoint.publish import Channel, publish, retain
from trainer.train.checkpoint.snapshot import Snapshot
from trainer.train.optim import make_optimizer
from trainer.train.state import TrainState

GOAL = 0.05
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class Loss(torch.nn.Module):
    """The model with its summed loss, on targets of an eighth of the positions, as the product computes it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids``: int64 [1, T]. A scalar."""
        hidden = self.model.model(ids).last_hidden_state[0, : ids.shape[1] // 8]
        logits = self.model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1 : len(hidden) + 1], reduction="sum")


def made() -> Strategy:
    """One process and its random model."""
    ranks = start_ranks(device="cuda" if torch.cuda.is_available() else "cpu", world_size=1)
    strategy = make_strategy("single", ranks, dtype=torch.bfloat16, clip_norm=1.0)
    module = Loss(LlamaForCausalLM(LlamaConfig(**SHAPE)))  # type: ignore[arg-type]
    strategy.prepare(module, lambda each: make_optimizer(each, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
    return strategy


def step(strategy: Strategy, ids: torch.Tensor) -> None:
    """One optimizer step."""
    with strategy.micro_batch(last=True), torch.autocast(ids.device.type, torch.bfloat16):
        loss = strategy.module(ids)
    strategy.backward(loss / ids.shape[1])
    float(strategy.clip())
    strategy.step()


def course(
    strategy: Strategy, folder: Path, channel: Channel | None, *, steps: int, every: int, tokens: int
) -> tuple[float, list[float]]:
    """Seconds of ``steps`` steps, and those that each save kept the training; ``every`` 0: no saves."""
    fence = claim(folder)
    saver = Saver(
        strategy,
        fence,
        channel,
        identity="bench",
        base="bench",
        before=lambda: None,
        after=lambda state: (retain(fence, keep=1, best=None, verified={state.step}), None)[1],
        warn=print,
    )
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens), device=strategy.ranks.device)
    step(strategy, ids)
    if every:
        saver.save(TrainState(step=1), required=True)  # host memory is taken once in a run
    blocked: list[float] = []
    start = time.perf_counter()
    for number in range(2, steps + 2):
        step(strategy, ids)
        saver.check()
        if every and number % every == 0:
            before = time.perf_counter()
            saver.save(TrainState(step=number), required=False)
            blocked.append(time.perf_counter() - before)
    seconds = time.perf_counter() - start
    saver.finish()
    return seconds, blocked


def saving(arguments: argparse.Namespace, folder: Path) -> bool:
    """The table; whether the goal is reached."""
    strategy = made()
    numbers = {"steps": arguments.steps, "tokens": arguments.tokens}
    found: dict[str, list[tuple[float, list[float]]]] = {"none": [], "waited for": [], "behind": []}
    for turn in range(arguments.rounds):
        for name, times in found.items():
            channel = strategy.ranks.aside() if name == "behind" else None
            every = 0 if name == "none" else arguments.every
            times.append(course(strategy, folder / f"{name}-{turn}", channel, every=every, **numbers))
    plain = median(seconds for seconds, _ in found["none"])
    print(f"a step: {plain / arguments.steps:.2f} s ({arguments.tokens} tokens, {torch.get_num_threads()} threads)")
    print("saves       | blocked, s each | blocked, % of the steps between | slower, %")
    shares: dict[str, float] = {}
    for name, times in found.items():
        each = median([seconds for _, blocked in times for seconds in blocked] or [0.0])
        shares[name] = each / (plain / arguments.steps * arguments.every)
        slower = median(seconds for seconds, _ in times) / plain - 1
        print(f"{name:11} | {each:15.3f} | {100 * shares[name]:31.2f} | {100 * slower:8.1f}")
    return shares["behind"] < GOAL


def verifying(folder: Path, rounds: int) -> None:
    """A checkpoint of 1 GB: warm files, in turn."""
    fence = claim(folder / "gigabyte")
    tensors = {f"param:{part}": torch.randn(25_000_000) for part in range(10)}
    places = {str(part): (0, 25_000_000, (25_000_000,)) for part in range(10)}
    ranks = start_ranks(device="cpu", world_size=1)
    state = TrainState(step=1)
    publish(ranks, fence, Snapshot(tensors, places, torch.zeros(10)), state, identity="bench", base="bench")
    (path,) = published(fence.directory)
    size = sum(file.stat().st_size for file in path.iterdir())
    times: dict[str, list[float]] = {"verify": [], "sha256": []}
    for _ in range(rounds):
        for name in times:
            start = time.perf_counter()
            if name == "verify":
                verify(path)
            else:
                for file in path.iterdir():
                    file_digest(file)
            times[name].append(time.perf_counter() - start)
    checked, plain = median(times["verify"]), median(times["sha256"])
    print(f"{size / 1e9:.2f} GB: verified in {checked:.2f} s ({size / checked / 1e9:.2f} GB/s), ", end="")
    print(f"sha256 alone {plain:.2f} s: ratio {checked / plain:.3f}")


def main() -> int:
    """Print both; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; none: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        verifying(Path(folder), 2 * arguments.rounds + 1)
        reached = saving(arguments, Path(folder))
    print(f"goal: blocked less than {100 * GOAL:.0f} % by saves behind the training: {'yes' if reached else 'NO'}")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
