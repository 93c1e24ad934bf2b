"""Which tokens end an answer, and which one pads: chosen once, so that no stop token is ever masked away as padding.

Many models pad with their end-of-text token. A trainer that masks padding by id then never teaches them to stop. Here
masks go by position, and besides a token is chosen for padding that ends nothing, wherever the tokenizer has one.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from trainer.errors import ModelError

_PAD_LIKE = re.compile(r"pad|reserved|unused|endoftext", re.IGNORECASE)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the strings that the tokenizer reads as one control token each."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset({*added, *tokenizer.all_special_tokens})


def require_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-text token.

    Raises:
        ModelError: the tokenizer has none, so a plain text would have no end to learn.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError(
            "the tokenizer has no end-of-text token",
            where=str(tokenizer.name_or_path),
            got="eos_token: null",
            do="set eos_token in the model's tokenizer_config.json",
        )
    return end


def stop_tokens(tokenizer: PreTrainedTokenizerBase, supervised: Sequence[int]) -> list[int]:
    """Return the ids that end generation: those that end an answer in the training rows, then end-of-text.

    ``supervised`` are the last tokens of the answers. End-of-text also stops where the template never writes it: a
    model falls back to it.
    """
    end = tokenizer.eos_token_id
    return list(dict.fromkeys([*supervised, *([end] if isinstance(end, int) else [])]))


def pad_token(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    """Choose the token for padding: the tokenizer's own unless it stops, else another control token, else the own.

    Preferred are tokens named for it (pad, reserved, unused, endoftext), then ``unk``, then ``bos``. Where every
    control token stops, padding stays what it was; the mask is by position, so nothing is lost.
    """
    own = tokenizer.pad_token_id
    if isinstance(own, int) and own not in stops:
        return own
    added = tokenizer.added_tokens_decoder.items()
    named = [at for at, token in added if token.special and _PAD_LIKE.search(token.content) and at not in stops]
    others = [at for at in (tokenizer.unk_token_id, tokenizer.bos_token_id) if isinstance(at, int) and at not in stops]
    found = next(iter([*named, *others]), None)
    if found is not None:
        return found
    return own if isinstance(own, int) else require_end_token(tokenizer)
