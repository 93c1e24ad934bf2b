"""How many positions of a pack are projected to the vocabulary at once, and what that costs."""

from typing import Literal

from trainer.memory.shape import ModelShape

LOSS_CHUNK = 1024
LOGITS_AT_ONCE = 2**30


def loss_chunk(strategy: str, device: Literal["cpu", "cuda"], capacity: int, vocabulary: int) -> int:
    """Return how many positions of a pack are projected to the vocabulary at once.

    On a GPU as many as have ``LOGITS_AT_ONCE`` bytes of 16-bit logits: large products, and a small part of its memory.
    Under zero3 all: it gathers the output layer for each chunk, and ranks whose packs have other numbers of chunks
    would wait for each other forever.
    """
    if strategy == "zero3":
        return capacity
    return max(LOSS_CHUNK, LOGITS_AT_ONCE // (2 * vocabulary)) if device == "cuda" else LOSS_CHUNK


def loss_bytes(shape: ModelShape, *, chunk: int, tokens: int, size: int, compiled: bool, head_trained: bool) -> int:
    """Bytes at the largest moment of the loss of a pack of ``tokens`` targets, ``chunk`` of them at a time.

    Eager, the probabilities, their gradient and that of the logits are there together, in float32; compiled, logits
    and their gradient in the compute dtype of ``size`` bytes. A trained output layer has its gradient made with each
    chunk: the sum over the chunks, and one chunk's in the compute dtype and in float32.
    """
    positions = min(chunk, tokens)
    logits = positions * shape.vocabulary * (2 * size if compiled else 12)
    head = 0
    if head_trained:
        of_chunk = 4 if size == 4 else 4 + size
        head = shape.vocabulary * shape.hidden * (of_chunk + (4 if tokens > chunk else 0))
    return logits + head
