"""The types that flow from a data file to the loss and to the evaluation, in the order in which a sample takes them.

    Record -> Conversation -> TokenizedExample -> (arena) -> PackedBatch        training and validation loss
                           -> EvaluationExample -> Prediction -> EvaluationRecord   generation and scores

A reader follows these types instead of dictionaries of guesses. ``TokenArena`` and ``PackedBatch`` come from
``trainer_kernels``. Everything here is plain data: no torch, no transformers, so the driver may read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record came from: ``file`` as the user named it, ``row`` counted from 1 (the line, in text formats)."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Record:
    """One row as read, before anybody interpreted it."""

    fields: Mapping[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. ``content`` may be empty for an assistant turn that only calls tools.

    ``tool_calls`` and ``name`` are handed to the chat template as they are.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One training or evaluation item with known roles.

    A plain text is a conversation with ``text`` set and no messages. ``answer`` is what a scorer compares with: the
    last assistant turn unless the row names one. ``slices`` are the columns that results are broken down by.
    """

    id: str
    origin: Origin
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    answer: str = ""
    label: str = ""
    group: str = ""
    slices: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedExample:
    """``input_ids`` int32[n]; ``loss_mask`` bool[n]: True where the token itself is to be learnt (not shifted)."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationExample:
    """A held-out item: ``prompt_ids`` end with the template's generation prompt, ``answer`` is the reference text."""

    id: str
    prompt_ids: list[int]
    answer: str
    label: str = ""
    slices: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model generated for one evaluation example. ``stopped``: it ended with a stop token, not by length."""

    id: str
    text: str
    token_ids: list[int]
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One model on the frozen test split: ``metrics`` of all ``rows``; ``by_slice``: column -> value -> the same.

    ``loss`` is nats per target token over ``targets`` tokens (None: not measured); ``seconds`` is wall time.
    """

    task: str
    rows: int
    metrics: dict[str, float]
    by_slice: dict[str, dict[str, dict[str, float]]]
    loss: float | None
    targets: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Rows left out for one reason, with the first few of them as ``file:row``."""

    reason: str
    count: int
    first: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """One data source as used: for lineage, the card and the report."""

    name: str
    location: str
    sha256: str
    rows: int
    revision: str = ""
    license: str = ""
    attribution: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One split after all filters. ``arena`` is the folder of its TokenArena; the counts are of that arena."""

    rows: int
    documents: int
    tokens: int
    targets: int
    longest: int
    arena: str
    arena_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The base model as used: ``directory`` is what transformers loads; ``sha256`` covers weights and tokenizer.

    ``added_tokens``: ids that were added to its vocabulary; then ``published`` is the folder without them, else "".
    """

    name: str
    directory: str
    revision: str
    sha256: str
    license: str
    attribution: str
    parameters: int
    published: str = ""
    added_tokens: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """``prepared.json``: all that the ranks need to know of the data and the base, fixed before any rank starts.

    ``tokenizer`` is a folder with the tokenizer and the chat template that were used. ``validation_examples`` and
    ``test_examples`` are JSON-lines files of ``EvaluationExample`` ("" when there is none). ``dtype`` is the resolved
    compute dtype ("float32", "bfloat16", "float16"). ``cost_ratio``: by how much packs are filled by time and not by
    tokens (``data/timing.py``), 0: by tokens. ``inputs`` is the digest of everything this depends on.
    """

    format: int
    inputs: str
    base: BaseModel
    tokenizer: str
    dtype: str
    dtype_reason: str
    pad_token_id: int
    stop_token_ids: list[int]
    labels: list[str]
    train: SplitInfo
    validation: SplitInfo | None
    test: SplitInfo | None
    validation_examples: str
    test_examples: str
    splits_file: str
    splits_sha256: str
    sources: list[SourceInfo]
    dropped: list[Dropped]
    truncated: int
    sample: str
    cost_ratio: float = 0.0
