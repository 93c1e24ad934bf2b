"""The rows of the smoke experiment: balanced, repeatable, and honest about what is tested."""

from collections import Counter

from trainer.data.smoke import LABELS, ROWS, smoke_records
from trainer.data.splits import SPLITS


def test_every_split_has_its_rows_and_labels_in_equal_parts() -> None:
    for split in SPLITS:
        records = smoke_records(split)
        assert len(records) == ROWS[split]
        assert Counter(record.fields["label"] for record in records) == dict.fromkeys(LABELS, ROWS[split] // 4)
        assert {record.fields["split"] for record in records} == {split}


def test_no_sentence_is_in_two_splits_or_twice_in_one() -> None:
    questions = [record.fields["messages"][0]["content"] for split in SPLITS for record in smoke_records(split)]
    assert len(set(questions)) == len(questions) == 240


def test_the_answer_is_the_assistants_turn_and_the_prompt_names_every_label() -> None:
    for record in smoke_records("train"):
        user, assistant = record.fields["messages"]
        assert assistant == {"role": "assistant", "content": record.fields["answer"]}
        assert all(label in user["content"] for label in LABELS)


def test_the_rows_are_the_same_every_time_and_shuffled() -> None:
    assert smoke_records("train") == smoke_records("train")
    labels = [record.fields["label"] for record in smoke_records("train")]
    assert labels != sorted(labels)
    assert [str(record.origin) for record in smoke_records("test")][:2] == ["smoke/test:1", "smoke/test:2"]
    assert smoke_records("test")[0].fields["id"] == "smoke-test-1"
