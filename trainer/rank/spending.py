"""The ledger of a rank: which GPU it holds, and which rank of a machine tells what its processors used."""

import time

import psutil
import torch

from trainer.console import warn
from trainer.cost.book import Book
from trainer.cost.gpu import read_gpus
from trainer.cost.power import GpuMeter, Sockets
from trainer.distributed.ranks import Ranks, launched_as
from trainer.paths import RunFolder


def open_book(folder: RunFolder, ranks: Ranks) -> Book:
    """Begin the ledger of this rank; called when the ranks have met."""
    is_first_here = launched_as().local_rank == 0
    sockets = Sockets()
    gpu, meter = "", None
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        gpu, meter = properties.name, GpuMeter(str(properties.uuid), read_gpus)
    return Book(
        folder.rank_ledger(ranks.rank),
        rank=ranks.rank,
        gpu=gpu,
        meter=meter,
        sockets=sockets if sockets.are_readable and is_first_here else None,
        told_by_another=sockets.are_readable and not is_first_here,
        lived=time.time() - psutil.Process().create_time(),
        warn=warn if ranks.is_first else lambda _: None,
    )
