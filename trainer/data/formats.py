"""Rows of any known shape become conversations with known roles, and a row of an unknown shape is told so at once.

People's files name the same three things differently. The shape is recognised once per file from its columns (or
named by ``data.format``), never guessed per row, so that a row lacking its answer is reported as that and not taken for
something else. Nothing is filled in: what a row lacks is a reason to leave it out, counted and listed by file and line.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from trainer.data.dropped import Leftovers
from trainer.data.turns import RowFault, messages_of, text_of, tools_of
from trainer.errors import DataError, nearest
from trainer.samples import Conversation, Dropped, Message, Record


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of rows: the columns that tell it, those it may have besides, and how the turns are read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str


SHAPES: tuple[Shape, ...] = (
    Shape("messages", ("messages",), ("tools", "system"), '{"messages": [{"role": "user", "content": "..."}, ...]}'),
    Shape(
        "sharegpt",
        ("conversations",),
        ("tools", "system"),
        '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    ),
    Shape("prompt_completion", ("prompt", "completion"), ("tools", "system"), '{"prompt": "...", "completion": "..."}'),
    Shape(
        "alpaca",
        ("instruction", "output"),
        ("input", "history", "system"),
        '{"instruction": "...", "input": "...", "output": "..."}',
    ),
    Shape("text", ("text",), (), '{"text": "..."}'),
)
"""In the order in which they are tried: Alpaca files may have a ``text`` column too, ``messages`` ones a ``prompt``."""

COMMON = ("id", "answer")
"""Columns that every shape may have: a name for the row, and what a scorer compares with."""

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("message", "chat", "dialog", "dialogue", "turns", "conversation"),
    "conversations": (),
    "prompt": ("question", "query", "input", "instruction", "user", "source", "premise", "clause"),
    "completion": ("answer", "response", "reply", "output", "assistant", "target", "summary", "label", "chosen"),
    "instruction": (),
    "output": (),
    "text": ("content", "body", "document", "article", "raw", "passage"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """What the config says of rows; the fields are those of ``data`` of the same name."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    system: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    slice_columns: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Formatted:
    """Rows as conversations. ``shapes``: file to the shape it was read as; ``ignored``: unused keys of messages."""

    conversations: list[Conversation]
    dropped: list[Dropped]
    shapes: dict[str, str]
    ignored: list[str]


def format_rows(records: Sequence[Record], options: RowOptions) -> Formatted:
    """Turn ``records`` into conversations; rows that lack something are left out and counted.

    Raises:
        DataError: the columns of a file fit no known shape, a column of the config does not exist, or no row is left.
    """
    _check_column_names(options)
    shapes = _shapes_of_files(records, options)
    leftovers = Leftovers()
    ignored: Counter[str] = Counter()
    conversations: list[Conversation] = []
    for record in records:
        try:
            conversations.append(_conversation(record, shapes[record.origin.file], options, ignored))
        except RowFault as fault:
            leftovers.add(fault.reason, str(record.origin), fault.detail)
    if records and not conversations:
        raise _nothing_left(records, leftovers)
    return Formatted(
        conversations=conversations,
        dropped=leftovers.report(),
        shapes={file: shape.name for file, shape in shapes.items()},
        ignored=[f"{key} ({count} times)" for key, count in ignored.most_common()],
    )


def recognise(columns: Collection[str], options: RowOptions, *, where: str = "") -> Shape:
    """Name the shape of rows with these ``columns``, or the one that the config names.

    Raises:
        DataError: none fits; the message shows the columns, the known shapes and the mapping that comes nearest.
    """
    named = options.format
    candidates = SHAPES if named == "auto" else tuple(shape for shape in SHAPES if shape.name == named)
    for shape in candidates:
        if all(options.columns.get(name, name) in columns for name in shape.required):
            return shape
    known = "; ".join(f"{shape.name}: {shape.example}" for shape in candidates)
    what = (
        "the columns fit no known shape of rows" if named == "auto" else f"the columns do not fit data.format={named}"
    )
    raise DataError(
        what,
        where=where,
        got=", ".join(sorted(columns)) or "no columns",
        allowed=known,
        do=_nearest_mapping(columns, candidates),
    )


def unique_ids(groups: Sequence[Sequence[Conversation]]) -> list[list[Conversation]]:
    """Make ids unique over all ``groups`` by adding file and line to those that occur more than once."""
    counts = Counter(item.id for group in groups for item in group)
    return [
        [replace(item, id=f"{item.id} ({item.origin})") if counts[item.id] > 1 else item for item in group]
        for group in groups
    ]


def _check_column_names(options: RowOptions) -> None:
    known = sorted({*COMMON, *(name for shape in SHAPES for name in (*shape.required, *shape.optional))})
    for name in options.columns:
        if name not in known:
            raise DataError(
                f"data.columns maps '{name}', which no shape of rows has",
                where=f"data.columns.{name}",
                got=name,
                allowed=", ".join(known),
                do=nearest(name, known) or "write the name used here first, then the column's: {prompt: question}",
            )


def _shapes_of_files(records: Sequence[Record], options: RowOptions) -> dict[str, Shape]:
    columns: dict[str, dict[str, None]] = {}
    for record in records:
        columns.setdefault(record.origin.file, {}).update(dict.fromkeys(record.fields))
    for file, present in columns.items():
        for where, name in _named_columns(options):
            if name not in present:
                raise DataError(
                    f"there is no column '{name}'",
                    where=f"{file} ({where})",
                    got=", ".join(sorted(present)),
                    do=nearest(name, list(present)) or f"name an existing column in {where}",
                )
    return {file: recognise(present, options, where=file) for file, present in columns.items()}


