"""What ZeRO checks and refuses without DeepSpeed (two ranks with it: tests/distributed/test_zero.py)."""

import sys
from typing import Literal

import pytest
import torch
from torch import nn
from train_fixtures import tiny_strategy

from trainer.distributed import ranks as ranks_module
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import make_strategy
from trainer.distributed.zero import DividedState, DividedWeights, check_divided, start_engine, whole_size
from trainer.errors import RunError, TrainingFault
from trainer.train.optim import make_optimizer
from trainer_launch.zero import Stage, ZeroSpec

Kind = Literal["zero1", "zero2", "zero3"]
KINDS: list[tuple[Kind, Stage]] = [("zero1", 1), ("zero2", 2), ("zero3", 3)]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


class TwoRanks(Ranks):
    """A group that says that it has two ranks."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.accelerator)
        self.world_size = 2


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(module, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def spec(stage: Stage, **changed: int) -> ZeroSpec:
    return ZeroSpec(stage=stage, world_size=2, accumulation=1, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_the_plan_chooses_the_class(ranks: Ranks, kind: Kind, stage: Stage) -> None:
    for gather in (True, False):
        made = make_strategy(
            kind,
            TwoRanks(ranks),
            dtype=torch.bfloat16,
            clip_norm=1.0,
            zero=spec(stage),
            gather_for_generation=gather,
        )
        assert type(made) is (DividedWeights if stage == 3 else DividedState)
        assert made.in_step is (stage == 3 and not gather)
        assert not made.replicated
        assert not made.may_overflow
        made.load_scaler_state({"scale": 2.0})
        assert made.scaler_state() == {}


@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_one_rank_has_nobody_to_share_with(ranks: Ranks, kind: Kind, stage: Stage) -> None:
    with pytest.raises(RunError, match="does not fit the number of ranks") as fault:
        tiny_strategy(ranks, lora=False, kind=kind)
    assert fault.value.problems[0].got == f"{kind} with 1 ranks"


@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_float16_is_refused_by_name(ranks: Ranks, kind: Kind, stage: Stage) -> None:
    with pytest.raises(RunError, match=f"{kind} has no loss scale, without which float16 cannot be trained"):
        make_strategy(kind, TwoRanks(ranks), dtype=torch.float16, clip_norm=0.0, zero=spec(stage))


@pytest.mark.parametrize("given", [None, spec(2)])
def test_what_is_divided_has_to_be_said(ranks: Ranks, given: ZeroSpec | None) -> None:
    with pytest.raises(ValueError, match="zero1 needs to know what of it to divide"):
        make_strategy("zero1", TwoRanks(ranks), dtype=torch.float32, clip_norm=0.0, zero=given)


def test_without_deepspeed_a_rank_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", environment)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    module = nn.Linear(2, 2)
    with pytest.raises(RunError, match="DeepSpeed cannot be imported on this machine") as fault:
        start_engine(module, adamw(module), spec(1), device=torch.device("cpu"))
    assert "pip install -c constraints.txt -e '.[deepspeed]'" in fault.value.problems[0].do
    assert environment == {"DS_ACCELERATOR": "cpu"}, "where there is a GPU, DeepSpeed would take it by itself"


def test_nothing_to_train_and_16_bit_masters_are_refused(ranks: Ranks) -> None:
    strategy = DividedState(TwoRanks(ranks), spec(1), clip_norm=0.0)
    with pytest.raises(TrainingFault, match="there is nothing to train"):
        strategy.prepare(nn.Linear(2, 2).requires_grad_(False), adamw)
    with pytest.raises(TrainingFault, match="trainable parameters have to be float32"):
        strategy.prepare(nn.Linear(2, 2).to(torch.bfloat16), adamw)
    with pytest.raises(RuntimeError, match="used before prepare"):
        _ = DividedState(TwoRanks(ranks), spec(1), clip_norm=0.0).module


# -- what is looked at after the division --------------------------------------------------------------------------


class Parted(nn.Parameter):
    """A parameter as DeepSpeed leaves it: without elements, and with a part beside it."""

    ds_tensor: torch.Tensor
    ds_numel: int


def parted(elements: int, part: int, *, whole: int = 0, dtype: torch.dtype = torch.float32) -> Parted:
    parameter = Parted(torch.zeros(whole, dtype=dtype))
    parameter.ds_tensor, parameter.ds_numel = torch.zeros(part, dtype=dtype), elements
    return parameter


def test_a_divided_parameter_is_accepted() -> None:
    check_divided("p", parted(7, 4), 7, torch.float32, world_size=2, spec=spec(3))
    check_divided("p", parted(7, 4, whole=7), 7, torch.float32, world_size=2, spec=spec(3, keep_whole_below=7))
    assert whole_size(parted(7, 4)) == 7
    assert whole_size(torch.zeros(3, 2)) == 6


@pytest.mark.parametrize(
    ("parameter", "got"),
    [
        (parted(7, 3), "a part of 3 elements in torch.float32, 0 whole"),
        (parted(7, 4, whole=7), "a part of 4 elements in torch.float32, 7 whole"),
        (parted(7, 4, dtype=torch.bfloat16), "a part of 4 elements in torch.bfloat16, 0 whole"),
        (nn.Parameter(torch.zeros(7)), "no part, 7 whole"),
    ],
)
def test_another_division_is_noticed(parameter: nn.Parameter, got: str) -> None:
    with pytest.raises(TrainingFault, match="DeepSpeed did not divide the training as planned") as fault:
        check_divided("p", parameter, 7, torch.float32, world_size=2, spec=spec(3, keep_whole_below=6))
    (problem,) = fault.value.problems
    assert (problem.where, problem.got) == ("p", got)
    assert problem.allowed == "a part of 4 elements in torch.float32, at most 0 whole"
