"""The built-in templates render the known formats, mark exactly the answers, and a bad choice is refused with words."""

from pathlib import Path
from typing import Any

import pytest
import trl
from chat_fixtures import byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.data import templates
from trainer.data.templates import (
    CONTROL_TOKENS,
    builtin_template,
    choose_template,
    suggestions,
    template_names,
)
from trainer.errors import DataError

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
VARIABLES: dict[str, Any] = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "é", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
SYSTEM, USER, ASSISTANT = ({"role": role, "content": f" {role} é "} for role in ("system", "user", "assistant"))
CALLING = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "3"},
    ASSISTANT,
    USER,
    {"role": "assistant", "content": "let me see", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
]


def render(template: str, messages: list[dict[str, Any]], *, tools: Any = None, prompt: bool = False) -> str:
    texts, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **VARIABLES
    )
    return texts[0]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [[USER, ASSISTANT], [USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]])
@pytest.mark.parametrize(
    ("name", "published"),
    [("llama3", "llama3"), ("qwen2.5", "qwen2_5"), ("qwen3", "qwen3_instruct_2507")],
)
def test_known_formats(name: str, published: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    expected = render((PUBLISHED / f"{published}.jinja").read_text(), messages, prompt=prompt)
    assert render(builtin_template(name).text, messages, prompt=prompt) == expected


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("published", "messages"),
    [("gemma", [USER, ASSISTANT, USER, ASSISTANT]), ("gemma3", [SYSTEM, USER, ASSISTANT]), ("gemma3", [USER])],
)
def test_gemma_with_and_without_a_system_prompt(published: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    expected = render((PUBLISHED / f"{published}.jinja").read_text(), messages, prompt=prompt)
    assert render(builtin_template("gemma").text, messages, prompt=prompt) == expected


@pytest.mark.parametrize("messages", [CALLING, [SYSTEM, *CALLING]])
@pytest.mark.parametrize(("name", "published"), [("qwen2.5", "qwen2_5"), ("qwen3", "qwen3_instruct_2507")])
def test_tool_calls(name: str, published: str, messages: list[dict[str, Any]]) -> None:
    expected = render((PUBLISHED / f"{published}.jinja").read_text(), messages, tools=TOOLS, prompt=True)
    assert render(builtin_template(name).text, messages, tools=TOOLS, prompt=True) == expected


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = said(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral", "<BOS>[INST] S\n\na[/INST] b<EOS>[INST] c[/INST] d<EOS>"),
        ("mistral-tekken", "<BOS>[INST]S\n\na[/INST]b<EOS>[INST]c[/INST]d<EOS>"),
        (
            "plain",
            "### System:\nS\n\n### User:\na\n\n### Assistant:\nb<EOS>\n\n### User:\nc\n\n### Assistant:\nd<EOS>\n\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
        ),
    ],
)
def test_formats_that_nobody_else_ships(name: str, expected: str) -> None:
    assert render(builtin_template(name).text, TWO_TURNS) == expected


def test_smollm2_has_its_system_prompt_and_chatml_has_none() -> None:
    opening = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = render(builtin_template("chatml").text, said(("user", "hi")), prompt=True)
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(builtin_template("smollm2").text, said(("user", "hi")), prompt=True) == opening + asked


@pytest.mark.parametrize("name", ["gemma", "mistral", "mistral-tekken"])
def test_templates_without_a_system_role_refuse_turns_out_of_order(name: str) -> None:
    with pytest.raises(Exception, match="user and assistant must take turns"):
        render(builtin_template(name).text, said(("user", "a"), ("user", "b")))


@pytest.mark.parametrize("name", template_names())
def test_the_marks_hold_the_answers_and_the_token_that_ends_them(name: str) -> None:
    end = {"gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}.get(name, "<|im_end|>")
    end = "<EOS>" if name in ("mistral", "mistral-tekken", "plain") else end
    space = " " if name == "mistral" else ""
    result: Any = render_jinja_template(
        [TWO_TURNS],
        chat_template=builtin_template(name).text,
        return_assistant_tokens_mask=True,
        **VARIABLES,
    )
    texts, places = result
    marked = [texts[0][start:stop] for start, stop in places[0]]
    assert marked == [f"{space}b{end}", f"{space}d{end}"]


def test_every_file_is_listed_and_needs_the_tokens_it_writes() -> None:
    folder = Path(templates.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.jinja")) == list(template_names())
    for name, tokens in CONTROL_TOKENS.items():
        assert all(token in builtin_template(name).text for token in tokens)


def test_suggestions_put_those_first_that_the_tokenizer_can_write() -> None:
    lines = suggestions(byte_level().get_vocab())
    fitting, others = lines.split(" (and, ")
    assert "model.chat_template=builtin:chatml" in fitting
    assert "builtin:plain" in fitting
    assert "llama3" in others
    every = {token for tokens in CONTROL_TOKENS.values() for token in tokens}
    assert suggestions(every).count("builtin:") == len(template_names())


def test_an_unknown_builtin_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no built-in chat template of this name") as raised:
        choose_template("builtin:chatlm", None, (), cwd=tmp_path)
    assert "did you mean 'chatml'?" in str(raised.value)
    assert "builtin:llama3" in str(raised.value)


def test_a_missing_template_lists_the_builtin_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model's tokenizer has no chat template") as raised:
        choose_template(None, None, byte_level().get_vocab(), cwd=tmp_path)
    assert raised.value.exit_code == 2
    assert "model.chat_template=builtin:chatml" in str(raised.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the chat template cannot be read") as raised:
        choose_template("chatml", None, (), cwd=tmp_path)
    assert "a built-in template needs 'builtin:' before its name" in str(raised.value)
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="the chat template cannot be read"):
        choose_template("latin.jinja", None, (), cwd=tmp_path)


def test_a_template_that_is_not_jinja_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{{ bos_token }}\n{% for message in messages %}")
    with pytest.raises(DataError, match="the chat template is not valid Jinja") as raised:
        choose_template("broken.jinja", None, (), cwd=tmp_path)
    assert "broken.jinja, line 2" in str(raised.value)


def test_the_choice(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('refuses everything') }}")
    assert choose_template("mine.jinja", "own", (), cwd=tmp_path).text.startswith("{{ raise")
    assert choose_template(None, "own", (), cwd=tmp_path).text == "own"
    assert choose_template(None, {"default": "d", "tool_use": "t"}, (), cwd=tmp_path).text == "d"
    assert choose_template("builtin:plain", "own", (), cwd=tmp_path).name == "builtin:plain"
