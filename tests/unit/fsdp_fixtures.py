"""What two ranks of fsdp are asked to show, each function on both ranks; a wrong answer ends a rank with an error.

They stand in a module of their own because another process has to find them.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_fixtures import tiny_loss, tiny_model, tiny_strategy

from trainer.batch import Batch
from trainer.distributed.fsdp import FullySharded, Sharding, local, shard_of
from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy, StrategyName
from trainer.errors import TrainingFault
from trainer.evaluate.generate import generate, in_order
from trainer.model.adapters import attach_lora, decoder_layer_modules, inner_model
from trainer.model.loss import PackedLoss
from trainer.model.precision import compute_context
from trainer.model.selfcheck import probe_batch
from trainer.samples import EvaluationExample, Prediction
from trainer.train.optim import make_optimizer

GROUPS = 3
"""What is gathered at once in the tiny model: each of its two layers, and what is around them."""
DOCUMENTS = [[3, 4, 5, 6, 3, 4], [10, 11, 10, 11, 10], [20, 21, 22]]


def batch() -> Batch:
    return probe_batch(DOCUMENTS, torch.device("cpu"))


def learn(strategy: Strategy, micro_batches: int = 1) -> None:
    """One optimizer step."""
    for number in range(micro_batches):
        with strategy.micro_batch(last=number == micro_batches - 1):
            strategy.backward(strategy.module(batch()) * 0.1)
    strategy.clip()
    strategy.step()


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def communication(work: Callable[[], object]) -> dict[str, int]:
    """How often each collective was called in ``work``."""
    with Collectives() as seen:
        work()
    return dict(seen.calls)


def every_rank_owns_a_part(ranks: Ranks) -> None:
    """Of weights, frozen ones too, of gradients and of the optimizer's state; also after a step."""
    for lora in (False, True):
        strategy, loss = tiny_strategy(ranks, lora=lora, kind="fsdp", dtype=torch.bfloat16)
        assert strategy.inner is strategy.module is loss
        learn(strategy)
        held = whole = 0
        for name, parameter in loss.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.dtype == (torch.bfloat16 if lora and "lora_" not in name else torch.float32), name
            held, whole = held + parameter.to_local().numel(), whole + parameter.numel()
        assert 0.49 < held / whole < 0.51, (held, whole)
        for name, parameter in strategy.trainable.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                state = strategy.optimizer.state[parameter][kind]
                assert isinstance(state, DTensor), name
                assert state.to_local().shape == local(parameter).shape, name
        lengths = [fragment.length for fragment in strategy.fragments(saving=True)]
        assert sum(lengths) == sum(local(p).numel() for p in strategy.trainable.values())
        (total,) = ranks.sum_over_ranks(torch.tensor([sum(lengths)], dtype=torch.int64)).tolist()
        assert total == sum(p.numel() for p in strategy.trainable.values())


def fragments_stand_where_their_rows_do(ranks: Ranks) -> None:
    """67 rows of vocabulary do not divide by two; where a fragment starts is compared with the whole parameter."""
    strategy, _ = tiny_strategy(ranks, lora=False, kind="fsdp")
    wholes = dict(tiny_loss(lora=False).named_parameters())
    for fragment in strategy.fragments(saving=False):
        flat = wholes[fragment.name].detach().view(-1)[fragment.start : fragment.start + fragment.length]
        assert torch.equal(fragment.tensors["param"], flat), fragment.name
        assert fragment.shape == wholes[fragment.name].shape
    assert shard_of((67, 64), rank=1, world_size=2) == (34 * 64, 33 * 64)


