"""Conversations become tokens with a loss mask that was verified row by row, before anything is trained on them.

A row is encoded in the pieces in which a served model meets them: the prompt, then the answer. So the tokens of the
prompt in training are those of the prompt in generation, and the mask follows from the pieces. Tokenizers that treat
the start of a string specially (SentencePiece's leading space) are encoded whole, and the mask follows from character
offsets. Which of the two holds is measured on the rows themselves. In both cases what the mask covers is decoded again
and must be the assistant's text and the token that ends its turn. The mask is by position and never by token id, so
padding that equals a stop token hides no stop token.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trainer.data.dropped import Leftovers
from trainer.data.render import CONTROL, Rendered, Renderer
from trainer.data.special_tokens import control_tokens, require_end_token
from trainer.data.templates import ChatTemplate, choose_template, suggestions
from trainer.data.turns import RowFault
from trainer.errors import DataError
from trainer.samples import Conversation, Dropped, TokenizedExample

MISREAD = "decoding the mask does not give the assistant's text back"
FUSED = "the tokens of the prompt change when the answer follows"

_PROBE = 128
"""Rows on which the way of encoding is measured."""
_CHUNK = 2048
"""Rows encoded at a time, to bound memory."""
_SHOWN = 1200
"""Characters of a rendered row in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row of the result: its tokens, and for a chat the prompt of its last answer and that answer.

    ``prompt_length``: tokens before the last answer; ``answer_text``: that answer without its end-of-turn token, as the
    template writes it. Plain text has neither.
    """

    conversation: Conversation
    example: TokenizedExample
    prompt_length: int = 0
    answer_text: str = ""

    @property
    def prompt_ids(self) -> list[int]:
        """What the model is given when it has to produce the last answer."""
        return self.example.input_ids[: self.prompt_length].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """``rows`` in the order given; ``end_token_ids``: the tokens that end an answer in them, each supervised."""

    rows: list[EncodedRow]
    dropped: list[Dropped]
    end_token_ids: list[int]


class ChatEncoder:
    """Encodes conversations and plain texts with one tokenizer and one template.

    ``template`` may be None when all rows are plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        *,
        loss_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._all = loss_on == "all"
        self._renderer: Renderer | None = None
        self._in_pieces: bool | None = None
        if template is not None:
            variables = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
            self._renderer = Renderer(template, control_tokens(tokenizer), variables)

    def encode(
        self, conversations: Sequence[Conversation], *, on_progress: Callable[[int], None] = lambda done: None
    ) -> Encoded:
        """Encode ``conversations``; rows that fail verification are left out and counted.

        Raises:
            DataError: more than half of the rows fail for a reason that lies in the template: it cannot be used with
                this data. The message shows a rendered row and the built-in templates.
            ModelError: a plain text needs an end-of-text token and the tokenizer has none.
        """
        leftovers = Leftovers()
        rows: list[EncodedRow] = []
        ends: dict[int, None] = {}
        for start in range(0, len(conversations), _CHUNK):
            chunk = conversations[start : start + _CHUNK]
            texts = [item for item in chunk if not item.messages]
            chats = [item for item in chunk if item.messages]
            encoded = {id(row.conversation): row for row in (*self._texts(texts), *self._chats(chats, leftovers, ends))}
            if start == 0:
                self._refuse_unfit_template(chats, leftovers)
            rows += [encoded[id(item)] for item in chunk if id(item) in encoded]
            on_progress(start + len(chunk))
        return Encoded(rows=rows, dropped=leftovers.report(), end_token_ids=list(ends))

    def _texts(self, conversations: list[Conversation]) -> list[EncodedRow]:
        """Plain text: the tokenizer's own opening token if it has one, the text, the end-of-text token; all learnt."""
        if not conversations:
            return []
        end = require_end_token(self.tokenizer)
        encoded = self._ids([item.text for item in conversations], specials=True)
        rows: list[EncodedRow] = []
        for item, ids in zip(conversations, encoded, strict=True):
            full = np.asarray(ids if ids and ids[-1] == end else [*ids, end], np.int32)
            example = TokenizedExample(full, np.ones(len(full), np.bool_), item.origin)
            rows.append(EncodedRow(conversation=item, example=example))
        return rows

    def _chats(
        self, conversations: list[Conversation], leftovers: Leftovers, ends: dict[int, None]
    ) -> list[EncodedRow]:
        if not conversations:
            return []
        kept: list[Conversation] = []
        rendered: list[Rendered] = []
        for item in conversations:
            try:
                rendered.append(self._needed_renderer().render(item))
                kept.append(item)
            except RowFault as fault:
                leftovers.add(fault.reason, str(item.origin), fault.detail)
        if self._in_pieces is None and rendered:
            self._in_pieces = self._pieces_join(rendered[:_PROBE])
        spans = self._encode_in_pieces(rendered) if self._in_pieces else self._encode_whole(rendered)
        faults = self._misread(rendered, spans)
        rows: list[EncodedRow] = []
        for item, text, (ids, answers), fault in zip(kept, rendered, spans, faults, strict=True):
            if fault is not None:
                leftovers.add(fault.reason, str(item.origin), fault.detail)
                continue
            ends.update((int(ids[end - 1]), None) for _, end in answers)
            rows.append(self._row(item, text, ids, answers))
        return rows

    def _row(
        self, item: Conversation, rendered: Rendered, ids: NDArray[np.int32], answers: list[tuple[int, int]]
    ) -> EncodedRow:
        mask = np.full(len(ids), self._all, np.bool_)
        for start, end in answers:
            mask[start:end] = True
        start, end = rendered.answers[-1]
        answer = rendered.text[start:end].removesuffix(self._needed_renderer().end_of_turn(rendered))
        return EncodedRow(
            conversation=item,
            example=TokenizedExample(ids, mask, item.origin),
            prompt_length=answers[-1][0],
            answer_text=answer.strip(),
        )

    def _needed_renderer(self) -> Renderer:
        if self._renderer is None:
            choose_template(None, None, self.tokenizer.get_vocab(), cwd=Path())
            raise AssertionError("choose_template raises without any template")
        return self._renderer

    # -- characters to tokens --------------------------------------------------------------------------------------

    def _ids(self, texts: list[str], *, specials: bool = False) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=specials, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def _decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(
            [list(row) for row in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _pieces_join(self, rendered: list[Rendered]) -> bool:
        """Say whether encoding in pieces gives the same text back as encoding whole, on these rows."""
        pieces = [ids.tolist() for ids, _ in self._encode_in_pieces(rendered)]
        whole = self._ids([item.text for item in rendered])
        return self._decode(pieces) == self._decode(whole)

    def _encode_in_pieces(self, rendered: list[Rendered]) -> list[tuple[NDArray[np.int32], list[tuple[int, int]]]]:
        """Encode each row cut at the borders of its answers; return its ids and the answers as token ranges."""
        texts: list[str] = []
        for item in rendered:
            cuts = [0, *(place for answer in item.answers for place in answer), len(item.text)]
            texts += [item.text[start:end] for start, end in pairwise(cuts)]
        encoded = iter(self._ids(texts))
        spans: list[tuple[NDArray[np.int32], list[tuple[int, int]]]] = []
        for item in rendered:
            ids: list[int] = []
            answers: list[tuple[int, int]] = []
            for _ in item.answers:
                ids += next(encoded)
                start = len(ids)
                ids += next(encoded)
                answers.append((start, len(ids)))
            ids += next(encoded)
            spans.append((np.asarray(ids, np.int32), answers))
        return spans

    def _encode_whole(self, rendered: list[Rendered]) -> list[tuple[NDArray[np.int32], list[tuple[int, int]]]]:
        """Encode each row as one string; an answer's tokens are those whose characters lie in it."""
        if not rendered:
            return []
        texts = [item.text for item in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans: list[tuple[NDArray[np.int32], list[tuple[int, int]]]] = []
        for item, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ends = np.asarray([end for _, end in offsets], np.int64)
            places = np.searchsorted(ends, [place for answer in item.answers for place in answer], side="right")
            pairs = places.reshape(-1, 2).tolist()
            spans.append((np.asarray(ids, np.int32), [(start, end) for start, end in pairs]))
        return spans

    # -- verification ----------------------------------------------------------------------------------------------

    def _misread(
        self, rendered: list[Rendered], spans: list[tuple[NDArray[np.int32], list[tuple[int, int]]]]
    ) -> list[RowFault | None]:
        """Decode every masked span of every row and compare it with the characters it stands for."""
        decoded = iter(self._decode([ids[start:end].tolist() for ids, answers in spans for start, end in answers]))
        prompts = self._prompts(rendered)
        faults: list[RowFault | None] = []
        for item, (ids, answers), prompt in zip(rendered, spans, prompts, strict=True):
            fault: RowFault | None = None
            for start, end in item.answers:
                got, expected = next(decoded), item.text[start:end]
                if not _same(got, expected):
                    fault = RowFault(MISREAD, f"{got[:60]!r} instead of {expected[:60]!r}")
            if fault is None and prompt is not None and ids[: answers[-1][0]].tolist() != prompt:
                fault = RowFault(FUSED, f"before {item.text[item.prompt_end :][:40]!r}")
            faults.append(fault)
        return faults

    def _prompts(self, rendered: list[Rendered]) -> Sequence[list[int] | None]:
        """Encode the prompt of each last answer alone, as generation does; None where it is the first piece anyway."""
        several = [not self._in_pieces or len(item.answers) > 1 for item in rendered]
        alone = iter(
            self._ids([item.text[: item.prompt_end] for item, check in zip(rendered, several, strict=True) if check])
        )
        return [next(alone) if check else None for check in several]

    def _refuse_unfit_template(self, chats: list[Conversation], leftovers: Leftovers) -> None:
        """Refuse when more than half of the first rows failed: then it is the template and not the rows."""
        # A control token in a row's own text is the row's fault with any template.
        found = [item for item in leftovers.report() if item.reason != CONTROL]
        if self.template is None or 2 * sum(item.count for item in found) <= len(chats):
            return
        worst = found[0]
        raise DataError(
            f"the chat template cannot be used with these rows: {worst.reason}",
            where=self.template.name,
            got=f"{worst.count} of {len(chats)} rows, first {worst.first[0]}\n{self._shown(chats, worst)}",
            allowed="a template that renders every turn as it is and ends an answer with a control token",
            do=suggestions(self.tokenizer.get_vocab()),
        )

    def _shown(self, chats: list[Conversation], worst: Dropped) -> str:
        """Render the first failing row for the error, as far as the template can."""
        # A listed row is "file:line" or "file:line (detail)".
        row = next(item for item in chats if f"{worst.first[0]} (".startswith(f"{item.origin} ("))
        return f"  the row as rendered:\n{self._needed_renderer().preview(row)[:_SHOWN]}"


def _same(got: str, expected: str) -> bool:
    """Equal up to Unicode normal form (some tokenizers apply one) and the leading space that decoding may eat."""
    got, expected = got.removeprefix(" "), expected.removeprefix(" ")
    return got == expected or unicodedata.normalize("NFKC", got) == unicodedata.normalize("NFKC", expected)


def marked_sample(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample) -> str:
    """Return the row as text with ``»`` before and ``«`` after each part that is learnt, for a human to check."""
    edges = np.flatnonzero(np.diff(example.loss_mask.astype(np.int8), prepend=0, append=0))
    cuts = [0, *edges.tolist(), len(example.input_ids)]
    parts: list[str] = []
    for start, end in pairwise(cuts):
        if start == end:
            continue
        text = tokenizer.decode(example.input_ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        parts.append(f"»{text}«" if example.loss_mask[start] else str(text))
    return "".join(parts)
