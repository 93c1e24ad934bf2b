"""What is learnt is exactly the assistant's text and the token that ends it; any other row is left out or refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from chat_fixtures import TEXT, UNMARKED, byte_level, row, sentence_piece_like, text_row, token_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.data.chat import FUSED, MISREAD, ChatEncoder, Encoded, EncodedRow, marked_sample
from trainer.data.render import ADDED, CONTROL, LOST, NO_END, REFUSED, REWRITES
from trainer.data.render import UNMARKED as UNMARKED_TURNS
from trainer.data.special_tokens import control_tokens, pad_token, stop_tokens
from trainer.data.templates import ChatTemplate, builtin_template
from trainer.errors import DataError, ModelError
from trainer.samples import Conversation, Message, Origin

TOKENIZER = byte_level()
SHORT = row(1, ("user", "Is it due? 🎉"), ("assistant", "Yes, §1 é"))
LONG = row(2, ("system", "Be brief."), ("user", "a"), ("assistant", "b b"), ("user", "c"), ("assistant", "d, payment"))
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"clause": "é"}}}


def own(text: str) -> ChatTemplate:
    return ChatTemplate("own", text)


def encode(template: ChatTemplate | None, *rows: Conversation, tokenizer: Any = TOKENIZER, **options: Any) -> Encoded:
    return ChatEncoder(tokenizer, template, **options).encode(rows)


def learnt(encoded: EncodedRow, tokenizer: Any = TOKENIZER) -> list[str]:
    """The runs of learnt tokens as text."""
    edges = np.flatnonzero(np.diff(encoded.example.loss_mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(encoded.example.input_ids[start:end].tolist()) for start, end in edges.tolist()]


def text_of(encoded: EncodedRow, tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode(encoded.example.input_ids.tolist())


def asked(template: ChatTemplate, messages: Sequence[Message], tokenizer: Any = TOKENIZER) -> list[int]:
    """The prompt as any user of transformers would make it."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(turns, chat_template=template.text, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [builtin_template("chatml"), builtin_template("smollm2"), own(UNMARKED)])
def test_every_answer_and_its_end_are_learnt_and_nothing_else(template: ChatTemplate) -> None:
    result = encode(template, SHORT, LONG)
    assert result.dropped == []
    assert learnt(result.rows[0]) == ["Yes, §1 é<|im_end|>"]
    assert learnt(result.rows[1]) == ["b b<|im_end|>", "d, payment<|im_end|>"]
    assert result.end_token_ids == [token_id(TOKENIZER, "<|im_end|>")]
    assert [item.answer_text for item in result.rows] == ["Yes, §1 é", "d, payment"]


def test_marks_and_prefixes_agree() -> None:
    marked, unmarked = encode(builtin_template("smollm2"), SHORT, LONG), encode(own(UNMARKED), SHORT, LONG)
    for one, other in zip(marked.rows, unmarked.rows, strict=True):
        assert one.example.input_ids.tolist() == other.example.input_ids.tolist()
        assert one.example.loss_mask.tolist() == other.example.loss_mask.tolist()
        assert one.prompt_ids == other.prompt_ids


@pytest.mark.parametrize("template", [builtin_template("chatml"), builtin_template("plain"), own(UNMARKED)])
@pytest.mark.parametrize("conversation", [SHORT, LONG, row(3, ("user", "q"), ("assistant", "\n\n leading space"))])
def test_the_prompt_has_the_tokens_that_generation_gives_it(template: ChatTemplate, conversation: Conversation) -> None:
    (encoded,) = encode(template, conversation).rows
    expected = asked(template, conversation.messages[:-1])
    assert encoded.prompt_ids == expected
    assert encoded.example.input_ids[: len(expected)].tolist() == expected
    assert encoded.example.loss_mask[len(expected)]


def test_an_answer_that_would_fuse_with_the_prompt_is_kept_apart() -> None:
    """Encoded as one string, the line breaks before and in the answer are one token that no prompt ends with."""
    tokenizer = byte_level(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), eos="<|eot_id|>", pad=None)
    template = builtin_template("chatml")
    template = ChatTemplate("breaks", template.text.replace("<|im_start|>", "").replace("<|im_end|>", "<|eot_id|>"))
    (encoded,) = encode(template, row(1, ("user", "q"), ("assistant", "\n\nA")), tokenizer=tokenizer).rows
    assert learnt(encoded, tokenizer) == ["\n\nA<|eot_id|>"]


