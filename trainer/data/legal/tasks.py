"""Six tasks out of licence texts: for each, the instruction, the text of a row and its answer.

Every answer is a fact of the source (its own heading, its own definitions, ScanCode's annotation), never a guess of a
model. Answers of the extracting tasks are verbatim parts of the text that is shown.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainer.data.legal.clauses import CLAUSE_TYPES, clause_type, clauses, clip, is_title, one_line
from trainer.data.legal.reading import License, Package, Rule

CATEGORIES = (
    "Permissive",
    "Copyleft",
    "Copyleft Limited",
    "Proprietary Free",
    "Commercial",
    "Free Restricted",
    "Source-available",
    "Public Domain",
    "Patent License",
    "CLA",
)
"""The 10 labels of ``license_category``; "Unstated License" is no kind of licence and is left out."""

INSTRUCTIONS: dict[str, str] = {
    "clause_type": "Classify this licence or contract clause. Answer with exactly one of: "
    + ", ".join(CLAUSE_TYPES)
    + ".\n\nClause: ",
    "clause_heading": "Write a short heading for this licence or contract clause.\n\nClause: ",
    "defined_terms": "List the terms that this text defines, separated by semicolons, exactly as written.\n\nText: ",
    "governing_law": "Which state's or country's law governs this agreement? Answer with the exact words from the "
    "clause.\n\nClause: ",
    "copyright_holder": "Who holds the copyright? Answer with the exact name from the text.\n\nText: ",
    "license_category": "Which kind of licence is this? Answer with exactly one of: "
    + ", ".join(CATEGORIES)
    + ".\n\nText: ",
}
"""Task -> what stands before the text in the prompt."""

_LONG_RULE = 2500
_LICENSE_KEY = re.compile(r"[a-z0-9][a-z0-9.\-_+]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A row before it is known to be unique: ``text`` is what the prompt shows after its instruction."""

    task: str
    license_key: str
    text: str
    answer: str
    source: str
    label: str | None = None
    heading: str | None = None

    @property
    def prompt(self) -> str:
        """The user's turn."""
        return INSTRUCTIONS[self.task] + self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreement:
    """A whole licence text in English, out of a licence or a long rule that stands for one licence."""

    license_key: str
    source: str
    text: str


def candidates(package: Package) -> Iterator[Candidate]:
    """Yield the rows of all tasks, in the order of their files."""
    for agreement in _agreements(package):
        yield from _clause_rows(agreement)
        flat = _Agreement(license_key=agreement.license_key, source=agreement.source, text=one_line(agreement.text))
        yield from _governing_law_rows(flat)
        yield from _defined_terms_rows(flat)
    yield from _copyright_holder_rows(package)
    yield from _license_category_rows(package.licenses)


def _agreements(package: Package) -> Iterator[_Agreement]:
    for license in package.licenses.values():
        if license.english:
            yield _Agreement(license_key=license.key, source=license.source, text=license.text)
    for rule in package.rules:
        if rule.is_license_text and rule.english and len(rule.text) > _LONG_RULE and rule.expression:
            keys = _license_keys(rule, package.licenses)
            if len(keys) == 1:
                yield _Agreement(license_key=keys[0], source=rule.source, text=rule.text)


def _license_keys(rule: Rule, licenses: Mapping[str, License]) -> list[str]:
    """Licences that the expression of a rule names (``mit OR gpl-2.0``)."""
    return [key for key in _LICENSE_KEY.findall(rule.expression.lower()) if key in licenses]


def _clause_rows(agreement: _Agreement) -> Iterator[Candidate]:
    for heading, body in clauses(agreement.text):
        text = clip(body, 700)
        label = clause_type(heading)
        if label is not None:
            yield Candidate(
                task="clause_type",
                license_key=agreement.license_key,
                text=text,
                answer=label,
                source=agreement.source,
                label=label,
                heading=heading,
            )
        if is_title(heading):
            yield Candidate(
                task="clause_heading",
                license_key=agreement.license_key,
                text=text,
                answer=heading.title() if heading.isupper() else heading,
                source=agreement.source,
                heading=heading,
            )


_GOVERNED_BY = re.compile(
    r"(?:governed|construed|interpreted)[^.]{0,160}?\b(?:by|under|with|to)\s+(?:and\s+\w+\s+\w+\s+\w+\s+)?"
    r"(?:the\s+)?(?:\w+\s+)?laws?\s+of\s+"
    r"(?P<place>(?:the\s+)?(?:(?:State|Commonwealth|Province|Republic|Kingdom|Federal Republic|Country"
    r"|People's Republic)\s+of\s+(?:the\s+)?)?[A-Z][A-Za-z]+(?:\s+(?:and\s+)?[A-Z][A-Za-z]+){0,3})"
)
_NO_PLACE = re.compile(r"\b(country|state|province|jurisdiction)$")


