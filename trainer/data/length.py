"""What happens to documents longer than a pack: applied once, to token ranges, counted, never left to a later stage.

A document that is cut silently may lose its whole answer and train nothing. Here every cut is a view
``(start, length, muted)`` on the document's tokens, a view without a target is left out, and a document without any
view is counted with its file and line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.dropped import SHOWN, Leftovers
from trainer.errors import ConfigError, DataError
from trainer.samples import Dropped, TokenizedExample

OverLong = Literal["error", "drop", "truncate", "split"]
View = tuple[int, int, int]
"""``(start, length, muted)``: tokens ``start .. start+length`` of the document, the first ``muted`` without loss."""

TOO_LONG = "longer than packing.capacity"
NO_TARGET = "no token to learn"
CUT_AWAY = "no token to learn is left after cutting to packing.capacity"

_ROUND = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """``views``: one list per document, empty where it is left out. ``over_long``: documents above the capacity.

    ``truncated``: of those, cut at the end; ``chunks``: views made of split ones.
    """

    views: list[list[View]]
    dropped: list[Dropped]
    over_long: int
    truncated: int
    chunks: int


def fit_length(examples: Sequence[TokenizedExample], *, capacity: int, over_long: OverLong, overlap: int) -> Fitted:
    """Apply the over-long policy to ``examples``.

    ``split`` makes chunks of ``capacity`` tokens, each of which repeats the last ``overlap`` tokens of the one before
    it as context without loss, so that every target is learnt exactly once.

    Raises:
        DataError: a document is longer than ``capacity`` and the policy is ``error``.
        ConfigError: ``overlap`` does not fit into ``capacity``, with the policy ``split``.
    """
    if over_long == "split" and not 1 <= overlap < capacity:
        raise ConfigError(
            "the overlap does not fit into a pack",
            where="data.split_overlap",
            got=overlap,
            allowed=f"1 to {capacity - 1} (below packing.capacity)",
            do="at least one token is needed: a chunk's first token has nothing before it to be predicted from",
        )
    long = [at for at, example in enumerate(examples) if len(example.input_ids) > capacity]
    if long and over_long == "error":
        raise _too_long(examples, long, capacity)
    leftovers = Leftovers()
    views = [_views(example, capacity, over_long, overlap, leftovers) for example in examples]
    return Fitted(
        views=views,
        dropped=leftovers.report(),
        over_long=len(long),
        truncated=sum(bool(views[at]) for at in long) if over_long == "truncate" else 0,
        chunks=sum(len(views[at]) for at in long) if over_long == "split" else 0,
    )


def targets_of(loss_mask: NDArray[np.bool_], view: View) -> int:
    """Count the tokens of ``view`` that are learnt; its first one has nothing before it to be predicted from."""
    start, length, muted = view
    return int(np.count_nonzero(loss_mask[start + max(1, muted) : start + length]))


def _views(
    example: TokenizedExample, capacity: int, over_long: OverLong, overlap: int, leftovers: Leftovers
) -> list[View]:
    length = len(example.input_ids)
    fits = length <= capacity
    if not fits and over_long == "drop":
        leftovers.add(TOO_LONG, str(example.origin), f"{length} tokens")
        return []
    whole = fits or over_long == "truncate"
    planned = [(0, min(length, capacity), 0)] if whole else _chunks(length, capacity, overlap)
    views = [view for view in planned if targets_of(example.loss_mask, view) > 0]
    if not views:
        leftovers.add(NO_TARGET if fits else CUT_AWAY, str(example.origin), f"{length} tokens")
    return views


def _chunks(length: int, capacity: int, overlap: int) -> list[View]:
    starts = range(0, length - overlap, capacity - overlap)
    return [(start, min(capacity, length - start), overlap if start else 0) for start in starts]


def _too_long(examples: Sequence[TokenizedExample], long: Sequence[int], capacity: int) -> DataError:
    longest = max(len(examples[at].input_ids) for at in long)
    enough = -(-longest // _ROUND) * _ROUND
    shown = ", ".join(f"{examples[at].origin} has {len(examples[at].input_ids)} tokens" for at in long[:SHOWN])
    rest = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    rows = "1 row is" if len(long) == 1 else f"{len(long)} rows are"
    return DataError(
        f"{rows} longer than a pack",
        where="packing.capacity",
        got=f"{shown}{rest}; the longest has {longest}",
        allowed=f"at most {capacity} tokens",
        do=f"packing.capacity={enough}, or data.over_long=drop (leave them out), truncate (cut the end, where answers "
        f"often are) or split (chunks that overlap by data.split_overlap)",
    )
