"""The study of packers compares what it says: TRL's own packs, and nothing but the packs different within a seed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import packing_training
import pytest
import torch
from datasets import Dataset
from licence_texts import Documents, texts
from packers import PACKERS, Packer, grouped, log_length_variance, steps_of
from packing_training import Size, chosen, read_results, study
from training_report import Result, paired, table, verdict
from trl.data_utils import pack_dataset

CAPACITY = 300
LENGTHS = np.clip(np.random.default_rng(7).lognormal(np.log(20), 1.2, 2500), 2, CAPACITY).astype(np.int32)
NAMES = tuple(PACKERS)
TINY = Size(layers=1, width=64, vocabulary=50, capacity=64, packs=2, tokens=1500, epochs=2, held_out=200, lr=1e-2)


def steps(packer: Packer, epochs: int = 2, seed: int = 3) -> list[list[np.ndarray]]:
    return steps_of(packer, LENGTHS, capacity=CAPACITY, packs_per_step=4, epochs=epochs, seed=seed)


def test_grouped_packs_are_what_trl_makes_by_default() -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, 1000, length).tolist() for length in LENGTHS]
    wanted = pack_dataset(Dataset.from_dict({"input_ids": rows}), CAPACITY)["input_ids"]
    made = grouped(LENGTHS, CAPACITY, 0, 0)
    assert [[token for number in ids for token in rows[number]] for ids in made] == list(wanted)


def test_no_grouped_pack_spans_two_groups_of_a_thousand() -> None:
    made = grouped(LENGTHS, CAPACITY, 0, 0)
    assert all(len(set((ids // 1000).tolist())) == 1 for ids in made)
    assert not all(len(set((ids // 1000).tolist())) == 1 for ids in PACKERS["bfd"](LENGTHS, CAPACITY, 0, 0))


@pytest.mark.parametrize("packer", NAMES)
def test_every_packer_gets_every_document_once_an_epoch_in_as_many_steps(packer: Packer) -> None:
    made = steps(packer)
    assert len(made) == -(-2 * int(LENGTHS.sum()) // (4 * CAPACITY))
    counted = Counter(int(number) for step in made for ids in step for number in ids)
    assert counted == dict.fromkeys(range(len(LENGTHS)), 2)
    assert max(int(LENGTHS[ids].sum()) for step in made for ids in step) <= CAPACITY
    sizes = {len(step) for step in made}
    assert max(sizes) - min(sizes) <= 1


def test_packs_are_shuffled_by_the_seed() -> None:
    for packer in NAMES:
        orders = [[tuple(ids.tolist()) for step in steps(packer, 1, seed) for ids in step] for seed in (3, 3, 4)]
        assert orders[0] == orders[1] != orders[2], packer
    in_order = [tuple(ids.tolist()) for ids in grouped(LENGTHS, CAPACITY, 3, 0)]
    assert in_order != [tuple(ids.tolist()) for step in steps("bfd-grouped", 1) for ids in step]


def test_decreasing_packs_make_uneven_steps() -> None:
    variance = {packer: log_length_variance(LENGTHS, steps(packer)) for packer in NAMES}
    assert variance["rfc"] < variance["bfd"] / 3
    assert variance["rfc"] < variance["bfd-grouped"] / 3


def test_the_variance_is_that_of_means_over_documents() -> None:
    lengths = np.array([1, 1, 100, 10], np.int32)
    made = [[np.array([0], np.int32), np.array([1, 2], np.int32)], [np.array([3], np.int32)]]
    assert log_length_variance(lengths, made) == pytest.approx((np.log(10) / 6) ** 2)


def test_the_split_is_one_and_the_same_and_the_rest_depends_on_the_seed() -> None:
    size = replace(TINY, tokens=20_000, epochs=1, held_out=3000)
    (first, held_out), (second, again) = (chosen(LENGTHS, size, seed) for seed in (0, 1))
    assert held_out.tolist() == again.tolist()
    assert len(held_out) <= 0.05 * len(LENGTHS)
    assert first.tolist() != second.tolist()
    for train in (first, second):
        assert not set(train.tolist()) & set(held_out.tolist())
        assert 20_000 - CAPACITY < int(LENGTHS[train].sum()) <= 20_000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a counting language, so that a few steps learn something."""
    lengths = np.random.default_rng(5).integers(2, 80, 400).astype(np.int32)
    tokens = np.concatenate([np.arange(n, dtype=np.int32) % 50 for n in lengths])
    monkeypatch.setattr(packing_training, "documents", lambda *_: Documents(tokens, lengths, 50, 0))


