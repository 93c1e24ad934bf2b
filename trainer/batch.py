"""One packed micro-batch on the device: what ``data`` makes, what ``model`` and ``train`` consume.

It is below both of them, so that neither has to know the other. Labels are already shifted: nobody below the collator
moves them again.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """``k`` documents in a row of ``T`` tokens.

    ``input_ids``, ``labels``, ``position_ids``: int64 [1, T]; ``labels[0, t]`` is the token after position ``t`` when
    that is to be learnt, else -100. ``cu_seqlens``: int32 [k+1] on the device; ``boundaries``: the same numbers on the
    host. A padded tail is the last segment. ``max_seqlen``: longest segment. ``num_tokens`` and ``num_targets`` count
    without padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    boundaries: tuple[int, ...]
    max_seqlen: int
    num_tokens: int
    num_targets: int
