"""What two ranks of ZeRO are asked to show, all in one process group: starting DeepSpeed costs seconds each time.

They stand in a module of their own because another process has to find them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fsdp_fixtures import (
    EXAMPLES,
    NEW_TOKENS,
    answers,
    batch,
    communication,
    learn,
    reads_what_was_loaded,
    restore,
    whole_parameters_of,
)
from torch import nn
from train_fixtures import CAPACITY, STAGES, Run, tiny_loss, tiny_strategy, train_run

from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy, StrategyName
from trainer.distributed.zero import Zero, check_divided, whole_size
from trainer.errors import StoppedInGoodOrder, TrainingFault
from trainer.evaluate.generate import in_order
from trainer_launch.zero import ZeroSpec

plain_loss = partial(tiny_loss, chunk=CAPACITY)


def train_all(kind: StrategyName, runs: list[Run], ranks: Ranks) -> None:
    """Train each of ``runs`` under ``kind``; one that is to be stopped is."""
    for run in runs:
        here = replace(run, world_size=2, strategy=kind)
        if run.stop_at:
            with pytest.raises(StoppedInGoodOrder):
                train_run(here, ranks)
        else:
            train_run(here, ranks)


def show_all(kind: StrategyName, runs: list[Run], ranks: Ranks) -> None:
    """Every function below, then ``train_all``."""
    shows: list[Callable[[StrategyName, Ranks], None]] = [
        every_rank_owns_a_part,
        fragments_stand_where_their_elements_do,
        gradients_are_reduced_as_the_stage_says,
        the_norm_is_what_it_was_before_clipping,
        the_forward_pass_reads_what_was_loaded,
        whole_parameters_of,
        answers_are_those_of_a_whole_model,
        another_division_is_noticed,
    ]
    for show in shows:
        show(kind, ranks)
    train_all(kind, runs, ranks)


def zero_of(strategy: Strategy) -> Any:
    """DeepSpeed's optimizer."""
    assert isinstance(strategy, Zero)
    return strategy._zero


def every_rank_owns_a_part(kind: StrategyName, ranks: Ranks) -> None:
    """Of the optimizer's state, of gradients from stage 2 on, of weights in stage 3, frozen ones too."""
    stage = STAGES[kind]
    for lora in (False, True):
        strategy, loss = tiny_strategy(ranks, lora=lora, kind=kind, dtype=torch.bfloat16)
        trained = sum(whole_size(p) for p in strategy.trainable.values())
        learn(strategy)
        moments = [state["exp_avg"].numel() for state in strategy.optimizer.state.values()]
        assert 0.49 < sum(moments) / trained < 0.52, (moments, trained)
        with strategy.micro_batch(last=False):
            strategy.backward(strategy.module(batch()) * 0.1)
        whole = [p for p in strategy.trainable.values() if p.grad is not None]
        assert len(whole) == (len(strategy.trainable) if stage == 1 else 0), len(whole)
        held = sum(p.numel() for p in loss.parameters())
        assert held == (0 if stage == 3 else sum(whole_size(p) for p in loss.parameters())), held
        for name, parameter in loss.named_parameters():
            frozen = lora and "lora_" not in name
            assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        fragments = list(strategy.fragments(saving=True))
        assert {tensor.dtype for fragment in fragments for tensor in fragment.tensors.values()} == {torch.float32}
        (total,) = ranks.sum_over_ranks(torch.tensor([sum(one.length for one in fragments)])).tolist()
        assert total == trained


def fragments_stand_where_their_elements_do(kind: StrategyName, ranks: Ranks) -> None:
    """67 rows of vocabulary do not divide by two; where a fragment starts is compared with the whole parameter."""
    strategy, _ = tiny_strategy(ranks, lora=False, kind=kind)
    wholes = dict(tiny_loss(lora=False).named_parameters())
    for fragment in strategy.fragments(saving=False):
        flat = wholes[fragment.name].detach().view(-1)[fragment.start : fragment.start + fragment.length]
        assert torch.equal(fragment.tensors["param"], flat), fragment.name
        assert fragment.shape == wholes[fragment.name].shape == strategy.shapes[fragment.name]


