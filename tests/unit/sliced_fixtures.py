"""What ranks show of loading in slices and of groups of ranks; in a module that another process finds."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fsdp_fixtures import DOCUMENTS, learn
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from train_fixtures import tiny_strategy, zero_spec
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.distributed import zero
from trainer.distributed.fsdp import FullySharded, Sharding, local
from trainer.distributed.ranks import Ranks
from trainer.distributed.strategy import Strategy, StrategyName, make_strategy
from trainer.distributed.zero import DividedWeights
from trainer.model.adapters import attach_lora, decoder_layer_modules, inner_model
from trainer.model.load import load_model, settle
from trainer.model.loss import PackedLoss
from trainer.model.selfcheck import probe_batch, self_check
from trainer.model.slices import (
    ReadSlice,
    parameter_names,
    plan_slices,
    slice_reader,
    standing_in,
    stored_tensors,
    without_numbers,
)
from trainer.train.optim import make_optimizer


def write_base(folder: Path, *, tied: bool = False, hidden: int = 64, layers: int = 2, vocabulary: int = 67) -> int:
    """A random Llama in bfloat16, rows that do not divide by two; returns the bytes of its weights in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).bfloat16()
    folder.mkdir()
    config.save_pretrained(folder)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(4 * weight.numel() for weight in weights.values())


def trained(base: nn.Module, lora: bool, dtype: torch.dtype) -> PackedLoss:
    if lora:
        torch.manual_seed(7)
        base = attach_lora(inner_model(base), rank=4, alpha=8.0)
    return PackedLoss(base, chunk=16, compute_dtype=dtype)


def prepared(
    ranks: Ranks, loss: PackedLoss, dtype: torch.dtype, kind: StrategyName, read: ReadSlice | None = None
) -> Strategy:
    sharding = Sharding(layers=decoder_layer_modules(inner_model(loss.model)), read=read)
    spec = zero_spec(kind, ranks, accumulation=1, keep_whole_below=0, offload=False)
    strategy = make_strategy(kind, ranks, dtype=dtype, clip_norm=1.0, sharding=sharding, zero=spec, read=read)
    strategy.prepare(loss, lambda m: make_optimizer(m, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1))
    return strategy


def in_slices(ranks: Ranks, folder: Path, *, lora: bool, dtype: torch.dtype, kind: StrategyName = "fsdp") -> Strategy:
    """The base in ``folder`` without numbers, cut, then read."""
    model = without_numbers(folder, dtype if lora else torch.float32)
    assert model is not None
    settle(model)
    places, names = plan_slices(model, stored_tensors(folder)), parameter_names(model)
    assert isinstance(places, dict), places
    with standing_in(model):
        loss = trained(cast(nn.Module, model), lora, dtype)
    return prepared(ranks, loss, dtype, kind, slice_reader(loss, names, places))


def at_once(ranks: Ranks, folder: Path, *, lora: bool, dtype: torch.dtype, kind: StrategyName = "fsdp") -> Strategy:
    """The same, loaded whole on every rank."""
    loss = trained(cast(nn.Module, load_model(folder, dtype=dtype if lora else torch.float32)), lora, dtype)
    return prepared(ranks, loss, dtype, kind)


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter that is cut."""
    if isinstance(parameter, DTensor):
        return local(parameter.detach())
    assert parameter.numel() == 0, "it is whole on this rank"
    return cast(torch.Tensor, parameter.ds_tensor)  # type: ignore[attr-defined]  # DeepSpeed's


def slices_are_what_a_whole_load_gives(folder: Path, kind: StrategyName, ranks: Ranks) -> None:
    """Every weight, the frozen ones and new adapters too, before and after steps; and the self-check on shards."""
    cases = ((False, torch.float32, "plain"), (True, torch.bfloat16, "tied"), (True, torch.float32, "plain"))
    for lora, dtype, base in cases:
        both = [load(ranks, folder / base, lora=lora, dtype=dtype, kind=kind) for load in (in_slices, at_once)]
        for _ in range(2):
            one, two = (dict(strategy.inner.named_parameters()) for strategy in both)
            assert list(one) == list(two)
            for name, parameter in one.items():
                assert parameter.dtype == two[name].dtype, name
                assert parameter.requires_grad == two[name].requires_grad, name
                assert torch.equal(own_part(parameter), own_part(two[name])), name
            decays = [[group["weight_decay"] for group in strategy.optimizer.param_groups] for strategy in both]
            assert decays[0] == decays[1]
            for strategy in both:
                learn(strategy)
        sliced, cpu = cast(FullySharded | DividedWeights, both[0]), torch.device("cpu")
        with sliced.gathered(layers=False):
            model = cast(PackedLoss, sliced.inner).model
            self_check(model, DOCUMENTS, pad_token_id=0, compute_dtype=dtype, device=cpu)


def a_rank_never_has_the_whole(folder: Path, size: int, kind: StrategyName, ranks: Ranks) -> None:
    """Memory of the process grows by less than the whole model; the other way it grows by more.

    Under zero3 up to where DeepSpeed's engine starts, which brings buffers and optimizer state of its own.
    """
    for load in (in_slices, at_once):  # what any start takes: modules that are imported late
        learn(load(ranks, folder.with_name("small"), lora=False, dtype=torch.float32, kind=kind))
    grown = {load: growth(partial(load, ranks, folder, lora=False, dtype=torch.float32, kind=kind)) / size
             for load in (in_slices, at_once)}  # fmt: skip
    print(f"{kind}: in slices {grown[in_slices]:.2f} of the model, at once {grown[at_once]:.2f}")
    assert grown[in_slices] < 1, grown
    assert grown[at_once] > 1.2, grown


def growth(load: Callable[[], Strategy]) -> int:
    """Bytes by which this process grew at most in ``load``, or before it started DeepSpeed."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, peaks, start = resident("VmRSS"), [], zero.start_engine

    def started(*arguments: Any, **options: Any) -> Any:
        peaks.append(resident("VmHWM"))
        return start(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "start_engine", started)
        load()
    return (peaks or [resident("VmHWM")])[0] - before


def resident(name: str) -> int:
    """``VmRSS``: bytes now; ``VmHWM``: at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def groups_are_replicas(ranks: Ranks) -> None:
    """Four ranks in groups of two: halves, twice; the first group writes everything once, both read it."""
    strategy, loss = tiny_strategy(ranks, lora=False, kind="fsdp", together=2)
    learn(strategy, 2)
    held = whole = 0
    for name, parameter in loss.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.placements[0] == Replicate(), name
        held, whole = held + local(parameter.detach()).numel(), whole + parameter.numel()
    assert 0.49 < held / whole < 0.51, (held, whole)
    written = sum(fragment.length for fragment in strategy.fragments(saving=True))
    assert (written > 0) == (ranks.rank < 2)
    (total,) = ranks.sum_over_ranks(torch.tensor([written], dtype=torch.int64)).tolist()
    assert total == whole
    assert sum(fragment.length for fragment in strategy.fragments(saving=False)) == held
    mine = torch.cat([fragment.tensors["param"] for fragment in strategy.fragments(saving=False)])
    everyone = ranks.gather(mine)
    assert torch.equal(everyone[0], everyone[2])
    assert torch.equal(everyone[1], everyone[3])
    with torch.no_grad():
        assert float(loss(probe_batch(DOCUMENTS, torch.device("cpu")))) > 0