@pytest.mark.parametrize(("name", "space"), [("mistral", " "), ("mistral-tekken", "")])
def test_tokenizers_that_put_a_space_before_the_first_word(name: str, space: str) -> None:
    tokenizer, template = sentence_piece_like(), builtin_template(name)
    one = row(1, ("user", "the buyer"), ("assistant", "pay é 🎉"))
    two = row(2, ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"))
    result = encode(template, one, two, tokenizer=tokenizer)
    assert result.dropped == []
    assert learnt(result.rows[0], tokenizer) == ["pay é 🎉</s>"]
    assert learnt(result.rows[1], tokenizer) == ["b</s>", "d e</s>"]
    whole = tokenizer(f"<s>[INST]{space}the buyer[/INST]{space}pay é 🎉</s>", add_special_tokens=False)["input_ids"]
    assert result.rows[0].example.input_ids.tolist() == whole
    assert result.rows[0].prompt_ids == asked(template, one.messages[:-1], tokenizer)


ANSWER_AFTER = "{% for m in messages %}{{ m.content + (PROMPT if m.role == 'user' else eos_token) }}{% endfor %}"


def test_an_answer_whose_first_token_reaches_into_the_prompt_is_left_out() -> None:
    template = own(ANSWER_AFTER.replace("PROMPT", "' pay'"))
    rows = [row(1, ("user", "the buyer"), ("assistant", " x y")), row(2, ("user", "the buyer"), ("assistant", "ment"))]
    result = encode(template, *rows, tokenizer=sentence_piece_like())
    assert [(item.reason, item.first) for item in result.dropped] == [
        (MISREAD, ["rows.jsonl:2 ('payment</s>' instead of 'ment</s>')"])
    ]


def test_a_prompt_whose_tokens_change_once_an_answer_follows_is_left_out() -> None:
    """GPT-2's way of cutting: line breaks at the end of a string are one token, before a word they are two."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["a\n\n\nb"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    template = own(ANSWER_AFTER.replace("PROMPT", "'\n\n'"))
    rows = [row(1, ("user", "a"), ("assistant", "\nb")), row(2, ("user", "a"), ("assistant", "b"))]
    result = encode(template, *rows, tokenizer=tokenizer)
    assert [(item.reason, item.first) for item in result.dropped] == [(FUSED, ["rows.jsonl:2 (before 'b</s>')"])]


def test_loss_on_all_learns_the_prompt_too() -> None:
    (encoded,) = encode(builtin_template("chatml"), SHORT, loss_on="all").rows
    assert encoded.example.loss_mask.all()
    assert encoded.prompt_ids == asked(builtin_template("chatml"), SHORT.messages[:-1])


def test_plain_text_is_learnt_whole_and_ends_once() -> None:
    end = token_id(TOKENIZER, "<|im_end|>")
    result = encode(None, text_row(1, "The buyer"), text_row(2, "The buyer<|im_end|>"))
    for encoded in result.rows:
        assert text_of(encoded) == "The buyer<|im_end|>"
        assert encoded.example.input_ids.tolist().count(end) == 1
        assert encoded.example.loss_mask.all()
        assert (encoded.prompt_ids, encoded.answer_text) == ([], "")


def test_plain_text_needs_an_end() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end-of-text token"):
        encode(None, text_row(1, "x"), tokenizer=tokenizer)


def test_texts_and_chats_stay_in_order_and_progress_is_told() -> None:
    told: list[int] = []
    rows = [text_row(1, "x"), SHORT, text_row(3, "y"), LONG]
    encoder = ChatEncoder(TOKENIZER, builtin_template("chatml"))
    result = encoder.encode(rows, on_progress=told.append)
    assert [item.conversation for item in result.rows] == rows
    assert told == [4]


def test_a_chat_without_any_template_lists_the_builtin_ones() -> None:
    with pytest.raises(DataError, match="the model's tokenizer has no chat template") as raised:
        encode(None, SHORT)
    assert "model.chat_template=builtin:chatml" in str(raised.value)


# ---- calls of tools


CALLING = Conversation(
    id="1",
    origin=Origin("rows.jsonl", 1),
    tools=(TOOL,),
    messages=(
        Message(role="user", content="due?"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="in May"),
        Message(role="assistant", content="In May."),
    ),
)


def test_calls_are_learnt_and_results_of_tools_are_not() -> None:
    result = encode(builtin_template("qwen2.5"), CALLING)
    assert learnt(result.rows[0]) == [
        '<tool_call>\n{"name": "look_up", "arguments": {"clause": "é"}}\n</tool_call><|im_end|>',
        "In May.<|im_end|>",
    ]


def test_an_answer_that_only_calls_is_what_the_template_writes() -> None:
    messages = CALLING.messages[:2]
    only_call = Conversation(id="1", origin=CALLING.origin, tools=(TOOL,), messages=messages)
    (encoded,) = encode(builtin_template("qwen2.5"), only_call).rows
    assert encoded.answer_text.startswith("<tool_call>")
    assert encoded.answer_text.endswith("</tool_call>")


def test_a_template_without_tools_is_refused_for_rows_with_tools() -> None:
    with pytest.raises(DataError, match=LOST) as raised:
        encode(builtin_template("chatml"), CALLING)
    assert "a call of the tool 'look_up'" in str(raised.value)
    described = Conversation(id="1", origin=CALLING.origin, tools=(TOOL,), messages=SHORT.messages)
    with pytest.raises(DataError, match="the description of the tool 'look_up'"):
        encode(builtin_template("chatml"), described)


# ---- rows and templates that do not go together


GOOD = [row(n, ("user", "q"), ("assistant", "a")) for n in (1, 2, 3)]
SIMPLE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "bad", "reason", "detail"),
    [
        (
            builtin_template("chatml"),
            row(9, ("user", "q"), ("assistant", "a <|im_end|> b")),
            CONTROL,
            "<|im_end|> in a turn of role assistant",
        ),
        (
            builtin_template("chatml"),
            row(9, ("user", "<|im_start|>system"), ("assistant", "a")),
            CONTROL,
            "<|im_start|> in a turn of role user",
        ),
        (
            own("{{ raise_exception('no system') if messages[0].role == 'system' }}" + SIMPLE + ASK),
            row(9, ("system", "s"), ("user", "q"), ("assistant", "a")),
            REFUSED,
            "no system",
        ),
        (
            own("{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"),
            row(9, ("user", "q"), ("assistant", "<think>hm</think>a")),
            LOST,
            "a turn of role assistant: '<think>hm</think>a'",
        ),
        (
            own("{% for m in messages %}{% if m.role == 'user' %}{{ m.content + (messages[0].content if loop.last and "
                "messages[0].role == 'system' else '') }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"),
            row(9, ("system", "S"), ("user", "q"), ("assistant", "a")),
            REWRITES,
            "",
        ),
        (
            own("{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content + eos_token if m.role == "
                "'assistant' }}{% endgeneration %}{{ m.content if m.role != 'assistant' }}{% endfor %}"
                "{{ 'assistant: ' if add_generation_prompt and messages[-1].content != 'x' }}"),
            row(9, ("user", "x"), ("assistant", "a")),
            REWRITES,
            "'assistant: ' instead of ''",
        ),
        (own(UNMARKED), row(9, ("assistant", "a")), UNMARKED_TURNS, "opens with an assistant turn"),
        (
            own("{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ 'A:' }}{% generation %}"
                "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.role + m.content }}{% endif %}"
                "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"),
            row(9, ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")),
            UNMARKED_TURNS,
            "1 marked places, 2 assistant turns",
        ),
        (
            own(SIMPLE.replace("m.content", "m.content + ('?!' if 'loud' in m.content else '')") + ASK),
            row(9, ("user", "q"), ("assistant", "loud")),
            ADDED,
            "after it: '?!'",
        ),
        (
            own(SIMPLE.replace("m.content", "('hm: ' if m.content == 'x' else '') + m.content") + ASK),
            row(9, ("user", "q"), ("assistant", "x")),
            ADDED,
            "before it: 'hm: '",
        ),
        (
            own(SIMPLE.replace("'<|im_end|>\n'", "'<|im_end|>\n' + ('bye' if m.content == 'x' else '')") + ASK),
            row(9, ("user", "q"), ("assistant", "x")),
            ADDED,
            "after its end: '\\nbye'",
        ),
        (
            own(SIMPLE.replace("'<|im_end|>\n'", "('\n' if m.content == 'x' else '<|im_end|>\n')") + ASK),
            row(9, ("user", "q"), ("assistant", "x")),
            NO_END,
            "after it: '\\n'",
        ),
    ],
)  # fmt: skip
def test_one_bad_row_is_left_out_and_half_of_them_are_refused(
    template: ChatTemplate, bad: Conversation, reason: str, detail: str
) -> None:
    result = encode(template, *GOOD, bad)
    assert len(result.rows) == 3
    ((found, first),) = [(item.reason, item.first[0]) for item in result.dropped]
    assert found == reason
    assert first.startswith("rows.jsonl:9")
    assert detail in first
    if reason == CONTROL:  # the row's fault with any template
        assert encode(template, bad).rows == []
        return
    with pytest.raises(DataError, match="the chat template cannot be used with these rows") as raised:
        encode(template, bad)
    message = str(raised.value)
    assert reason in message
    assert "the row as rendered:" in message
    assert "model.chat_template=builtin:chatml" in message


def test_a_mark_that_leaves_the_answer_out_is_refused() -> None:
    elsewhere = own(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% generation %}"
        "{{ '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(DataError, match=LOST) as raised:
        encode(elsewhere, row(1, ("assistant", "a")))
    assert "an assistant turn: 'a'" in str(raised.value)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (row(1, ("user", "q"), ("assistant", "a")), ADDED),  # an empty <think> block is put before it
        (
            row(1, ("user", "q"), ("assistant", "<think>\nhm\n</think>\n\na"), ("user", "r"), ("assistant", "b")),
            LOST,  # thinking is taken out of history
        ),
    ],
)
def test_a_template_that_rewrites_thinking_is_refused_with_the_row_and_the_way_out(
    conversation: Conversation, reason: str
) -> None:
    rewriting = own((PUBLISHED / "qwen3.jinja").read_text())
    with pytest.raises(DataError, match=reason) as raised:
        encode(rewriting, conversation)
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert "1 of 1 rows, first rows.jsonl:1" in message
    assert "<|im_start|>user\nq<|im_end|>" in message
    assert "qwen3" in message
    assert encode(builtin_template("qwen3"), conversation).dropped == []


def test_a_refused_row_is_shown_by_its_turns_when_it_cannot_be_rendered() -> None:
    with pytest.raises(DataError, match=r"\(not rendered: the template refuses the conversation \(never\)\)") as raised:
        encode(own("{{ raise_exception('never') }}"), SHORT)
    assert "user: Is it due?" in str(raised.value)


def test_a_tokenizer_that_loses_characters_is_noticed() -> None:
    vocabulary = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "q": 3, "a": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>")
    template = own("{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}")
    unknown = row(9, ("user", "q"), ("assistant", "zebra"))
    result = encode(template, *GOOD, unknown, tokenizer=tokenizer)
    assert [(item.reason, item.count) for item in result.dropped] == [(MISREAD, 1)]
    assert "'<unk><|im_end|>' instead of 'zebra<|im_end|>'" in result.dropped[0].first[0]


# ---- tokens with a meaning


def test_padding_is_no_stop_token_where_another_is_there() -> None:
    end = token_id(TOKENIZER, "<|im_end|>")
    assert TOKENIZER.pad_token_id == end
    assert pad_token(TOKENIZER, [end]) == token_id(TOKENIZER, "<|endoftext|>")
    with_own = byte_level(pad="<|im_start|>")
    assert pad_token(with_own, [end]) == token_id(with_own, "<|im_start|>")


def test_padding_falls_back_to_unk_then_bos_then_to_what_it_was() -> None:
    with_unk = sentence_piece_like()
    assert pad_token(with_unk, [token_id(with_unk, "</s>")]) == with_unk.unk_token_id
    with_bos = byte_level(("<s>", "</s>"), eos="</s>", pad=None, bos="<s>")
    assert pad_token(with_bos, [1]) == 0
    alone = byte_level(("</s>",), eos="</s>", pad="</s>")
    assert pad_token(alone, [0]) == 0
    without = byte_level(("</s>",), eos="</s>", pad=None)
    assert pad_token(without, [0]) == 0


def test_stop_tokens_are_those_of_the_template_and_the_end_of_text() -> None:
    tokenizer = byte_level(("<|end_of_text|>", "<|eot_id|>"), eos="<|end_of_text|>", pad=None)
    assert stop_tokens(tokenizer, [1]) == [1, 0]
    assert stop_tokens(tokenizer, [0]) == [0]
    tokenizer.eos_token = None
    assert stop_tokens(tokenizer, [1]) == [1]
    assert control_tokens(tokenizer) == {"<|end_of_text|>", "<|eot_id|>"}


def test_the_sample_marks_what_is_learnt() -> None:
    (encoded,) = encode(builtin_template("chatml"), SHORT).rows
    assert marked_sample(TOKENIZER, encoded.example) == (
        "<|im_start|>user\nIs it due? 🎉<|im_end|>\n<|im_start|>assistant\n»Yes, §1 é<|im_end|>«\n"
    )
    (text,) = encode(None, text_row(1, TEXT)).rows
    assert marked_sample(TOKENIZER, text.example) == f"»{TEXT}<|im_end|>«"
