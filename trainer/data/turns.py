"""Reads the turns of a conversation and its tools out of whatever JSON a row holds, strictly.

Separate from ``formats.py`` because a turn is read in the same way whichever column it comes from. Keys that would
change what is to be learnt (weights, reasoning, images) are refused, because ignoring them would train something else
than the row says; keys that only annotate are ignored and counted.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trainer.samples import Message

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that data sets use, and the role that chat templates know."""

_READ = frozenset({"role", "from", "content", "value", "tool_calls", "name"})
_CHANGES_MEANING = {
    "weight": (None, 1, 1.0),
    "train": (None, True, 1),
    "mask": (None, False, 0),
    "reasoning_content": (None, ""),
    "reasoning": (None, ""),
    "thinking": (None, ""),
    "function_call": (None, ""),
    "images": (None, []),
    "audio": (None, []),
}
"""Keys of a message that say what to learn, and the values with which they say nothing new."""


class RowFault(Exception):
    """This row cannot be used. ``reason`` is the same for all rows of a kind; ``detail`` speaks of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def text_of(value: Any, column: str, missing: str) -> str:
    """Return the text of a column; numbers are allowed, empty text is not.

    Raises:
        RowFault: ``missing`` when there is none; another reason when it is not a text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowFault(missing, f"'{column}' is empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowFault(f"'{column}' is not a text", f"got {type(value).__name__}")
    return str(value)


def messages_of(value: Any, column: str, ignored: Counter[str]) -> tuple[Message, ...]:
    """Read a list of turns, given as such or as JSON text; ``ignored`` counts keys that were not used.

    Raises:
        RowFault: it is not a list of turns, a role is unknown, a system turn is not the first, or a turn holds what
            cannot be trained on.
    """
    turns = _parsed(value, column)
    if turns is None or turns == []:
        raise RowFault("no turns", f"'{column}' is empty")
    if not isinstance(turns, list):
        raise RowFault(f"'{column}' is not a list of turns", f"got {type(turns).__name__}")
    messages = tuple(_message(turn, ignored) for turn in turns)
    if any(message.role == "system" for message in messages[1:]):
        raise RowFault("a system turn comes after another turn")
    return messages


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read the descriptions of tools (JSON schemas), given as a list or as JSON text.

    Raises:
        RowFault: it is not a list of objects.
    """
    tools = _parsed(value, "tools")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("'tools' is not a list of objects", f"got {str(value)[:60]}")
    return tuple(tools)


def _parsed(value: Any, column: str) -> Any:
    """Parse JSON text, the form in which CSV and many Parquet files keep nested values."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as fault:
        raise RowFault(f"'{column}' is a text that is not JSON", str(fault)) from None


def _message(turn: Any, ignored: Counter[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowFault("a turn is not an object with role and content", f"got {str(turn)[:60]}")
    said = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if said == "function_call":
        return Message(role="assistant", content="", tool_calls=_calls(content))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise RowFault("unknown role", f"{said!r}, known are {', '.join(ROLES)}, function_call")
    for key, value in turn.items():
        if key in _CHANGES_MEANING and value not in _CHANGES_MEANING[key]:
            raise RowFault(f"a turn has '{key}', which this version cannot train on", f"got {str(value)[:60]}")
        if key not in _READ and key not in _CHANGES_MEANING and value is not None:
            ignored[key] += 1
    calls = _calls(turn.get("tool_calls"))
    if calls and role != "assistant":
        raise RowFault("tool calls in a turn that is not the assistant's", f"role {role}")
    return Message(role=role, content=_content(content), tool_calls=calls, name=str(turn.get("name") or ""))


def _content(content: Any) -> str:
    """Return the text of a turn; a list of parts is joined when all of them are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    raise RowFault("the content of a turn is not text", f"got {str(content)[:60]}")


def _calls(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read tool calls as ``{"type": "function", "function": {"name", "arguments"}}`` with parsed arguments.

    Arguments come as an object or as JSON text; templates write objects as JSON themselves, so text would be quoted
    twice.
    """
    parsed = _parsed(value, "tool_calls")
    if parsed is None or parsed == []:
        return ()
    listed = parsed if isinstance(parsed, list) else [parsed]
    calls: list[Mapping[str, Any]] = []
    for call in listed:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault("a tool call has no function name", f"got {str(call)[:60]}")
        arguments = _parsed(function.get("arguments"), "arguments")
        calls.append(
            {
                "type": "function",
                "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
            }
        )
    return tuple(calls)
