"""The beginning that all prompts share, computed once.

Evaluation prompts of one task begin alike: the same system prompt, the same instruction, the same list of labels. For
the built-in clause task that is 107 of 180 tokens of a prompt. Its keys and values do not depend on what follows, so
they are made once, in a batch of one, and every batch of prompts starts from a copy.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from trainer.model.adapters import inner_model

SHORTEST = 16
"""A shorter beginning is not worth a forward pass of its own."""


class SharedPrefix:
    """Keys and values of the token ids that a number of prompts begin with; of none where nothing can be shared."""

    def __init__(self, ids: Sequence[int], cache: DynamicCache | None) -> None:
        self.ids = list(ids) if cache is not None else []
        self._cache = cache

    def for_rows(self, rows: int) -> DynamicCache | None:
        """A copy for a batch of ``rows``, that ``generate`` may add to; None when nothing is shared."""
        if self._cache is None:
            return None
        own = copy.deepcopy(self._cache)
        own.batch_repeat_interleave(rows)
        return own


def shared_prefix(
    model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device | str, *, shortest: int = SHORTEST
) -> SharedPrefix:
    """Compute what all of ``prompts`` (token ids) begin with; call it where they will be answered: same mode, autocast.

    Nothing is shared when the common beginning has fewer than ``shortest`` tokens, or when padding between it and the
    rest of a row would change the answers: the model takes no ``position_ids``, or a layer does not keep keys and
    values of all tokens (sliding windows). At least one token of every prompt is left over.
    """
    ids, inner = common_beginning(prompts), inner_model(model)
    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    if len(prompts) < 2 or len(ids) < shortest or not takes_positions:
        return SharedPrefix([], None)
    cache = DynamicCache(config=inner.config)
    row = torch.tensor([ids], dtype=torch.int64, device=device)
    with torch.no_grad():
        cast(nn.Module, inner.get_decoder())(input_ids=row, past_key_values=cache, use_cache=True)
    whole = all(type(layer) is DynamicLayer and layer.get_seq_length() == len(ids) for layer in cache.layers)
    return SharedPrefix(ids, cache if whole and cache.layers else None)


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The token ids that all prompts begin with, and that leave at least one token of each."""
    if not prompts:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in sorted order these two differ first
    most = min(len(prompt) for prompt in prompts) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return first[:same]


def padded_prompts(
    prompts: Sequence[Sequence[int]], prefix: Sequence[int], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``prompts`` as rows of one width and their attention mask, both int64 [rows, width].

    The padding stands left of a row's own tokens and right of ``prefix``, with which every prompt begins.
    """
    width, shared = max(len(prompt) for prompt in prompts), len(prefix)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = width - (len(prompt) - shared)
        input_ids[row, :shared] = torch.tensor(prefix, dtype=torch.int64)
        input_ids[row, start:] = torch.tensor(prompt[shared:], dtype=torch.int64)
        attention_mask[row, :shared] = attention_mask[row, start:] = 1
    return input_ids, attention_mask
