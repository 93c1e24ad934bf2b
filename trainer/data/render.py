"""A conversation becomes one text in which the exact places of the assistant's turns are known.

What is learnt is decided here, on characters, before any tokenizer is involved. The places come from the template's own
``{% generation %}`` marks, or from rendering the conversation up to each turn and checking that this is a prefix of the
whole. Either way they are verified against the row: the place holds the row's own text and the token that ends a turn,
nothing else, and no other turn's text got lost. A template that rewrites history or adds text of its own is refused,
because a mask over it would teach something that the row does not say.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.data.templates import ChatTemplate
from trainer.data.turns import RowFault
from trainer.samples import Conversation, Message

DATE = "01 Jan 2026"
"""What templates get that ask for a ``date_string``: the same row must render alike on every day."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

LOST = "the template leaves out text of the row"
ADDED = "the template adds text of its own to the answer"
REFUSED = "the template refuses the conversation"
NO_END = "the template does not end the answer with a control token"
CONTROL = "the row's text holds a control token"
UNMARKED = "the template does not mark each answer"
REWRITES = "the template writes a conversation's beginning differently once it goes on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A rendered conversation.

    ``answers``: (start, end) of each assistant turn in ``text``, end-of-turn token included. ``prompt_end``: where the
    last answer begins; ``text[:prompt_end]`` is exactly what the model is given when it has to produce that answer.
    """

    text: str
    answers: tuple[tuple[int, int], ...]

    @property
    def prompt_end(self) -> int:
        """Start of the last answer."""
        return self.answers[-1][0]


class Renderer:
    """Renders conversations with one template and verifies each of them.

    ``specials`` are the strings of the tokenizer's control tokens, ``variables`` what transformers hands to templates
    (``bos_token``, ``eos_token``, ...).
    """

    def __init__(self, template: ChatTemplate, specials: Collection[str], variables: Mapping[str, str]) -> None:
        self.template = template
        self.marked = _MARKED.search(template.text) is not None
        ordered = sorted((text for text in specials if text), key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(text) for text in ordered)) if ordered else re.compile(r"(?!)")
        self._variables = {**variables, "date_string": DATE}

    def render(self, conversation: Conversation) -> Rendered:
        """Render ``conversation`` and find its answers.

        Raises:
            RowFault: the template refuses, rewrites or loses something of it; the reasons are this module's constants.
        """
        self._refuse_control_tokens(conversation)
        messages = [_as_dict(message) for message in conversation.messages]
        turns = [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]
        text, marks = self._render(messages, conversation.tools, marks=self.marked)
        _check_nothing_lost(conversation, text)
        if self.marked:
            places = self._marked_places(marks, len(turns))
        else:
            places = [self._place_by_prefix(messages, conversation.tools, at, text) for at in turns]
        answers = tuple(
            self._exact(text, place, conversation.messages[at]) for at, place in zip(turns, places, strict=True)
        )
        if self.marked:  # without marks the place of an answer was found by rendering its prompt
            self._check_prompt(messages[: turns[-1]], conversation.tools, text[: answers[-1][0]])
        return Rendered(text=text, answers=answers)

    def end_of_turn(self, rendered: Rendered) -> str:
        """Return the text of the control token that ends the last answer."""
        start, end = rendered.answers[-1]
        *_, last = self._special.finditer(rendered.text, start, end)
        return last[0]

    def preview(self, conversation: Conversation) -> str:
        """Return the row as far as the template can render it, unverified, for an error message."""
        try:
            return self._render(
                [_as_dict(message) for message in conversation.messages], conversation.tools, marks=False
            )[0]
        except RowFault as fault:
            turns = "\n".join(f"{message.role}: {message.content}" for message in conversation.messages)
            return f"(not rendered: {fault})\n{turns}"

    def _render(
        self, messages: list[dict[str, Any]], tools: tuple[Mapping[str, Any], ...], *, marks: bool, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            result: Any = render_jinja_template(
                [messages],
                [dict(tool) for tool in tools] or None,
                None,
                self.template.text,
                marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as fault:
            raise RowFault(REFUSED, str(fault)[:200]) from None
        texts, places = result
        return texts[0], places[0] if marks else []

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """A control token inside a row's text would be read as one: it would end a turn in the middle of it."""
        for message in conversation.messages:
            found = self._special.search(message.content)
            if found is not None:
                raise RowFault(CONTROL, f"{found[0]} in a turn of role {message.role}")

    def _marked_places(self, marks: list[tuple[int, int]], turns: int) -> list[tuple[int, int]]:
        places: list[tuple[int, int]] = []
        for start, end in marks:
            if places and places[-1][1] == start:
                places[-1] = (places[-1][0], end)
            elif start < end:
                places.append((start, end))
        if len(places) != turns:
            raise RowFault(UNMARKED, f"{len(places)} marked places, {turns} assistant turns")
        return places

    def _place_by_prefix(
        self, messages: list[dict[str, Any]], tools: tuple[Mapping[str, Any], ...], at: int, text: str
    ) -> tuple[int, int]:
        if at == 0:
            raise RowFault(UNMARKED, "the conversation opens with an assistant turn")
        before, _ = self._render(messages[:at], tools, marks=False, prompt=True)
        after = text if at == len(messages) - 1 else self._render(messages[: at + 1], tools, marks=False)[0]
        for part in (before, after):
            if not text.startswith(part):
                raise RowFault(REWRITES, _difference(text, part))
        return len(before), len(after)

    def _exact(self, text: str, place: tuple[int, int], message: Message) -> tuple[int, int]:
        """Narrow ``place`` to the answer and the control token that ends it.

        White space before the answer belongs to it (Mistral's format has a space there); a line break after the
        control token does not. A turn that calls tools has the template's own wording of the calls after its content.
        """
        start, end = place
        segment = text[start:end]
        content = message.content if message.content in segment else message.content.strip()
        at = segment.find(content)
        if at < 0:
            raise RowFault(LOST, f"an assistant turn: {message.content[:80]!r}")
        if segment[:at].strip():
            raise RowFault(ADDED, f"before it: {segment[:at][:80]!r}")
        ends = list(self._special.finditer(segment, at + len(content)))
        if not ends:
            raise RowFault(NO_END, f"after it: {segment[at + len(content) :][:80]!r}")
        last = ends[-1] if message.tool_calls else ends[0]
        between = segment[at + len(content) : last.start()]
        if between.strip() and not message.tool_calls:
            raise RowFault(ADDED, f"after it: {between[:80]!r}")
        if segment[last.end() :].strip():
            raise RowFault(ADDED, f"after its end: {segment[last.end() :][:80]!r}")
        return start, start + last.end()

    def _check_prompt(self, messages: list[dict[str, Any]], tools: tuple[Mapping[str, Any], ...], prompt: str) -> None:
        """The text before the last answer must be what the template renders when the model is asked for it."""
        if not messages:
            return
        asked, _ = self._render(messages, tools, marks=False, prompt=True)
        if asked != prompt:
            raise RowFault(REWRITES, _difference(prompt, asked))


def _as_dict(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.name:
        turn["name"] = message.name
    return turn


def _check_nothing_lost(conversation: Conversation, text: str) -> None:
    """Every turn, tool and called function must be in the text; some templates write tool results as JSON strings."""
    for message in conversation.messages:
        content = message.content.strip()
        if content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise RowFault(LOST, f"a turn of role {message.role}: {content[:80]!r}")
        for call in message.tool_calls:
            if call["function"]["name"] not in text:
                raise RowFault(LOST, f"a call of the tool {call['function']['name']!r}")
    for tool in conversation.tools:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise RowFault(LOST, f"the description of the tool {name!r}")


def _difference(text: str, part: str) -> str:
    same = next((at for at, (a, b) in enumerate(zip(text, part, strict=False)) if a != b), min(len(text), len(part)))
    return f"{text[same : same + 60]!r} instead of {part[same : same + 60]!r}"
