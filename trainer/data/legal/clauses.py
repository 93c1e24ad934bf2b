"""Clauses of a licence or contract: where one begins, what its heading says it is about.

Headings are found by their form (a number, a short title in capitals, a full stop, colon or line end). What a heading
is about is decided by words; a heading about two things says nothing certain and has no type.
"""

import re
from collections.abc import Iterator

SHORTEST = 120
"""Characters of the shortest clause that is kept; below it there is mostly a cross-reference."""

_MOST_HEADING_WORDS = 8
_LONG_CLAUSE = 400

CLAUSE_TYPES: dict[str, str] = {
    "governing law": r"governing law|applicable law|choice of law|jurisdiction|venue|dispute",
    "limitation of liability": r"limitation (of|on) .*(liabilit|damage|remed)|limitations? of liability|^liability$"
    r"|exclusion of (consequential|damages|liab)|damages|disclaimer of liability",
    "warranty disclaimer": r"(disclaimer|exclusion).*warrant|no warrant|warranty disclaimer|as is"
    r"|^(limited )?warrant(y|ies)$|representations, warranties and disclaimer|^disclaimers?( of warrant.*)?$",
    "termination": r"terminat",
    "definitions": r"^definitions?\b|^interpretation$|^defined terms",
    "confidentiality": r"confidential|non-?disclosure",
    "indemnification": r"indemni",
    "export control": r"export",
    "entire agreement": r"entire agreement|^integration$|complete agreement|merger",
    "severability": r"severab|partial invalidity",
    "assignment": r"assign(ment|ability)?$|^no assignment|transfer of (rights|license|agreement)|assignment",
    "patents": r"patent",
    "trademarks": r"trade ?mark|logos|publicity",
    "license grant": r"licen[sc]e grant|grant of (licen[sc]e|rights|copyright)|^grants?$|scope of (the )?licen[sc]e"
    r"|^your grants$|rights granted|right to use|installation and use",
    "restrictions": r"restrictions?$|^restrictions|prohibited|unauthorized use",
    "redistribution": r"distribut(ion|ing)|redistribut|conveying|copying|larger works",
    "support and updates": r"support|updates?|maintenance|upgrades?",
    "fees and payment": r"payment|fees?$|taxes|royalt|invoice|price",
    "ownership": r"owner|title|intellectual property|proprietary rights|reservation of rights",
    "privacy and data": r"privacy|personal data|data (use|protection|collection)|^data$|telemetry",
}
"""The 20 labels of ``clause_type`` in the order in which a prompt lists them, and the words that stand for them."""

_TYPE_PATTERNS = {label: re.compile(pattern) for label, pattern in CLAUSE_TYPES.items()}

_MARK = r"^\s{0,12}(?:\#{1,4}\s*)?(?:\*\*)?(?:(?:Section|Article|SECTION|ARTICLE|Clause|§)\s*)?"
_NUMBER = r"(?:\d{1,2}(?:\.\d{1,2}){0,2}|[IVX]{1,5})"
_HEADING = re.compile(
    _MARK + _NUMBER + r"\s*[\.\):\-–—]*\s+"
    r"(?P<title>[A-Z][A-Za-z ,/&'\-;]{2,60}?)\s*"
    r"(?:[\.:](?=\s|$)|$|\s[-–—]\s)(?P<rest>.*)$"
)
_NUMBERED_LINE = re.compile(_MARK + _NUMBER + r"\s*[\.\)]?\s+\S")

# A title that starts like a sentence is the first words of a clause without a heading.
_SENTENCE_START = re.compile(r"^(by|to|for|if|the|a|an|you|notice to)\b")


def clauses(text: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, body) of each numbered clause with a heading; the body is on one line and at least 120 long."""
    for heading, lines in _blocks(text):
        body = one_line(" ".join(lines)).lstrip(".:-–— ")
        if len(body) >= SHORTEST:
            yield heading, body


def _blocks(text: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    current: tuple[str, list[str]] | None = None
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading and len(heading["title"].split()) <= _MOST_HEADING_WORDS:
            current = (heading["title"].strip(" ,;-"), [heading["rest"]])
            found.append(current)
        elif current is not None and _NUMBERED_LINE.match(line) and len(" ".join(current[1])) > _LONG_CLAUSE:
            # A numbered line without a heading ends a clause that is long already; before that it is a list in it.
            current = None
        elif current is not None:
            current[1].append(line)
    return found


def clause_type(heading: str) -> str | None:
    """The one label that the words of ``heading`` stand for; None for none or for several."""
    lowered = heading.lower().strip(" .:-")
    hits = [label for label, pattern in _TYPE_PATTERNS.items() if pattern.search(lowered)]
    return hits[0] if len(hits) == 1 else None


def is_title(heading: str) -> bool:
    """Whether ``heading`` reads as a title that a model can be asked to write."""
    return len(heading) > 3 and len(heading.split()) <= 7 and not _SENTENCE_START.search(heading.lower())


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space."""
    return " ".join(text.split())


def clip(text: str, limit: int) -> str:
    """At most ``limit`` characters, cut after a sentence when that keeps more than half, else after a word."""
    if len(text) <= limit:
        return text
    cut = text[:limit]
    end = max(cut.rfind(". "), cut.rfind("; "))
    return cut[: end + 1] if end > limit * 0.5 else cut.rsplit(" ", 1)[0] + " …"
