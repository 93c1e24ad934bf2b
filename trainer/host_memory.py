"""Main memory of a machine for copies of the state, from which saves behind the training are written.

A copy holds the weights in float32 and AdamW's moments of what is trained. It is taken at the first save, when a run
that dies for it has lost all it did; so it is counted before the start, and where it has no room beside the rest the
training waits for its saves instead. That costs time and is said.
"""

from dataclasses import dataclass
from typing import Literal

from trainer.console import gigabytes
from trainer.memory import MemoryEstimate, StrategyName

STATE_BYTES = 12
"""Of a trained parameter: float32 value and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingRoom:
    """Bytes of main memory on the machine that needs most: ``copies`` alone, ``needed`` with everything else.

    ``there``: what the ranks of a machine may take together; None: nobody knows.
    """

    copies: int
    needed: int
    there: int | None

    @property
    def why_not(self) -> str:
        """Why there is no room for copies, with the figures; empty: there is, or nobody knows."""
        if self.there is None or self.needed <= self.there:
            return ""
        return (
            f"copies of the state ({gigabytes(self.copies)}) do not fit into the main memory: "
            f"{gigabytes(self.needed)} with everything else, {gigabytes(self.there)} there"
        )


def saving_room(
    memory: MemoryEstimate,
    strategy: StrategyName,
    *,
    device: Literal["cpu", "cuda"],
    processes: int,
    owners: int,
    main_memory: int | None,
) -> SavingRoom:
    """What copies need beside what ``memory`` counts for one rank.

    ``processes``: ranks on a machine; ``owners``: ranks among which the state is divided, where it is; replicas are
    copied by rank 0 alone. On a CPU all of a rank is in main memory, else what is offloaded.
    """
    state = STATE_BYTES * memory.trainable
    whole = strategy in ("single", "ddp")
    copies = state if whole else -(-state // owners) * min(owners, processes)
    beside = (memory.peak if device == "cpu" else 0) + memory.offloaded
    return SavingRoom(copies=copies, needed=copies + beside * processes, there=main_memory)
