"""How long ranks wait for the slowest one, with packs by tokens and by time: a simulation, nothing is trained.

    python bench/stragglers.py [--documents 1500000] [--ranks 8 64 512] [--capacity 32768] [--picture FILE]

The schedules are those of a run; only the time of a pack is the model's: ``n + b / a * n**2`` for a document of n
tokens, with b / a of an 8 B Llama in full fine-tuning. Printed is the share of the time that an average rank waits,
over the first 64 steps, where ranks wait for each other in every micro-batch ("micro", sharded weights) or once per
step ("step", replicas). Tokens are packed by `bfd` as well, which is what peers do.

`short tail` has documents up to half a pack, so all of them cost less than a pack may and `packing.cost=time` fills
packs by time. In `long tail` some are as long as a pack and cost more, so packs are filled by tokens and those of a
step are dealt to the ranks by time, which takes several micro-batches to help.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from synthetic import Lengths, lognormal

from trainer.data.scheduling import Algorithm, ScheduleOptions, packs_by_time, training_schedule
from trainer.data.timing import cost_ratio, waiting_share
from trainer.memory import ModelShape
from trainer_kernels import CostModel
from trainer_kernels.schedule import Sync

LLAMA_8B = ModelShape(
    hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256, tied=False,
    max_positions=8192,
)  # fmt: skip
MICRO_BATCHES = 8
"""Of the rows with more than one micro-batch a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A row of the table."""

    name: str
    algorithm: Algorithm
    by_time: bool
    accumulation: int
    sync: Sync


LAYOUTS = (
    Layout(name="tokens, bfd", algorithm="bfd", by_time=False, accumulation=1, sync="micro"),
    Layout(name="tokens, rfc", algorithm="rfc", by_time=False, accumulation=1, sync="micro"),
    Layout(name="packing.cost=time", algorithm="rfc", by_time=True, accumulation=1, sync="micro"),
    Layout(name="tokens, rfc", algorithm="rfc", by_time=False, accumulation=MICRO_BATCHES, sync="micro"),
    Layout(name="packing.cost=time", algorithm="rfc", by_time=True, accumulation=MICRO_BATCHES, sync="micro"),
    Layout(name="tokens, rfc", algorithm="rfc", by_time=False, accumulation=MICRO_BATCHES, sync="step"),
    Layout(name="packing.cost=time", algorithm="rfc", by_time=True, accumulation=MICRO_BATCHES, sync="step"),
)


def waiting(lengths: Lengths, layout: Layout, ranks: Sequence[int], capacity: int, ratio: float) -> list[float]:
    """Share of the time lost at each number of ranks."""
    options = ScheduleOptions(
        capacity=capacity,
        algorithm=layout.algorithm,
        accumulation=layout.accumulation,
        cost_ratio=ratio if layout.by_time else 0.0,
        sync=layout.sync,
    )
    targets = np.ones_like(lengths)
    weights = CostModel(1.0, ratio).weight(lengths)
    return [
        waiting_share(training_schedule(lengths, targets, replace(options, world_size=size)), weights) for size in ranks
    ]


def draw(found: dict[str, dict[Layout, list[float]]], ranks: Sequence[int], path: Path) -> None:
    """A PNG: waiting over the number of ranks, where they wait in every micro-batch."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (kind, rows) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), place)
        for layout, shares in rows.items():
            style = {1: "-", MICRO_BATCHES: "--"}[layout.accumulation]
            if layout.sync == "micro":
                label = f"{layout.name}, {layout.accumulation} micro-batch{'es' if layout.accumulation > 1 else ''}"
                axes.plot(ranks, [100 * share for share in shares], style, marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ranks), [str(size) for size in ranks])
        axes.set_xlabel("ranks")
        axes.set_ylabel("waiting, % of the time")
        axes.set_ylim(bottom=-1)
        axes.set_title(kind, fontsize="small")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="x-small", frameon=False)
    # Without the version of matplotlib in it, the same figures give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--documents", type=int, default=1_500_000)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    arguments.add_argument("--capacity", type=int, default=32768)
    arguments.add_argument("--picture", type=Path, help="a PNG")
    given = arguments.parse_args()
    ratio = cost_ratio(LLAMA_8B, frozen_base=False)
    print(f"{given.documents:,} documents, packs of {given.capacity}, b / a = {ratio:.3g} per token")
    print(f"{'':34}{'micro-batches':>14}{'wait in each':>14}" + "".join(f"{size:>7} ranks" for size in given.ranks))
    found: dict[str, dict[Layout, list[float]]] = {}
    for kind, longest in (("short tail", given.capacity // 2), ("long tail", given.capacity)):
        lengths = lognormal(given.documents, 350, 1.3, longest, np.random.default_rng(0))
        by_time = packs_by_time(lengths, ScheduleOptions(capacity=given.capacity, cost_ratio=ratio))
        for layout in LAYOUTS:
            shares = waiting(lengths, layout, given.ranks, given.capacity, ratio)
            found.setdefault(kind, {})[layout] = shares
            name = f"{kind}: {layout.name}" + (", dealt" if layout.by_time and not by_time else "")
            row = "".join(f"{100 * share:11.2f} %" for share in shares)
            print(f"{name:34}{layout.accumulation:14}{layout.sync:>14}{row}", flush=True)
    if given.picture:
        draw(found, given.ranks, given.picture)


if __name__ == "__main__":
    main()
