"""Small pieces of Markdown, and the escaping of text that comes from data: a label must not become a link or a tag."""

from collections.abc import Mapping, Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def escape(text: str) -> str:
    """Text from data on one line, without meaning to Markdown or HTML."""
    flat = " ".join(text.split())
    for sign, instead in _ESCAPES.items():
        flat = flat.replace(sign, instead)
    return flat


def code(text: str) -> str:
    """Text from data between backticks, which know no escapes."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


_ESCAPES: Mapping[str, str] = {
    "\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "*": "\\*", "[": "\\[", "]": "\\]", "`": "\\`"
}  # fmt: skip