def _named_columns(options: RowOptions) -> Iterable[tuple[str, str]]:
    yield from ((f"data.columns.{name}", column) for name, column in options.columns.items())
    if options.label_column is not None:
        yield "data.label_column", options.label_column
    if options.group_column is not None:
        yield "data.group_column", options.group_column
    yield from (("data.slice_columns", name) for name in options.slice_columns)


def _nearest_mapping(columns: Collection[str], candidates: Sequence[Shape]) -> str:
    """Propose ``data.columns`` for the shape that needs the fewest renamed columns and can be filled."""
    best: dict[str, str] | None = None
    lower = {column.lower(): column for column in columns}
    for shape in candidates:
        mapping: dict[str, str] = {}
        for name in shape.required:
            free = {key: column for key, column in lower.items() if column not in mapping.values()}
            column = _column_for(name, free)
            if column is None:
                break
            mapping[name] = column
        else:
            if best is None or len(mapping) > len(best):
                best = mapping
    if best is None:
        return "rename the columns, or map them: data.columns={prompt: your_column, completion: your_other_column}"
    pairs = ", ".join(f"{name}: {column}" for name, column in best.items() if name != column)
    return f"if that is what they hold: 'data.columns={{{pairs}}}'"


def _column_for(name: str, free: Mapping[str, str]) -> str | None:
    for candidate in (name, *_OTHER_NAMES[name]):
        if candidate in free:
            return free[candidate]
    close = get_close_matches(name, list(free), n=1, cutoff=0.75)
    return free[close[0]] if close else None


def _conversation(record: Record, shape: Shape, options: RowOptions, ignored: Counter[str]) -> Conversation:
    def value(name: str) -> Any:
        return record.fields.get(options.columns.get(name, name))

    identity = value("id")
    common = {
        "id": str(identity) if identity not in (None, "") else str(record.origin),
        "origin": record.origin,
        "label": _plain(record.fields.get(options.label_column)) if options.label_column else "",
        "group": _plain(record.fields.get(options.group_column)) if options.group_column else "",
        "slices": {name: _plain(record.fields.get(name)) for name in options.slice_columns},
    }
    if shape.name == "text":
        text = text_of(value("text"), "text", "no text")
        return Conversation(**common, text=text, answer=_plain(value("answer")))
    messages = _READERS[shape.name](value, ignored)
    messages = _with_system(messages, value("system") if "system" in shape.optional else None, options.system)
    tools = tools_of(value("tools")) if "tools" in shape.optional else ()
    final = _last_answer(messages)
    return Conversation(**common, messages=messages, tools=tools, answer=_plain(value("answer")) or final.content)


def _messages(value: Callable[[str], Any], ignored: Counter[str]) -> tuple[Message, ...]:
    return messages_of(value("messages"), "messages", ignored)


def _sharegpt(value: Callable[[str], Any], ignored: Counter[str]) -> tuple[Message, ...]:
    return messages_of(value("conversations"), "conversations", ignored)


def _prompt_completion(value: Callable[[str], Any], ignored: Counter[str]) -> tuple[Message, ...]:
    prompt, completion = value("prompt"), value("completion")
    before = (
        messages_of(prompt, "prompt", ignored)
        if isinstance(prompt, list)
        else (Message(role="user", content=text_of(prompt, "prompt", "no prompt")),)
    )
    after = (
        messages_of(completion, "completion", ignored)
        if isinstance(completion, list)
        else (Message(role="assistant", content=text_of(completion, "completion", "no answer")),)
    )
    return before + after


def _alpaca(value: Callable[[str], Any], ignored: Counter[str]) -> tuple[Message, ...]:
    del ignored
    instruction = text_of(value("instruction"), "instruction", "no prompt")
    given = _plain(value("input"))
    earlier: list[Message] = []
    for pair in value("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowFault("'history' is not a list of [question, answer] pairs", f"got {str(pair)[:60]}")
        earlier.append(Message(role="user", content=text_of(pair[0], "history", "no prompt")))
        earlier.append(Message(role="assistant", content=text_of(pair[1], "history", "no answer")))
    return (
        *earlier,
        Message(role="user", content=f"{instruction}\n\n{given}" if given.strip() else instruction),
        Message(role="assistant", content=text_of(value("output"), "output", "no answer")),
    )


_READERS: dict[str, Callable[[Callable[[str], Any], Counter[str]], tuple[Message, ...]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}


def _with_system(messages: tuple[Message, ...], of_row: Any, of_config: str | None) -> tuple[Message, ...]:
    """Put the row's own system prompt in front, else the config's; a system turn among the messages is left alone."""
    if messages[0].role == "system":
        return messages
    prompt = _plain(of_row) or of_config
    return (Message(role="system", content=prompt), *messages) if prompt else messages


def _last_answer(messages: tuple[Message, ...]) -> Message:
    """Return the last assistant turn.

    Raises:
        RowFault: there is none, or an assistant turn neither says nor calls anything.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowFault("no answer", f"roles are {', '.join(message.role for message in messages)}")
    if any(not message.content.strip() and not message.tool_calls for message in answers):
        raise RowFault("no answer", "an assistant turn is empty")
    return answers[-1]


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _nothing_left(records: Sequence[Record], leftovers: Leftovers) -> DataError:
    return DataError(
        "no row can be used",
        where=records[0].origin.file,
        got="; ".join(f"{item.reason}: {item.count} rows ({', '.join(item.first)})" for item in leftovers.report()),
        allowed="; ".join(f"{shape.name}: {shape.example}" for shape in SHAPES),
        do="give each row an answer in one of these shapes, or map the columns with data.columns",
    )
