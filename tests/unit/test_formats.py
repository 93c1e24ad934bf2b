"""Every documented shape is read, every other one is refused with words, and no row is lost without a count."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from chat_fixtures import records

from trainer.data.formats import Formatted, RowOptions, format_rows, unique_ids
from trainer.errors import DataError
from trainer.samples import Conversation

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def only(fields: Mapping[str, Any], **options: Any) -> Conversation:
    result = format_rows(records(dict(fields)), RowOptions(**options))
    assert result.dropped == []
    return result.conversations[0]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def reasons(result: Formatted) -> dict[str, list[str]]:
    return {item.reason: item.first for item in result.dropped}


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages"),
        ({"messages": [USER, ASSISTANT], "prompt": "x", "text": "y"}, "messages"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "sharegpt"),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion"),
        ({"instruction": "Q", "input": "", "output": "A", "text": "Q A"}, "alpaca"),
    ],
)
def test_each_chat_shape_is_recognised_and_means_the_same(fields: dict[str, Any], shape: str) -> None:
    result = format_rows(records(fields), RowOptions())
    assert result.shapes == {"rows.jsonl": shape}
    assert turns(result.conversations[0]) == [("user", "Q"), ("assistant", "A")]
    assert result.conversations[0].answer == "A"


def test_plain_text_has_no_turns() -> None:
    conversation = only({"text": "Once."})
    assert (conversation.text, conversation.messages) == ("Once.", ())


def test_alpaca_joins_instruction_and_input_and_keeps_history() -> None:
    conversation = only({"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "ho"]]})
    assert turns(conversation) == [("user", "hi"), ("assistant", "ho"), ("user", "Add\n\n1 2"), ("assistant", "3")]


def test_a_named_format_wins_over_the_order_of_recognition() -> None:
    conversation = only({"instruction": "Q", "output": "A", "text": "whole"}, format="text")
    assert conversation.text == "whole"


def test_columns_are_mapped() -> None:
    conversation = only({"question": "Q", "reply": "A"}, columns={"prompt": "question", "completion": "reply"})
    assert turns(conversation) == [("user", "Q"), ("assistant", "A")]


def test_what_a_scorer_compares_with_can_be_named_by_the_row() -> None:
    conversation = only({"id": 7, "prompt": "Q", "completion": "so it is A", "answer": "A"})
    assert (conversation.id, conversation.answer) == ("7", "A")


def test_label_group_and_slices_come_from_their_columns() -> None:
    fields = {"prompt": "Q", "completion": "A", "kind": "k", "family": 3, "source": None}
    conversation = only(fields, label_column="kind", group_column="family", slice_columns=["source", "kind"])
    assert (conversation.label, conversation.group) == ("k", "3")
    assert conversation.slices == {"source": "", "kind": "k"}


def test_system_prompt_of_the_turns_then_of_the_row_then_of_the_config() -> None:
    own = {"messages": [{"role": "system", "content": "turn"}, USER, ASSISTANT], "system": "row"}
    assert turns(only(own, system="config"))[0] == ("system", "turn")
    assert turns(only({"prompt": "Q", "completion": "A", "system": "row"}, system="config"))[0] == ("system", "row")
    assert turns(only({"prompt": "Q", "completion": "A"}, system="config"))[0] == ("system", "config")


def test_tools_and_calls_are_parsed_so_that_a_template_does_not_quote_them_twice() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ASSISTANT,
    ]
    conversation = only({"messages": said, "tools": json.dumps([tool])})
    assert conversation.tools == (tool,)
    assert conversation.messages[1].tool_calls == (
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
    )


def test_sharegpt_function_calls_become_tool_calls() -> None:
    said = [
        {"from": "human", "value": "1+1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    conversation = only({"conversations": said})
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls[0]["function"]["name"] == "add"


def test_text_parts_are_joined_and_annotations_counted() -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    said = [{**USER, "timestamp": 1}, {"role": "assistant", "content": parts, "timestamp": 2}]
    result = format_rows(records({"messages": said}), RowOptions())
    assert turns(result.conversations[0])[1] == ("assistant", "AB")
    assert result.ignored == ["timestamp (2 times)"]


def test_equal_ids_are_told_apart_by_their_lines() -> None:
    one = only({"id": "a", "prompt": "Q", "completion": "A"})
    other = records({"id": "a", "prompt": "R", "completion": "B"}, {"id": "b", "text": "x"}, file="other.jsonl")
    rest = format_rows(other, RowOptions(format="prompt_completion")).conversations
    groups = unique_ids([[one], rest])
    assert [[item.id for item in group] for group in groups] == [["a (rows.jsonl:1)"], ["a (other.jsonl:1)"]]


GOOD = {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ({"messages": [USER]}, "no answer", "roles are user"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no answer", "an assistant turn is empty"),
        ({"messages": []}, "no turns", "'messages' is empty"),
        ({"messages": None}, "no turns", "'messages' is empty"),
        ({"messages": " "}, "no turns", "'messages' is empty"),
        ({"messages": "[{"}, "'messages' is a text that is not JSON", "Expecting property name"),
        ({"messages": {"role": "user"}}, "'messages' is not a list of turns", "got dict"),
        ({"messages": ["hi"]}, "a turn is not an object with role and content", "got hi"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role", "'narrator', known are system"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "a system turn comes after another turn", ""),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "a turn has 'weight', which this version cannot train on",
            "got 0",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]},
            "a turn has 'reasoning_content', which this version cannot train on",
            "got hm",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
            "the content of a turn is not text",
            "image",
        ),
        (
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}, ASSISTANT]},
            "tool calls in a turn that is not the assistant's",
            "role user",
        ),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"x": 1}]}]}, "a tool call has no function name", "x"),
        ({"messages": [USER, ASSISTANT], "tools": '{"a": 1}'}, "'tools' is not a list of objects", "got"),
    ],
)
def test_a_bad_row_is_left_out_with_its_line_and_why(bad: dict[str, Any], reason: str, detail: str) -> None:
    result = format_rows(records(GOOD, bad), RowOptions())
    assert len(result.conversations) == 1
    (shown,) = reasons(result)[reason]
    assert shown.startswith("rows.jsonl:2")
    assert detail in shown


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ({"prompt": "Q", "completion": "A"}, {"prompt": "Q"}, "no answer"),
        ({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": " "}, "no answer"),
        ({"prompt": "Q", "completion": "A"}, {"prompt": None, "completion": "A"}, "no prompt"),
        ({"prompt": "Q", "completion": "A"}, {"prompt": True, "completion": "A"}, "'prompt' is not a text"),
        ({"instruction": "Q", "output": "A"}, {"instruction": "Q"}, "no answer"),
        (
            {"instruction": "Q", "output": "A"},
            {"instruction": "Q", "output": "A", "history": ["x"]},
            "'history' is not a list of [question, answer] pairs",
        ),
        ({"text": "x"}, {"text": ""}, "no text"),
    ],
)
def test_a_row_that_lacks_something_is_not_taken_for_another_shape(
    good: dict[str, Any], bad: dict[str, Any], reason: str
) -> None:
    assert reasons(format_rows(records(good, bad), RowOptions())).keys() == {reason}


def test_no_usable_row_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError) as raised:
        format_rows(records({"messages": [USER]}, {"messages": [USER]}), RowOptions())
    message = str(raised.value)
    assert raised.value.exit_code == 2
    assert "no row can be used" in message
    assert "no answer: 2 rows (rows.jsonl:1 (roles are user), rows.jsonl:2 (roles are user))" in message


def test_an_unknown_shape_shows_the_columns_the_shapes_and_the_nearest_mapping() -> None:
    with pytest.raises(DataError) as raised:
        format_rows(records({"question": "Q", "reply": "A", "lang": "en"}), RowOptions())
    message = str(raised.value)
    assert "rows.jsonl: the columns fit no known shape of rows" in message
    assert "got: lang, question, reply" in message
    assert all(name in message for name in ("messages:", "sharegpt:", "prompt_completion:", "alpaca:", "text:"))
    assert "data.columns={prompt: question, completion: reply}" in message


def test_an_unknown_shape_without_any_near_name_still_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"data.columns=\{prompt: your_column, completion: your_other_column\}"):
        format_rows(records({"zz": 1}), RowOptions())


def test_a_named_format_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"the columns do not fit data\.format=messages") as raised:
        format_rows(records({"mesages": []}), RowOptions(format="messages"))
    assert "data.columns={messages: mesages}" in str(raised.value)


def test_a_mapping_to_a_column_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(DataError, match="there is no column 'qestion'") as raised:
        format_rows(records({"question": "Q", "completion": "A"}), RowOptions(columns={"prompt": "qestion"}))
    assert "data.columns.prompt" in str(raised.value)
    assert "did you mean 'question'?" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"label_column": "kind"}, "data.label_column"),
        ({"group_column": "kind"}, "data.group_column"),
        ({"slice_columns": ["kind"]}, "data.slice_columns"),
    ],
)
def test_a_named_column_has_to_exist(options: dict[str, Any], where: str) -> None:
    with pytest.raises(DataError, match="there is no column 'kind'") as raised:
        format_rows(records({"text": "x"}), RowOptions(**options))
    assert where in str(raised.value)


def test_a_mapping_of_a_name_that_no_shape_has_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"data\.columns maps 'promt', which no shape of rows has") as raised:
        format_rows(records({"text": "x"}), RowOptions(columns={"promt": "text"}))
    assert "did you mean 'prompt'?" in str(raised.value)