def gradients_are_reduced_as_the_stage_says(kind: StrategyName, ranks: Ranks) -> None:
    """Of four micro-batches stage 1 reduces in the last alone; the gradients are those of one process."""
    strategy, _ = tiny_strategy(ranks, lora=False, kind=kind, accumulation=4)
    learn(strategy, 4)  # the first pass sets things up
    reduced: list[int] = []

    def micro_batch(*, last: bool) -> None:
        with strategy.micro_batch(last=last):
            strategy.backward(strategy.module(batch()) * 0.1)

    for number in range(4):
        counts = communication(partial(micro_batch, last=number == 3))
        reduced.append(sum(count for name, count in counts.items() if "reduce" in name))
    assert all(reduced) if STAGES[kind] > 1 else [bool(count) for count in reduced] == [False] * 3 + [True], reduced


def the_norm_is_what_it_was_before_clipping(kind: StrategyName, ranks: Ranks) -> None:
    """Of the average over the ranks, whatever the accumulation; and after ``clip`` the gradients are that short."""
    for accumulation in (1, 2):
        strategy, _ = tiny_strategy(ranks, lora=False, kind=kind, accumulation=accumulation, clip_norm=0.05)
        plain = plain_loss(lora=False)
        for number in range(accumulation):
            with strategy.micro_batch(last=number == accumulation - 1):
                strategy.backward(strategy.module(batch()) * 0.1)
            (plain(batch()) * 0.1).backward()
        wanted = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        torch.testing.assert_close(strategy.clip(), wanted)
        assert wanted > 0.5
        torch.testing.assert_close(strategy.clip(), torch.tensor(0.05), rtol=1e-4, atol=0)


def the_forward_pass_reads_what_was_loaded(kind: StrategyName, ranks: Ranks) -> None:
    """After an evaluation something may still be gathered; weights that are loaded then must not be overlooked."""
    for keep_whole_below in (0, 500):
        strategy, loss = tiny_strategy(ranks, lora=False, kind=kind, keep_whole_below=keep_whole_below)
        reads_what_was_loaded(strategy, loss, plain_loss(lora=False))


def answers_are_those_of_a_whole_model(kind: StrategyName, ranks: Ranks) -> None:
    """Each rank another number of batches, answers of unlike lengths; learning goes on after it.

    Gathered at once, ranks do not talk while they generate; gathered a module at a time they go in step.
    """
    for gather in (True, False) if kind == "zero3" else (True,):
        strategy, loss = tiny_strategy(ranks, lora=True, kind=kind, gather=gather)
        assert strategy.in_step is not gather
        plain = plain_loss(lora=True)
        stop = answers(plain, torch.float32)[0].token_ids[2]
        wanted = answers(plain, torch.float32, stops=[stop])
        assert {len(one.token_ids) for one in wanted} >= {3, NEW_TOKENS}
        for _ in range(2):
            with strategy.gathered() as inner:
                assert inner is loss
                share = answers(loss, torch.float32, ranks, stops=[stop], in_step=strategy.in_step)
                counts = communication(partial(answers, loss, torch.float32)) if gather else {}
            assert counts == {}, counts
            assert in_order(EXAMPLES, ranks.gather(share)) == wanted
            learn(strategy)
            restore(strategy, plain)


def another_division_is_noticed(kind: StrategyName, ranks: Ranks) -> None:
    """What was prepared, checked against another plan than that it was prepared by."""
    strategy, loss = tiny_strategy(ranks, lora=False, kind=kind)
    if kind == "zero3":
        spec = ZeroSpec(stage=3, world_size=2, accumulation=1)
        name, parameter = next(iter(loss.named_parameters()))
        elements = whole_size(parameter)
        check_divided(name, parameter, elements, torch.float32, world_size=2, spec=spec)
        with pytest.raises(TrainingFault, match="DeepSpeed did not divide the training as planned"):
            check_divided(name, parameter, elements, torch.float32, world_size=4, spec=spec)
        with pytest.raises(TrainingFault, match=r"torch\.bfloat16"):
            check_divided(name, parameter, elements, torch.bfloat16, world_size=2, spec=spec)
        whole = nn.Linear(2, 2).weight
        with pytest.raises(TrainingFault, match="no part, 4 whole"):
            check_divided("0.weight", whole, 4, torch.float32, world_size=2, spec=spec)
        return
    assert isinstance(strategy, Zero)
    stored = {name: (parameter.numel(), parameter.dtype) for name, parameter in loss.named_parameters()}
    strategy._check(stored)
    kept = zero_of(strategy).single_partition_of_fp32_groups[0]
    zero_of(strategy).single_partition_of_fp32_groups[0] = nn.Parameter(torch.zeros(3 * kept.numel()))
    with pytest.raises(TrainingFault, match="DeepSpeed did not divide the training as planned"):
        strategy._check(stored)
