"""The data card that is stored beside the derived rows: what they are, whose they are, what they are not good for."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from trainer.data.legal.derive import LegalRow
from trainer.data.legal.tasks import INSTRUCTIONS
from trainer.data.splits import SPLITS

LICENSE = "CC-BY-4.0"
ATTRIBUTION = (
    "Derived from licensedcode-data, Copyright (c) nexB Inc. and others, SPDX-License-Identifier: CC-BY-4.0, "
    "https://github.com/aboutcode-org/scancode-toolkit. The texts of the licences belong to their authors."
)

_ABOUT = {
    "clause_type": "one of 20 clause types, read from the clause's own heading (not shown)",
    "clause_heading": "the heading that the author of the clause gave it",
    "defined_terms": "the terms that a passage defines, in order",
    "governing_law": "the state or country whose law governs",
    "copyright_holder": "the one holder that ScanCode annotated, verbatim",
    "license_category": "ScanCode's category of the licence, one of 10",
}


def data_card(rows: Sequence[LegalRow], *, release: str, splits_sha256: str) -> str:
    """Markdown with the front matter that the Hub reads."""
    return _TEMPLATE.format(
        attribution=ATTRIBUTION, release=release, splits_sha256=splits_sha256, table=_table(rows), total=len(rows)
    )


def _table(rows: Sequence[LegalRow]) -> str:
    counts = Counter((row.task, row.split) for row in rows)
    families: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        families[row.task, row.split].add(row.family)
    lines: list[str] = []
    for task in INSTRUCTIONS:
        numbers = "/".join(str(counts[task, split]) for split in SPLITS)
        groups = "/".join(str(len(families[task, split])) for split in SPLITS)
        lines.append(f"| {task} | {_ABOUT[task]} | {numbers} | {groups} |")
    return "\n".join(lines)


_TEMPLATE = """---
license: cc-by-4.0
language: en
pretty_name: Licence and contract clauses
---
# Licence and contract clauses

{total} rows of six tasks, derived on this machine from the package licensedcode-data {release}.
{attribution}
They are meant for use on this machine: some licence texts may only be passed on verbatim.

| task | answer | rows train/validation/test | licence families |
|---|---|---|---|
{table}

**How they were made.** Clauses are numbered sections with a heading in English licences. Equal texts are kept once;
texts with several answers where one can be right are left out; near copies (shared runs of four words, Jaccard at
least 0.7) are thinned within a task. Splits go by licence family (same owner or same first part of the name), by a
hash, 75/10/15; the three largest families are always in training. Training rows that share half of the smaller text's
runs with a held-out row are left out, and so are validation rows near a test row. Splits: sha256 {splits_sha256}.

**Limits.** Headings decide the clause type, and an author's heading may be wrong. `license_category` is noisy
("Proprietary Free" and "Free Restricted" overlap). The held-out rows of `governing_law` and `copyright_holder` are too
few to be scored alone. Nothing here is legal advice.
"""
