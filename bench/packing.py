"""Planning of packs: time beside TRL's packer and a plain copy, and how full the packs are.

    python bench/packing.py [--documents 10000000] [--rounds 5] [--capacity 8192] [--lengths chat]

All are timed in turn in one process on one core, in CPU time, so that a busy machine slows all of them alike; medians
and ratios are printed. The copy moves 16 bytes a document, about what any planner must: read lengths, write ids, and
each once more. TRL gets tokens of one byte, so that little but its planning is timed, and fewer documents, because it
takes ten seconds for a million. Below the times: the share of the capacity in use, against the fewest packs possible.
"""

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from synthetic import LENGTHS, lower_bound

from trainer_kernels import pack
from trainer_kernels.order import DOCUMENTS, permuted

Algorithm = Literal["rfc", "ffd", "bfd"]
TRL_DOCUMENTS = 20_000
FILLS = (("chat", 4096), ("chat", 8192), ("chat", 32768), ("short", 4096), ("long_mix", 32768), ("uniform", 4096))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, all threads."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def in_turn(works: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per document, ``rounds`` of each, one after the other; the first call of all is not counted."""
    for _, work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (count, work) in works.items():
            times[name].append(cpu_seconds(work) / count * 1e9)
    return times


def trl_packer(lengths: NDArray[np.int32], capacity: int) -> Callable[[], object]:
    """TRL's default packing of these documents, groups of 1000 rows as it makes them."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl.data_utils import pack_dataset

    disable_progress_bar()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int8)))
    rows = Dataset(pa.table({"input_ids": tokens}))
    return lambda: pack_dataset(rows, capacity, strategy="bfd", map_kwargs={"load_from_cache_file": False})


def time_planners(kind: str, documents: int, capacity: int, rounds: int) -> None:
    """Print the table of times."""
    lengths = LENGTHS[kind](documents, capacity, 0)
    some = LENGTHS[kind](min(documents, TRL_DOCUMENTS), capacity, 1)
    source, copy = np.ones(2 * documents, np.int64), np.zeros(2 * documents, np.int64)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy of 16 bytes a document": (documents, lambda: np.copyto(copy, source)),
        "order of documents alone": (documents, lambda: permuted(documents, 0, 0, DOCUMENTS)),
    }
    for algorithm in get_args(Algorithm):
        works[algorithm] = (documents, lambda algorithm=algorithm: pack(lengths, capacity, algorithm=algorithm))
    works["TRL pack_dataset, bfd"] = (len(some), trl_packer(some, capacity))
    taken = in_turn(works, rounds)
    times = {name: median(values) for name, values in taken.items()}
    memory, trl = times["copy of 16 bytes a document"], times["TRL pack_dataset, bfd"]
    print(f"{documents:,} documents, {kind}, capacity {capacity}, median of {rounds}")
    print(f"{'':30}{'ns/document':>12}{'ms for all':>12}{'(least)':>9}{'x copy':>9}{'TRL x':>9}")
    for name, value in times.items():
        all_ms, least_ms = value * documents / 1e6, min(taken[name]) * documents / 1e6
        print(f"{name:30}{value:12.1f}{all_ms:12.0f}{least_ms:9.0f}{value / memory:9.1f}{trl / value:9.1f}")


def print_fills(documents: int) -> None:
    """Print how many packs more than the fewest possible each algorithm makes."""
    print(f"\nfewest packs possible / packs made, in percent, {documents:,} documents")
    print(f"{'':20}" + "".join(f"{algorithm:>10}" for algorithm in get_args(Algorithm)))
    for kind, capacity in FILLS:
        lengths = LENGTHS[kind](documents, capacity, 0)
        bound = lower_bound(lengths, capacity)
        shares = [100 * bound / len(pack(lengths, capacity, algorithm=name)) for name in get_args(Algorithm)]
        print(f"{kind + ' ' + str(capacity):20}" + "".join(f"{share:10.3f}" for share in shares))


def main() -> None:
    """Run everything."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--documents", type=int, default=10_000_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--capacity", type=int, default=8192)
    arguments.add_argument("--lengths", choices=sorted(LENGTHS), default="chat")
    given = arguments.parse_args()
    print(f"{platform.processor() or platform.machine()}, CPU time\n")
    time_planners(given.lengths, given.documents, given.capacity, given.rounds)
    print_fills(min(given.documents, 1_000_000))


if __name__ == "__main__":
    main()
