"""The stage as a whole: what the ranks will read is complete, says what became of every row, and is found again."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prepare_fixtures import planned, question, write_rows
from transformers import AutoTokenizer

from trainer import prepare as stage
from trainer.data import tokenized
from trainer.data.rows import gather_rows
from trainer.data.scheduling import read_row, row_key, schedule_options
from trainer.data.timing import cost_ratio
from trainer.errors import ConfigError, DataError, RunError
from trainer.markers import is_current, read_marker
from trainer.memory import folder_shape
from trainer.paths import RunFolder
from trainer.plan import load_plan, stage_inputs
from trainer.samples import EvaluationExample, Prepared
from trainer_kernels import TokenArena

TINY = ("model=tiny", "packing.capacity=256", "optim.batch_packs=2")


def own_data(tmp_path: Path, rows: int = 40) -> tuple[str, ...]:
    path = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(rows)])
    return (*TINY, "data=files", f"data.train={path}", "task=extraction")


def examples(path: str) -> list[EvaluationExample]:
    return [msgspec.json.decode(line, type=EvaluationExample) for line in Path(path).read_bytes().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Prepared]:
    folder = planned(tmp_path_factory.mktemp("smoke"), "+experiment=smoke")
    return folder, stage.prepare(folder)


def test_everything_that_ranks_read_is_there(smoke: tuple[RunFolder, Prepared]) -> None:
    folder, prepared = smoke
    assert msgspec.json.decode(folder.prepared_json.read_bytes(), type=Prepared) == prepared
    assert (prepared.dtype, prepared.dtype_reason) == ("float32", "as configured")
    assert prepared.labels == ["confidentiality", "governing law", "payment", "termination"]
    assert [info.rows for info in (prepared.train, prepared.validation, prepared.test) if info] == [160, 40, 40]
    assert prepared.dropped == []
    assert prepared.stop_token_ids == [2]
    assert prepared.pad_token_id == 0
    arena = TokenArena.open(prepared.train.arena, expect_sha256=prepared.train.arena_sha256)
    assert (arena.num_documents, arena.num_tokens) == (prepared.train.documents, prepared.train.tokens)
    assert prepared.train.longest == int(arena.lengths.max())


def test_what_is_learnt_are_the_answers(smoke: tuple[RunFolder, Prepared]) -> None:
    _, prepared = smoke
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    arena = TokenArena.open(prepared.train.arena)
    learnt = set()
    for document in range(arena.num_documents):
        ids, target = arena.document(document)
        learnt.add(tokenizer.decode(ids[target].tolist()))
    assert learnt == {f"{label}<|im_end|>" for label in prepared.labels}
    assert prepared.sample.count("»") == 1
    assert prepared.sample.rstrip().endswith("<|im_end|>«")


def test_held_out_prompts_are_what_the_saved_tokenizer_renders(smoke: tuple[RunFolder, Prepared]) -> None:
    folder, prepared = smoke
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    config = load_plan(folder.plan_json.read_bytes()).config
    splits = gather_rows(config.data, config.task, cache=folder.root).splits
    for path, split in ((prepared.validation_examples, splits.validation), (prepared.test_examples, splits.test)):
        held_out = examples(path)
        assert Path(path).parent == folder.evaluation
        assert [example.id for example in held_out] == [row.id for row in split]
        for example, row in zip(held_out, split, strict=True):
            turns = [{"role": "user", "content": row.messages[0].content}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert example.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert (example.answer, example.label) == (row.answer, row.label)


def test_the_tokenizer_is_saved_as_it_is_used(smoke: tuple[RunFolder, Prepared]) -> None:
    _, prepared = smoke
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    assert tokenizer.pad_token_id == prepared.pad_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 2048
    assert "{%- generation -%}" in tokenizer.chat_template


def test_schedule_and_marker(smoke: tuple[RunFolder, Prepared]) -> None:
    folder, prepared = smoke
    plan = load_plan(folder.plan_json.read_bytes())
    schedule = json.loads((folder.launch / "schedule.json").read_text())
    names = {"packs", "fill", "steps", "steps_per_epoch", "tokens_per_step", "waiting", "by_time", "sync"}
    assert schedule.keys() == names
    options = schedule_options(plan, cost_ratio=prepared.cost_ratio)
    row = read_row(folder.schedule_npz, key=row_key(prepared.train.arena_sha256, options))
    assert row is not None, "the ranks look for it with this key"
    assert row.first[1] == schedule["packs"]
    assert schedule["steps"] == plan.config.optim.max_steps
    assert schedule["fill"] == pytest.approx(prepared.train.tokens / (schedule["packs"] * 256))
    assert schedule["steps_per_epoch"] == schedule["packs"] / 2
    assert schedule["tokens_per_step"] == pytest.approx(prepared.train.tokens / schedule["steps_per_epoch"])
    assert is_current(folder, "prepare", stage_inputs(plan, "prepare"))
    marker = read_marker(folder, "prepare")
    assert marker is not None
    assert marker.summary["train rows"] == 160


def by_time(tmp_path: Path, *overrides: str) -> tuple[Prepared, dict[str, Any]]:
    """Prepared with packs by time for two ranks, and its schedule.json."""
    given = ("packing.cost=time", "launch.processes=2", *overrides)
    folder = planned(tmp_path, *own_data(tmp_path), *given)
    return stage.prepare(folder), json.loads((folder.launch / "schedule.json").read_text())


def test_packs_by_time_go_by_the_shape_of_the_model_unless_a_ratio_is_given(tmp_path: Path) -> None:
    prepared, schedule = by_time(tmp_path)
    shape = folder_shape(Path(prepared.base.directory))
    assert shape is not None
    assert prepared.cost_ratio == cost_ratio(shape, frozen_base=True) > 0
    assert schedule["by_time"]
    assert 0 <= schedule["waiting"] < 1
    prepared, _ = by_time(tmp_path, "packing.cost_ratio=2e-3")
    assert prepared.cost_ratio == 2e-3


@pytest.mark.parametrize(
    ("layout", "sync", "words"),
    [
        ("parallel=ddp", "step", "about the same sum to each, because ranks wait for each other once per step"),
        ("parallel=fsdp", "micro", "equally long together, because ranks wait for each other in every micro-batch"),
    ],
)
def test_a_document_that_takes_longer_than_a_pack_is_said_and_packs_are_dealt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, sync: str, words: str
) -> None:
    prepared, schedule = by_time(tmp_path, "packing.cost_ratio=10.0", layout)
    assert prepared.cost_ratio == 10.0
    assert not schedule["by_time"]
    assert schedule["sync"] == sync
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"a document of {prepared.train.longest} tokens takes longer than a pack of 256 may" in said
    assert "packs are filled by tokens, and the packs of a step are dealt to the ranks by time" in said
    assert words in said


def test_a_model_without_a_known_shape_needs_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "folder_shape", lambda _: None)
    with pytest.raises(ConfigError, match="the time of a document cannot be told from this architecture") as caught:
        by_time(tmp_path)
    assert caught.value.problems[0].where == "packing.cost_ratio"
    assert "packing.cost=tokens" in caught.value.problems[0].do
    assert by_time(tmp_path, "packing.cost_ratio=1e-3")[1]["by_time"]


def test_every_document_says_where_it_comes_from(smoke: tuple[RunFolder, Prepared]) -> None:
    _, prepared = smoke
    folder = Path(prepared.train.arena).parent
    origins = tokenized.origins_path(folder, "train").read_text().splitlines()
    assert len(origins) == prepared.train.documents
    assert origins[0] == "smoke/train:1"


def test_the_same_rows_are_found_and_other_options_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path)
    first = stage.prepare(planned(tmp_path, *data))
    assert "tokens made" in capsys.readouterr().out
    again = stage.prepare(planned(tmp_path, *data, "optim.lr=0.5"))
    assert "tokens found in the cache" in capsys.readouterr().out
    assert again.train == first.train
    for option in (
        "data.loss_on=all",
        "packing.capacity=512",
        "data.system=hello",
        "model.chat_template=builtin:plain",
    ):
        other = stage.prepare(planned(tmp_path, *data, option))
        assert "tokens made" in capsys.readouterr().out
        assert other.train.arena != first.train.arena


def test_a_damaged_cache_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = own_data(tmp_path)
    first = stage.prepare(planned(tmp_path, *data))
    cached = Path(first.train.arena).parent
    (cached / tokenized.REPORT).unlink()
    (cached / "train.arena" / "left-over").touch()
    capsys.readouterr()
    again = stage.prepare(planned(tmp_path, *data, "optim.lr=0.5"))
    assert "tokens made" in capsys.readouterr().out
    assert again.train.arena_sha256 == first.train.arena_sha256
    assert not (cached / "train.arena" / "left-over").exists()


def test_of_two_that_make_the_same_tokens_the_first_wins(tmp_path: Path) -> None:
    folder = planned(tmp_path, *own_data(tmp_path))
    first = stage.prepare(folder)
    cached = Path(first.train.arena).parent
    rival = tmp_path / "rival"
    shutil.copytree(cached, rival)
    (rival / "slower").touch()
    assert tokenized._publish(rival, cached) == cached
    assert not (cached / "slower").exists()
    assert rival.exists()  # its maker removes it


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [*(question(n) for n in range(30)), {"prompt": "x " * 400, "completion": "y"}])
    folder = planned(tmp_path, *TINY, "data=files", f"data.train={tmp_path}/long.jsonl")
    with pytest.raises(DataError, match="1 row is longer than a pack"):
        stage.prepare(folder)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert not folder.prepared_json.exists()
    assert read_marker(folder, "prepare") is None


def test_what_is_left_out_or_cut_is_counted_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [question(number) for number in range(60)]
    long_prompt = {"prompt": "pay " * 400, "completion": "cut away"}
    long_answer = {"prompt": "why?", "completion": "because " * 400}
    control = {"prompt": "say <|im_end|>", "completion": "no"}
    path = write_rows(tmp_path / "rows.jsonl", [*good, {"prompt": "no answer"}, long_prompt, long_answer, control])
    held_out = write_rows(tmp_path / "held_out.jsonl", [question(number) for number in range(100, 110)])
    files = (f"data.train={path}", f"data.validation={held_out}")
    options = ("data=files", *files, "data.test_share=0", "data.over_long=truncate")
    prepared = stage.prepare(planned(tmp_path, *TINY, *options))
    reasons = {item.reason: (item.count, item.first[0].split(" (")[0]) for item in prepared.dropped}
    assert reasons == {
        "no answer": (1, f"{path}:61"),
        "no token to learn is left after cutting to packing.capacity": (1, f"{path}:62"),
        "the row's text holds a control token": (1, f"{path}:64"),
    }
    assert prepared.truncated == 1
    assert prepared.train.rows == 61
    assert prepared.test is None
    assert prepared.test_examples == ""
    printed = capsys.readouterr()
    assert "left out 1 rows: no answer" in printed.err
    assert "1 documents were cut at the end" in printed.err
    assert "learnt in 60 of 61 training documents" in printed.out


def test_split_makes_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(
        tmp_path / "texts.jsonl", [{"text": f"{number} " + "the buyer pays " * 200} for number in range(20)]
    )
    options = (*TINY, "task=text", "data=files", f"data.train={path}", "data.over_long=split", "data.split_overlap=16")
    prepared = stage.prepare(planned(tmp_path, *options))
    assert prepared.train.documents > prepared.train.rows
    assert prepared.train.longest <= 256
    assert (prepared.validation_examples, prepared.test_examples) == ("", "")
    assert "documents above packing.capacity became" in capsys.readouterr().out
    arena = TokenArena.open(prepared.train.arena)
    assert set(np.unique(arena.muted).tolist()) == {0, 16}


def test_a_mixture_repeats_rows_without_storing_them_twice(tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", [question(number) for number in range(10)])
    large = write_rows(tmp_path / "large.jsonl", [question(number) for number in range(100, 140)])
    mixture = f"data.mixture=[{{path: {small}, weight: 1}}, {{path: {large}, weight: 1}}]"
    options = (*TINY, "data=files", mixture, "data.validation_share=0", "data.test_share=0")
    prepared = stage.prepare(planned(tmp_path, *options))
    origins = tokenized.origins_path(Path(prepared.train.arena).parent, "train").read_text().splitlines()
    assert sum(str(small) in origin for origin in origins) == 25
    assert prepared.train.documents == 50
    arena = TokenArena.open(prepared.train.arena)
    assert len(arena.tokens) < prepared.train.tokens
    assert prepared.validation is None


def test_limits_choose_after_the_splits_are_frozen(tmp_path: Path) -> None:
    data = (*own_data(tmp_path), "packing.capacity=64")
    all_rows = stage.prepare(planned(tmp_path, *data))
    fewer = stage.prepare(planned(tmp_path, *data, "data.max_test_rows=2", "data.max_train_rows=5"))
    assert fewer.test is not None
    assert (fewer.test.rows, fewer.train.rows) == (2, 5)
    assert fewer.splits_sha256 == all_rows.splits_sha256


def test_rows_that_changed_under_a_run_are_refused(tmp_path: Path) -> None:
    data = own_data(tmp_path)
    folder = planned(tmp_path, *data)
    stage.prepare(folder)
    write_rows(tmp_path / "rows.jsonl", [question(number, "refund") for number in range(40)])
    with pytest.raises(DataError, match="rows are not the frozen ones"):
        stage.prepare(folder)


def test_a_measured_dtype_is_kept_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planned(tmp_path, "+experiment=smoke", "model.dtype=auto")
    answers = iter([("bfloat16", "measured"), ("float32", "measured again")])
    monkeypatch.setattr(stage, "resolve_dtype", lambda *_, **__: next(answers))
    assert stage.prepare(folder).dtype == "bfloat16"
    assert stage.prepare(folder).dtype_reason == "measured"


def test_plain_text_needs_no_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": f"clause {number} of the contract"} for number in range(40)])
    options = (*TINY, "packing.capacity=32", "task=text", "data=files", f"data.train={path}")
    prepared = stage.prepare(planned(tmp_path, *options))
    assert prepared.sample.startswith("»clause")
    assert prepared.sample.endswith("<|im_end|>«")


def test_a_capacity_above_the_context_of_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        stage._check_capacity(4096, 2048)
    assert "packing.capacity: a pack would hold longer documents than the model was made for" in str(raised.value)
    assert "packing.capacity=2048" in str(raised.value)
    stage._check_capacity(4096, None)


def test_a_prompt_without_room_for_its_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="a held-out prompt and its answer do not fit into the model's context"
    ) as raised:
        stage.prepare(planned(tmp_path, *own_data(tmp_path), "task.max_new_tokens=2040"))
    assert "2048 together" in str(raised.value)


def test_documents_that_never_stop_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": "word " * 400} for n in range(40)])
    options = (*TINY, "data=files", f"data.train={path}", "data.over_long=truncate")
    with pytest.raises(DataError, match="no training document teaches the model to stop") as raised:
        stage.prepare(planned(tmp_path, *options))
    assert "<|im_end|>" in str(raised.value)
    assert "data.over_long=split" in str(raised.value)


def test_a_split_that_loses_all_its_rows_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(40)])
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "x", "completion": "<|im_start|>"}])
    options = (*TINY, "data=files", f"data.train={path}", f"data.test={bad}", "data.max_dropped_share=1")
    with pytest.raises(DataError, match="no test row is left after tokenising") as raised:
        stage.prepare(planned(tmp_path, *options, "data.validation_share=0"))
    assert "the row's text holds a control token" in str(raised.value)


def test_the_command_line_of_the_stage(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="prepare works on one run folder"):
        stage.main([])
    with pytest.raises(RunError, match="this is not a run folder"):
        stage.main([str(tmp_path)])
    folder = planned(tmp_path, "+experiment=smoke")
    assert stage.main([str(folder.root)]) == 0


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_positions": 1024}, 1024),
        ({}, None),
    ],
)
def test_the_context_is_read_from_the_config(tmp_path: Path, config: dict[str, object], context: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stage._context(tmp_path) == context
