"""Real documents for the benches: the texts of the installed package licensedcode-data, as token ids.

Licences and rules together have what synthetic lengths only imitate: half of the documents are a line, and most of the
tokens are in a few long ones. Tokenising takes half a minute, so it is kept in the trainer's cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.data.legal.store import installed, installed_digest
from trainer.errors import DataError
from trainer.fingerprint import digest
from trainer.model import builtin

Start = Literal["scratch", "builtin"]
FORMAT = 1
FENCE = "---\n"
FOLDERS = (("licenses", "*.LICENSE"), ("rules", "*.RULE"))


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Token ids of documents, one after the other, each with an end-of-text token behind it.

    ``tokens`` int32[sum of lengths], ``lengths`` int32[n], at least 2. ``vocabulary``: ids are below it. ``pad``: id of
    the padding.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    vocabulary: int
    pad: int

    def cut(self, capacity: int) -> list[NDArray[np.int32]]:
        """The first ``capacity`` tokens of every document."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return [self.tokens[end - n : end - n + min(n, capacity)] for end, n in zip(ends, self.lengths, strict=True)]


def texts(data: Path) -> list[str]:
    """The different texts that are not empty, in the order of their file names, without the front matter."""
    found: dict[str, None] = {}
    for folder, pattern in FOLDERS:
        for path in sorted((data / folder).glob(pattern)):
            parts = path.read_bytes().decode("utf-8", errors="replace").split(FENCE, 2)
            text = parts[2].strip() if len(parts) == 3 else ""
            if text:
                found[text] = None
    if not found:
        raise DataError("the package licensedcode-data has no texts", where=str(data), do="install it again")
    return list(found)


def documents(start: Start, vocabulary: int, cache: Path) -> Documents:
    """All texts as tokens: of the built-in model, or of a BPE of ``vocabulary`` tokens trained on these texts.

    The BPE has seen the held-out texts, too; it is the same for all that are compared.

    Raises:
        DataError, UserError: a package of the built-in data or model is missing.
    """
    key = digest([installed_digest(), start, vocabulary if start == "scratch" else builtin.SMOLLM2_FORMAT, FORMAT])
    path = cache / "bench" / f"licence-texts-{key[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            return Documents(file["tokens"], file["lengths"], int(file["vocabulary"]), int(file["pad"]))
    wanted = texts(installed()[1])
    if start == "scratch":
        tokenizer: PreTrainedTokenizerBase = builtin.train_tokenizer(wanted, vocabulary)
    else:
        tokenizer = AutoTokenizer.from_pretrained(builtin.smollm2(cache))
    made = tokenised(wanted, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial, tokens=made.tokens, lengths=made.lengths, vocabulary=np.array(made.vocabulary), pad=np.array(made.pad)
    )
    partial.rename(path)
    return made


def tokenised(wanted: list[str], tokenizer: PreTrainedTokenizerBase) -> Documents:
    """``wanted`` in the same order, without special tokens but the one at the end."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(end, int):
        raise DataError("the tokenizer has no end-of-text token", got=type(tokenizer).__name__)
    # verbose=False: it would warn about texts longer than the model, which are cut later.
    encoded = cast(list[list[int]], tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"])
    rows = [np.array([*ids, end], np.int32) for ids in encoded]
    lengths = np.array([len(row) for row in rows], np.int32)
    return Documents(np.concatenate(rows), lengths, len(tokenizer), pad if isinstance(pad, int) else end)
