"""The tables of docs/which_layout.md, from the estimator: `python bench/which_layout.py` prints them anew.

    python bench/which_layout.py [--write]

No GPU is needed. `--write` puts them into the page; a test compares the page with what is printed here.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.config import Config
from trainer.console import gigabytes
from trainer.fitting import Candidate, Case, Considered, candidates, choose, components, memory_of
from trainer.memory import ModelShape

PAGE = Path(__file__).parent.parent / "docs/which_layout.md"
Method = Literal["full", "lora"]
CAPACITY, BATCH_PACKS = 4096, 64
MAIN_MEMORY = 10**12
A_MACHINE = 8


def llama(hidden: int, layers: int, heads: int, head_dim: int, intermediate: int, *, tied: bool) -> ModelShape:
    """A Llama with 8 key heads and its vocabulary of 128,256."""
    return ModelShape(
        hidden=hidden, layers=layers, heads=heads, kv_heads=8, head_dim=head_dim, intermediate=intermediate,
        vocabulary=128256, tied=tied, max_positions=131072,
    )  # fmt: skip


MODELS = {
    "1 B": llama(2048, 16, 32, 64, 8192, tied=True),
    "3 B": llama(3072, 28, 24, 128, 8192, tied=True),
    "8 B": llama(4096, 32, 32, 128, 14336, tied=False),
    "70 B": llama(8192, 80, 64, 128, 28672, tied=False),
}
CASES = [
    ("1 B", 24, 1), ("1 B", 80, 1), ("3 B", 24, 8), ("3 B", 80, 1),
    ("8 B", 24, 1), ("8 B", 40, 8), ("8 B", 80, 1), ("8 B", 80, 8),
    ("8 B", 141, 1), ("8 B", 40, 64), ("70 B", 80, 8), ("70 B", 141, 64),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What ``parallel=auto`` does: ``taken``, None where nothing fits, after all of ``seen``."""

    case: Case
    taken: Candidate | None
    seen: Sequence[Considered]


def case_of(model: str, gigabytes_each: int, gpus: int, method: Method) -> Case:
    """``method`` on ``model`` with so many GPUs of so many 10^9 bytes, eight in a machine of 10^12 bytes."""
    config = Config()
    config.method.name = method
    config.packing.capacity = CAPACITY
    return Case(
        config=config,
        shape=MODELS[model],
        device="cuda",
        processes=min(gpus, A_MACHINE),
        world_size=gpus,
        accumulation=BATCH_PACKS // gpus,
        dtype="bfloat16",
        room=gigabytes_each * 10**9,
        main_room=MAIN_MEMORY,
    )


def answer(case: Case) -> Answer:
    """What is taken for ``case``."""
    options = candidates(
        case.config, world_size=case.world_size, accumulation=case.accumulation, device="cuda", deepspeed=True
    )
    taken, seen = choose(case, options)
    return Answer(case=case, taken=taken, seen=seen)


def choices() -> Iterator[str]:
    """The table of 12 cases, full and LoRA."""
    yield "| model | GPUs | all weights | LoRA, rank 16 |"
    yield "|---|---|---|---|"
    for model, each, gpus in CASES:
        found = [in_words(answer(case_of(model, each, gpus, method))) for method in ("full", "lora")]
        yield f"| {model} | {gpus} x {each} GB | " + " | ".join(found) + " |"


def in_words(found: Answer) -> str:
    """``fsdp (43.1 GB)``, or the smallest layout that did not fit."""
    if found.taken is not None:
        return f"{found.taken.label} ({gigabytes(found.seen[-1].needed)})"
    best = min(found.seen, key=lambda entry: entry.needed)
    return f"**does not fit**: {best.label} needs {gigabytes(best.needed)}"


def parts() -> Iterator[str]:
    """Components of a rank's memory on 8 GPUs, under every layout."""
    columns = ["model, method", "layout", "weights", "copies", "gradients", "optimizer", "activations", "loss or layer"]
    columns += ["gathered, buckets", "step", "loading"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for model in ("1 B", "8 B", "70 B"):
        for method in ("full", "lora"):
            case = case_of(model, 80, A_MACHINE, method)
            for candidate in shown(case):
                yield f"| {model}, {method} | {candidate.label} | " + " | ".join(cells(case, candidate)) + " |"


def shown(case: Case) -> list[Candidate]:
    """The layouts of the table: one process, and on eight GPUs ddp, ZeRO and fsdp, and fsdp with checkpointing."""
    asked = case.config.parallel
    names: list[Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]] = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
    found = [Candidate(strategy="single", parallel=asked)]
    found += [Candidate(strategy=name, parallel=replace(asked, name=name)) for name in names]
    return [*found, replace(found[-1], checkpointing=True)]


def cells(case: Case, candidate: Candidate) -> list[str]:
    """Figures of one row, in 10^9 bytes; batches are less than a tenth of one and left out."""
    memory = memory_of(case, candidate)
    assert memory is not None
    sizes = [size for name, size in components(memory) if name != "batches"]
    return [f"{size / 1e9:.1f}" for size in (*sizes, memory.step, memory.loading)]


def page_with(text: str) -> str:
    """``text`` of the page with both tables put in anew, between their marks."""
    for name, table in (("choices", choices()), ("parts", parts())):
        body = f"<!-- {name} -->\n" + "\n".join(table) + f"\n<!-- end of {name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> None:
    """Print both tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print("\n".join([*choices(), "", *parts()]))


if __name__ == "__main__":
    main()
