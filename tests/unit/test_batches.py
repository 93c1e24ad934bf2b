"""Schedules and batches: the same numbers everywhere, every document once, tensors as the batch promises."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fixtures import make_arena, schedule_for

from trainer.data.batches import TrainingBatches, held_out_batches
from trainer.data.scheduling import ScheduleOptions, training_schedule
from trainer.data.transfer import make_batch
from trainer.errors import DataError
from trainer_kernels import TokenArena

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> TokenArena:
    return make_arena(tmp_path_factory.mktemp("arena") / "train")


def batches(arena: TokenArena, rank: int = 0, world_size: int = 1) -> TrainingBatches:
    plan = schedule_for(arena, world_size=world_size, packs=2, epochs=2.0, max_steps=None)
    return TrainingBatches(arena, plan, capacity=96, rank=rank, device=CPU, pad_token_id=0)


def test_a_batch_is_what_its_documents_say(arena: TokenArena) -> None:
    chosen = np.array([5, 2, 9], np.int32)
    batch = make_batch(arena, chosen, pad_token_id=0)
    documents = [arena.document(int(number)) for number in chosen]
    assert batch.input_ids.tolist() == [[token for ids, _ in documents for token in ids.tolist()]]
    ends = np.cumsum([0, *(len(ids) for ids, _ in documents)]).tolist()
    assert batch.boundaries == tuple(ends)
    assert batch.cu_seqlens.tolist() == ends
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids[0].tolist() == [place for ids, _ in documents for place in range(len(ids))]
    labels = [
        int(ids[t + 1]) if t + 1 < len(ids) and targets[t + 1] else -100
        for ids, targets in documents
        for t in range(len(ids))
    ]
    assert batch.labels.tolist() == [labels]
    assert batch.num_targets == sum(int(targets.sum()) for _, targets in documents)
    assert batch.num_tokens == ends[-1]
    assert batch.max_seqlen == max(len(ids) for ids, _ in documents)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_no_documents_are_one_token_of_padding(arena: TokenArena) -> None:
    batch = make_batch(arena, np.array([], np.int32), pad_token_id=3)
    assert (batch.input_ids.tolist(), batch.labels.tolist()) == ([[3]], [[-100]])
    assert (batch.num_tokens, batch.num_targets) == (0, 0)


def test_every_document_comes_once_per_epoch_at_any_world_size(arena: TokenArena) -> None:
    everything = Counter({number: 2 for number in range(arena.num_documents)})
    for world_size in (1, 2):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            for step in batches(arena, rank, world_size).steps(0):
                seen.update(int(d) for documents in step.documents for d in documents)
        assert seen == everything, world_size


def test_a_step_has_the_same_documents_at_any_world_size(arena: TokenArena) -> None:
    alone = [sorted(np.concatenate(step.documents).tolist()) for step in batches(arena).steps(0)]
    first, second = batches(arena, 0, 2), batches(arena, 1, 2)
    shared = [
        sorted(np.concatenate([*a.documents, *b.documents]).tolist())
        for a, b in zip(first.steps(0), second.steps(0), strict=True)
    ]
    assert shared == alone


def test_steps_can_begin_anywhere(arena: TokenArena) -> None:
    source = batches(arena)
    everything = [[d.tolist() for d in step.documents] for step in source.steps(0)]
    late = list(source.steps(7))
    assert [[d.tolist() for d in step.documents] for step in late] == everything[7:]
    assert [step.index for step in late] == list(range(7, source.num_steps))
    assert list(source.steps(source.num_steps)) == []


def test_the_counted_targets_are_those_of_the_batches(arena: TokenArena) -> None:
    source = batches(arena)
    for step in source.steps(0):
        assert step.num_targets == sum(source.load(documents).num_targets for documents in step.documents)


def test_documents_are_described_by_origin_or_number(arena: TokenArena) -> None:
    source = batches(arena, rank=0, world_size=2)
    other = next(batches(arena, rank=1, world_size=2).steps(3)).documents[0].tolist()
    assert source.describe(3, 1, 0) == ", ".join(f"document {number}" for number in other)
    plan = schedule_for(arena, world_size=2, packs=2, epochs=2.0, max_steps=None)
    named = TrainingBatches(
        arena,
        plan,
        capacity=96,
        rank=0,
        device=CPU,
        pad_token_id=0,
        origin_of=lambda number: f"rows.jsonl:{number + 1}",
    )
    assert named.describe(3, 1, 0) == ", ".join(f"rows.jsonl:{number + 1}" for number in other)


def test_only_the_first_documents_of_many_are_named(tmp_path: Path) -> None:
    arena = make_arena(tmp_path / "many", documents=40)
    plan = training_schedule(arena.lengths, arena.targets, ScheduleOptions(capacity=10_000))
    words = TrainingBatches(arena, plan, capacity=10_000, rank=0, device=CPU, pad_token_id=0).describe(0, 0, 0)
    assert words.endswith(" and 32 more")
    assert words.count("document ") == 8


def test_held_out_documents_come_once_over_all_ranks(arena: TokenArena) -> None:
    for world_size in (1, 2, 3):
        shares = [
            list(held_out_batches(arena, capacity=96, rank=r, world_size=world_size, device=CPU, pad_token_id=0))
            for r in range(world_size)
        ]
        assert sum(batch.num_tokens for share in shares for batch in share) == int(arena.lengths.sum())
        assert sum(batch.num_targets for share in shares for batch in share) == int(arena.targets.sum())
        assert all(batch.num_tokens <= 96 for share in shares for batch in share)
        assert len({len(share) for share in shares}) == 1, "sharded models talk in every forward pass"


def test_a_schedule_that_cannot_be_is_a_data_error(arena: TokenArena) -> None:
    with pytest.raises(DataError, match="the whole run has fewer packs than one optimizer step takes") as fault:
        schedule_for(arena, world_size=1, packs=1000, epochs=1.0, max_steps=None)
    assert fault.value.exit_code == 2
    assert "at least 1000" in fault.value.problems[0].allowed


def test_max_steps_takes_as_many_passes_as_it_needs(arena: TokenArena) -> None:
    """As users of other trainers expect: the number of steps wins over the number of epochs, in both directions."""
    one_pass = schedule_for(arena, world_size=1, packs=2, epochs=1.0, max_steps=None).num_steps
    for wanted in (1, one_pass + 1, 5 * one_pass):
        assert schedule_for(arena, world_size=1, packs=2, epochs=1.0, max_steps=wanted).num_steps == wanted
