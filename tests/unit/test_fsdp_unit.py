"""What fsdp checks and refuses, in a group of one rank (two ranks: tests/distributed/test_fsdp.py)."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_fixtures import tiny_loss, tiny_strategy

from trainer.distributed import fsdp
from trainer.distributed.fsdp import FullySharded, Sharding, check_shards, device_mesh, layer_policy, shard_of
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import make_strategy
from trainer.errors import RunError, TrainingFault
from trainer.model.adapters import decoder_layer_modules, inner_model
from trainer.train.optim import make_optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(module, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def sharded(ranks: Ranks, module: nn.Module, layers: list[nn.Module]) -> FullySharded:
    strategy = FullySharded(ranks, Sharding(layers=layers), dtype=torch.float32, clip_norm=0.0)
    strategy.prepare(module, adamw)
    return strategy


class TwoRanks(Ranks):
    """A group that says that it has two ranks."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.accelerator)
        self.world_size = 2


# -- what is refused -----------------------------------------------------------------------------------------------


def test_one_rank_has_nobody_to_share_with(ranks: Ranks) -> None:
    with pytest.raises(RunError, match="does not fit the number of ranks") as fault:
        tiny_strategy(ranks, lora=False, kind="fsdp")
    assert fault.value.problems[0].got == "fsdp with 1 ranks"
    assert fault.value.problems[0].allowed == "single with one rank, ddp, fsdp or zero1 to zero3 with several"


def test_float16_is_refused_by_name(ranks: Ranks) -> None:
    with pytest.raises(RunError, match="fsdp has no loss scale, without which float16 cannot be trained") as fault:
        make_strategy("fsdp", TwoRanks(ranks), dtype=torch.float16, clip_norm=0.0)
    assert fault.value.problems[0].allowed == "bfloat16, float32"


def test_layers_have_to_be_named(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="fsdp needs to know the layers to shard"):
        make_strategy("fsdp", TwoRanks(ranks), dtype=torch.float32, clip_norm=0.0)


@pytest.mark.parametrize(("layers", "got"), [([], "0 layers, 0 of them"), ([nn.Linear(2, 2)], "1 layers, 1 of them")])
def test_a_model_without_layers_is_refused(ranks: Ranks, layers: list[nn.Module], got: str) -> None:
    with pytest.raises(TrainingFault, match="there are no decoder layers to shard one by one") as fault:
        sharded(ranks, nn.Linear(2, 2), layers)
    assert fault.value.problems[0].got.startswith(got)


def test_nothing_to_train_and_16_bit_masters_are_refused(ranks: Ranks) -> None:
    frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(TrainingFault, match="there is nothing to train"):
        sharded(ranks, frozen, list(frozen))
    narrow = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    with pytest.raises(TrainingFault, match="trainable parameters have to be float32"):
        sharded(ranks, narrow, list(narrow))


def test_use_before_prepare_is_a_defect(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=re.escape("used before prepare()")):
        _ = FullySharded(ranks, Sharding(layers=[]), dtype=torch.float32, clip_norm=0.0).module


# -- what is looked at after sharding ------------------------------------------------------------------------------


def dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


@pytest.mark.usefixtures("group")
def test_a_parameter_that_stayed_whole_is_noticed() -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(module[0], mesh=mesh)
    with pytest.raises(TrainingFault, match="a parameter is not sharded as planned") as fault:
        check_shards(module, mesh, dtypes(module), CPU)
    (problem,) = fault.value.problems
    assert problem.where == "1.weight"
    assert problem.got == "a whole Parameter in torch.float32"
    assert problem.allowed == "Shard(dim=0) over 1 ranks in torch.float32"


@pytest.mark.usefixtures("group")
def test_another_dtype_is_noticed() -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    module = nn.Linear(2, 2)
    fully_shard(module, mesh=mesh)
    with pytest.raises(TrainingFault, match="a parameter is not sharded as planned") as fault:
        check_shards(module, mesh, dict.fromkeys(dtypes(module), torch.bfloat16), CPU)
    assert fault.value.problems[0].got == "Shard(dim=0) over 1 ranks in torch.float32"