def gradients_are_reduced_once_in_a_step(ranks: Ranks) -> None:
    """Four micro-batches; with ``reduce_every`` in each of them. The gradients are the same."""
    norms: list[float] = []
    for every, wanted in ((False, GROUPS), (True, 4 * GROUPS)):
        strategy, _ = tiny_strategy(ranks, lora=False, kind="fsdp", reduce_every=every)
        learn(strategy)  # the first pass sets things up

        def accumulate(strategy: Strategy = strategy) -> None:
            for number in range(4):
                with strategy.micro_batch(last=number == 3):
                    strategy.backward(strategy.module(batch()) * 0.1)

        counts = communication(accumulate)
        assert counts.get("_reduce_scatter_base_") == wanted, counts
        norms.append(float(strategy.clip()))
    assert abs(norms[0] - norms[1]) <= 1e-5 * norms[0], norms


def layers_are_given_back(ranks: Ranks) -> None:
    """With ``reshard`` a layer is gathered in the forward and again in the backward pass, without it once."""
    for reshard, wanted in ((True, GROUPS + 2), (False, GROUPS)):
        strategy, _ = tiny_strategy(ranks, lora=False, kind="fsdp", reshard=reshard)
        learn(strategy)

        def pass_through(strategy: Strategy = strategy) -> None:
            with strategy.micro_batch(last=True):
                strategy.backward(strategy.module(batch()) * 0.1)

        counts = communication(pass_through)
        assert counts.get("_allgather_base_", 0) == wanted, counts


def the_forward_pass_reads_what_was_loaded(ranks: Ranks) -> None:
    """After an evaluation something is still gathered; weights that are loaded then must not be overlooked."""
    strategy, loss = tiny_strategy(ranks, lora=False, kind="fsdp")
    reads_what_was_loaded(strategy, loss, tiny_loss(lora=False))


def reads_what_was_loaded(strategy: Strategy, loss: PackedLoss, plain: PackedLoss) -> None:
    """``loss`` equals ``plain``, of one process, before and after all weights of both are halved."""
    with torch.no_grad():
        assert torch.equal(loss(batch()), plain(batch()))
        for fragment in strategy.fragments(saving=False):
            fragment.tensors["param"].mul_(0.5)
        strategy.refresh()
        for parameter in plain.parameters():
            parameter.mul_(0.5)
        assert torch.equal(loss(batch()), plain(batch()))


def whole_parameters_are_on_the_first_rank(ranks: Ranks) -> None:
    whole_parameters_of("fsdp", ranks)


def whole_parameters_of(kind: StrategyName, ranks: Ranks) -> None:
    """On the first rank, as they are trained, in float32, whatever the compute dtype."""
    strategy, _ = tiny_strategy(ranks, lora=True, kind=kind, dtype=torch.bfloat16)
    plain = {n: p for n, p in tiny_loss(lora=True, compute_dtype=torch.bfloat16).named_parameters() if p.requires_grad}
    found = dict(strategy.full_parameters())
    assert list(found) == list(plain)
    for name, tensor in found.items():
        assert (tensor is not None) == ranks.is_first
        assert tensor is None or torch.equal(tensor, plain[name]), name


def answers_are_those_of_a_whole_model(ranks: Ranks) -> None:
    """Each rank another number of batches, answers of unlike lengths, also first of all; learning goes on after it.

    Gathered at once, ranks do not talk while they generate; gathered a layer at a time they go in step.
    """
    for gather, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
        strategy, loss = tiny_strategy(ranks, lora=True, kind="fsdp", gather=gather, dtype=dtype)
        assert strategy.in_step is not gather
        plain = tiny_loss(lora=True, compute_dtype=dtype)
        stop = answers(plain, dtype)[0].token_ids[2]
        wanted = answers(plain, dtype, stops=[stop])
        assert {len(one.token_ids) for one in wanted} >= {3, NEW_TOKENS}
        for _ in range(2):
            with strategy.gathered() as inner:
                assert inner is loss
                share = answers(loss, dtype, ranks, stops=[stop], in_step=strategy.in_step)
                counts = communication(partial(answers, loss, dtype)) if gather else {}
            assert counts == {}, counts
            assert in_order(EXAMPLES, ranks.gather(share)) == wanted
            learn(strategy)
            restore(strategy, plain)


