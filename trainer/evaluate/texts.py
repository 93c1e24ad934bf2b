"""How an answer is compared with its reference, as texts: without numpy, so that those who only look can do it too.

Texts are compared after ``normalise``: Unicode NFKC, case folded, every run of white space one space, outer white space
and one final full stop removed. Words (``words``) are runs of letters and digits of the normalised text; a Han, kana
or Thai character is a word of its own, because those scripts do not put spaces between words.
"""

import re
import unicodedata
from collections import Counter

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")


def normalise(text: str) -> str:
    """The form in which texts are compared; see the head of this module."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").rstrip()


def words(text: str) -> list[str]:
    """Words of ``text`` for token F1 and ROUGE; see the head of this module."""
    return _WORD.findall(normalise(text))


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two texts are equal after ``normalise``."""
    return normalise(prediction) == normalise(answer)


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of two texts, as in SQuAD (arXiv 1606.05250, section 6.1).

    Articles stay, unlike there: "the Licensor" and "a Licensor" differ in law. Two texts without words are equal.
    """
    predicted, expected = Counter(words(prediction)), Counter(words(answer))
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (predicted & expected).total()
    return 2.0 * shared / (predicted.total() + expected.total())
