"""What is written of a step: this rank's fragments, as they are (the training waits) or copied to host memory first.

The copy takes memory bandwidth instead of a disk, so a save beside the training blocks it for that long only. The host
memory is taken once, pinned where the state is on a GPU, and used again by every later save: one save at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.distributed.strategy import Strategy
from trainer.train.checkpoint.format import FragmentInfo


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``tensors``: flat, by ``KIND:NAME``. ``places``: (start, length, shape) by name; ``steps``: in the same order."""

    tensors: Mapping[str, torch.Tensor]
    places: Mapping[str, tuple[int, int, tuple[int, ...]]]
    steps: torch.Tensor | None
    copied: torch.cuda.Event | None = None

    def index(self) -> dict[str, FragmentInfo]:
        """What ``rank{r}.json`` says; waits until a copy from a GPU has arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        steps = [] if self.steps is None else self.steps.tolist()
        return {
            name: FragmentInfo(*place, step) for (name, place), step in zip(self.places.items(), steps, strict=True)
        }


def live_snapshot(strategy: Strategy) -> Snapshot:
    """The fragments themselves: they must not change before they are written."""
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    steps: list[torch.Tensor] = []
    for fragment in strategy.fragments(saving=True):
        tensors |= {f"{kind}:{fragment.name}": flat.detach() for kind, flat in fragment.tensors.items()}
        places[fragment.name] = (fragment.start, fragment.length, fragment.shape)
        steps.append(fragment.step.detach().float().reshape(()))
    return Snapshot(tensors, places, torch.stack(steps) if steps else None)


class HostCopies:
    """Host memory for one copy of what this rank owns; each ``take`` overwrites the one before."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, strategy: Strategy) -> Snapshot:
        """Copy the fragments; on a GPU the copy is only queued, before everything that comes after it."""
        live = live_snapshot(strategy)
        tensors = {name: self._copy(name, tensor) for name, tensor in live.tensors.items()}
        steps = None if live.steps is None else self._copy("", live.steps)
        on_gpu = any(tensor.is_cuda for tensor in live.tensors.values())
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        return Snapshot(tensors, live.places, steps, copied)

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self._tensors.get(name)
        if held is None or held.shape != tensor.shape:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[name] = held
        return held.copy_(tensor, non_blocking=tensor.is_cuda)
