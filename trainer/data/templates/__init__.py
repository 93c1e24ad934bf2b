"""The built-in chat templates, and the choice of the one that a run uses.

Most published templates cannot say which tokens are the assistant's. These do (``{% generation %}``), render the known
formats and learn the end of each turn. A template is one Jinja file beside this one, and is used by
``model.chat_template=builtin:NAME``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.errors import DataError, nearest

_FOLDER = Path(__file__).parent
_PREFIX = "builtin:"

CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "mistral-tekken": ("[INST]", "[/INST]"),
    "plain": (),
    "qwen2.5": ("<|im_start|>", "<|im_end|>", "<tool_call>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<tool_call>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
}
"""Built-in template to the tokens that a tokenizer must have for it."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template that compiles: its name in messages (``builtin:chatml``, a path, ...) and its text."""

    name: str
    text: str


def template_names() -> tuple[str, ...]:
    """Return the names of the built-in templates, sorted."""
    return tuple(sorted(CONTROL_TOKENS))


def builtin_template(name: str) -> ChatTemplate:
    """Return the built-in template ``name``.

    Raises:
        DataError: there is none of that name.
    """
    if name not in CONTROL_TOKENS:
        raise DataError(
            "there is no built-in chat template of this name",
            where="model.chat_template",
            got=f"{_PREFIX}{name}",
            allowed=", ".join(_PREFIX + known for known in template_names()),
            do=nearest(name, template_names()),
        )
    return ChatTemplate(f"{_PREFIX}{name}", (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def suggestions(vocabulary: Collection[str]) -> str:
    """Return the lines a user may write, those first whose control tokens are in the tokenizer's ``vocabulary``."""
    fitting = [name for name in template_names() if all(token in vocabulary for token in CONTROL_TOKENS[name])]
    others = [name for name in template_names() if name not in fitting]
    listed = ", ".join(f"model.chat_template={_PREFIX}{name}" for name in fitting)
    return f"{listed} (and, for tokenizers that have their control tokens: {', '.join(others)})" if others else listed


def choose_template(
    requested: str | None, own: str | Mapping[str, str] | None, vocabulary: Collection[str], *, cwd: Path
) -> ChatTemplate:
    """Return the template to use: ``model.chat_template`` (``builtin:NAME`` or a Jinja file), else the tokenizer's own.

    ``own`` may be several named templates; the one called ``default`` is used.

    Raises:
        DataError: there is none at all, the file is missing or not UTF-8, or it is not valid Jinja.
    """
    if requested is not None and requested.startswith(_PREFIX):
        return builtin_template(requested.removeprefix(_PREFIX))
    if requested is not None:
        return _from_file(requested, cwd)
    text = own.get("default") if isinstance(own, Mapping) else own
    if not text:
        raise DataError(
            "the model's tokenizer has no chat template, and the rows are conversations",
            where="model.chat_template",
            got="null",
            allowed="builtin:NAME, or a Jinja file",
            do=suggestions(vocabulary),
        )
    return _compiled(ChatTemplate("the tokenizer's own template", text))


def _from_file(requested: str, cwd: Path) -> ChatTemplate:
    path = cwd / Path(requested).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        builtins = ", ".join(_PREFIX + name for name in template_names())
        raise DataError(
            "the chat template cannot be read",
            where="model.chat_template",
            got=f"{path}: {fault}",
            allowed=f"a Jinja file in UTF-8, or {builtins}",
            do="correct the path; a built-in template needs 'builtin:' before its name",
        ) from None
    return _compiled(ChatTemplate(str(path), text))


def _compiled(template: ChatTemplate) -> ChatTemplate:
    """Refuse a template that is not valid Jinja, with its line, before the first row meets it."""
    try:
        render_jinja_template(conversations=[[{"role": "user", "content": "x"}]], chat_template=template.text)
    except TemplateSyntaxError as fault:
        raise DataError(
            "the chat template is not valid Jinja",
            where=f"{template.name}, line {fault.lineno}",
            got=str(fault.message),
            do="correct it, or use a built-in one: " + ", ".join(_PREFIX + name for name in template_names()),
        ) from None
    except (TemplateError, TypeError):
        pass  # It compiles; whether it can render a conversation is verified on the real rows.
    return template
