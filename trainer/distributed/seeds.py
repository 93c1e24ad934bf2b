"""Noise that does not depend on how many processes there are, nor on where a run was interrupted."""

import random

import numpy as np
import torch


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch (CPU and CUDA) from whole numbers >= 0; other numbers give an unrelated stream.

    The loop calls this before every micro-batch with (seed, step, documents), so dropout noise belongs to the data and
    not to a rank: no random state exists between two micro-batches, a resumed run and a run at another world size draw
    the same noise.
    """
    # NumPy fills up with zeros, so (7,) and (7, 0) would be one seed without the length.
    numbers = (len(parts), *parts)
    # The same words, without the loop in which NumPy looks at each number: a third of the time.
    words = np.array(numbers, np.uint32) if max(numbers) < 2**32 else numbers
    state = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    # torch.manual_seed asks every kind of accelerator, and each that was not started formats a stack: 1.2 ms on a CPU.
    torch.default_generator.manual_seed(state % 2**63)
    if torch.backends.cuda.is_built():
        torch.cuda.manual_seed_all(state % 2**63)