def run(folder: Path, packers: tuple[Packer, ...], seeds: int = 1) -> list[Result]:
    return study("scratch", TINY, "cpu", packers, seeds, threads=None, cache=folder, results=folder / "results.jsonl")


@pytest.mark.usefixtures("small")
def test_packers_get_the_same_tokens_steps_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    real = packing_training.model_of

    def noted(*given: object) -> torch.nn.Module:
        model = real(*given)  # pyright: ignore[reportArgumentType]
        begun.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(packing_training, "model_of", noted)
    found = run(tmp_path, NAMES)
    assert [result.packer for result in found] == list(NAMES)
    assert len({(result.tokens, result.steps, result.documents, result.held_out) for result in found}) == 1
    assert found[0].tokens <= TINY.tokens
    for other in begun[1:]:
        assert all(torch.equal(begun[0][name], other[name]) for name in other)
    assert all(result.loss < np.log(50) < result.before for result in found), "nothing was learnt"
    assert len({result.loss for result in found}) == 3


@pytest.mark.usefixtures("small")
def test_a_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, ("rfc",), 2)
    trained: list[tuple[str, int]] = []
    real = packing_training.one_run

    def noted(*given: object, **named: object) -> Result:
        made = real(*given, **named)  # pyright: ignore[reportArgumentType]
        trained.append((made.packer, made.seed))
        return made

    monkeypatch.setattr(packing_training, "one_run", noted)
    again = run(tmp_path, ("rfc", "bfd"), 2)
    assert trained == [("bfd", 0), ("bfd", 1)]
    assert again[:2] == first
    key = first[0].key
    assert len(read_results(tmp_path / "results.jsonl", key)) == 4
    assert read_results(tmp_path / "results.jsonl", "another study") == {}
    assert packing_training.study_key("scratch", replace(TINY, lr=1.0), "cpu") != key


def result(packer: str, seed: int, loss: float) -> Result:
    return Result(
        key="k",
        packer=packer,
        seed=seed,
        documents=1,
        tokens=1,
        steps=1,
        fill=1.0,
        variance=0.5,
        before=4.0,
        loss=loss,
        by_length={"short": loss},
        held_out=1,
        seconds=1.0,
    )


def test_differences_are_taken_within_a_seed() -> None:
    found = [result("rfc", 0, 2.0), result("rfc", 1, 3.0), result("bfd", 1, 3.5), result("bfd", 0, 1.75)]
    assert paired(found) == {"bfd": [-0.25, 0.5]}
    assert "rfc is lower in 1 of 2" in table(found)
    assert "-0.2500 +0.5000" in table(found)


def test_a_difference_counts_when_chance_seldom_makes_it() -> None:
    assert verdict([0.1]) == "one seed tells nothing"
    assert "t = 3.0 of 2 pairs" in verdict([0.1, 0.2])
    assert "NOT decided" in verdict([0.1, 0.2]), "12.7 is needed"
    assert verdict([0.10, 0.11, 0.12]).endswith("a difference")
    assert verdict([-0.10, -0.11, -0.12]).endswith("a difference")
    assert "NOT decided" in verdict([0.1, -0.1, 0.2, -0.2, 0.1])


@pytest.mark.usefixtures("small")
def test_a_study_ends_with_a_whole_seed_in_the_time_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = 60.0

    def pretended(*given: object, **named: object) -> Result:
        return replace(result(str(given[4]), int(str(given[5])), 2.0), key=str(named["key"]), seconds=taken)

    monkeypatch.setattr(packing_training, "one_run", pretended)
    given = {"threads": None, "cache": tmp_path, "results": tmp_path / "results.jsonl"}
    first = study("scratch", TINY, "cpu", ("rfc", "bfd"), 3, **given, minutes=1.0)  # pyright: ignore[reportArgumentType]
    assert [(run.packer, run.seed) for run in first] == [("rfc", 0), ("bfd", 0)], "two more runs take two minutes"
    assert "1 of 3 seeds" in capsys.readouterr().out
    rest = study("scratch", TINY, "cpu", ("rfc", "bfd"), 3, **given, minutes=2.5)  # pyright: ignore[reportArgumentType]
    assert len(rest) == 6, "nothing was waited for"


def test_texts_are_read_without_front_matter_and_once(tmp_path: Path) -> None:
    for name, content in {
        "licenses/a.LICENSE": "---\nkey: a\n---\n\nfirst\n---\nstill first\n",
        "rules/b.RULE": "---\nx: 1\n---\nsecond",
        "rules/c.RULE": "---\nx: 2\n---\nsecond\n",
        "rules/d.RULE": "---\nx: 2\n---\n\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert texts(tmp_path) == ["first\n---\nstill first", "second"]
