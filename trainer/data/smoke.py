"""Rows made on the spot, so that ``+experiment=smoke`` proves a whole run in seconds and needs no file.

Short clause-like sentences of four kinds, written for this project. A tiny model with random weights learns to tell
them apart in a few steps, which makes a falling loss and a working export visible.
"""

import random
from itertools import product

from trainer.data.splits import SPLITS, SplitName
from trainer.samples import Origin, Record

LABELS = ("confidentiality", "governing law", "payment", "termination")

ROWS: dict[SplitName, int] = {"train": 160, "validation": 40, "test": 40}

_INSTRUCTION = f"Classify this clause. Answer with exactly one of: {', '.join(LABELS)}."

# A sentence per label with two places to fill; the words are such that every filled sentence is different.
_SENTENCES = {
    "confidentiality": "The {0} must keep secret what it learns about {1} and show it to nobody else.",
    "governing law": "The law of {1} applies to every question between the {0} and the other side.",
    "payment": "The {0} pays the price within {1} days after the invoice has arrived.",
    "termination": "The {0} may end this agreement at any time by a letter sent {1} days before.",
}
_PARTIES = ("buyer", "seller", "tenant", "landlord", "lender", "borrower", "author", "publisher")
_FILLINGS = {
    "confidentiality": ("prices", "customers", "recipes", "designs", "salaries", "suppliers", "plans", "patients"),
    "governing law": ("Norway", "Portugal", "Kenya", "Chile", "Japan", "Canada", "Ireland", "Estonia"),
    "payment": ("seven", "ten", "fourteen", "twenty", "thirty", "forty", "sixty", "ninety"),
    "termination": ("seven", "ten", "fourteen", "twenty", "thirty", "forty", "sixty", "ninety"),
}


def smoke_records(split: SplitName) -> list[Record]:
    """The rows of one split: 160, 40 and 40, the same on every machine, equally many of each label.

    Fields: ``id``, ``task``, ``messages`` (user, assistant), ``answer``, ``label``, ``split``. No sentence is in two
    splits.
    """
    start = sum(ROWS[earlier] for earlier in SPLITS[: SPLITS.index(split)]) // len(LABELS)
    rows = [(label, text) for label in LABELS for text in _sentences(label)[start : start + ROWS[split] // len(LABELS)]]
    random.Random(split).shuffle(rows)
    return [_record(split, number, label, text) for number, (label, text) in enumerate(rows, start=1)]


def _sentences(label: str) -> list[str]:
    sentences = [_SENTENCES[label].format(*words) for words in product(_PARTIES, _FILLINGS[label])]
    random.Random(label).shuffle(sentences)
    return sentences


def _record(split: SplitName, number: int, label: str, text: str) -> Record:
    fields = {
        "id": f"smoke-{split}-{number}",
        "task": "smoke",
        "messages": [
            {"role": "user", "content": f"{_INSTRUCTION}\n\nClause: {text}"},
            {"role": "assistant", "content": label},
        ],
        "answer": label,
        "label": label,
        "split": split,
    }
    return Record(fields, Origin(f"smoke/{split}", number))
