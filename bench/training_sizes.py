"""How much a study of packers trains, by what it begins with and where it runs."""

from dataclasses import dataclass
from typing import Literal

from licence_texts import Start

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a study trains: results of another size are other results.

    ``layers``, ``width``, ``vocabulary``: of a Llama from scratch, or 0. ``rank``: of LoRA on the built-in model, or 0;
    its layers from ``first_layer`` on have one.
    ``capacity``: tokens in a pack. ``packs``: per optimizer step. ``tokens``: trained on in one run, in ``epochs``
    passes. ``held_out``: most tokens the loss is measured on. ``lr``: the highest of a cosine.
    """

    layers: int = 0
    width: int = 0
    vocabulary: int = 0
    rank: int = 0
    first_layer: int = 0
    capacity: int
    packs: int
    tokens: int
    epochs: int
    held_out: int
    lr: float


SIZES: dict[tuple[Start, Device], Size] = {
    ("scratch", "cpu"): Size(
        layers=2,
        width=128,
        vocabulary=4096,
        capacity=512,
        packs=8,
        tokens=300_000,
        epochs=1,
        held_out=60_000,
        lr=1.5e-3,
    ),
    ("scratch", "cuda"): Size(
        layers=8,
        width=512,
        vocabulary=8192,
        capacity=4096,
        packs=8,
        tokens=15_000_000,
        epochs=2,
        held_out=500_000,
        lr=1.5e-3,
    ),
    ("builtin", "cpu"): Size(
        rank=8, first_layer=15, capacity=512, packs=4, tokens=24_000, epochs=1, held_out=8_000, lr=2e-3
    ),
    ("builtin", "cuda"): Size(rank=16, capacity=4096, packs=8, tokens=4_000_000, epochs=1, held_out=500_000, lr=5e-4),
}


GPU_TOKENS = SIZES["builtin", "cuda"].tokens
