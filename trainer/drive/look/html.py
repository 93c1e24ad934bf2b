"""HTML and SVG as text in which data cannot become markup: whatever is not ``Markup`` already is escaped.

Secrets are replaced on the way, as in every other place that writes.
"""

import functools
import html
import re
from collections.abc import Iterable

from trainer.redaction import redact

_EMPTY = ("br", "meta", "line", "rect", "circle", "polyline", "path")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What HTML has no way to say."""


class Markup(str):
    """Text that is HTML already; only this module and constants of ours make it."""

    __slots__ = ()


Part = str | Iterable["Part"]


@functools.lru_cache(maxsize=4096)
def text(value: str) -> Markup:
    """``value`` as text of a page, or as the value of an attribute."""
    return Markup(html.escape(_CONTROLS.sub("\ufffd", redact(value)), quote=True))


def join(parts: Iterable[Part]) -> Markup:
    """Parts one after the other."""
    return Markup("".join(_one(part) for part in parts))


def element(tag: str, /, *parts: Part, **attributes: str | float) -> Markup:
    """``<tag name="value">parts</tag>``. Names: ``class_`` for class, ``_`` for hyphens; tags and names are ours."""
    names = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value) if isinstance(value, str) else f"{value:.6g}"}"'
        for name, value in attributes.items()
    )
    if tag in _EMPTY and not parts:
        return Markup(f"<{tag}{names}{'/' if tag not in ('br', 'meta') else ''}>")
    return Markup(f"<{tag}{names}>{join(parts)}</{tag}>")


def _one(part: Part) -> str:
    if isinstance(part, Markup):
        return part
    return text(part) if isinstance(part, str) else join(part)