@pytest.mark.usefixtures("group")
def test_shards_in_another_place_are_noticed() -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    module = nn.Linear(2, 2)
    fully_shard(module, mesh=mesh)
    with pytest.raises(TrainingFault, match="a parameter is not sharded as planned") as fault:
        check_shards(module, mesh, dtypes(module), torch.device("cuda"))
    assert (fault.value.problems[0].got, fault.value.problems[0].allowed) == ("rows on the cpu", "rows on the cuda")


@pytest.mark.parametrize("together", [1, 3])
def test_groups_that_do_not_come_out_even_are_refused(ranks: Ranks, together: int) -> None:
    with pytest.raises(TrainingFault, match="do not divide into groups") as fault:
        device_mesh(TwoRanks(ranks), together)
    assert fault.value.problems[0].got == f"2 ranks in groups of {together}"


@pytest.mark.usefixtures("group")
def test_shards_of_another_size_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fragments start follows from how torch cuts; if it cut otherwise, checkpoints would be wrong."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    module = nn.Linear(2, 2)
    fully_shard(module, mesh=mesh)
    monkeypatch.setattr(fsdp, "shard_of", lambda shape, rank, world_size: (0, 1))
    with pytest.raises(TrainingFault, match="a parameter is not sharded as planned") as fault:
        check_shards(module, mesh, dtypes(module), CPU)
    assert (fault.value.problems[0].got, fault.value.problems[0].allowed) == ("4 elements on this rank", "1 elements")


@pytest.mark.parametrize(("rows", "world_size"), [(67, 2), (67, 4), (3, 4), (8, 4), (5, 4), (1, 2)])
def test_rows_are_cut_as_torch_cuts_them(rows: int, world_size: int) -> None:
    whole = torch.arange(rows * 6).view(rows, 2, 3)
    parts = [*whole.chunk(world_size), *[whole[:0]] * world_size]
    for rank in range(world_size):
        start, length = shard_of(whole.shape, rank=rank, world_size=world_size)
        assert torch.equal(whole.view(-1)[start : start + length], parts[rank].reshape(-1)), rank


# -- small things that a wrong result would not show ---------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_names_are_those_of_the_module(ranks: Ranks) -> None:
    plain, loss = tiny_loss(lora=True), tiny_loss(lora=True)
    strategy = sharded(ranks, loss, decoder_layer_modules(inner_model(loss.model)))
    assert list(strategy.trainable) == [name for name, p in plain.named_parameters() if p.requires_grad]
    assert not strategy.replicated
    assert not strategy.may_overflow
    strategy.load_scaler_state({"scale": 2.0})
    assert strategy.scaler_state() == {}


@pytest.mark.usefixtures("group")
def test_the_norm_is_global_and_what_it_was_before_clipping(ranks: Ranks) -> None:
    for clip_norm, after in ((1.0, 1.0), (0.0, 5.0)):
        module = nn.Sequential(nn.Linear(1, 2, bias=False))
        strategy = FullySharded(ranks, Sharding(layers=list(module)), dtype=torch.float32, clip_norm=clip_norm)
        strategy.prepare(module, adamw)
        with strategy.micro_batch(last=True):
            strategy.backward((strategy.module(torch.ones(1, 1)) * torch.tensor([3.0, 4.0])).sum())
        assert float(strategy.clip()) == pytest.approx(5.0)
        gradient = strategy.trainable["0.weight"].grad
        assert gradient is not None
        assert float(fsdp.local(gradient).norm()) == pytest.approx(after, abs=1e-5)
        strategy.step()
        assert strategy.trainable["0.weight"].grad is None


def test_layers_compute_in_the_compute_dtype_and_reduce_in_float32() -> None:
    assert layer_policy(torch.float32).param_dtype is None
    policy = layer_policy(torch.bfloat16)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs, "the residual stream keeps its dtype"
