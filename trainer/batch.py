"""One packed micro-batch on the device: what ``data`` makes, what ``model`` and ``train`` consume.

It is below both of them, so that neither has to know the other. Labels are already shifted: nobody below the collator
moves them again.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """``k`` segments in a row of ``T`` tokens: documents, and a padded tail, if there is one, as the last.

    ``input_ids``, ``labels``, ``position_ids``: int64 [1, T]; ``labels[0, t]`` is the token after position ``t`` when
    that is to be learnt, else -100. ``boundaries``: where segments begin, and ``T``, k + 1 numbers on the host.
    ``cu_seqlens``: the same as int32 on the device, with repetitions of ``T`` behind them or not. ``max_seqlen``: no
    segment is longer. ``num_tokens`` and ``num_targets`` count without padding.

    On a CPU a row has just the tokens of its documents, ``cu_seqlens`` is ``boundaries``, and ``max_seqlen`` is the
    longest segment. On a GPU shapes do not change from batch to batch, so that what is compiled or captured for one is
    right for all: rows are padded to the packing capacity, ``cu_seqlens`` has one length for the whole run (segments of
    no tokens at its end), and ``max_seqlen`` is rounded up to a power of two, at most ``T``.

    The memory may be written again once the next batch is asked for; who keeps a batch copies it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    boundaries: tuple[int, ...]
    max_seqlen: int
    num_tokens: int
    num_targets: int
