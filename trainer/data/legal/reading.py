"""Licences and licence rules as the package ships them: YAML front matter between two ``---`` lines, then the text.

The package has 37 000 files, of which the tasks use about 7000; the others are recognised by their bytes and never
parsed, which is most of the speed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import DataError

_FENCE = "---\n"
_WANTED_IN_RULES = (b"is_license_text:", b"ignorable_holders:")


class _Loader(yaml.CSafeLoader):
    """Reads ``1.0`` and ``2001-02-03`` as the text they are: keys, names and versions, not numbers and dates."""


_KEPT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "null", "int")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """One licence: ``key`` is its name in the package, ``source`` its file (``licenses/mit.LICENSE``)."""

    key: str
    source: str
    category: str
    owner: str
    english: bool
    holders: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One text that stands for licences: ``expression`` names them, ``is_license_text``: a whole licence."""

    source: str
    expression: str
    is_license_text: bool
    english: bool
    holders: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """All licences by key, and the rules that the tasks can use; both in the order of their file names."""

    licenses: Mapping[str, License]
    rules: tuple[Rule, ...]


def read_package(data: Path) -> Package:
    """Read the ``licensedcode/data`` folder of the package.

    Raises:
        DataError: a folder or file is missing or cannot be read as it should.
    """
    licenses = {license.key: license for license in _read_licenses(data)}
    rules = tuple(_read_rules(data))
    if not licenses or not rules:
        raise DataError(
            "the package licensedcode-data is incomplete",
            where=str(data),
            got=f"{len(licenses)} licences and {len(rules)} rules",
            do="install it again: pip install --force-reinstall licensedcode-data",
        )
    return Package(licenses=licenses, rules=rules)


def _read_licenses(data: Path) -> Iterator[License]:
    for path in sorted((data / "licenses").glob("*.LICENSE")):
        fields, text = _split(path.read_bytes(), path)
        yield License(
            key=path.stem,
            source=f"licenses/{path.name}",
            category=fields["category"],
            owner=fields.get("owner", ""),
            english=fields.get("language", "en") == "en",
            holders=tuple(map(str, fields.get("ignorable_holders") or ())),
            text=text,
        )


def _read_rules(data: Path) -> Iterator[Rule]:
    for path in sorted((data / "rules").glob("*.RULE")):
        raw = path.read_bytes()
        if not any(mark in raw for mark in _WANTED_IN_RULES):
            continue
        fields, text = _split(raw, path)
        yield Rule(
            source=f"rules/{path.name}",
            expression=fields.get("license_expression", ""),
            is_license_text=bool(fields.get("is_license_text")),
            english=fields.get("language", "en") == "en",
            holders=tuple(map(str, fields.get("ignorable_holders") or ())),
            text=text,
        )


def _split(raw: bytes, path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of one file; undecodable bytes become U+FFFD, as they are in quoted texts of others."""
    content = raw.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    parts = content.split(_FENCE, 2)
    if parts[0] or len(parts) < 2:
        raise DataError("has no front matter", where=str(path), do="install licensedcode-data again")
    # A rule that is front matter alone may end with the fence but without a line end.
    header = parts[1] if len(parts) == 3 else parts[1].rsplit("---", 1)[0]
    try:
        fields = yaml.load(header, Loader=_Loader)
    except yaml.YAMLError as error:
        raise DataError("has unreadable front matter", where=str(path), got=error) from error
    return fields or {}, parts[2].strip("\n") if len(parts) == 3 else ""