EXAMPLES = [
    EvaluationExample(id=f"row{row}", prompt_ids=[(row * 7 + place) % 64 + 1 for place in range(length)], answer="")
    for row, length in enumerate((30, 5, 9, 22, 3, 17, 12))
]
NEW_TOKENS = 8


def answers(
    model: nn.Module,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    *,
    stops: Sequence[int] = (),
    in_step: bool = False,
) -> list[Prediction]:
    """Of all examples, or of a rank's share; three batches."""

    def compute() -> AbstractContextManager[object]:
        return compute_context(torch.device("cpu"), dtype)

    return generate(
        model,
        EXAMPLES,
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=stops,
        pad_token_id=0,
        batch_tokens=90,
        decode=str,
        device="cpu",
        compute=compute,
        rank=0 if ranks is None else ranks.rank,
        world_size=1 if ranks is None else ranks.world_size,
        in_step=in_step,
    )


def restore(strategy: Strategy, plain: nn.Module) -> None:
    """The weights of ``plain``, in place, as a checkpoint would bring them."""
    wholes = dict(plain.named_parameters())
    with torch.no_grad():
        for fragment in strategy.fragments(saving=False):
            flat = wholes[fragment.name].view(-1)
            fragment.tensors["param"].copy_(flat[fragment.start : fragment.start + fragment.length])
    strategy.refresh()


def a_mixed_outer_group_trains(ranks: Ranks) -> None:
    """An adapter on the output layer: float32 that is trained and bfloat16 that is frozen, gathered as they are."""
    torch.manual_seed(7)
    model = attach_lora(tiny_model().to(torch.bfloat16), rank=4, alpha=8.0, targets=["lm_head", "q_proj"])  # type: ignore[arg-type]
    loss = PackedLoss(model, chunk=16, compute_dtype=torch.bfloat16)
    sharding = Sharding(layers=decoder_layer_modules(inner_model(model)))
    strategy = FullySharded(ranks, sharding, dtype=torch.bfloat16, clip_norm=1.0)
    strategy.prepare(loss, _adamw)
    assert any("lm_head" in name for name in strategy.trainable)
    losses: list[float] = []
    for _ in range(4):
        losses.append(float(loss(batch())))
        learn(strategy)
    assert losses == sorted(losses, reverse=True), losses


def ranks_with_other_weights_are_refused(ranks: Ranks) -> None:
    """DDP would send those of the first rank to the others; here rows of both would become one model."""
    torch.manual_seed(ranks.rank)
    module = nn.Sequential(nn.Linear(3, 4))
    strategy = FullySharded(ranks, Sharding(layers=list(module)), dtype=torch.float32, clip_norm=0.0)
    with pytest.raises(TrainingFault, match="the ranks do not have the same weights before they are sharded"):
        strategy.prepare(module, _adamw)


def a_rank_may_have_no_rows(ranks: Ranks) -> None:
    """Of a parameter of one row the second rank has nothing: it trains along, and writes nothing of it."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    module = copy.deepcopy(plain)
    strategy = FullySharded(ranks, Sharding(layers=list(module)), dtype=torch.float32, clip_norm=0.1)
    strategy.prepare(module, _adamw)
    optimizer = _adamw(plain)
    inputs = torch.arange(6.0).view(2, 3)
    for _ in range(3):
        with strategy.micro_batch(last=True):
            strategy.backward(strategy.module(inputs).square().sum())
        norm = strategy.clip()
        strategy.step()
        plain(inputs).square().sum().backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
        optimizer.step()
        optimizer.zero_grad()
    wanted = ["0.weight", "0.bias", "1.weight", "1.bias"] if ranks.is_first else ["0.weight", "0.bias"]
    assert [fragment.name for fragment in strategy.fragments(saving=True)] == wanted
    for name, tensor in strategy.full_parameters():
        if tensor is not None:
            torch.testing.assert_close(tensor, plain.get_parameter(name).detach())
    restore(strategy, copy.deepcopy(plain).apply(_zero))
    assert all(not tensor.any() for _, tensor in strategy.full_parameters() if tensor is not None)


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(module, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)