def _governing_law_rows(agreement: _Agreement) -> Iterator[Candidate]:
    flat = agreement.text
    for match in _GOVERNED_BY.finditer(flat):
        place = match["place"].strip()
        lowered = place.lower()
        if lowered == "the united states" or len(place) < 4 or _NO_PLACE.search(lowered):
            continue
        text = flat[_sentence_start(flat, match.start()) : _sentence_end(flat, match.end(), within=300, otherwise=200)]
        if place in text:
            yield Candidate(
                task="governing_law",
                license_key=agreement.license_key,
                text=text,
                answer=place,
                source=agreement.source,
                label=place,
            )


def _sentence_start(flat: str, position: int) -> int:
    full_stop = flat.rfind(". ", 0, position)
    return max(position - 200, full_stop + 2 if full_stop >= 0 else 0)


def _sentence_end(flat: str, position: int, *, within: int, otherwise: int) -> int:
    """After the full stop that follows ``position`` ``within`` so many characters, else ``otherwise`` many on."""
    full_stop = flat.find(". ", position)
    if 0 < full_stop < position + within:
        return full_stop + 1
    return position + otherwise


_DEFINITION = re.compile(
    r"[\"“]([A-Z][A-Za-z0-9 /\-&']{1,40}?)[,\.]?[\"”]\s+"
    r"(?:shall\s+)?(?:means?|refers?\s+to|is\s+defined|shall\s+mean|includes?)\b"
)
_ALIAS = re.compile(r'["”]\s*(?:or|and|, )\s*["“]')
_PASSAGE = 650


def shorten(task: str, text: str, answer: str, limit: int | None) -> tuple[str, str] | None:
    """``text`` cut to ``limit`` characters and the answer to what is left; None when no answer is left.

    A shorter passage defines fewer terms, so their list is read again; a name has to stand in it whole.
    """
    if limit is None or len(text) <= limit:
        return text, answer
    cut = text[:limit]
    if task == "defined_terms":
        terms = dict.fromkeys(match[1] for match in _DEFINITION.finditer(cut))
        return (cut, "; ".join(terms)) if terms else None
    if task in ("governing_law", "copyright_holder") and answer not in cut:
        return None
    return cut, answer


def _defined_terms_rows(agreement: _Agreement) -> Iterator[Candidate]:
    flat = agreement.text
    for group in _passages(flat):
        end = _sentence_end(flat, group[-1].end(), within=350, otherwise=150)
        text = flat[group[0].start() : end]
        # "X" or "Y" means ...: the pattern sees only Y, so the answer would be incomplete.
        if len(text) >= 1000 or _ALIAS.search(text):
            continue
        terms = dict.fromkeys(match[1] for match in group)
        yield Candidate(
            task="defined_terms",
            license_key=agreement.license_key,
            text=text,
            answer="; ".join(terms),
            source=agreement.source,
        )


def _passages(flat: str) -> list[list[re.Match[str]]]:
    """Definitions in groups that fit one passage."""
    groups: list[list[re.Match[str]]] = []
    for match in _DEFINITION.finditer(flat):
        if groups and match.start() - groups[-1][0].start() < _PASSAGE:
            groups[-1].append(match)
        else:
            groups.append([match])
    return groups


def _copyright_holder_rows(package: Package) -> Iterator[Candidate]:
    for rule in package.rules:
        if rule.english and len(rule.holders) == 1:
            keys = _license_keys(rule, package.licenses)
            if keys:
                yield from _copyright_holder_row(keys[0], rule.source, rule.holders[0], rule.text)
    for license in package.licenses.values():
        if license.english and len(license.holders) == 1:
            yield from _copyright_holder_row(license.key, license.source, license.holders[0], license.text)


def _copyright_holder_row(license_key: str, source: str, annotated: str, text: str) -> Iterator[Candidate]:
    flat, holder = one_line(text), one_line(annotated)
    position = flat.find(holder)
    if position < 0 or len(holder) < 4 or holder.startswith(("GNU General", "GNU Lesser")):
        return
    start = max(0, position - 150)
    start = flat.find(" ", start) + 1 if start else 0
    shown = clip(flat[start : position + 550], 650)
    if holder in shown:
        yield Candidate(
            task="copyright_holder",
            license_key=license_key,
            text=shown,
            answer=holder,
            source=source,
            label=holder,
        )


def _license_category_rows(licenses: Mapping[str, License]) -> Iterator[Candidate]:
    for license in licenses.values():
        if license.english and license.category in CATEGORIES and len(license.text) > 200:
            yield Candidate(
                task="license_category",
                license_key=license.key,
                text=clip(one_line(license.text), 900),
                answer=license.category,
                source=license.source,
                label=license.category,
            )
